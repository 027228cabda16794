"""Kernels compiled by Triton and launched without it: with shared memory by size, in clusters, and in a few microseconds of the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton

from ..errors import BackendError
from .staging import RESERVE_STEP

# The kernel and its constants by what they depend on. Triton's own look-up takes longer than small kernels run.
_compiled: dict[Hashable, tuple[Any, tuple[object, ...]]] = {}


def run(
    kernel: Any, key: Hashable, grid: tuple[int, int, int], arguments: tuple[Any, ...], settings: Callable[[], dict[str, object]], *,
    shared: int, warps: int, cluster: int = 1,
) -> None:  # fmt: skip
    """Launch a kernel on the device of its first argument.

    Args:
        kernel: whose last constant is RESERVED, the stages of `reserve`. key: all that the compiled code depends on.
        grid: of clusters. settings: of the other constants, in the kernel's order; asked for once a key.
        shared: bytes of shared memory that a program needs. cluster: programs that run together and reach each other's shared memory.
    Raises: BackendError: this version of Triton does not give so much shared memory.
    """
    with torch.cuda.device_of(arguments[0]):
        if key not in _compiled:
            _compiled[key] = _compile(kernel, arguments, settings(), shared, warps, cluster)
        compiled, constants = _compiled[key]
        compiled[grid](*arguments, *constants)


def _compile(
    kernel: Any, arguments: tuple[Any, ...], settings: dict[str, object], shared: int, warps: int, cluster: int
) -> tuple[Any, tuple[object, ...]]:
    """With as many stages of `reserve` as give the ring its bytes: it depends on where the compiler keeps operands."""
    least = triton.cdiv(shared, RESERVE_STEP.value)
    for reserved in range(least, least + 3):
        compiled = kernel.warmup(*arguments, **settings, RESERVED=reserved, num_warps=warps, grid=(1,))
        if compiled.metadata.shared >= shared:
            if cluster > 1:
                # Triton's own clusters (num_ctas) part every tensor of a program among them. Here each program keeps its own, and only the
                # launch says that some belong together: Triton's launcher takes it from here.
                compiled._init_handles()
                compiled.packed_metadata = (warps, cluster, compiled.metadata.shared)
            return compiled, (*settings.values(), reserved)
    raise BackendError(
        f"sparse_linear_24: expected {shared} bytes of shared memory from Triton {triton.__version__}, got "
        f"{compiled.metadata.shared}. Use backend='reference', and report this version."
    )
