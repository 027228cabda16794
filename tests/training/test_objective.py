"""What learns, what the loss sees, and that the model is given back as it was."""

from __future__ import annotations

from typing import Any

import by_hand
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from proxsparse_triton.errors import ConfigError
from proxsparse_triton.ops import mask_24
from proxsparse_triton.optim.prox_adamw import ProxAdamW
from proxsparse_triton.training.batches import Batch
from proxsparse_triton.training.distillation import DistillationLoss
from proxsparse_triton.training.loop import LoopConfig, learn
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


def tiny(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(config(**more))


def linears_of(model: nn.Module, *, head: bool = False) -> dict[str, nn.Linear]:
    return {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear) and (head or ".layers." in n)}


def of_text(model: nn.Module) -> Tensor:
    logits = model(input_ids=TOKENS).logits.double()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def distance(model: nn.Module, dense: nn.Module, **options: Any) -> Tensor:
    return by_hand.distance(*(some(input_ids=TOKENS, output_hidden_states=True) for some in (model, dense)), **options)


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
    assert all(type(linear) is nn.Linear for linear in linears.values())


@pytest.mark.parametrize(("temperature", "layer_weight"), [(1.0, 0.0), (2.0, 0.0), (1.0, 1.0), (2.0, 0.5)])
@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_the_masked_loss_is_that_of_the_pruned_model(loss: Any, temperature: float, layer_weight: float) -> None:
    """At the start: magnitude's mask on the pretrained weights."""
    model, pruned, dense = tiny(), tiny(), tiny()
    with torch.no_grad():
        for linear in linears_of(pruned).values():
            linear.weight *= mask_24(linear.weight.abs())
    expected = of_text(pruned) if loss == "ce" else distance(pruned, dense, temperature=temperature, layer_weight=layer_weight)
    with Objective(loss, "masked", "pruned", temperature, layer_weight).of(model, linears_of(model), TOKENS[0]) as prepared:
        found = prepared.loss(Batch(TOKENS, None)).item()
    assert found == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_a_pruned_head_is_masked_too(loss: Any) -> None:
    """Its weight must not be taken past its forward pass, as the chunked losses do."""
    model, pruned, dense = tiny(), tiny(), tiny()
    with torch.no_grad():
        for linear in linears_of(pruned, head=True).values():
            linear.weight *= mask_24(linear.weight.abs())
    expected = of_text(pruned) if loss == "ce" else distance(pruned, dense, temperature=2.0)
    with Objective(loss, "masked", "pruned", 2.0).of(model, linears_of(model, head=True), TOKENS[0]) as prepared:
        assert not prepared.loss.chunked  # type: ignore[attr-defined]
        assert prepared.loss(Batch(TOKENS, None)).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("good", [0, 1])
@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_everything_is_given_back_after_an_error(objective: Objective, good: int) -> None:
    """In the first forward pass, of the preparation or the teacher, and in the second."""
    model = tiny()
    model.get_parameter("model.norm.weight").requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    linears = linears_of(model)
    calls = iter(range(good, -1, -1))
    model.model.norm.register_forward_pre_hook(lambda *_: (1 / next(calls), None)[1])
    with pytest.raises(ZeroDivisionError), objective.of(model, linears, TOKENS[0]) as prepared:
        prepared.loss(Batch(TOKENS, None))
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert addresses == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
    assert all(type(linear) is nn.Linear for linear in linears.values())


@pytest.mark.parametrize("train", ["pruned", "all"])
def test_nothing_to_learn_at_the_start_but_the_mask(train: Any) -> None:
    """The learned weights are the teacher's; under their mask they are not."""
    found = {}
    for forward in ("learned", "masked"):
        model = tiny()
        with Objective("kl", forward, train).of(model, linears_of(model), TOKENS[0]) as prepared:  # type: ignore[arg-type]
            found[forward] = prepared.loss(Batch(TOKENS, None)).item()
    assert found["learned"] == pytest.approx(0, abs=1e-6)
    assert found["masked"] > 0.1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("forward", ["learned", "masked"])
