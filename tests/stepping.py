"""Parameters in the middle of their training, in every way that `prox_adamw_` can store them; shared by its tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from adversarial import BACKENDS, HAVE_TRITON
from torch import Tensor

from proxsparse_triton.ops import prox_adamw_
from proxsparse_triton.reference.storage import decode_first, decode_second, join_residual
from proxsparse_triton.step import MOMENT_GROUP, AdamState, StepSettings

FP32, BF16 = torch.float32, torch.bfloat16
SETTINGS = StepSettings(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=1)
SPARSE = dataclasses.replace(SETTINGS, lambda1=0.05, lambda2=0.1, step=3)
# (weights, bits of the residual, moments): every way to store a parameter.
STORAGES = [(FP32, 0, m) for m in ("fp32", "bf16", "int8")] + [(BF16, bits, m) for bits in (0, 8, 16) for m in ("fp32", "bf16", "int8")]
Storage = tuple[torch.dtype, int, str]


def storage_name(storage: Storage) -> str:
    return f"{str(storage[0])[6:]}-{storage[1]}-{storage[2]}"


every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_storage = pytest.mark.parametrize("storage", STORAGES, ids=storage_name)


def small_tiles() -> Iterator[None]:
    """Smaller tiles under the interpreter, so that several programs share the work there too; a fixture of the modules that use it."""
    with pytest.MonkeyPatch.context() as patch:
        if HAVE_TRITON:
            from proxsparse_triton.kernels import launch

            patch.setattr(launch, "INTERPRETER_TILE", 2048)
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass
class Case:
    """A parameter in the middle of its training."""

    w: Tensor
    grad: Tensor
    state: AdamState
    w0: Tensor

    def tensors(self) -> dict[str, Tensor]:
        found = {"w": self.w} | {field.name: getattr(self.state, field.name) for field in dataclasses.fields(self.state)}
        return {name: x for name, x in found.items() if x is not None}

    def clone(self, change: Callable[[Tensor], Tensor] = torch.clone) -> Case:
        state = AdamState(**{name: change(x) for name, x in self.tensors().items() if name != "w"})
        return Case(change(self.w), change(self.grad), state, change(self.w0))

    def to(self, device: str) -> Case:
        return self.clone(lambda x: x.to(device, copy=True))

    def step(self, settings: StepSettings, backend: str | None = None, **options: object) -> Tensor:
        return prox_adamw_(self.w, self.grad, self.state, settings, backend=backend, **options)

    def weight(self) -> Tensor:
        """In fp32, residual included."""
        return (self.w.float() if self.state.residual is None else join_residual(self.w.cpu(), self.state.residual.cpu())).cpu()

    def moments(self) -> tuple[Tensor, Tensor]:
        s = self.state
        if s.exp_avg_scale is None or s.exp_avg_sq_scale is None:
            return s.exp_avg.float().cpu(), s.exp_avg_sq.float().cpu()
        return (
            decode_first(s.exp_avg.cpu(), s.exp_avg_scale.cpu()),
            decode_second(s.exp_avg_sq.cpu(), s.exp_avg_sq_scale.cpu()),
        )


def case(shape: tuple[int, ...], storage: Storage = (FP32, 0, "fp32"), seed: int = 0) -> Case:
    """Weights near the pretrained ones, some exactly zero, and moments that are not; made by one plain step from zero moments."""
    dtype, bits, moments = storage
    w0 = normal(*shape, seed=seed).to(dtype)
    w = w0.clone()
    w[normal(*shape, seed=seed + 1) > 1] = 0
    if moments == "int8":
        scales = [torch.zeros(-(-w.numel() // MOMENT_GROUP)) for _ in range(2)]
        state = AdamState(torch.zeros(shape, dtype=torch.int8), torch.zeros(shape, dtype=torch.uint8), *scales)
    else:
        state = AdamState(*(torch.zeros(shape, dtype=FP32 if moments == "fp32" else BF16) for _ in range(2)))
    if bits:
        state = dataclasses.replace(state, residual=torch.zeros(shape, dtype=torch.int8 if bits == 8 else torch.int16))
    made = Case(w, normal(*shape, seed=seed + 2).to(dtype), state, w0)
    if w.numel():
        made.step(SETTINGS, "reference")
    made.grad = normal(*shape, seed=seed + 3).to(dtype)
    return made
