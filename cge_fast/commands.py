"""The console scripts: `cge-train` is `python -m cge_fast.train`, and so on for evaluate, embed, search, ..."""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Runs the module that the script is named after."""
    command = Path(sys.argv[0]).stem.removeprefix("cge-")
    runpy.run_module(f"cge_fast.{command}", run_name="__main__", alter_sys=True)
