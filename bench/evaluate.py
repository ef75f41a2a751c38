"""Time and memory of the evaluator at Market-1501's size: python -m bench.evaluate"""

import resource
import time

import torch

from cge_fast.ranking import evaluate_ranking

QUERIES, GALLERY, CHANNELS = 3_368, 19_281, 2_048  # 15,913 images of 750 identities and 3,368 distractors
IDENTITIES, CAMERAS = 750, 6


def peak_memory() -> int:
    """The largest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Ranks random features and prints seconds and the memory above the features."""
    random = torch.Generator().manual_seed(0)

    def draw(count: int, lowest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        identities = torch.randint(lowest, IDENTITIES + 1, (count,), generator=random)
        cameras = torch.randint(CAMERAS, (count,), generator=random)
        return torch.randn(count, CHANNELS, generator=random), identities, cameras

    query, gallery = draw(QUERIES, 1), draw(GALLERY, 0)
    before = peak_memory()
    for metric in ("cosine", "euclidean"):
        start = time.perf_counter()
        evaluate_ranking(*query, *gallery, metric)
        print(f"{metric}: {QUERIES} x {GALLERY} features of {CHANNELS}: {time.perf_counter() - start:.1f} s")
    print(f"memory above the features: {(peak_memory() - before) / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
