"""What learns, what the loss sees, and that the model is given back as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from proxsparse_triton.errors import ConfigError
from proxsparse_triton.ops import mask_24
from proxsparse_triton.training.batches import Batch
from proxsparse_triton.training.distillation import DistillationLoss
from proxsparse_triton.training.loss import NextTokenLoss
from proxsparse_triton.training.memory import meta_model, trace_step
from proxsparse_triton.training.objective import Objective

TOKENS = torch.randint(48, (2, 9), generator=torch.Generator().manual_seed(5))
EVERY = [
    Objective(loss, forward, train)  # type: ignore[arg-type]
    for loss in ("kl", "ce")
    for forward in ("masked", "learned")
    for train in ("pruned", "all")
]


def config(**more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3, **more
    )


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(config())


def linears_of(model: nn.Module, *, head: bool = False) -> dict[str, nn.Linear]:
    return {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear) and (head or ".layers." in n)}


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_what_learns_and_what_is_given_back(objective: Objective) -> None:
    model = tiny()
    model.get_parameter("model.norm.weight").requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    linears = linears_of(model)
    with objective.of(model, linears, TOKENS[0]) as prepared:
        assert (prepared.pretrained is not None) == (objective.loss == "kl" or objective.forward == "masked") == objective.keeps_pretrained
        with torch.no_grad():  # else there is nothing to learn from a teacher
            for linear in linears.values():
                linear.weight *= 1.1
        prepared.loss(Batch(TOKENS, None)).backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    everything = {name for name, learns in before.items() if learns}
    assert learned == (set(linears) if objective.train == "pruned" else everything)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all("forward" not in vars(linear) for linear in linears.values())


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_the_masked_loss_is_that_of_the_pruned_model(loss: Any) -> None:
    """At the start: magnitude's mask on the pretrained weights."""
    model, pruned, dense = tiny(), tiny(), tiny()
    with torch.no_grad():
        for linear in linears_of(pruned).values():
            linear.weight *= mask_24(linear.weight.abs())
    logits, target = (some(input_ids=TOKENS).logits.double() for some in (pruned, dense))
    if loss == "ce":
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    else:
        log_p, log_p0 = ((z.flatten(0, 1) / 2).log_softmax(-1) for z in (logits, target))
        expected = 4 * torch.nn.functional.kl_div(log_p, log_p0, log_target=True, reduction="batchmean")
    with Objective(loss, "masked", "pruned", 2.0).of(model, linears_of(model), TOKENS[0]) as prepared:
        found = prepared.loss(Batch(TOKENS, None)).item()
    assert found == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_a_pruned_head_is_masked_too(loss: Any) -> None:
    """Its weight must not be taken past its forward pass, as the chunked losses do."""
    model, pruned, dense = tiny(), tiny(), tiny()
    with torch.no_grad():
        for linear in linears_of(pruned, head=True).values():
            linear.weight *= mask_24(linear.weight.abs())
    logits, target = (some(input_ids=TOKENS).logits.double() for some in (pruned, dense))
    if loss == "ce":
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    else:
        log_p, log_p0 = ((z.flatten(0, 1) / 2).log_softmax(-1) for z in (logits, target))
        expected = 4 * torch.nn.functional.kl_div(log_p, log_p0, log_target=True, reduction="batchmean")
    with Objective(loss, "masked", "pruned", 2.0).of(model, linears_of(model, head=True), TOKENS[0]) as prepared:
        assert not prepared.loss.chunked  # type: ignore[attr-defined]
        assert prepared.loss(Batch(TOKENS, None)).item() == pytest.approx(expected.item(), rel=1e-4)


def test_heads_run_in_chunks_where_they_are_the_teachers() -> None:
    model = tiny()
    linears = linears_of(model)
    for objective in EVERY:
        with objective.of(model, linears, TOKENS[0]) as prepared:
            assert isinstance(prepared.loss, DistillationLoss if objective.loss == "kl" else NextTokenLoss)
            assert prepared.loss.chunked == (objective.loss == "ce" or objective.train == "pruned")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "mse"}, "expected --loss kl or ce, got 'mse'"),
        ({"forward": "soft"}, "expected --forward masked or learned, got 'soft'"),
        ({"train": "norms"}, "expected --train pruned or all, got 'norms'"),
        ({"temperature": 0.0}, "expected a finite temperature > 0, got 0.0"),
        ({"temperature": float("nan")}, "expected a finite temperature > 0, got nan"),
    ],
)
def test_values_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        Objective(**settings)
    assert "\n" not in str(raised.value)


def traced(objective: Objective, layers: int) -> Any:
    """Llama-2-7B's shape, or with fewer layers."""
    shape = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32)
    model = meta_model(shape, torch.bfloat16)
    return trace_step(model, 1, 4096, checkpoint=False, release=False, pruned=linears_of(model), objective=objective)


def test_memory_of_a_teacher() -> None:
    """Counted without weights: the teacher adds its logits, in chunks, and a hidden state, nothing that grows with depth."""
    shallow, deep = ({loss: traced(Objective(loss), layers) for loss in ("kl", "ce")} for layers in (2, 32))  # type: ignore[arg-type]
    assert abs((deep["kl"].total - deep["ce"].total) - (shallow["kl"].total - shallow["ce"].total)) < 2**20
    assert deep["kl"].total <= 1.05 * deep["ce"].total
    assert 1.25 < deep["kl"].flops / deep["ce"].flops < 1.4  # one more forward pass
    assert traced(Objective("ce", "learned", "all"), 2).flops > shallow["ce"].flops  # embeddings and head learn too
