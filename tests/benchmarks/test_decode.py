"""`pst bench decode` on a tiny model: both variants by the same code, checked against each other; what fails is a row."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proxsparse_triton.benchmarks import decode
from proxsparse_triton.benchmarks.decode import DENSE, SPARSE, DecodeBench, pruned_model, read_bytes, whole_bytes
from proxsparse_triton.benchmarks.decoder import Decoder, compiled_step, step
from proxsparse_triton.benchmarks.shapes import TINY, build, config_of
from proxsparse_triton.benchmarks.timer import machine
from proxsparse_triton.errors import ConfigError, ModelError, ResourceError
from proxsparse_triton.export import export_run
from proxsparse_triton.inference.convert import sparsify_model
from proxsparse_triton.inference.linear import SparseLinear

CPU = torch.device("cpu")
QUICK = machine("cpu", quick=True)
# A tiny block's four projections and three of the MLP, two blocks.
PRUNED = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)
TABLE = 512 * 128

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny_once() -> nn.Module:
    return pruned_model(TINY, CPU)


@pytest.fixture
def tiny(tiny_once: nn.Module) -> nn.Module:
    return copy.deepcopy(tiny_once)


@pytest.fixture(scope="module")
def folder(tiny_once: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decode") / "small"
    tiny_once.save_pretrained(path)  # type: ignore[operator]
    return path


def run(**settings: Any) -> list[dict[str, Any]]:
    return list(DecodeBench(**{"batch": (2,), "prompt": 8, "new_tokens": 4, "rounds": 1, **settings}).run(QUICK))


def prompts(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(512, (batch, length), generator=torch.Generator().manual_seed(3))


def without_cache(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """Greedy tokens, the whole sequence computed again for each."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[:, -count:]


def greedy(one: Decoder, count: int) -> Tensor:
    one.prefill()
    one.rewind()
    tokens = [one.token.clone()]
    for _ in range(count - 1):
        one.advance()
        tokens.append(one.token.clone())
    return torch.cat(tokens, 1)


def test_rows() -> None:
    rows = run(batch=(1, 2))
    assert [(row["variant"], row["batch"]) for row in rows] == [(DENSE, 1), (DENSE, 2), (SPARSE, 1), (SPARSE, 2)]
    whole = PRUNED + 2 * TABLE + 5 * 128
    for row in rows:
        assert (row["bench"], row["model"], row["prompt"], row["new_tokens"], row["compiled"]) == ("decode", TINY, 8, 4, "no")
        assert row["note"] is None
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["ms_per_step"] * 1e3)
        assert row["ms_20"] <= row["ms_per_step"] <= row["ms_80"]
        assert row["ttft_ms"] > 0
        assert row["peak_bytes"] is row["of_roof"] is row["ttft_graph_ms"] is None
        packed = row["variant"] == SPARSE
        assert row["layers_gb"] == pytest.approx(2 * PRUNED * (9 / 16 if packed else 1) / 1e9)
        assert row["layers_ratio"] == (0.5625 if packed else 1)
        assert row["weight_gb"] == pytest.approx((2 * whole - (2 * PRUNED * 7 / 16 if packed else 0)) / 1e9, rel=1e-3)
        read = row["weight_gb"] - 2 * TABLE / 1e9  # without the embedding
        assert row["gb_per_s"] == pytest.approx(read / row["ms_per_step"] * 1e3)
        assert row["same_tokens"] == f"{4 * row['batch']} of {4 * row['batch']}"
        before = next(other for other in rows if other["variant"] == DENSE and other["batch"] == row["batch"])
        assert row["speed_up"] == pytest.approx(before["ms_per_step"] / row["ms_per_step"])
        assert row["ttft_speed_up"] == pytest.approx(before["ttft_ms"] / row["ttft_ms"])
        assert (row["logits_error"] is None) == (not packed)
    assert max(row["logits_error"] for row in rows[2:]) < 0.01


