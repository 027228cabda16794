"""Passes that are replayed from a CUDA graph give what they give without; the rules of when, with a graph that is played by Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

from proxsparse_triton.optim.prox_adamw import ProxAdamW
from proxsparse_triton.training import loop, passes
from proxsparse_triton.training.batches import Batch
from proxsparse_triton.training.loop import LoopConfig, learn
from proxsparse_triton.training.loss import NextTokenLoss
from proxsparse_triton.training.objective import Objective
from proxsparse_triton.training.passes import EAGER, Passes, one_text_a_window


def tiny(device: str = "cpu", layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=28, num_hidden_layers=layers, num_attention_heads=4, initializer_range=0.3
    )
    return LlamaForCausalLM(config).to(device)


def windows(count: int, length: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(48, (length,), generator=generator) for _ in range(count)]


def batch(length: int = 12, *, seed: int = 0, rows: int = 2, mask: bool = False) -> Batch:
    tokens = torch.randint(48, (rows, length), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, torch.ones_like(tokens, dtype=torch.bool) if mask else None)


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in name}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Generator:
    def __init__(self, device: torch.device) -> None:
        pass

    def set_state(self, state: str) -> None:
        self.state = state

    def graphsafe_get_state(self) -> str:
        return self.state


class Played:
    """Stands for torch.cuda: a graph whose replay is the pass itself, on the tokens and into the gradients of the capture."""

    def __init__(self, allocated: int = 10, total: int = 100, error: Exception | None = None) -> None:
        self.allocated, self.total, self.error = allocated, total, error
        self.restored: list[object] = []
        self.streams: list[str] = []
        self.captures = self.replays = 0
        self.default_generators = [SimpleNamespace(get_state=lambda: "before", graphsafe_set_state=self.restored.append)]

    def current_device(self) -> int:
        return 0

    def current_stream(self, device: torch.device) -> str:
        return "this"

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        self.streams.append(stream)
        yield
        self.streams.pop()

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.allocated

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(total_memory=self.total)

    def CUDAGraph(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(replay=self.replay)

    @contextmanager
    def graph(self, graph: object, capture_error_mode: str) -> Iterator[None]:
        self.captures += 1
        assert self.streams == ["this"]
        yield
        if self.error is not None:
            raise self.error

    def replay(self) -> None:
        self.replays += 1
        written = dict(self.passes._gradients)
        with torch.enable_grad():
            found = torch.autograd.grad(self.passes._loss_of(Batch(self.passes._tokens, None)), list(written))
        for gradient, new in zip(written.values(), found, strict=True):
            gradient.copy_(new)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Played, Passes, nn.Module]]:
    def make(*, capture: bool = True, **settings: Any) -> tuple[Played, Passes, nn.Module]:
        cuda, model = Played(**settings), tiny()
        monkeypatch.setattr(passes, "torch", SimpleNamespace(cuda=cuda, Generator=Generator))
        cuda.passes = Passes(NextTokenLoss(model, windows(1)[0]), model.parameters(), capture=capture)
        return cuda, cuda.passes, model

    return make


def step(run: Passes, model: nn.Module, given: Batch) -> dict[str, Tensor]:
    run(given)
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    return found


def by_hand(given: Batch) -> dict[str, Tensor]:
    model = tiny()
    NextTokenLoss(model, windows(1)[0])(given).backward()
    return gradients(model)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_first_passes_run_and_the_next_ones_are_replayed(played: Any) -> None:
    cuda, run, model = played()
    for number in range(EAGER + 3):
        same(step(run, model, batch(seed=number)), by_hand(batch(seed=number)))
        assert cuda.replays == max(0, number + 1 - EAGER)
    assert cuda.captures == 1
    assert run.captured


def test_other_shapes_and_padding_run_in_between(played: Any) -> None:
    cuda, run, model = played()
    for number in range(EAGER + 1):
        step(run, model, batch(seed=number))
    for given in (batch(9), batch(rows=1), batch(mask=True), batch(seed=7)):
        same(step(run, model, given), by_hand(given))
    assert (cuda.captures, cuda.replays) == (1, 2)


@pytest.mark.parametrize(
    ("settings", "captures"),
    [({"capture": False}, 0), ({"allocated": 51}, 0), ({"error": RuntimeError("operation not permitted when stream is capturing")}, 1)],
    ids=["not asked for", "more than half of the memory", "not possible"],
)
def test_passes_that_are_not_captured_run_as_ever(played: Any, settings: dict[str, Any], captures: int) -> None:
    cuda, run, model = played(**settings)
    for number in range(EAGER + 3):
        same(step(run, model, batch(seed=number)), by_hand(batch(seed=number)))
    assert (cuda.captures, cuda.replays, run.captured) == (captures, 0, False)
    assert cuda.restored == ["before"] * captures


def test_the_loss_keeps_nothing_alive(played: Any) -> None:
    _, run, _ = played()
    assert not run(batch()).requires_grad


def test_nothing_is_looked_for_in_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Tensor] = []
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", looked.append)
    before, model = masking_utils.find_packed_sequence_indices, tiny()
    with torch.no_grad():
        expected = model(batch().tokens, use_cache=False).logits
        assert looked
        looked.clear()
        with one_text_a_window():
            found = model(batch().tokens, use_cache=False).logits
        assert not looked
        with pytest.raises(KeyError), one_text_a_window():
            raise KeyError
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert masking_utils.find_packed_sequence_indices == before


@pytest.mark.parametrize(
    ("config", "expected"),
    [({}, False), ({"cuda_graph": False}, False), ({"checkpointing": True}, False), ({"release_gradients": True}, False)],
)
def test_the_loop_asks_on_a_gpu_only(config: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    class Spy(Passes):
        def __init__(self, *args: Any, capture: bool) -> None:
            asked.append(capture)
            super().__init__(*args, capture=capture)

    monkeypatch.setattr(loop, "Passes", Spy)
    model = tiny()
    optimizer = ProxAdamW([{"params": list(model.parameters()), "prox": False}], lambda1=0.0)
    learn(model, windows(2), optimizer, LoopConfig(lr=1e-3, **config))
    assert asked == [expected]


# --- on the card ---------------------------------------------------------------------------------------------------------------------


def learned(cuda_graph: bool, monkeypatch: pytest.MonkeyPatch, loss: Any = "kl", count: int = 23) -> tuple[Any, list[Any], bool]:
    made: list[Passes] = []

    class Spy(Passes):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            made.append(self)

    monkeypatch.setattr(loop, "Passes", Spy)
    model, rows = tiny("cuda"), []
    linears = linears_of(model)
    with Objective(loss if isinstance(loss, str) else "ce").of(model, linears, windows(1)[0].cuda()) as prepared:
        groups = [{"params": [(name, linear.weight)], "prox": True} for name, linear in linears.items()]
        optimizer = ProxAdamW(groups, lambda1=0.5)
        chosen = prepared.loss if isinstance(loss, str) else loss(prepared.loss)
        learn(model, windows(count), optimizer, LoopConfig(lr=1e-2, batch_size=2, cuda_graph=cuda_graph), chosen, record=rows.append)
    return {name: p.detach().cpu() for name, p in model.named_parameters()}, rows, made[0].captured


@pytest.mark.gpu
@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_a_run_with_a_graph_is_a_run_without(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 batches the first three and the last, of one window, run as ever."""
    weights, rows, captured = learned(True, monkeypatch, loss)
    expected, eager, not_captured = learned(False, monkeypatch, loss)
    assert captured
    assert not not_captured
    torch.testing.assert_close([row["loss"] for row in rows], [row["loss"] for row in eager], rtol=2e-3, atol=1e-5)
    moved = sum((weights[name] - expected[name]).square().sum().item() for name in weights)
    start = tiny().state_dict()
    assert moved < 1e-4 * sum((expected[name] - start[name]).square().sum().item() for name in expected)


