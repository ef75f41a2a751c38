"""Lists the commands: python -m cge_fast"""

COMMANDS = {
    "train": ("train a network; without options, on the embedded data set", "--config cge_bot --data.root DIR"),
    "evaluate": ("rank a gallery with a trained network", "--checkpoint runs/NAME/checkpoints/last"),
    "embed": ("write images' features to a file", "--checkpoint runs/NAME --images DIR --output features.npz"),
    "search": ("find the images most like others", "--checkpoint runs/NAME --gallery DIR --query a.jpg b.jpg"),
    "export": (
        "write a trained network as ONNX or torch.export",
        "--checkpoint runs/NAME/checkpoints/best --output reid.onnx",
    ),
    "data": ("count a data set's images, draw them, convert Omniglot", "--help"),
    "analyze": ("pictures and tables of what trained networks do", "--help"),
    "experiments": ("the paper's tables and figures, with controls", "--help"),
}

if __name__ == "__main__":
    for name, (purpose, example) in COMMANDS.items():
        print(f"{name:<12} {purpose}\n{'':<12} python -m cge_fast.{name} {example}")
