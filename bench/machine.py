"""On what and with which versions something was measured."""

import os
import platform
import subprocess
from datetime import datetime
from pathlib import Path

import torch

from cge_kernels.common.device_functions import triton

CPU_INFO = Path("/proc/cpuinfo")


def description(device: torch.device) -> str:
    """Machine, versions, commit and date on one line."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if triton is not None:
        versions += f", triton {triton.__version__}"
    now = datetime.now().strftime("%Y-%m-%d %H:%M")
    return f"{processor(device)}; {versions}; commit {commit()}; {now}"


def processor(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its vector instructions, cores and torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{model} ({instructions}), {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def commit() -> str:
    """The checkout's commit, with "+" if files differ from it; "unknown" outside of a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
