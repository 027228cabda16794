"""Saving and loading ProxAdamW: bit for bit, and refused when made with other settings, with nothing changed."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proxsparse_triton import ProxAdamW
from proxsparse_triton.errors import ConfigError


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"first": (6, 8), "second": (3, 100), "bias": (5,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for name, shape in shapes.items()}


def build(ps: dict[str, nn.Parameter], **options: Any) -> ProxAdamW:
    scales = {"first": torch.linspace(0.5, 2, 8), "second": None}
    groups: list[dict[str, Any]] = [{"params": [(name, ps[name])], "column_scale": scale} for name, scale in scales.items()]
    return ProxAdamW(
        [*groups, {"params": [("bias", ps["bias"])], "prox": False}], **{"lr": 0.01, "lambda1": 0.1, "lambda2": 0.1, **options}
    )


def train(ps: dict[str, nn.Parameter], optimizer: ProxAdamW, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in ps.values():
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        optimizer.step()


def contents(x: Any) -> Any:
    """Tensors by their bits."""
    if isinstance(x, Tensor):
        return (x.dtype, x.shape, x.detach().flatten().view(torch.uint8).tolist() if x.dim() else x.item())
    if isinstance(x, dict):
        return {key: contents(value) for key, value in x.items()}
    return [contents(value) for value in x] if isinstance(x, list | tuple) else x


@pytest.mark.parametrize("options", [{}, {"weight_bits": 24, "moments": "int8"}, {"weight_bits": 32, "moments": "bfloat16"}], ids=str)
def test_a_resumed_run_is_the_same_run(options: dict[str, Any]) -> None:
    """Through a file; fp32 moments of bf16 weights keep their bits, and W0 is the one of the first step."""
    ps = parameters()
    optimizer = build(ps, **options)
    train(ps, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": ps, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    resumed = build(saved["model"], **options)
    resumed.load_state_dict(saved["optimizer"])
    assert contents(resumed.state_dict()) == contents(optimizer.state_dict())
    train(ps, optimizer, range(3, 6))
    train(saved["model"], resumed, range(3, 6))
    assert contents(resumed.state_dict()) == contents(optimizer.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(ps.values(), saved["model"].values(), strict=True))


def test_it_loads_with_weights_only() -> None:
    """Tensors and numbers, nothing that needs unpickling."""
    ps = parameters()
    optimizer = build(ps, moments="int8")
    train(ps, optimizer, range(1))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert contents(torch.load(file, weights_only=True)) == contents(optimizer.state_dict())


def test_loading_copies() -> None:
    """Steps after loading do not write into the state dict that was loaded, nor into its owner's state."""
    ps = parameters()
    optimizer = build(ps)
    train(ps, optimizer, range(2))
    state = optimizer.state_dict()
    before = contents(state)
    other = parameters()
    twin = build(other)
    twin.load_state_dict(state)
    train(other, twin, range(2, 3))
    assert contents(optimizer.state_dict()) == before


def test_before_the_first_step() -> None:
    ps = parameters()
    optimizer = build(ps)
    optimizer.load_state_dict(copy.deepcopy(build(parameters()).state_dict()))
    assert not optimizer.state
    optimizer.share_pretrained({ps["first"]: torch.zeros(6, 8)})
    other = parameters()
    twin = build(other)
    twin.load_state_dict(optimizer.state_dict())
    assert torch.equal(twin.pretrained(other["first"]), torch.zeros(6, 8))
    train(other, twin, range(1))


def test_hooks_run_as_in_torch() -> None:
    """The caller's pre-hook sees and may change the state dict; the post-hook sees what was loaded."""
    ps = parameters()
    optimizer = build(ps)
    train(ps, optimizer, range(1))
    twin = build(parameters())
    seen = []

    def before(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        assert isinstance(state_dict["state"][0]["exp_avg"], Tensor)
        changed = copy.deepcopy(state_dict)
        changed["state"][0]["step"] = 41
        return changed

    twin.register_load_state_dict_pre_hook(before)
    twin.register_load_state_dict_post_hook(lambda o: seen.append(o.state_dict()["state"][0]["step"]))
    twin.load_state_dict(optimizer.state_dict())
    assert seen == [41]


OTHERS = [
    ({"weight_bits": 24}, {}, r"expected no residual for first, got one\. .* made with other weight_bits"),
    ({}, {"weight_bits": 24}, r"expected residual for first, got none\. .* made with other weight_bits"),
    ({"weight_bits": 24}, {"weight_bits": 32}, r"expected residual of torch\.int16 for first, got torch\.int8\. .* with other weight_bits"),
    ({"moments": "int8"}, {}, r"expected no exp_avg_scale for first, got one\. .* made with other moments"),
    ({}, {"moments": "bfloat16"}, r"expected exp_avg of torch\.bfloat16 for first, got torch\.float32\. .* made with other moments"),
]


@pytest.mark.parametrize(("saved", "now", "message"), OTHERS, ids=[message[:40] for *_, message in OTHERS])
def test_other_precision_is_refused(saved: dict[str, Any], now: dict[str, Any], message: str) -> None:
    ps = parameters()
    optimizer = build(ps, **saved)
    train(ps, optimizer, range(1))
    twin = build(parameters(), **now)
    refused(twin, optimizer.state_dict(), message)


def refused(optimizer: ProxAdamW, state_dict: dict[str, Any], message: str) -> None:
    before = contents(optimizer.state_dict())
    with pytest.raises(ConfigError, match=rf"^ProxAdamW: {message}") as caught:
        optimizer.load_state_dict(state_dict)
    assert "\n" not in str(caught.value)
    assert contents(optimizer.state_dict()) == before


def test_other_shapes_and_groups_are_refused() -> None:
    ps = parameters()
    optimizer = build(ps)
    train(ps, optimizer, range(1))
    state = optimizer.state_dict()
    wider = parameters()
    wider["first"] = nn.Parameter(torch.zeros(12, 8, dtype=torch.bfloat16))
    refused(build(wider), state, r"expected exp_avg of shape \(12, 8\) for first, got \(6, 8\)\. The state dict was made with other shapes")
    one = ProxAdamW([("first", parameters()["first"])])
    refused(one, state, r"expected a state dict with groups of \[1\] parameters, got \[1, 1, 1\]\.")
    plain = ProxAdamW([{"params": [(name, p)], "prox": False} for name, p in parameters().items()])
    refused(plain, state, r"expected a state dict with prox=False in group 0, got prox=True\.")
    adamw = torch.optim.AdamW([{"params": [p]} for p in ps.values()])
    refused(
        build(parameters()), adamw.state_dict(), r"expected a state dict with prox=True in group 0, got the state of another optimizer\."
    )
