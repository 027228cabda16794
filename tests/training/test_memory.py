"""The model of memory against the same step with real tensors, and against arithmetic done by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from proxsparse_triton.errors import ConfigError, ModelError
from proxsparse_triton.methods.proxsparse import ProxSparse
from proxsparse_triton.models.selection import plan_layers
from proxsparse_triton.optim.prox_adamw import ProxAdamW
from proxsparse_triton.training.batches import Batch
from proxsparse_triton.training.loss import NextTokenLoss
from proxsparse_triton.training.memory import (
    GRANULE,
    RESERVE,
    WORKSPACE,
    StepMemory,
    Storage,
    _Ledger,
    checkpointing,
    enable_checkpointing,
    fits,
    meta_model,
    resident,
    supports_checkpointing,
    trace_step,
)
from proxsparse_triton.training.objective import Objective


def config(kind: str = "Llama", **settings: Any) -> Any:
    shape = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 6, "num_attention_heads": 4}
    return getattr(transformers, f"{kind}Config")(**{**shape, "num_key_value_heads": 4, **settings})


def real(dtype: torch.dtype, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config(**settings)).to(dtype).train()


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name}


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_step_has_the_same_highest_point(dtype: torch.dtype, checkpoint: bool, release: bool) -> None:
    """Byte by byte, allocations of a CPU step against those of the meta device."""
    planned = trace_step(meta_model(config(), dtype), 2, 128, checkpoint=checkpoint, release=release)
    model = real(dtype)
    ledger = _Ledger(model)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: ledger.gradient(p, release))
    tokens = torch.zeros(2, 128, dtype=torch.int64)
    with checkpointing(model, checkpoint):
        loss_of = NextTokenLoss(model, tokens[0])
        with ledger:
            loss_of(Batch(tokens, None)).backward()
    found = ledger.peak()
    assert found.total == pytest.approx(planned.total, rel=0.01)
    assert found.gradients == pytest.approx(planned.gradients, rel=0.01)


@pytest.mark.parametrize("loss", ["kl", "ce"])
@pytest.mark.parametrize("train", ["pruned", "all"])
def test_what_is_kept_between_steps(loss: Any, train: Any) -> None:
    """Weights, moments, W0, and with a teacher a copy of all else that learns: embeddings, norms, head."""
    settings = ProxSparse(loss=loss, train=train, checkpointing=False)
    model = real(torch.float32)
    linears = linears_of(model)
    planned = settings.memory_of_step(meta_model(config(), torch.float32), list(linears), 16, checkpointing=False).kept
    tokens = torch.randint(0, 100, (1, 16))
    with settings.objective.of(model, linears, tokens[0]) as prepared:
        optimizer = settings.optimizer(model, linears, 10)
        prepared.loss(Batch(tokens, None)).backward()
        optimizer.step()
        optimizer.zero_grad()
        pretrained = prepared.pretrained
        assert pretrained is not None
        state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
        held = [*model.parameters(), *model.buffers(), *state, *pretrained.tensors.values(), *(copy for _, copy in pretrained._others)]
    assert {w0.dtype for w0 in pretrained.tensors.values()} == {torch.float32}  # random weights, which do not fit into bf16
    kept = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}
    assert sum(kept.values()) == pytest.approx(sum(planned.values()), rel=1e-3)


@pytest.mark.parametrize(("checkpoint", "release"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("objective", [Objective(), Objective("kl", "learned"), Objective("ce")], ids=str)
def test_a_real_step_with_masks_and_a_teacher(objective: Objective, checkpoint: bool, release: bool) -> None:
    """The same, from what the objective prepares; few tokens, so that the gradients are the highest point."""
    planned = meta_model(config(), torch.float32)
    step = trace_step(planned, 1, 32, checkpoint=checkpoint, release=release, pruned=linears_of(planned), objective=objective)
    model = real(torch.float32)
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    with checkpointing(model, checkpoint), objective.of(model, linears_of(model), tokens[0]) as prepared:
        ledger = _Ledger(model, prepared.pretrained.tensors.values())
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: ledger.gradient(p, release))
        with ledger:
            prepared.loss(Batch(tokens, None)).backward()
    found = ledger.peak()
    assert found.total == pytest.approx(step.total, rel=0.01)
    assert found.gradients == pytest.approx(step.gradients, rel=0.01)
    assert found.logits == step.logits


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_gradients_of_the_pruned_layers_alone(loss: Any) -> None:
    """At the end of the backward pass of a few tokens they are all there is; of all parameters they are more.

    At the learned weights: of masked ones a block's worth is there too while checkpointing has run it again, and the peak is earlier.
    """
    model = meta_model(config(), torch.bfloat16)
    linears = linears_of(model)
    gradients = {
        train: trace_step(
            model, 1, 4, checkpoint=True, release=False, pruned=linears, objective=Objective(loss, "learned", train)
        ).gradients
        for train in ("pruned", "all")
    }
    last = linears["model.layers.0.self_attn.q_proj.weight"].weight.nbytes  # may be counted once it has a name, after the peak
    pruned = sum(linear.weight.nbytes for linear in linears.values())
    assert pruned - 3 * last <= gradients["pruned"] <= pruned
    assert pruned < gradients["all"] <= sum(p.nbytes for p in model.parameters()) + 16 * GRANULE
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all("forward" not in vars(linear) for linear in linears.values())


@pytest.mark.parametrize(
    ("forward", "checkpoint", "release"),
    [("masked", False, False), ("masked", True, False), ("masked", True, True), ("learned", True, True)],
)
def test_a_teacher_costs_at_most_a_twentieth(forward: Any, checkpoint: bool, release: bool) -> None:
    """Of the peak with cross-entropy, for a quarter of Llama-2-7B with weights and moments kept in the frugal way.

    The errors of the hidden states take the teacher's, and the model's own where no checkpoint keeps them anyway.
    """
    shape = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
    model = meta_model(config(**shape, num_hidden_layers=8), torch.bfloat16)
    linears = linears_of(model)
    with Objective().trainable(model, linears):
        kept = resident(model, linears, Storage(16, "int8", torch.bfloat16))
    kl, plain, ce = (
        trace_step(model, 1, 4096, checkpoint=checkpoint, release=release, pruned=linears, objective=objective)
        for objective in (Objective("kl", forward), Objective("kl", forward, layer_weight=0.0), Objective("ce", forward))
    )
    assert StepMemory(kept, kl).peak <= 1.05 * StepMemory(kept, ce).peak
    assert plain.total - ce.total <= 2**28
    assert kl.total - plain.total <= 8 * (1 if checkpoint else 2) * (4096 * 4096 * 2)
    assert kl.flops > 1.2 * ce.flops  # there is one


@pytest.mark.gpu
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_a_step_on_the_card(kv_heads: int, checkpoint: bool, release: bool) -> None:
    """Within 10 % of what the allocator counts, of a model large enough for it to matter."""
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 32000, "num_attention_heads": 8, "num_key_value_heads": kv_heads}
    planned = trace_step(meta_model(config(**shape), torch.bfloat16), 1, 4096, checkpoint=checkpoint, release=release)
    model = real(torch.bfloat16, **shape).cuda()
    tokens = torch.zeros(1, 4096, dtype=torch.int64, device="cuda")

    def forget(p: Tensor) -> None:
        p.grad = None

    if release:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(forget)
    with checkpointing(model, checkpoint):
        loss_of = NextTokenLoss(model, tokens[0])
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            loss_of(Batch(tokens, None)).backward()
    measured = torch.cuda.max_memory_allocated() - before
    assert planned.total == pytest.approx(measured, rel=0.1)


def test_checkpointing_and_release_lower_the_peak() -> None:
    model = meta_model(config(num_hidden_layers=8), torch.bfloat16)
    both = trace_step(model, 4, 512, checkpoint=True, release=True)
    checkpointed = trace_step(model, 4, 512, checkpoint=True, release=False)
    plain = trace_step(model, 4, 512, checkpoint=False, release=False)
    assert both.total <= checkpointed.total < plain.total / 2
    assert plain.flops < checkpointed.flops < 1.5 * plain.flops
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_flops_are_those_of_the_matrices() -> None:
    """6 x weights of matrices x tokens, and attention's half of 4 T^2 width a layer, three and a half times."""
    model = meta_model(config(), torch.bfloat16)
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    matrices = 6 * weights * 256
    attention = 6 * 3.5 * 2 * 256**2 * 64
    assert trace_step(model, 1, 256, checkpoint=False, release=False).flops == pytest.approx(matrices + attention, rel=0.01)


