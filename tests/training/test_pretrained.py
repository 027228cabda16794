"""The mask in the loss: what layers compute with, what gradients they get, and that everything is as before afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from proxsparse_triton.ops import mask_24, masked_weight_24
from proxsparse_triton.training.batches import Batch
from proxsparse_triton.training.loss import NextTokenLoss
from proxsparse_triton.training.memory import _Ledger, checkpointing
from proxsparse_triton.training.pretrained import PretrainedWeights, compact, mask_scores


def layer(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[nn.Linear, Tensor]:
    """A layer whose learned weights are not its pretrained ones, and these."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 12, bias=bias).to(dtype)
    return linear, linear.weight.detach().clone()


def moved(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight += 0.2 * torch.randn(12, 16, generator=torch.Generator().manual_seed(1)).to(linear.weight)


def expected_weight(linear: nn.Linear, w0: Tensor, scale: Tensor | None) -> Tensor:
    scores = linear.weight.detach().float().abs() * (1 if scale is None else scale)
    return (w0 * mask_24(scores)).to(linear.weight.dtype)


SCALE = torch.rand(16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("bias", [False, True])
def test_masked_forward_and_straight_through(dtype: torch.dtype, scale: Tensor | None, bias: bool) -> None:
    """Against a layer whose weight is W0 * mask, by ordinary autograd."""
    linear, w0 = layer(dtype, bias)
    pretrained = PretrainedWeights(linear, {"w": linear}, {} if scale is None else {"w": scale})
    moved(linear)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = expected_weight(linear, w0, scale).requires_grad_()
    plain = F.linear(one, weight, None if linear.bias is None else linear.bias.detach())
    with pretrained.forward("masked"):
        out = linear(other)
    assert torch.equal(out, plain)
    assert not torch.equal(weight, expected_weight(linear, linear.weight.detach(), scale))
    upstream = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(4)).to(dtype)
    plain.backward(upstream)
    out.backward(upstream)
    bounds = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(other.grad, one.grad, **bounds)
    torch.testing.assert_close(linear.weight.grad, weight.grad, **bounds)  # of pruned weights too
    if linear.bias is not None:
        torch.testing.assert_close(linear.bias.grad, upstream.flatten(0, 1).sum(0), **bounds)


def test_only_what_learns_gets_a_gradient() -> None:
    linear, _ = layer()
    pretrained = PretrainedWeights(linear, {"w": linear})
    moved(linear)
    linear.bias.requires_grad_(False)
    x = torch.randn(3, 16)
    with pretrained.forward("masked"):
        linear(x).sum().backward()
    assert linear.bias.grad is None
    assert linear.weight.grad is not None
    linear.weight.grad = None
    linear.weight.requires_grad_(False)
    with pretrained.forward("masked"):
        linear(x.requires_grad_()).sum().backward()
    assert linear.weight.grad is None
    torch.testing.assert_close(x.grad, expected_weight(linear, pretrained.tensors["w"], None).sum(0).expand(3, 16))


def test_no_copy_of_the_weights_is_kept_for_the_backward_pass() -> None:
    """The masked weights are formed again, so what waits for the backward pass is what waits without them."""
    waiting = {}
    for kind in ("learned", "masked"):
        model = tiny()
        pretrained = PretrainedWeights(model, linears_of(model))
        ledger = _Ledger(model, pretrained.tensors.values())
        with pretrained.forward(kind), ledger:  # type: ignore[arg-type]
            loss = NextTokenLoss(model, TOKENS[0])(Batch(TOKENS, None))
        waiting[kind] = sum(ledger._sizes[index] for index in ledger._live.values() if index is not None)
        del loss
    assert waiting["masked"] == waiting["learned"]


def test_weights_that_changed_before_the_backward_pass_are_refused() -> None:
    """Their mask would be another one."""
    linear, _ = layer()
    with PretrainedWeights(linear, {"w": linear}).forward("masked"):
        out = linear(torch.randn(3, 16, requires_grad=True))
    moved(linear)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_learned_forward_is_the_layers_own() -> None:
    linear, _ = layer()
    pretrained = PretrainedWeights(linear, {"w": linear})
    moved(linear)
    x = torch.randn(3, 16)
    with pretrained.forward("learned"):
        out = linear(x)
    assert torch.equal(out, F.linear(x, linear.weight, linear.bias))


def tiny(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3, **more
    )
    return LlamaForCausalLM(config)


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}


TOKENS = torch.randint(48, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["learned", "masked"])
def test_the_teacher_is_the_dense_model(kind: Any, bias: bool) -> None:
    """Whatever has been learned, also by parameters that are not pruned; afterwards all of it is there again."""
    model = tiny(attention_bias=bias, mlp_bias=bias)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    dense = model(input_ids=TOKENS).logits
    linears = linears_of(model)
    others = {name: p for name, p in model.named_parameters() if name not in linears}
    pretrained = PretrainedWeights(model, linears, others=others)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    learned = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pretrained.forward(kind), torch.no_grad():
        student = model(input_ids=TOKENS).logits
        with pretrained.teacher():
            assert torch.equal(model(input_ids=TOKENS).logits, dense)
        assert torch.equal(model(input_ids=TOKENS).logits, student)
    assert not torch.allclose(student, dense)
    assert all(torch.equal(p, learned[name]) for name, p in model.named_parameters())


