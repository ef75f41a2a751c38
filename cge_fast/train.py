"""Trains a re-identification network: python -m cge_fast.train --help

What takes seconds to import is imported once the command line is known to be right.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from cge_fast import errors
from cge_fast.cli import (
    add_settings,
    as_dataclass,
    parse_settings,
    program_parser,
    read_settings,
    recipes,
    set_defaults,
)
from cge_fast.errors import UserError
from cge_fast.options import TrainConfig

if TYPE_CHECKING:
    from cge_fast.build import Run

PROGRAM = "cge_fast.train"


def main(arguments: Sequence[str] | None = None, variants: Mapping[str, type] = MappingProxyType({})) -> None:
    """The program; `arguments` default to the command line's, and `loss.variant` is one of `variants`."""
    config, resuming, profiling = parse(sys.argv[1:] if arguments is None else arguments)

    from cge_fast import report
    from cge_fast.build import build_run, chosen_backend
    from cge_fast.data.sets import nothing_to_find
    from cge_fast.distributed import rank
    from cge_fast.loop import resume, train, way_on
    from cge_fast.profile import StepProfile
    from cge_fast.ranks import start_ranks, stop_ranks

    device = start_ranks()
    with claimed(config, resuming), chosen_backend(config.backend):
        # A resumed network takes nothing of the weights that it once started from, which may be gone.
        model = replace(config.model, pretrained=False, weights=None) if resuming else config.model
        run = build_run(replace(config, model=model), device, variants)
        run.config = config
        if resuming:
            resume(run)
        if rank() == 0:
            print(description(run), file=sys.stderr)
            if why := nothing_to_find(run.reid_set):
                errors.notice(f"trains without evaluation: {why}; afterwards, cge_fast.evaluate --data.root does it")
        profile = StepProfile(run.model.backbone, device) if profiling else None
        try:
            train(run, profile)
        except BaseException as error:
            error.add_note(way_on(run))
            if rank() == 0:
                with suppress(UserError, OSError):  # there may be no epoch yet
                    report.write(config.output)
            raise
        is_first = rank() == 0
        stop_ranks()  # the others may go: what follows is for one process
        if is_first:
            if profile:
                print(profile.report(config.output))
            report.at_end(run)
            print(final_line(run))


@contextmanager
def claimed(config: TrainConfig, resuming: bool) -> Iterator[None]:
    """Inside, the run's folder, which is set if it is not, belongs to this run alone; if it stays empty it is removed.

    Raises:
        UserError: the folder holds another run, is in use, or cannot be made.
    """
    from cge_fast import files
    from cge_fast.loop import holds_run
    from cge_fast.ranks import from_first_rank

    with ExitStack() as stack:

        def claim() -> Path:
            output = config.output or new_folder()
            try:
                is_new = config.output is None or not output.exists()
                output.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"output: {output} cannot be made ({error.strerror})") from error
            if is_new:
                stack.callback(remove_if_empty, output)
            stack.enter_context(files.locked(output))
            if not resuming and holds_run(output):
                raise UserError(f"output: {output} holds a run already; continue it with --resume or choose another")
            for folder in (output, output / "checkpoints"):
                files.mend(folder)
            return output

        config.output = from_first_rank(claim)
        yield


def new_folder() -> Path:
    """Makes runs/<date>-<time>, or the like if there is one already."""
    Path("runs").mkdir(exist_ok=True)
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    for number in count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def remove_if_empty(folder: Path) -> None:
    """Removes a folder in which nothing was written."""
    with suppress(OSError):
        folder.rmdir()


def parse(arguments: Sequence[str]) -> tuple[TrainConfig, bool, bool]:
    """Settings, --resume and --profile; a resumed run's own settings come first, then the command line's."""
    parser = program_parser(
        PROGRAM,
        "Trains a re-identification network; without options, on the embedded data set.",
        "[--config NAME] [--SETTING VALUE ...]",
    )
    parser.add_argument(
        "--config",
        action="config",
        help=f"recipe ({', '.join(recipes())}) or YAML file of settings; given more than once, the later one counts "
        "where both have a setting, as do settings that follow it; with --help, its defaults are shown",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --output, with its settings")
    parser.add_argument(
        "--profile", action="store_true", help="print where the time of a training step goes, and write a trace"
    )
    add_settings(parser, TrainConfig)
    parsed = parse_settings(parser, arguments)
    if parsed.resume:
        if parsed.output is None:
            raise UserError("output: --resume needs the folder of the run that it continues")
        from cge_fast import checkpoint

        set_defaults(parser, read_settings(checkpoint.config_file(Path(parsed.output) / "checkpoints" / "last")))
        parsed = parse_settings(parser, arguments)
    config = as_dataclass(parser, parsed, TrainConfig)
    if config.data.root:  # used from another folder too
        config.data.root = Path("+".join(str(root.absolute()) if root else "" for root in config.data.roots))
    return config, parsed.resume, parsed.profile


def description(run: Run) -> str:
    """What is about to be trained, in two lines."""
    reid_set, config, model = run.reid_set, run.config, run.model
    kind = f"CGE, {model.pool.stripes} stripes" if config.model.cge else "without CGE"
    return (
        f"{config.data.name}: {len(reid_set.train)} images of {run.num_classes} identities to "
        f"train on, {len(reid_set.query)} queries, {len(reid_set.gallery)} gallery images\n"
        f"{config.model.backbone}, {kind}; {run.device}, {str(model.precision).removeprefix('torch.')}; "
        f"epochs {run.epochs_done + 1} to {config.optim.epochs}, {config.output}"
    )


def final_line(run: Run) -> str:
    """mAP and rank-1 of the last epoch, of the untrained network beside it, and where the checkpoint lies."""
    result, untrained = run.result, run.untrained
    if result is None:
        return f"trained, not evaluated; checkpoint {run.checkpoints / 'last'}"
    floor = f" (untrained: mAP {untrained['mAP']:.1%}, rank-1 {untrained['rank1']:.1%})" if untrained else ""
    return f"mAP {result['mAP']:.1%}, rank-1 {result['rank1']:.1%}{floor}, checkpoint {run.checkpoints / 'last'}"


if __name__ == "__main__":
    errors.run(main, PROGRAM)
