"""What each of several workers on this machine works with."""

from __future__ import annotations

import os

import torch

from ...errors import OptionError


def share_of_threads(workers: int) -> dict[str, str]:
    """The variable that gives each worker its share of the CPU's threads."""
    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // workers))}


def environments(workers: int, device: str) -> list[dict[str, str]]:
    """Variables that give each worker a device of its own: a GPU, or a share of the threads.

    Raises :class:`OptionError` if there are too few.
    """
    name, _, index = device.partition(":")
    if index:
        raise OptionError(f"--workers gives each worker a device of its own: give device {name}, not {device}")
    if name == "cpu" or not torch.cuda.is_available():
        return [share_of_threads(workers)] * workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    devices = visible.split(",")
    if workers > len(devices):
        raise OptionError(
            f"--workers {workers}, but there are {len(devices)} CUDA devices: at most one worker for each"
        )
    return [{"CUDA_VISIBLE_DEVICES": one} for one in devices[:workers]]
