"""Which backend runs an operation, and the checks all operations share."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import BackendError, ConfigError, ShapeError
from .sharded import is_dtensor

BACKENDS = ("triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # looked for here: torch.compile cannot trace the search


def have_triton() -> bool:
    return TRITON_INSTALLED


@functools.cache
def kernels_compile(device: torch.device) -> bool:
    """Whether a CUDA device can run the kernels, whose PTX is of compute capability 8.0."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def choose_backend(function: str, tensor: Tensor, backend: str | None) -> str:
    """CUDA from Ampere on -> triton, everything else (and fp64) -> reference, unless `backend` says otherwise.

    Raises: TypeError: a DTensor, which no backend takes whole. ConfigError: unknown backend. BackendError: triton asked for where it
        cannot run.
    """
    if is_dtensor(tensor):
        raise TypeError(f"{function}: expected a plain tensor, got a DTensor. Pass each rank's part, .to_local(), or .full_tensor().")
    if backend is None:
        able = tensor.is_cuda and tensor.dtype in KERNEL_DTYPES and have_triton()
        # torch.compile, which cannot ask a device, needs a card as new anyway.
        able = able and (torch.compiler.is_compiling() or kernels_compile(tensor.device))
        return "triton" if able else "reference"
    if backend not in BACKENDS:
        raise ConfigError(f"{function}: expected backend 'triton' or 'reference', got {backend!r}. Leave it out to choose by device.")
    if backend == "reference":
        return backend
    if not have_triton():
        raise BackendError(
            f"{function}: expected Triton for backend='triton', found none. Install triton (Linux) or use backend='reference'."
        )
    if tensor.dtype == torch.float64:
        raise BackendError(f"{function}: expected fp32, fp16 or bf16 for backend='triton', got float64. Use backend='reference'.")
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendError(
            f"{function}: expected a CUDA tensor for backend='triton', got {tensor.device.type}. "
            "Use backend='reference', or set TRITON_INTERPRET=1 before Python starts to run kernels slowly on the CPU."
        )
    if tensor.is_cuda and not torch.compiler.is_compiling() and not kernels_compile(tensor.device):
        raise BackendError(f"{function}: expected an Ampere GPU or newer for backend='triton', got an older one. Use backend='reference'.")
    return backend


def traced(x: Tensor) -> bool:
    """Whether someone watches the operations on x, or transforms them, and must not find a kernel that writes behind their back."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def flat(x: Tensor) -> Tensor:
    """x, or a copy, as the kernels address it: contiguous, and two bf16 weights in one word."""
    return x if x.is_contiguous() and x.data_ptr() % 4 == 0 else x.clone(memory_format=torch.contiguous_format)


def check_floating(function: str, name: str, value: object) -> None:
    """TypeError unless `value` is a tensor of a supported floating dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: expected a tensor for {name}, got {type(value).__name__}. Pass a torch.Tensor.")
    if value.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise TypeError(f"{function}: expected float32, float16, bfloat16 or float64 for {name}, got {value.dtype}. Convert it first.")


def check_strength(function: str, name: str, value: float, *, positive: bool = False) -> None:
    """ConfigError unless `value` is finite and >= 0 (> 0 where `positive`)."""
    # Comparisons only: torch.compile traces them for a strength that changes from call to call.
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf or (positive and value == 0):
        rule = "> 0" if positive else ">= 0"
        raise ConfigError(f"{function}: expected a finite {name} {rule}, got {value!r}. Choose another value.")


def check_partial(function: str, partial: Tensor | None, rows: int | None, width: int, device: torch.device) -> None:
    """ConfigError or ShapeError unless `partial` is missing or room for the sums of a launch; `rows` is None where the reference runs."""
    if partial is None:
        return
    if rows is None:
        raise ConfigError(f"{function}: expected no partial where the reference runs, got one. Leave it out.")
    check_like(function, "partial", partial, (rows, width), device)
    if partial.dtype != torch.float32 or not partial.is_contiguous():
        raise ConfigError(f"{function}: expected a contiguous float32 partial, got {partial.dtype}. Take it from partial_sums.")


def check_like(function: str, name: str, value: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """ShapeError or ConfigError unless `value` is a plain tensor of that shape on that device."""
    if is_dtensor(value):
        raise ConfigError(f"{function}: expected {name} not sharded, as the other tensors, got a DTensor. Pass its part, .to_local().")
    if tuple(value.shape) != tuple(shape):
        raise ShapeError(f"{function}: expected {name} of shape {tuple(shape)}, got {tuple(value.shape)}. Pass matching tensors.")
    if value.device != device:
        raise ConfigError(f"{function}: expected {name} on {device}, got {value.device}. Move it with .to({str(device)!r}).")
