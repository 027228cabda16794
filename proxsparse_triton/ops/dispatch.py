"""Which backend runs an operation, and the checks all operations share."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import BackendError, ConfigError, ShapeError

BACKENDS = ("triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # looked for here: torch.compile cannot trace the search


def have_triton() -> bool:
    return TRITON_INSTALLED


def choose_backend(function: str, tensor: Tensor, backend: str | None) -> str:
    """CUDA -> triton, everything else (and fp64) -> reference, unless `backend` says otherwise.

    Raises: ConfigError: unknown backend. BackendError: triton asked for where it cannot run.
    """
    if backend is None:
        return "triton" if tensor.is_cuda and tensor.dtype in KERNEL_DTYPES and have_triton() else "reference"
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
    return backend


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


def check_like(function: str, name: str, value: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """ShapeError or ConfigError unless `value` has that shape and lives on that device."""
    if tuple(value.shape) != tuple(shape):
        raise ShapeError(f"{function}: expected {name} of shape {tuple(shape)}, got {tuple(value.shape)}. Pass matching tensors.")
    if value.device != device:
        raise ConfigError(f"{function}: expected {name} on {device}, got {value.device}. Move it with .to({str(device)!r}).")
