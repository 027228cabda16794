"""A pruned model, its inputs, and devices that read each order of packed weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from proxsparse_triton import apply_masks, mask_24
from proxsparse_triton.inference import blob
from proxsparse_triton.models.loading import load_model
from proxsparse_triton.models.selection import plan_layers
from proxsparse_triton.models.source import resolve_model


def prune(model: nn.Module) -> None:
    """2:4 by magnitude, in place."""
    apply_masks(model, {f"{name}.weight": mask_24(model.get_submodule(name).weight.abs()) for name in plan_layers(model).selected()})


@pytest.fixture(scope="session")
def pruned_once() -> nn.Module:
    model = load_model(resolve_model("demo"), dtype=torch.float32)
    prune(model)
    return model


@pytest.fixture
def pruned(pruned_once: nn.Module) -> nn.Module:
    """The built-in model in fp32 on the CPU, dense with zeros: a copy of one's own."""
    return copy.deepcopy(pruned_once)


@pytest.fixture(scope="session")
def ids() -> Tensor:
    return torch.randint(5, 4000, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["linear", "hopper", "ampere"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device whose library reads this order."""

    def order_for(device: torch.device, dtype: torch.dtype, out: int, width: int) -> str:
        rows, columns = {"hopper": (64, 32), "ampere": (32, 64)}.get(request.param, (1, 1))
        return request.param if dtype != torch.float32 and out % rows == 0 and width % columns == 0 else "linear"

    monkeypatch.setattr(blob, "order_for", order_for)
    return request.param  # type: ignore[no-any-return]