def test_everything_is_put_back_after_an_error() -> None:
    model = tiny()
    linears = linears_of(model)
    embedding = model.get_input_embeddings().weight
    pretrained = PretrainedWeights(model, linears, others={"embedding": embedding})
    data = embedding.data
    with pytest.raises(ZeroDivisionError), pretrained.forward("masked"), pretrained.teacher():
        raise ZeroDivisionError
    assert all(type(linear) is nn.Linear for linear in linears.values())
    assert embedding.data.data_ptr() == data.data_ptr()
    x = torch.randn(3, 16)
    linear = next(iter(linears.values()))
    assert torch.equal(linear(x), F.linear(x, linear.weight))


def test_the_student_is_back_after_an_error_in_the_teacher() -> None:
    """Inside `forward`: neither W0 nor the other parameters of the teacher stay."""
    model = tiny()
    linears = linears_of(model)
    pretrained = PretrainedWeights(model, linears, others={name: p for name, p in model.named_parameters() if name not in linears})
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    with pretrained.forward("masked"), torch.no_grad():
        student = model(input_ids=TOKENS).logits
        with pytest.raises(ZeroDivisionError), pretrained.teacher():
            raise ZeroDivisionError
        assert torch.equal(model(input_ids=TOKENS).logits, student)


def gradients(checkpoint: bool, release: bool = False) -> dict[str, Tensor]:
    """release: each weight is written to inside the backward pass, once its gradient is complete."""
    model = tiny().train()
    linears = linears_of(model)
    pretrained = PretrainedWeights(model, linears)
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for linear in linears.values():
            linear.weight += 0.1 * torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(6))

    def step(name: str, p: Tensor) -> None:
        found[name], p.grad = p.grad, None
        with torch.no_grad():
            p.neg_()

    for name, p in model.named_parameters() if release else ():
        p.register_post_accumulate_grad_hook(lambda p, name=name: step(name, p))
    with pretrained.forward("masked"), checkpointing(model, checkpoint):
        NextTokenLoss(model, TOKENS[0])(Batch(TOKENS, None)).backward()
    return found if release else {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("checkpoint", "release"), [(True, False), (False, True), (True, True)])
def test_checkpointing_and_release_change_nothing(checkpoint: bool, release: bool) -> None:
    plain, saving = gradients(False), gradients(checkpoint, release)
    assert plain.keys() == saving.keys()
    assert all(torch.equal(gradient, saving[name]) for name, gradient in plain.items())


def test_w0_is_kept_in_bf16_where_that_loses_nothing() -> None:
    exact = torch.randn(4, 8).to(torch.bfloat16)
    assert compact(exact).dtype == torch.bfloat16
    assert compact(exact).data_ptr() != exact.data_ptr()
    assert compact(exact.float()).dtype == torch.bfloat16
    assert torch.equal(compact(exact.float()).float(), exact.float())
    fine = torch.randn(4, 8)
    assert torch.equal(compact(fine), fine)
    assert compact(fine).data_ptr() != fine.data_ptr()


def test_fp32_weights_with_a_bf16_w0() -> None:
    linear, _ = layer()
    with torch.no_grad():
        linear.weight.copy_(linear.weight.bfloat16())
    w0 = linear.weight.detach().clone()
    pretrained = PretrainedWeights(linear, {"w": linear}, {"w": SCALE})
    assert pretrained.tensors["w"].dtype == torch.bfloat16
    moved(linear)
    x = torch.randn(3, 16)
    with pretrained.forward("masked"):
        assert torch.equal(linear(x), F.linear(x, expected_weight(linear, w0, SCALE), linear.bias))


def test_scores_are_those_the_operation_compares() -> None:
    w = torch.randn(6, 16).to(torch.bfloat16)
    scale = SCALE.clone()
    scale[3] = 0  # a dead feature: its weights keep their order
    assert torch.equal(mask_scores(w, None), w.float().abs())
    assert torch.equal(mask_scores(w, scale), w.float().abs() * scale.clamp_min(1e-20))
    assert mask_scores(w.double(), scale).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_their_mask_is_the_one_the_loss_saw(dtype: torch.dtype) -> None:
    """With ties, zeros, and dead features."""
    w = torch.randint(-3, 4, (64, 16), generator=torch.Generator().manual_seed(7)).to(dtype)
    scale = SCALE.clone()
    scale[[3, 4, 5, 6]] = 0
    for some in (None, scale):
        seen = masked_weight_24(w, torch.ones_like(w), column_scale=some) != 0
        assert torch.equal(mask_24(mask_scores(w, some)), seen)
    assert not torch.equal(mask_24(mask_scores(w, None)), seen)


def test_a_forward_that_somebody_else_had_put_there_stays() -> None:
    """accelerate wraps modules that way; what it computes with is what everybody reads."""
    linear, w0 = layer()
    calls = []

    def wrapped(x: Tensor) -> Tensor:
        calls.append(x)
        return F.linear(x, linear.weight, linear.bias)

    linear.forward = wrapped  # type: ignore[method-assign]
    pretrained = PretrainedWeights(linear, {"w": linear})
    moved(linear)
    x = torch.ones(16)
    with pretrained.forward("masked"):
        assert torch.equal(linear(x), F.linear(x, expected_weight(linear, w0, None), linear.bias))
    assert len(calls) == 1
    assert vars(linear)["forward"] is wrapped


def test_a_single_row_without_a_batch() -> None:
    linear, _ = layer()
    x = torch.randn(16, requires_grad=True)
    with PretrainedWeights(linear, {"w": linear}).forward("masked"):
        linear(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(linear.weight.grad, x.detach().expand(12, 16))
    torch.testing.assert_close(linear.bias.grad, torch.ones(12))
