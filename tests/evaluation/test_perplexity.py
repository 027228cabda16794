"""Perplexity: the published figure of the built-in model, the definition in fp64, and every message."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from proxsparse_triton.errors import ConfigError, DataError, ModelError, ResourceError
from proxsparse_triton.evaluation import perplexity as module
from proxsparse_triton.evaluation.perplexity import finite, perplexity
from proxsparse_triton.progress import Progress, Task

ASSET = Path(__file__).parents[2] / "proxsparse_triton" / "assets" / "pylm-2m"
HELDOUT = Path(__file__).parents[1] / "data" / "heldout.jsonl.gz"


def load(dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(ASSET, dtype=dtype)


@pytest.fixture(scope="module")
def model() -> Any:
    return load()


@pytest.fixture(scope="module")
def windows() -> list[Tensor]:
    """The protocol of the built-in model: documents each preceded by token 0, windows of 512, the first 128."""
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    ids: list[int] = []
    with gzip.open(HELDOUT, "rt", encoding="utf-8") as lines:
        for line in lines:
            ids += [0, *tokenizer(json.loads(line)["text"], add_special_tokens=False, verbose=False)["input_ids"]]
            if len(ids) >= 128 * 512:
                break
    return list(torch.tensor(ids[: 128 * 512]).view(128, 512))


class Stub(nn.Module):
    """A model of one parameter that answers as it is told."""

    def __init__(self, answer: Callable[[Tensor], Tensor], vocabulary: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 1)
        self.answer = answer

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(logits=self.answer(input_ids))


def uniform(input_ids: Tensor) -> Tensor:
    return torch.zeros(*input_ids.shape, 8)


def in_fp64(model: nn.Module, windows: list[Tensor]) -> float:
    """The definition, one window at a time, softmax and sums in fp64."""
    total, count = 0.0, 0
    for window in windows:
        with torch.no_grad():
            log_p = model(input_ids=window[None]).logits[0].double().log_softmax(-1)
        total -= sum(float(log_p[t - 1, window[t]]) for t in range(1, len(window)))
        count += len(window) - 1
    return math.exp(total / count)


def magnitude_24(model: nn.Module) -> None:
    """The two smallest of every four weights of the decoder's Linears become zero."""
    for layer in model.get_submodule("model.layers").modules():
        if isinstance(layer, nn.Linear):
            blocks = layer.weight.data.view(-1, 4)
            blocks.scatter_(1, blocks.abs().topk(2, largest=False).indices, 0.0)


def test_published_figure_of_the_built_in_model(model: Any, windows: list[Tensor]) -> None:
    assert perplexity(model, windows, batch_size=4) == pytest.approx(5.870, abs=0.005)


@pytest.mark.slow
def test_published_figure_of_magnitude_pruning(windows: list[Tensor]) -> None:
    pruned = load()
    magnitude_24(pruned)
    assert perplexity(pruned, windows, batch_size=4) == pytest.approx(74.7, rel=0.01)


