"""Peak memory of a piece of work: what torch's allocators handed out at most, on any device."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ...models import LoadedModel
from ...utils.memory import check_room

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's ``mallopt``, see ``malloc.h``."""
LARGEST_MMAP_THRESHOLD = 32 * 2**20
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have this process keep the memory of tensors that are gone, as torch's allocator does on a GPU, from now on.

    By default glibc hands large blocks back to the system, and the next tensor of that size pays for fresh pages: on a
    CPU as much as its arithmetic, and not in every run. False where the C library has no such setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, NEVER))


@contextmanager
def peak_memory(device: torch.device, held: int) -> Iterator[Callable[[], int]]:
    """Yield a function that, after the block, tells the most bytes that were allocated on ``device`` at one time.

    ``held``: bytes of tensors that stay there throughout, such as weights; a GPU's allocator knows of them itself. On a
    CPU the profiler's record of torch's allocator is added up, so that scratch space of kernels' own does not count.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        highest: list[int] = []
        yield lambda: highest[0]
        highest.append(torch.cuda.max_memory_allocated(device))
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or starting and stopping print a line each
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiling:
        yield lambda: held + _highest(profiling)


def check_prefill(loaded: LoadedModel, rows: int, tokens: int) -> None:
    """Raise :class:`NoRoomError` where a batch of ``rows`` prompts of ``tokens`` cannot fit into the host's memory.

    A GPU says so by itself; on a CPU, Linux would end the process. What a prefill takes at least: its KV cache, the
    attention mask, and of one layer the hidden states and what its FFN makes of them.
    """
    if loaded.model.device.type != "cpu":
        return
    sizes, width = loaded.geometry, loaded.model.dtype.itemsize
    cache = 2 * sizes.layers * sizes.kv_heads * sizes.head_size * width
    layer = (2 * sizes.hidden + 2 * sizes.intermediate) * width
    eager = loaded.model.config.get_text_config()._attn_implementation == "eager"
    square = sizes.heads * width if eager else 1
    wanted = rows * tokens * (cache + layer + tokens * square)
    check_room(wanted, f"a batch of {rows} × {tokens} tokens", "choose a smaller batch size, --dtype or model")


def out_of_memory(error: BaseException) -> bool:
    """Whether it is the memory of GPU or host. On the host, torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _highest(profiling: Any) -> int:
    events = [event for event in profiling.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest
