"""apply_masks on models that are wrapped or offloaded: the real weights are set, or it is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proxsparse_triton import apply_masks, mask_24
from proxsparse_triton.errors import ModelError, ShapeError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(2)])
        self.head = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    return {f"layers.{i}.weight": mask_24(model.get_parameter(f"layers.{i}.weight").detach().abs()) for i in range(2)}


class Wrapper(nn.Module):
    """A wrapper that holds the model under some name."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, model)


def nested(model: nn.Module, name: str) -> nn.Module:
    """Every layer wrapped by itself as well."""
    model.layers = nn.ModuleList([Wrapper(layer, name) for layer in model.layers])
    return Wrapper(model, name)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": lambda model: Wrapper(model, "module"),
    "compile": torch.compile,
    "FSDP1": lambda model: nested(model, "_fsdp_wrapped_module"),
    "checkpointing": lambda model: nested(model, "_checkpoint_wrapped_module"),
    "peft": lambda model: Wrapper(Wrapper(model, "model"), "base_model"),
    "DDP of compile": lambda model: Wrapper(torch.compile(model), "module"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Masks of the plain model fit them, and masks of them fit the plain model."""
    model = Net()
    masks = masks_of(model)
    expected = copy.deepcopy(model)
    apply_masks(expected, masks)
    weights = [layer.weight for layer in model.layers]
    wrapped = wrap(model)
    apply_masks(wrapped, masks)
    assert all(torch.equal(w, layer.weight) for w, layer in zip(weights, expected.layers, strict=True))
    assert (model.head.weight != 0).all()
    names = [name for name, _ in wrapped.named_parameters() if "layers" in name]
    plain = Net()
    apply_masks(plain, dict(zip(names, masks.values(), strict=True)))
    assert all(torch.equal(w, layer.weight) for w, layer in zip(weights, plain.layers, strict=True))


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    model = Net()
    masks = masks_of(model)
    weights = [layer.weight for layer in model.layers]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "1"], r=2))
    apply_masks(adapted, masks)
    assert all(torch.equal(w != 0, mask) for w, mask in zip(weights, masks.values(), strict=True))


def test_names_that_fit_several_or_none_are_refused() -> None:
    model = Wrapper(nn.ModuleDict({"a": Net(), "b": Net()}), "module")
    mask = masks_of(Net())["layers.0.weight"]
    for name in ("layers.0.weight", "c.layers.0.weight"):
        with pytest.raises(ModelError, match=rf"^apply_masks: expected names of the model's parameters, got 1 unknown: {name}\. Use the"):
            apply_masks(model, {"a.layers.0.weight": mask, name: mask})
    assert all((p != 0).all() for p in model.parameters())


@pytest.mark.parametrize("whole_model", [True, False])
def test_offloaded_to_the_cpu(whole_model: bool) -> None:
    """The parameters are on `meta`; what accelerate loads before each use is zeroed."""
    accelerate = pytest.importorskip("accelerate")
    model = Net()
    masks = masks_of(model)
    expected = copy.deepcopy(model)
    apply_masks(expected, masks)
    if whole_model:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(model.layers, execution_device=torch.device("cpu"))
    assert model.layers[0].weight.is_meta
    apply_masks(model, masks)
    x = torch.randn(3, 8)
    assert torch.equal(model(x), expected(x))


def test_tied_and_offloaded() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = Net()
    model.layers[1].weight = model.layers[0].weight
    masks = masks_of(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match=r"tied parameter layers\.1\.weight, got two that disagree"):
        apply_masks(model, {"layers.0.weight": masks["layers.0.weight"], "layers.1.weight": masks["layers.0.weight"].flip(1)})
    apply_masks(model, masks)
    assert float((model.layers[1]._hf_hook.weights_map["weight"] == 0).float().mean()) == 0.5


def test_what_is_in_no_memory_is_refused(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    masks = masks_of(Net())
    with pytest.raises(ModelError, match=r"^apply_masks: expected weights in memory, got layers\.0\.weight on the meta device"):
        apply_masks(Net().to("meta"), masks)
    model = Net()
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match=r"^apply_masks: expected weights in memory, got layers\.0\.weight offloaded to disk"):
        apply_masks(model, masks)


def test_nothing_is_written_where_one_weight_is_out_of_reach() -> None:
    model = Net()
    masks = masks_of(model)
    model.layers[1].to("meta")
    with pytest.raises(ModelError, match=r"layers\.1\.weight on the meta device"):
        apply_masks(model, masks)
    assert (model.layers[0].weight != 0).all()


def test_flat_parameters_of_fsdp1_say_where_to_call_it() -> None:
    """Outside of summon_full_params its parameters are flat parts."""
    model: Any = Wrapper(Net(), "_fsdp_wrapped_module")
    masks = masks_of(Net())
    inner = model._fsdp_wrapped_module
    inner.layers[0].weight = nn.Parameter(torch.ones(32))
    with pytest.raises(ShapeError, match=r"got \(8, 8\)\. Call it inside FSDP\.summon_full_params\(model\)\."):
        apply_masks(model, masks)
    inner.layers = nn.ModuleList()
    inner._flat_param = nn.Parameter(torch.ones(32))
    with pytest.raises(ModelError, match=r"got 2 unknown: .* Call it inside FSDP\.summon_full_params\(model\)\."):
        apply_masks(model, masks)
