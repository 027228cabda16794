"""ProxSparse on a tiny random Llama: what is learned, what is recorded, and what must not be touched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from proxsparse_triton.errors import ModelError
from proxsparse_triton.methods.base import PruneResult, PruneTask
from proxsparse_triton.methods.magnitude import magnitude_mask
from proxsparse_triton.methods.proxsparse import ProxRegulariser, ProxSparse, rms
from proxsparse_triton.models.selection import plan_layers
from proxsparse_triton.ops import frozen_penalty, prox_24
from proxsparse_triton.sparsity import check_mask
from proxsparse_triton.training.loop import LoopConfig, learn

STEPS = 8


def tiny(device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(device, dtype)


def task(device: str, rows: list[Mapping[str, object]] | None = None, **options: Any) -> PruneTask:
    model = options.pop("model", None) or tiny(device)
    generator = torch.Generator().manual_seed(1)
    texts = tuple(torch.randint(48, (12,), generator=generator) for _ in range(STEPS))
    record = (lambda row: None) if rows is None else rows.append
    return PruneTask(model, plan_layers(model, **options), texts, seed=3, record=record)


def run(device: str, **settings: Any) -> tuple[PruneResult, list[Mapping[str, Any]]]:
    rows: list[Mapping[str, Any]] = []
    return ProxSparse(**settings).prune(task(device, rows)), rows


def same(one: PruneResult, other: PruneResult) -> bool:
    return all(torch.equal(mask, other.masks[name]) for name, mask in one.masks.items())


def test_masks_and_what_is_recorded(device: str) -> None:
    result, rows = run(device, lambda1=2.0, lr=1e-2)
    assert result.weights is None  # the caller keeps the original ones
    assert list(result.masks) == list(task(device).linears())
    for name, mask in result.masks.items():
        check_mask("test", name, mask)
        assert mask.device.type == "cpu"
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    shares = [row["share_24"] for row in rows]
    assert shares[-1] > shares[0] + 0.1
    assert result.summary["share_24"] == pytest.approx(shares[-1])
    assert all(row["penalty"] == 0 for row in rows)
    # the whole is the mean over layers, weighted by their size
    sizes = {name: linear.weight.numel() for name, linear in task(device).linears().items()}
    assert list(rows[-1]["layers"]) == list(sizes)
    mean = sum(share * sizes[name] for name, share in rows[-1]["layers"].items()) / sum(sizes.values())
    assert shares[-1] == pytest.approx(mean, abs=1e-6)


def test_unselected_layers_never_see_the_prox(device: str) -> None:
    given = task(device, skip=["mlp"])
    ProxSparse(lambda1=50.0, lr=1e-2).prune(given)
    for name, parameter in given.model.named_parameters():
        zeros = int((parameter == 0).sum())
        assert (zeros > 0) == ("self_attn" in name), name


def test_without_lambda1_it_is_plain_training(device: str) -> None:
    """Hand-written: the loop with a regulariser that does nothing, then the two largest of each block."""

    class Nothing:
        def add_gradient(self) -> Tensor | None:
            return None

        def after_step(self) -> None:
            pass

        def shares(self) -> dict[str, Tensor]:
            return {"all": torch.zeros((), device=device)}

    given = task(device)
    learn(given.model, given.windows, Nothing(), LoopConfig(lr=1e-2), seed=3)
    result, rows = run(device, lambda1=0.0, lr=1e-2)
    for name, linear in given.linears().items():
        assert torch.equal(result.masks[name], magnitude_mask(linear.weight)), name
    assert rows[-1]["share_24"] == 0
    assert not same(result, run(device, lambda1=2.0, lr=1e-2)[0])


def test_mask_is_that_of_the_learned_weights(device: str) -> None:
    given = task(device)
    start = {name: linear.weight.detach().clone() for name, linear in given.linears().items()}
    result = ProxSparse(lambda1=1.0, lr=2e-2).prune(given)
    moved = 0
    for name, linear in given.linears().items():
        assert torch.equal(result.masks[name], magnitude_mask(linear.weight))
        moved += int((result.masks[name] != magnitude_mask(start[name])).sum())
    assert moved > 0


def test_lambda2_changes_the_masks_and_is_recorded(device: str) -> None:
    plain, _ = run(device, lambda1=1.0, lr=2e-2)
    frozen, rows = run(device, lambda1=1.0, lr=2e-2, lambda2=0.5, frozen_eps=0.1)
    assert not same(plain, frozen)
    assert rows[0]["penalty"] == 0  # w = w0 before the first step
    assert all(row["penalty"] > 0 for row in rows[1:])
    assert all(math.isfinite(row["penalty"]) for row in rows)


def test_lambda2_enters_the_gradient_before_clipping(device: str) -> None:
    """Recorded norm = norm of the loss gradient plus the penalty's, as autograd computes it."""
    given = task(device)
    linears = given.linears()
    regulariser = ProxRegulariser(linears, 0.0, 0.5, 0.1)
    w0 = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    for linear in linears.values():
        linear.weight.data += 0.05
        linear.weight.grad = torch.full_like(linear.weight, 0.25)
    next(iter(linears.values())).weight.grad = None  # a layer that the loss does not reach
    value = regulariser.add_gradient()
    expected = torch.zeros(())
    for position, (name, linear) in enumerate(linears.items()):
        w = linear.weight.detach().double().cpu().requires_grad_()
        penalty = frozen_penalty(w, w0[name].double().cpu(), 0.5, 0.1)
        penalty.backward()
        expected = expected + penalty.detach()
        torch.testing.assert_close(linear.weight.grad.double().cpu(), w.grad + (0.25 if position else 0.0), rtol=1e-4, atol=1e-4)
    assert value is not None
    torch.testing.assert_close(value.double().cpu(), expected.double(), rtol=1e-4, atol=0)