@pytest.mark.parametrize(("dtype", "kv_heads", "scores"), [("bfloat16", 1, False), ("float32", 4, False), ("float32", 1, True)])
def test_attention_keeps_scores_only_where_no_kernel_exists(dtype: str, kv_heads: int, scores: bool) -> None:
    """From T to 2 T tokens the activations double; with the scores of all pairs they grow by more."""
    model = meta_model(config(num_key_value_heads=kv_heads), getattr(torch, dtype))
    one, two = (trace_step(model, 1, tokens, checkpoint=False, release=False).activations for tokens in (1024, 2048))
    assert (two / one > 3) if scores else (two / one == pytest.approx(2, rel=0.05))


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("weight_bits", [16, 24, 32])
def test_what_stays_is_what_the_optimiser_keeps(weight_bits: int, moments: Any) -> None:
    """Tensors of a real model and of ProxAdamW's state after a step, added up."""
    model = real(torch.bfloat16)
    pruned = {f"{name}.weight" for name in plan_layers(model).selected()}
    named = list(model.named_parameters())
    optimizer = ProxAdamW(
        [{"params": [(n, p) for n, p in named if (n in pruned) == prox], "prox": prox} for prox in (True, False)],
        lambda2=0.5,
        weight_bits=weight_bits,
        moments=moments,
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    found = {"weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())), "moments": 0, "pretrained": 0, "residual": 0}
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and key != "step":
                found[key if key in found else "moments"] += value.nbytes
    storage = Storage(weight_bits, moments, torch.bfloat16)
    assert resident(meta_model(config(), torch.bfloat16), pruned, storage) == pytest.approx(found, rel=0.001)
    assert resident(model, pruned, storage) == pytest.approx(found, rel=0.001)


def test_what_stays_of_other_models() -> None:
    """fp32 weights have no low bits to keep; W0 costs what it is stored in; frozen weights have no state."""
    model = meta_model(config(tie_word_embeddings=True), torch.float32)
    pruned = {f"{name}.weight" for name in plan_layers(model).selected()}
    inside = sum(p.numel() for name, p in model.named_parameters() if name in pruned)
    outside = sum(p.numel() for name, p in model.named_parameters() if name not in pruned)
    kept = resident(model, pruned, Storage(32, "float32", torch.bfloat16))
    assert (kept["residual"], kept["pretrained"], kept["moments"]) == (0, 2 * inside, 8 * (inside + outside))
    assert resident(model, pruned, Storage(32, "float32", torch.float32))["pretrained"] == 4 * inside
    assert resident(model, pruned, Storage(32, "float32", None))["pretrained"] == 0
    for p in model.parameters():
        p.requires_grad_(False)
    assert resident(model, pruned, Storage(24, "float32", torch.float32))["moments"] == 0


def test_items_add_up() -> None:
    model = meta_model(config(), torch.bfloat16)
    step = trace_step(model, 1, 64, checkpoint=False, release=False)
    memory = StepMemory(resident(model, (), Storage(16, "int8", None)), step)
    assert memory.peak == sum(memory.items.values()) == sum(memory.kept.values()) + step.total + WORKSPACE
    assert list(memory.items) == ["weights", "moments", "pretrained", "residual", "gradients", "activations", "logits", "workspace"]


def test_fits_leaves_a_reserve() -> None:
    assert fits(int(100 * (1 - RESERVE)), 100)
    assert not fits(100, 100)


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "GPTNeoX", "Gemma", "Phi3"])
def test_families(kind: str) -> None:
    settings = {"head_dim": 16} if kind == "Gemma" else {"pad_token_id": 0} if kind == "Phi3" else {}
    model = meta_model(config(kind, **settings), torch.bfloat16)
    assert trace_step(model, 1, 64, checkpoint=True, release=False).total > 0


