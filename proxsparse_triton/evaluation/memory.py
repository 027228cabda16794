"""Memory of a piece of work: its peak, and running out of it explained."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ..errors import ResourceError

# torch's own class covers the GPU; the CPU allocator raises a plain RuntimeError with one of these words.
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory")

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def is_out_of_memory(error: BaseException) -> bool:
    """True for every way in which torch or Python says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


@contextmanager
def explain_out_of_memory(function: str, work: str, advice: str) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into a ResourceError that says what was tried and what to lower.

    Args:
        function: who failed, e.g. "perplexity".
        work: what did not fit, e.g. "4 windows of 2048 tokens on cuda:0".
        advice: the setting that lowers the need, a whole sentence.
    Raises: ResourceError: memory ran out. Every other error passes unchanged.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(f"{function}: expected memory for {work}, got out of memory. {advice}") from error


def reset_peak_memory(device: str) -> None:
    """Start counting anew. The process peak can be reset on Linux only; elsewhere it is the peak since the start."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        _CLEAR.write_text("5")


def peak_memory(device: str) -> int:
    """Bytes at the highest point since `reset_peak_memory`."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