def test_lambda2_needs_no_activation_memory(device: str) -> None:
    """What autograd saves for the backward pass, byte by byte, is the same with and without the penalty."""

    def saved_bytes(lambda2: float) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(device, lambda1=1.0, lr=1e-2, lambda2=lambda2)
        return total

    assert saved_bytes(0.5) == saved_bytes(0.0) > 0


def test_without_lambda2_the_start_is_not_copied(device: str) -> None:
    assert not ProxRegulariser(task(device).linears(), 1.0, 0.0, 0.1)._w0


def test_regulariser_applies_the_prox_in_place(device: str) -> None:
    linears = task(device).linears()
    before = {name: (linear.weight.data_ptr(), linear.weight.detach().clone()) for name, linear in linears.items()}
    ProxRegulariser(linears, 0.7, 0.0, 0.1).after_step()
    for name, linear in linears.items():
        assert linear.weight.data_ptr() == before[name][0]
        assert torch.equal(linear.weight, prox_24(before[name][1], 0.7))


def test_derived_strengths_are_dimensionless(device: str) -> None:
    """lambda1 T sigma = 2 and lr T / sigma = 2, whatever the scale of the model and the number of steps."""
    given = task(device)
    flat = torch.cat([linear.weight.detach().flatten() for linear in given.linears().values()]).double()
    sigma = float(flat.square().mean().sqrt())
    assert rms(given.linears()) == pytest.approx(sigma, rel=1e-6)
    for settings, steps in (({}, STEPS), ({"batch_size": 3}, 3), ({"epochs": 2}, 2 * STEPS)):
        result, rows = run(device, **settings)
        summary: Any = result.summary
        assert summary["steps"] == steps == len(rows)
        assert summary["weight_rms"] == pytest.approx(sigma, rel=1e-6)
        assert summary["lambda1"] * steps * sigma == pytest.approx(2.0)
        assert summary["lr"] * steps / sigma == pytest.approx(2.0)
        assert max(row["lr"] for row in rows) == pytest.approx(summary["lr"])
    given_both = run(device, lambda1=0.3, lr=0.004)[0].summary
    assert (given_both["lambda1"], given_both["lr"]) == (0.3, 0.004)


def test_strength_scales_with_the_model(device: str) -> None:
    """Twice the weights, half of lambda1: the share of 2:4 blocks after a step without a gradient stays."""
    shares = []
    for scale in (1.0, 2.0):
        linears = task(device).linears()
        for linear in linears.values():
            linear.weight.data *= scale
        regulariser = ProxRegulariser(linears, 4.0 / scale, 0.0, 0.1)
        regulariser.after_step()
        shares.append(float(regulariser.shares()["all"]))
    assert shares[0] == pytest.approx(shares[1], abs=0.01)
    assert 0.05 < shares[0] < 1


def test_learning_in_bf16(device: str) -> None:
    model = tiny(device, torch.bfloat16)
    result = ProxSparse(lambda1=1.0, lr=1e-2, lambda2=0.1).prune(task(device, model=model))
    for name, mask in result.masks.items():
        check_mask("test", name, mask)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_same_seed_same_masks() -> None:
    """On the CPU, bit for bit; the rows as well."""
    one, rows = run("cpu", lambda1=1.0, lr=1e-2, epochs=2)
    other, again = run("cpu", lambda1=1.0, lr=1e-2, epochs=2)
    assert same(one, other)
    assert rows == again


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_weights_without_a_scale(device: str, value: float) -> None:
    given = task(device)
    for linear in given.linears().values():
        linear.weight.data.fill_(value)
    with pytest.raises(ModelError, match="proxsparse: expected finite weights that are not all zero"):
        ProxSparse().prune(given)