def test_the_teacher_stays_where_it_was(forward: Any, tied: bool) -> None:
    """All parameters have moved, embeddings and head too: the distance is that from the model as it came."""
    model, student, dense = tiny(tie_word_embeddings=tied), tiny(tie_word_embeddings=tied), tiny(tie_word_embeddings=tied)
    with Objective("kl", forward, "all").of(model, linears_of(model), TOKENS[0]) as prepared, torch.no_grad():
        for some in (model, student):
            generator = torch.Generator().manual_seed(8)
            for p in some.parameters():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
        original = linears_of(dense)
        for name, linear in linears_of(student).items():
            if forward == "masked":
                linear.weight.copy_(original[name].weight * mask_24(linear.weight.abs()))
        expected = distance(student, dense).item()
        assert prepared.loss(Batch(TOKENS, None)).item() == pytest.approx(expected, rel=1e-4)
    assert expected > 0.1


def test_a_pruned_head_that_is_not_masked() -> None:
    """Cross-entropy may take the learned weight as it is; the divergence has two heads."""
    for loss in ("ce", "kl"):
        model, learned, dense = tiny(), tiny(), tiny()
        with Objective(loss, "learned").of(model, linears_of(model, head=True), TOKENS[0]) as prepared:  # type: ignore[arg-type]
            with torch.no_grad():
                for some in (model, learned):
                    some.lm_head.weight.mul_(1.5)
                expected = of_text(learned) if loss == "ce" else distance(learned, dense)
            assert prepared.loss.chunked == (loss == "ce")  # type: ignore[attr-defined]
            assert prepared.loss(Batch(TOKENS, None)).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("objective", [Objective(), Objective("kl", "masked", "all"), Objective("ce")], ids=str)
def test_saving_memory_changes_no_number(objective: Objective) -> None:
    """A run of several steps, with a teacher and masks in the loss: checkpointing, and gradients that are stepped in the backward pass."""
    runs = []
    for checkpoint, release in ((False, False), (True, False), (False, True), (True, True)):
        model = tiny()
        linears = linears_of(model)
        losses: list[float] = []
        with objective.of(
            model, linears, TOKENS[0], {name: torch.arange(1.0, m.in_features + 1) for name, m in linears.items()}
        ) as prepared:
            named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            groups = [{"params": [(n, p) for n, p in named if (n in linears) == prox], "prox": prox} for prox in (True, False)]
            optimizer = ProxAdamW([group for group in groups if group["params"]], lambda1=0.01, lambda2=0.01)
            options = LoopConfig(lr=1e-2, steps=6, checkpointing=checkpoint, release_gradients=release)
            learn(model, list(TOKENS), optimizer, options, prepared.loss, record=lambda row: losses.append(row["loss"]))  # noqa: B023
        runs.append((losses, [p.detach().clone() for p in model.parameters()]))
    (losses, weights), *others = runs
    assert losses[-1] < losses[0]
    for again, found in others:
        assert again == losses
        assert all(torch.equal(one, other) for one, other in zip(weights, found, strict=True))


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
        ({"temperature": float("inf")}, "expected a finite temperature > 0, got inf"),
        ({"layer_weight": -0.5}, r"expected a finite layer_weight >= 0, got -0\.5\. The default is 1\."),
        ({"layer_weight": float("nan")}, "expected a finite layer_weight >= 0, got nan"),
        ({"layer_weight": float("inf")}, "expected a finite layer_weight >= 0, got inf"),
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
    """Counted without weights: the teacher adds its logits, in chunks, and a hidden state, nothing that grows with depth.

    The errors of the hidden states take two of each block, the model's own and the teacher's.
    """
    kinds = {"ce": Objective("ce"), "kl": Objective(layer_weight=0.0), "layers": Objective()}
    shallow, deep = ({name: traced(objective, layers) for name, objective in kinds.items()} for layers in (2, 32))
    assert abs((deep["kl"].total - deep["ce"].total) - (shallow["kl"].total - shallow["ce"].total)) < 2**20
    assert deep["kl"].total <= 1.05 * deep["ce"].total
    for layers, found in ((2, shallow), (32, deep)):
        assert found["layers"].total - found["kl"].total <= layers * 2 * (4096 * 4096 * 2)
    for name in ("kl", "layers"):
        assert 1.25 < deep[name].flops / deep["ce"].flops < 1.4  # one more forward pass
    assert traced(Objective("ce", "learned", "all"), 2).flops > shallow["ce"].flops  # embeddings and head learn too
