"""What an operator must move and compute, by formula.

Bytes: each argument read once and each result written once; of the memory, the write needs the batch's rows. FLOPs: two
for each product of a matmul, one for each number of the map that is added to a mean or gets its gradient; a power x^p
counts as one.
"""

from dataclasses import dataclass

from bench.shapes import Shape

INSTANCES = 4  # samples of each identity in the batch
NUMBER = 4  # bytes of a float32: pooled features, logits, losses, parameters
LABEL = 8  # bytes of an int64


@dataclass(frozen=True)
class Work:
    """Compulsory bytes and FLOPs."""

    bytes: int
    flops: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)


NONE = Work(0, 0)


def work(operator: str, shape: Shape, pooling: str = "average", itemsize: int = NUMBER) -> dict[str, Work]:
    """An operator's work by direction: "forward", "backward" if it has one, and both as "step".

    operator: one of cge_kernels', or "head", the whole of CGEHead's step, whose backward ends with the memory's write.
    pooling: "average" or "gem", of the operators that pool. itemsize: bytes of a number of the feature map, of its
    gradient and of the memory that is multiplied; the head's classifier, and its memory, are float32.
    """
    b, c, n, k = shape.batch, shape.channels, shape.stripes, shape.classes
    pixels = b * c * shape.height * shape.width
    feature_map, memory = pixels * itemsize, n * k * c * itemsize
    local, pooled, logits = b * n * c * NUMBER, b * c * NUMBER, b * k * NUMBER
    is_gem = pooling == "gem"
    p = NUMBER if is_gem else 0
    cosines = 2 * b * n * k * c
    backward = None
    match operator:
        case "stripe_pool":
            features = feature_map + pooled + local
            again = features + p if is_gem else 0  # GeM's gradient needs the map and the features again
            forward, backward = Work(features + p, pixels), Work(features + again, pixels)
        case "revise_logits":
            forward = Work(memory + local + 2 * logits, cosines)
            backward = Work(memory + 2 * local + 3 * logits, cosines)
        case "revise_logits_one_pass":
            again = feature_map + p if is_gem else 0
            forward = Work(feature_map + p + memory + local + 2 * logits, pixels + cosines)
            backward = Work(memory + 2 * local + 3 * logits + feature_map + again, pixels + cosines)
        case "revised_cross_entropy":
            weight, losses, labels = k * c * NUMBER, b * NUMBER, b * LABEL
            read = pooled + weight + local + memory + labels
            forward = Work(read + losses + b * (1 + n), cosines + 2 * b * k * c)
            backward = Work(read + losses + pooled + weight + local, cosines + 4 * b * k * c)
        case "write_memory_":
            rows = min(-(-b // INSTANCES), k) * n * c
            low_precision = itemsize if itemsize < NUMBER else 0
            forward = Work(rows * (2 * NUMBER + low_precision) + local + b * LABEL + NUMBER, 3 * b * n * c)
        case "head":
            pool = work("stripe_pool", shape, pooling, itemsize)
            loss = work("revised_cross_entropy", shape)
            forward, backward = (pool[direction] + loss[direction] for direction in ("forward", "backward"))
            backward += work("write_memory_", shape)["forward"]
        case _:
            raise ValueError(f"operator must be one of cge_kernels' or 'head', got {operator!r}")
    return {"forward": forward, **({"backward": backward} if backward else {}), "step": forward + (backward or NONE)}