def test_the_model_is_24(tiny: nn.Module) -> None:
    assert not tiny.training
    weights = decode._pruned_weights(tiny)
    assert len(weights) == 14
    for name, weight in weights.items():
        assert (weight.view(-1, 4) != 0).sum(-1).eq(2).all(), name
        assert not (weight.signbit() & (weight == 0)).any(), name
    assert not any(p.requires_grad for p in tiny.parameters())


def test_decoding_is_the_models_own(tiny: nn.Module) -> None:
    """In fp32, where there are no near-ties: with the static cache, rewound, and without any cache."""
    model = tiny.float()
    one = Decoder(model, prompts(), 8)
    expected = without_cache(model, prompts(), 8)
    assert torch.equal(greedy(one, 8), expected)
    assert torch.equal(greedy(one, 8), expected)
    logits, first = one.logits()
    assert torch.equal(first, expected[:, :1])
    with torch.no_grad():
        ids = torch.cat([prompts(), first], 1)
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, torch.stack([whole[:, -2], whole[:, -1]]))


def test_decoding_packed_is_the_same(tiny: nn.Module) -> None:
    model = tiny.float()
    expected = without_cache(model, prompts(), 8)
    assert torch.equal(greedy(Decoder(sparsify_model(model), prompts(), 8), 8), expected)


def test_a_window_that_is_too_short() -> None:
    config = config_of("qwen2.5-14b")
    small = {"num_hidden_layers": 2, "hidden_size": 80, "intermediate_size": 16, "vocab_size": 32}
    config.update({**small, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16, "use_sliding_window": True})
    model = build(config, CPU).eval()
    with pytest.raises(ConfigError, match="bench decode: expected a prompt and new tokens within the model's attention window, got 64 pos"):
        Decoder(model, prompts() % 32, 8)


def test_bytes_read_in_a_step(tiny: nn.Module) -> None:
    assert whole_bytes(tiny) - read_bytes(tiny) == 2 * TABLE
    tiny.lm_head.weight = tiny.model.embed_tokens.weight  # type: ignore[union-attr]
    assert read_bytes(tiny) == whole_bytes(tiny)


def test_folders_dense_and_packed(folder: Path, tmp_path: Path) -> None:
    export_run(str(folder), tmp_path / "packed", format="packed")
    dense, packed = (run(models=(str(path),)) for path in (folder, tmp_path / "packed"))
    for rows in (dense, packed):
        assert [row["variant"] for row in rows] == [DENSE, SPARSE]
        assert all(row["ms_per_step"] > 0 for row in rows)
        assert [row["layers_gb"] for row in rows] == [2 * PRUNED / 1e9, 2 * PRUNED * 9 / 16 / 1e9]


def test_a_packed_folder_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    export_run(str(folder), tmp_path / "packed", format="packed")
    dense, packed = (pruned_model(str(path), CPU) for path in (folder, tmp_path / "packed"))
    assert not any(isinstance(module, SparseLinear) for module in packed.modules())
    for name, weight in dense.state_dict().items():
        assert torch.equal(packed.state_dict()[name], weight), name


def test_a_folder_that_is_not_24(tmp_path: Path) -> None:
    build(config_of(TINY), CPU).save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    with pytest.raises(ModelError, match=r"bench decode: expected a 2:4 model, got .*dense, none of whose layers is"):
        run(models=(str(tmp_path / "dense"),))


def test_wrong_logits_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module) -> nn.Module:
        model = sparsify_model(model)
        next(module for module in model.modules() if isinstance(module, SparseLinear)).packed[: 64 * 64].zero_()
        return model

    monkeypatch.setattr(decode, "sparsify_model", wrong)
    dense, sparse = run()
    assert dense["ms_per_step"] > 0
    assert sparse["note"] == "wrong: these are not the dense model's logits"
    assert sparse["logits_error"] > decode.LOGITS_TOLERANCE
    assert "ms_per_step" not in sparse