@pytest.mark.gpu
def test_a_loss_that_waits_for_the_gpu_is_run_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(loss_of: Any) -> Any:
        def run(given: Batch) -> Tensor:
            loss: Tensor = loss_of(given)
            return loss * (1.0 if loss.item() > -1 else 0.0)

        return run

    weights, _, captured = learned(True, monkeypatch, waiting)
    expected, _, _ = learned(False, monkeypatch, "ce")
    assert not captured
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)
    x = torch.ones(1000, device="cuda")
    assert 300 < F.dropout(x, 0.5).count_nonzero().item() < 700  # the random state is not left in the failed capture
    assert learned(True, monkeypatch, "ce")[2]


@pytest.mark.gpu
def test_dropout_differs_from_replay_to_replay() -> None:
    weight = nn.Parameter(torch.ones(1000, device="cuda"))
    run = Passes(lambda given: F.dropout(weight, 0.5).sum(), [weight], capture=True)
    given = Batch(torch.zeros(1, 4, dtype=torch.int64, device="cuda"), None)
    seen = []
    for _ in range(EAGER + 3):
        weight.grad = None
        run(given)
        seen.append(weight.grad.clone())
    assert run.captured
    assert not any(torch.equal(one, other) for i, one in enumerate(seen) for other in seen[:i])


@pytest.mark.gpu
def test_parameters_out_of_reach_have_no_gradient() -> None:
    used, unused = (nn.Parameter(torch.ones(3, device="cuda")) for _ in range(2))
    run = Passes(lambda given: (used * given.tokens.sum()).sum(), [used, unused], capture=True)
    for number in range(EAGER + 3):
        used.grad = None
        run(Batch(torch.full((1, 4), number, device="cuda"), None))
        assert used.grad.tolist() == [4.0 * number] * 3
        assert unused.grad is None
    assert run.captured
