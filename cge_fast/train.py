"""Trains a re-identification network: python -m cge_fast.train --help

What takes seconds to import is imported once the command line is known to be right.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from cge_fast import errors
from cge_fast.cli import (
    as_dataclass,
    parse_settings,
    program_parser,
    read_settings,
    recipes,
    set_defaults,
    with_recipe_paths,
)
from cge_fast.errors import UserError
from cge_fast.options import TrainConfig

if TYPE_CHECKING:
    import torch

    from cge_fast.build import Run

PROGRAM = "cge_fast.train"


def main(arguments: Sequence[str] | None = None, variants: Mapping[str, type] = MappingProxyType({})) -> None:
    """The program; `arguments` default to the command line's, and `loss.variant` is one of `variants`."""
    config, resuming, profiling = parse(sys.argv[1:] if arguments is None else arguments)

    import torch.distributed as dist

    from cge_fast.build import build_run, chosen_backend
    from cge_fast.data.sets import nothing_to_find
    from cge_fast.distributed import rank
    from cge_fast.loop import resume, train
    from cge_fast.profile import StepProfile

    check_output(config.output, resuming)
    device = start_ranks()
    try:
        with chosen_backend(config.backend):
            run = build_run(config, device, variants)
            if resuming:
                resume(run)
            if rank() == 0:
                print(description(run), file=sys.stderr)
                if why := nothing_to_find(run.reid_set):
                    errors.notice(
                        f"trains without evaluation: {why}; afterwards, cge_fast.evaluate --data.root does it"
                    )
            profile = StepProfile(run.model.backbone, device) if profiling else None
            train(run, profile)
        if rank() == 0:
            if profile:
                print(profile.report(config.output))
            print(final_line(run))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parse(arguments: Sequence[str]) -> tuple[TrainConfig, bool, bool]:
    """Settings, --resume and --profile; a resumed run's own settings come first, then the command line's."""
    parser = program_parser(PROGRAM, "Trains a re-identification network; without options, on the embedded data set.")
    parser.add_argument("--config", action="config", help="YAML file, or name of a recipe: " + ", ".join(recipes()))
    parser.add_argument("--resume", action="store_true", help="continue the run in --output, with its settings")
    parser.add_argument(
        "--profile", action="store_true", help="print where the time of a training step goes, and write a trace"
    )
    parser.add_class_arguments(TrainConfig)
    arguments = with_recipe_paths(arguments)
    parsed = parse_settings(parser, arguments)
    if parsed.resume:
        if parsed.output is None:
            raise UserError("output: --resume needs the folder of the run that it continues")
        from cge_fast import checkpoint

        set_defaults(parser, read_settings(checkpoint.config_file(Path(parsed.output) / "checkpoints" / "last")))
        parsed = parse_settings(parser, arguments)
    config = as_dataclass(parser, parsed, TrainConfig)
    config.output = config.output or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    return config, parsed.resume, parsed.profile


def check_output(output: Path, resume: bool) -> None:
    """Raises UserError, before any work, if the run's folder holds another run or cannot be written."""
    from cge_fast.loop import holds_run

    if not resume and holds_run(output):
        raise UserError(f"output: {output} holds a run already; continue it with --resume or choose another")
    existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"output: {output} cannot be made, since {existing} is not a folder that can be written to")


def start_ranks() -> torch.device:
    """Joins the other processes if torchrun started this one; returns this process's device."""
    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    return device


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