def test_nothing_of_the_configuration_changes() -> None:
    given = config()
    before = given.to_dict(), given._attn_implementation
    model = meta_model(given, torch.bfloat16)
    assert (given.to_dict(), given._attn_implementation) == before
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert type(meta_model(given, torch.float32, kind=transformers.LlamaForCausalLM)) is transformers.LlamaForCausalLM


def test_a_model_that_cannot_be_built() -> None:
    with pytest.raises(ModelError, match=r"plan: expected a model that transformers can build, got .*\. Check config\.json"):
        meta_model(transformers.BertConfig(hidden_act="no such thing", is_decoder=True), torch.bfloat16)


def test_attention_of_its_own() -> None:
    falcon = transformers.FalconConfig(vocab_size=400, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(ModelError, match=r"whose attention can be exchanged, got a falcon\. Leave out --plan, and choose --checkpointing"):
        meta_model(falcon, torch.bfloat16)


@pytest.mark.parametrize("wrong", [RuntimeError, AttributeError, TypeError, IndexError])
def test_whatever_a_model_raises_without_values(wrong: type[Exception]) -> None:
    model = meta_model(config(), torch.bfloat16)

    def stumble(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise wrong("no values")

    model.model.norm.register_forward_pre_hook(stumble)
    with pytest.raises(ModelError, match=r"whose steps can be counted without its weights, got \w+: no values\. Leave out --plan"):
        trace_step(model, 1, 16, checkpoint=False, release=False)


def test_a_step_that_depends_on_values(monkeypatch: pytest.MonkeyPatch) -> None:
    model = meta_model(config(), torch.bfloat16)

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if float(args[0].sum()) > 0:
            raise AssertionError

    model.model.norm.register_forward_pre_hook(look)
    with pytest.raises(ModelError, match=r"whose steps can be counted without its weights, got .*\. Leave out --plan"):
        trace_step(model, 1, 16, checkpoint=False, release=False)


def test_a_model_without_checkpointing() -> None:
    model = real(torch.float32)
    model.supports_gradient_checkpointing = False
    assert not supports_checkpointing(model)
    with pytest.raises(ConfigError, match=r"learning: expected a model with activation checkpointing, got LlamaForCausalLM\. Use --no-"):
        enable_checkpointing(model)
    with checkpointing(model, False):
        pass
    with pytest.raises(ConfigError), checkpointing(model):
        pass


def test_checkpointing_is_off_after_an_error() -> None:
    model = real(torch.float32)
    with pytest.raises(ZeroDivisionError), checkpointing(model):
        _ = 1 / 0
    assert not model.model.gradient_checkpointing
    with checkpointing(model):
        assert model.model.gradient_checkpointing
    assert not model.model.gradient_checkpointing
