"""Kernels compiled by Triton and launched without it: with shared memory by size, in clusters, and in few microseconds of the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
import triton

from ..errors import BackendError
from .staging import RESERVE_STEP

# The kernel and its constants by what they depend on. Triton's own look-up takes longer than small kernels run.
_compiled: dict[Hashable, tuple[Any, tuple[object, ...]]] = {}


class Launch(Protocol):
    """bytes: shared memory that a program needs. warps: of a program. cluster: programs that reach each other's shared memory."""

    @property
    def bytes(self) -> int: ...

    @property
    def warps(self) -> int: ...

    @property
    def cluster(self) -> int: ...


def run(
    kernel: Any, key: Hashable, grid: tuple[int, int, int], arguments: tuple[object, ...], types: tuple[object, ...],
    settings: Callable[[], dict[str, object]], launch: Launch, device: torch.device,
) -> None:  # fmt: skip
    """Launch a kernel on `device`.

    Args:
        kernel: whose last constant is RESERVED, the stages of `reserve`. key: all that the compiled code depends on.
        grid: of clusters. arguments: tensors or addresses at multiples of 16 bytes, and numbers. types: their dtypes, and like numbers.
        settings: the other constants, in the kernel's order; asked for once a key.
    Raises: BackendError: this version of Triton does not give so much shared memory.
    """
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return run(kernel, key, grid, arguments, types, settings, launch, device)
    found = _compiled.get(key)
    if found is None:
        found = _compiled[key] = _compile(kernel, types, settings(), launch)
    compiled, constants = found
    compiled[grid](*arguments, *constants)
    return None


def _compile(kernel: Any, types: tuple[object, ...], settings: dict[str, object], launch: Launch) -> tuple[Any, tuple[object, ...]]:
    """With as many stages of `reserve` as give the ring its bytes: it depends on where the compiler keeps operands."""
    least = triton.cdiv(launch.bytes, RESERVE_STEP.value)
    for reserved in range(least, least + 3):
        compiled = kernel.warmup(*types, **settings, RESERVED=reserved, num_warps=launch.warps, grid=(1,))
        if compiled.metadata.shared >= launch.bytes:
            if launch.cluster > 1:
                _in_clusters(compiled, launch)
            return compiled, (*settings.values(), reserved)
    raise BackendError(
        f"sparse_linear_24: expected {launch.bytes} bytes of shared memory from Triton {triton.__version__}, got "
        f"{compiled.metadata.shared}. Use backend='reference', and report this version."
    )


def _in_clusters(compiled: Any, launch: Launch) -> None:
    """Have programs launched in clusters.

    Triton's own clusters (num_ctas) part every tensor of a program among them. Here each program keeps its own, and only the launch says
    that some belong together: Triton's launcher takes it from (warps, clusters, shared memory).
    """
    compiled._init_handles()
    warps, shared = launch.warps, compiled.metadata.shared
    found, meant = tuple(compiled.packed_metadata), (warps, launch.cluster, shared)
    if found not in ((warps, 1, shared), meant):  # meant: this kernel served other sizes before
        raise BackendError(
            f"sparse_linear_24: expected Triton to launch by (warps, clusters, shared memory), got {found} from version "
            f"{triton.__version__}. Use backend='reference', and report this version."
        )
    compiled.packed_metadata = meant