@pytest.mark.parametrize(("error", "note"), [(RuntimeError("broken"), "RuntimeError: broken"), (MemoryError(), "out of memory")])
def test_a_failure_is_a_row_and_the_next_goes_on(error: Exception, note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Decoder.advance

    def fails(self: Decoder) -> None:
        if len(self.token) == 2:
            raise error
        original(self)

    monkeypatch.setattr(Decoder, "advance", fails)
    rows = run(batch=(2, 1))
    assert [row["note"] for row in rows] == [note, None, "no dense result to compare with", None]
    assert [("ms_per_step" in row) for row in rows] == [False, True, False, True]


def test_compiling(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph, in several where that fails, and not at all where nothing does."""
    original = torch.compile
    asked = []

    def fake(function: Any, *, fullgraph: bool, dynamic: bool) -> Any:
        asked.append(fullgraph)
        if fullgraph:
            raise RuntimeError("graph break")
        return original(function, backend="eager", fullgraph=fullgraph, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", fake)
    one = Decoder(tiny.float(), prompts(), 4)
    expected = greedy(one, 4)
    one.step, how = compiled_step(one)
    assert (how, asked) == ("several graphs", [True, False])
    assert torch.equal(greedy(one, 4), expected)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    rows = run(compile=True)
    assert {row["compiled"] for row in rows} == {"no"}
    assert {row["note"] for row in rows} == {"not compiled: RuntimeError: no compiler"}
    assert all(row["ms_per_step"] > 0 for row in rows)


@pytest.mark.parametrize("packed", [False, True])
def test_the_step_is_one_graph(tiny: nn.Module, packed: bool) -> None:
    """So it never looks at a value on the host, and a CUDA graph can hold it."""
    model = sparsify_model(tiny.float()) if packed else tiny.float()
    one = Decoder(model, prompts(), 6)
    expected = greedy(one, 6)
    torch.compiler.reset()
    one.step = torch.compile(step, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(greedy(one, 6), expected)
    torch.compiler.reset()


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def watched(self: Any, model: nn.Module, batch: int, dense: Any) -> Any:
        seen.append((self.name, self.prompt, self.new_tokens, self.compile, self.place.rounds, batch))
        return decode._Found(note="seen")

    monkeypatch.setattr(decode._Session, "measured", watched)
    list(DecodeBench().run(replace(QUICK, rounds=30)))
    assert seen == [(TINY, 16, 8, False, 5, batch) for batch in (1, 2)] * 2
    assert (decode.BATCHES, decode.PROMPT, decode.NEW_TOKENS) == ((1, 8, 32), 128, 64)


def test_a_model_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decode, "build", too_large)
    with pytest.raises(ResourceError, match=r"bench decode: expected room for tiny, got out of memory. Choose a smaller --model."):
        run()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"models": ("gpt",)},
            "bench decode: expected --model of llama-2-7b, llama-3.1-8b, llama-2-13b, qwen2.5-14b, tiny, or a folder, got",
        ),
        ({"batch": (1, 0)}, "bench decode: expected --batch of at least 1, got 0. Choose another value."),
        ({"prompt": 0}, "bench decode: expected --prompt of at least 1, got 0."),
        ({"new_tokens": 0}, "bench decode: expected --new-tokens of at least 1, got 0."),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        DecodeBench(**settings)
    assert message in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_the_card(compiled: bool) -> None:
    bench = DecodeBench(models=(TINY,), batch=(1, 4), prompt=64, new_tokens=16, compile=compiled)
    rows: list[dict[str, Any]] = list(bench.run(machine("cuda", quick=True)))
    assert len(rows) == 4
    for row in rows:
        assert row["note"] is None
        assert row["compiled"] == ("one graph" if compiled else "no")
        assert row["peak_bytes"] > 0
        assert row["ttft_graph_ms"] > 0
        assert 0 < row["of_roof"] < 1
