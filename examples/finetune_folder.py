"""Fine-tunes a trained network on a folder of crops: python examples/finetune_folder.py CHECKPOINT CROPS OUTPUT

CHECKPOINT: a folder like runs/mine/checkpoints/last. CROPS: a folder with `train`, `query` and `gallery`, each with
identity/camera_anything.jpg. What is new, classifier and memory, starts anew; backbone and its settings are the
checkpoint's. The rest of the command line goes to the training, such as --optim.epochs 5.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from cge_fast import train


def main(arguments: Sequence[str]) -> None:
    """Trains from the checkpoint's backbone with a tenth of the usual learning rate."""
    checkpoint, crops, output, *rest = arguments
    train.main(
        [
            *("--config", str(Path(checkpoint) / "config.yaml")),
            *("--model.weights", str(Path(checkpoint) / "model.safetensors"), "--model.pretrained", "false"),
            *("--data.name", "folder", "--data.root", crops),
            *("--optim.lr", "3.5e-5", "--output", output),
            *rest,
        ]
    )


if __name__ == "__main__":
    main(sys.argv[1:])
