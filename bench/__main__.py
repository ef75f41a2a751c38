"""What is fast and what it takes: python -m bench operators --shapes msmt17 --csv bench/results.csv"""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from bench.results import append, document, read
from cge_fast import errors
from cge_fast.cli import parse_settings, program_parser
from cge_fast.errors import UserError

COMMANDS = {
    "operators": "time and memory of each operator and of the head, beside eager PyTorch and torch.compile",
    "loss": "time and memory of the loss over the number of identities",
    "step": "images per second of the whole training step",
    "program": "the whole program from disk to gradient",
    "host": "what the host takes to launch an operator's kernels",
    "sharding": "memory and traffic of one process where classes are sharded, by formula",
    "evaluate": "the evaluator beside one in plain NumPy",
    "count": "launches, bytes and operations of a training step, without a GPU",
    "predict": "what the operators should take on a GPU, from counts and data sheets",
    "gpu": "one command for whoever has a GPU: checks and measures everything on it",
    "tables": "prints the tables of a results file",
}
USAGE = "\n".join(
    [
        "usage: python -m bench COMMAND [--csv FILE] [options]",
        "",
        "Prints tables in Markdown; --csv appends each figure to a file. `COMMAND --help` has the options.",
        "",
        *(f"  {name:<11}{meaning}" for name, meaning in COMMANDS.items()),
    ]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return
    if command not in COMMANDS:
        raise UserError(f"command: must be one of {', '.join(COMMANDS)}, got {command!r}")
    parser = program_parser(f"python -m bench {command}", COMMANDS[command])
    parser.add_argument("--csv", type=Path, help="results file; figures are appended")
    if command == "tables":
        file = parse_settings(parser, rest).csv or Path(__file__).with_name("results.csv")
        print(document(read(file)))
        return
    module = import_module(f"bench.{command}")
    parser.description = module.__doc__
    module.add_options(parser)
    options = vars(parse_settings(parser, rest))
    file, found = options.pop("csv"), []
    try:
        for figure in append(module.measure(**options), file):
            found.append(figure)
    finally:  # Ctrl-C ends the measuring; what was found until then is shown
        print(document(found))


if __name__ == "__main__":
    errors.run(main, "bench")