def test_damage_shows(model: Any, windows: list[Tensor]) -> None:
    pruned = load()
    magnitude_24(pruned)
    assert perplexity(pruned, windows[:4]) > 5 * perplexity(model, windows[:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(model: Any, windows: list[Tensor], dtype: torch.dtype) -> None:
    assert perplexity(load(dtype), windows[:4]) == pytest.approx(perplexity(model, windows[:4]), rel=0.01)


def test_equals_the_definition_in_fp64(model: Any, windows: list[Tensor]) -> None:
    assert perplexity(model, windows[:3]) == pytest.approx(in_fp64(model, windows[:3]), rel=1e-6)


def test_independent_of_batch_and_chunk(model: Any, windows: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    some = windows[:5]
    expected = perplexity(model, some)
    assert perplexity(model, some, batch_size=3) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 100 * 4096 + 17)
    assert perplexity(model, some, batch_size=5) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 17)  # less than one position: still one at a time
    assert perplexity(model, [window[:64] for window in some], batch_size=2) == pytest.approx(
        in_fp64(model, [w[:64] for w in some]), rel=1e-6
    )


def test_tokens_weigh_the_same_in_windows_of_different_length(model: Any, windows: list[Tensor]) -> None:
    mixed = [windows[0], windows[1][:2], windows[2][:100], windows[3][:100], windows[4]]
    assert perplexity(model, mixed, batch_size=4) == pytest.approx(in_fp64(model, mixed), rel=1e-6)


def test_windows_are_independent(model: Any, windows: list[Tensor]) -> None:
    assert perplexity(model, windows[4:0:-1]) == pytest.approx(perplexity(model, windows[1:5]), rel=1e-9)


def test_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    assert perplexity(Stub(uniform), [torch.arange(8)]) == pytest.approx(8.0, rel=1e-7)


def test_hopeless_model_is_infinite_rather_than_an_error() -> None:
    assert perplexity(Stub(lambda ids: -1e4 * F.one_hot(ids.roll(-1), 8).float()), [torch.arange(8)]) == math.inf


def test_upcasts_a_few_positions_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, torch.dtype]] = []

    def spy(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((logits.numel(), logits.dtype))
        return cross_entropy(logits, *args, **kwargs)

    cross_entropy = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", spy)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 24)
    perplexity(Stub(lambda ids: uniform(ids).bfloat16()), [torch.arange(8)] * 4, batch_size=4)
    assert {dtype for _, dtype in seen} == {torch.float32}
    assert max(size for size, _ in seen) <= 24


def test_training_mode_is_restored_for_every_submodule() -> None:
    stub = Stub(lambda ids: torch.full((*ids.shape, 8), math.nan) if stub.training is False else uniform(ids))
    stub.train()
    stub.embedding.eval()
    with pytest.raises(ModelError):
        perplexity(stub, [torch.arange(8)])
    assert stub.training
    assert not stub.embedding.training
    stub.answer = uniform
    perplexity(stub.eval(), [torch.arange(8)])
    assert not stub.training


def test_reports_progress() -> None:
    class Recorder(Progress):
        def __init__(self) -> None:
            self.total: int | None = None
            self.steps: list[int] = []

        def task(self, description: str, total: int | None = None) -> Task:
            recorder, recorder.total = self, total

            class Counter(Task):
                def advance(self, amount: int = 1, **fields: object) -> None:
                    assert fields == {"perplexity": "8.000"}
                    recorder.steps.append(amount)

            return Counter()

    recorder = Recorder()
    perplexity(Stub(uniform), [torch.arange(8)] * 5, batch_size=2, progress=recorder)
    assert recorder.total == 5
    assert recorder.steps == [2, 2, 1]


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([], "expected at least one window of tokens, got none"),
        ([torch.arange(8), torch.arange(8).view(2, 4)], r"got torch.int64 \(2, 4\) as window 2"),
        ([torch.arange(1)], r"L at least 2, got torch.int64 \(1,\) as window 1"),
        ([torch.rand(8)], r"got torch.float32 \(8,\) as window 1"),
        ([torch.arange(8), torch.tensor([0, 8])], "token ids from 0 to 7, got 8 in window 2. The tokenizer does not belong to this model"),
        ([torch.tensor([0, -1])], "token ids from 0 to 7, got -1 in window 1"),
    ],
)
def test_windows_that_cannot_be_evaluated(windows: list[Tensor], message: str) -> None:
    with pytest.raises(DataError, match=message):
        perplexity(Stub(uniform), windows)


def test_batch_size_below_one() -> None:
    with pytest.raises(ConfigError, match="batch_size of at least 1, got 0"):
        perplexity(Stub(uniform), [torch.arange(8)], batch_size=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_names_the_window(value: float) -> None:
    def answer(input_ids: Tensor) -> Tensor:
        logits = uniform(input_ids)
        logits[input_ids[:, 0] == 5] = value
        return logits

    tokens = [torch.arange(8), torch.arange(8), torch.arange(7, -1, -1).roll(-2), torch.arange(8)]
    with pytest.raises(ModelError, match=r"model produces non-finite loss on window 3 of 4\). Check the dtype"):
        perplexity(Stub(answer), tokens, batch_size=2)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_setting(error: BaseException) -> None:
    def answer(input_ids: Tensor) -> Tensor:
        raise error

    with pytest.raises(
        ResourceError, match=r"memory for 2 windows of 8 tokens on cpu, got out of memory. Lower --batch-size, then --seqlen"
    ):
        perplexity(Stub(answer), [torch.arange(8)] * 2, batch_size=2)


def test_other_errors_of_the_model_pass() -> None:
    def answer(input_ids: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        perplexity(Stub(answer), [torch.arange(8)])
    assert not isinstance(caught.value, ResourceError)


@pytest.mark.gpu
def test_same_on_the_gpu(model: Any, windows: list[Tensor]) -> None:
    assert perplexity(load().cuda(), windows[:16], batch_size=4) == pytest.approx(perplexity(model, windows[:16]), rel=1e-3)


def test_a_record_has_null_for_what_json_cannot_hold() -> None:
    assert [finite(value) for value in (None, 3.5, float("inf"), float("nan"))] == [None, 3.5, None, None]
