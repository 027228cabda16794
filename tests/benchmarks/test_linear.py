"""`pst bench linear`: what is measured, that nothing wrong is timed and no rival takes others down, which way is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from proxsparse_triton.benchmarks import linear, ways
from proxsparse_triton.benchmarks.linear import TOKENS, LinearBench, fastest, linear_shapes, summarise
from proxsparse_triton.benchmarks.timer import HostClock, Machine, Rival, Timing, machine
from proxsparse_triton.benchmarks.ways import DEFAULT, DENSE, KERNEL, LIBRARY, OURS, UNPACKED, Layer, traffic
from proxsparse_triton.errors import BackendError, ConfigError
from proxsparse_triton.inference import choice
from proxsparse_triton.inference.choice import Entry, Key, Point, choose, load_table, table_path, temporary_table
from proxsparse_triton.inference.library import Library

CPU = torch.device("cpu")
QUICK = machine("cpu", quick=True)
CARD = Machine(torch.device("cuda"), HostClock(), 30, 10**10)  # its cases can be listed without one
SHAPE = (64, 128)
GPU = "NVIDIA Some GPU"

Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PROXSPARSE_CACHE_DIR", str(tmp_path / "cache"))
    choice._forget()
    yield
    choice._forget()


def run(place: Machine = QUICK, **settings: Any) -> Rows:
    return list(LinearBench(**{"shapes": (SHAPE,), "tokens": (1, 64), "rounds": 1, **settings}).run(place))


def times(**milliseconds: float) -> dict[str, Timing]:
    return {name: Timing(value / 1e3, value / 1e3, value / 1e3, 1) for name, value in milliseconds.items()}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """A cuSPARSELt that runs on a CPU; returns the algorithms that it was called with."""
    called: list[tuple[int, int, int]] = []

    def multiply(
        name: str, blob: Tensor, values: Tensor, metadata: Tensor, x: Tensor, bias: None, algorithm: tuple[int, int, int]
    ) -> Tensor:
        called.append(algorithm)
        words = metadata.view(len(values), -1)
        return x @ ways.SparseLinear.from_packed(values, words).weight.T

    monkeypatch.setattr(ways, "find_library", lambda device: Library("cusparselt", "there"))
    monkeypatch.setattr(ways, "search_algorithm", lambda blob, x: (7, 2, 1))
    monkeypatch.setattr(ways, "multiply", multiply)
    return called


def test_shapes_are_what_runs() -> None:
    assert linear_shapes("llama-2-7b") == [(4096, 4096), (11008, 4096), (4096, 11008), (12288, 4096), (22016, 4096)]
    assert (1024, 4096) in linear_shapes("llama-3.1-8b")  # key and value
    assert {(6144, 4096), (28672, 4096)} < set(linear_shapes("llama-3.1-8b"))
    assert {(15360, 5120), (27648, 5120)} < set(linear_shapes("llama-2-13b"))
    assert {(7168, 5120), (27648, 5120)} < set(linear_shapes("qwen2.5-14b"))


def test_defaults() -> None:
    bench = LinearBench()
    assert bench._shapes(CARD) == linear_shapes("llama-2-7b")
    assert bench._tokens(CARD) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
    assert bench._shapes(QUICK) == [linear.CPU_SHAPE]
    assert LinearBench(models=("tiny",), shapes=((128, 128), (8, 8)))._shapes(CARD) == [(128, 128), (8, 8), *linear_shapes("tiny")[1:]]
    assert LinearBench(tokens=(300, 3, 3))._tokens(CARD) == [3, 300]
    assert LinearBench(tokens=(300,), save=True)._tokens(CARD) == sorted([*TOKENS, 300])  # else 300 alone would speak for all counts


def test_rounds_and_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few of both unless asked for: five shapes at fifteen counts have to end."""
    seen: list[Machine] = []

    def watched(shape: object, place: Machine, tokens: int) -> Layer:
        seen.append(place)
        raise RuntimeError("stop")

    monkeypatch.setattr(linear.Layer, "random", watched)
    for rounds, expected in ((None, 7), (30, 30)):
        (row,) = run(place=Machine(CPU, HostClock(), 30, 10**10), rounds=rounds)
        assert (row["backend"], row["note"]) == ("all", "RuntimeError: stop")
        assert (seen[-1].rounds, seen[-1].rotated) == (expected, linear.ROTATED)


def test_rows() -> None:
    rows = run()
    assert [(row["tokens"], row["backend"]) for row in rows] == [
        *((1, name) for name in (DENSE, KERNEL, LIBRARY, OURS)),
        *((64, name) for name in (DENSE, KERNEL, UNPACKED, LIBRARY, OURS)),
    ]
    for row in rows:
        assert (row["bench"], row["out"], row["in"], row["dtype"], row["mode"]) == ("linear", *SHAPE, "bfloat16", "eager")
        if row["backend"] == LIBRARY:
            assert row["note"] == "none: not a CUDA GPU"
            assert "us" not in row
            continue
        assert row["us_20"] <= row["us"] <= row["us_80"]
        assert row["speed_up"] == row["dense_us"] / row["us"]
        assert row["gb_per_s"] == pytest.approx(traffic(SHAPE, row["tokens"], packed=row["backend"] != DENSE) / row["us"] / 1e3)
    assert {row["chosen"] for row in rows if row["backend"] == OURS} <= {"kernel", "dense"}


def test_where_the_kernel_and_unpacking_take_part() -> None:
    rows = run(tokens=(63, 512, 513))
    took = {(row["tokens"], row["backend"]) for row in rows}
    assert {(63, KERNEL), (512, KERNEL), (512, UNPACKED), (513, UNPACKED)} < took
    assert not {(63, UNPACKED), (513, KERNEL)} & took


def test_bytes() -> None:
    """4 tokens: x 4 x 128, y 4 x 64, the weight 64 x 128, or half of it and a nibble for four."""
    assert traffic(SHAPE, 4) == 2 * (4 * 128 + 4 * 64 + 64 * 128)
    assert traffic(SHAPE, 4, packed=True) == 2 * (4 * 128 + 4 * 64 + 64 * 64) + 64 * 32 // 2
    layer = Layer.random(SHAPE, QUICK, 1)
    assert layer.packed[0].packed.nbytes == traffic(SHAPE, 0, packed=True)


def test_a_layer_is_the_same_dense_and_packed() -> None:
    layer = Layer.random(SHAPE, Machine(CPU, HostClock(), 1, 100_000), 1)
    assert len(layer.dense) == len(layer.packed) == -(-100_000 // traffic(SHAPE, 1))
    assert len(Layer.random(SHAPE, Machine(CPU, HostClock(), 1, 10**10), 1).dense) == ways.MOST_COPIES
    assert len({w.data_ptr() for w in layer.dense} | {one.packed.data_ptr() for one in layer.packed}) == 2 * len(layer.dense)
    for w, one in zip(layer.dense, layer.packed, strict=True):
        assert torch.equal(w, one.weight)
    assert (layer.dense[0].view(-1, 4) != 0).sum(-1).eq(2).all()
    assert not (layer.dense[0].signbit() & (layer.dense[0] == 0)).any()


@pytest.mark.parametrize(
    ("broken", "note"),
    [
        (lambda x, blob, bias, layout, first, rows, shape: x.new_zeros(shape), "wrong: 100.00% from the fp32 product's answers"),
        (lambda x, blob, bias, layout, first, rows, shape: x.new_full(shape, torch.nan), "wrong: nan% from"),
        (lambda x, blob, bias, layout, first, rows, shape: blob[10**9], "IndexError: "),
        (lambda x, blob, bias, layout, first, rows, shape: None, "the kernel does not take this shape"),
    ],
)
def test_a_wrong_or_failing_way_is_a_row(broken: Callable[..., Tensor], note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "by_kernel", broken)
    rows = run(tokens=(64,))
    (row,) = (row for row in rows if row["backend"] == KERNEL)
    assert row["note"].startswith(note)
    assert "us" not in row
    assert all(row["us"] > 0 for row in rows if row["backend"] in (DENSE, UNPACKED, OURS))


def test_one_wrong_column_is_seen() -> None:
    layer = Layer.random((64, 1024), QUICK, 1)
    x = torch.randn(300, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    right = x @ layer.dense[0].T
    wrong = right.clone()
    wrong[:, 5] = 0
    last = right.clone()
    last[299, 63] += 0.5
    found, failures = ways.checked(
        [ways.Way(name, lambda _, y=y: y) for name, y in (("right", right), ("wrong", wrong), ("last", last))], layer.dense[0], x
    )
    assert [way.name for way in found] == ["right"]
    assert set(failures) == {"wrong", "last"}


class BrokenClock(HostClock):
    """Fails where the named rivals warm up, as a graph's capture may, or while it measures."""

    def __init__(self, *names: str, finish: bool = False) -> None:
        self.names, self._finish = names, finish

    def prepare(self, rival: Rival) -> Callable[[], object]:
        if rival.name in self.names:
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().prepare(rival)

    def finish(self) -> None:
        if self._finish:
            raise RuntimeError("an illegal instruction was encountered")


def failed_notes(clock: BrokenClock) -> dict[str, str]:
    rows = run(Machine(CPU, clock, 1, 0), tokens=(64,))
    return {row["backend"]: row["note"] for row in rows if "note" in row and row["backend"] != LIBRARY}


def test_a_failing_capture_takes_no_other_with_it() -> None:
    assert failed_notes(BrokenClock(KERNEL)) == {KERNEL: "RuntimeError: operation not permitted when stream is capturing"}
    assert set(failed_notes(BrokenClock(OURS))) == {OURS}
    assert set(failed_notes(BrokenClock(DENSE))) == {DENSE, KERNEL, UNPACKED}
    assert set(failed_notes(BrokenClock(finish=True))) == {DENSE, KERNEL, UNPACKED}


def test_out_of_memory_is_a_row_and_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    original = linear.all_ways

    def too_large(layer: Layer, x: Tensor) -> Any:
        if len(x) == 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(layer, x)

    monkeypatch.setattr(linear, "all_ways", too_large)
    rows = run(tokens=(64, 65))
    assert (rows[0]["backend"], rows[0]["tokens"], rows[0]["note"]) == ("all", 64, "out of memory")
    assert {row["tokens"] for row in rows[1:]} == {65}


def test_the_library_with_its_searched_and_its_default_algorithm(library: list[tuple[int, int, int]]) -> None:
    rows = run(tokens=(1, 2, 4, 5))
    algorithms = {(row["tokens"], row["backend"]): row["algorithm"] for row in rows if row["backend"] in (LIBRARY, DEFAULT)}
    assert algorithms == {(n, LIBRARY): "7/2/1" for n in (1, 2, 4, 5)} | {(n, DEFAULT): "0/1/-1" for n in (1, 4)}
    assert set(library) == {(7, 2, 1), (0, 1, -1)}


@pytest.mark.usefixtures("library")
def test_a_refused_shape_is_a_row() -> None:
    rows = run(shapes=((8, 8),), tokens=(1,))
    assert [row["note"] for row in rows if row["backend"] == LIBRARY] == ["cusparselt does not take 8x8"]


def test_the_fastest_is_chosen() -> None:
    timings = times(**{DENSE: 1.0, KERNEL: 3.0, LIBRARY: 2.0, UNPACKED: 4.0, DEFAULT: 0.5})
    assert fastest(64, timings, (7, 2, 1)) == Point(64, "library", (7, 2, 1))
    assert fastest(64, timings | times(**{KERNEL: 1.5}), (7, 2, 1)) == Point(64, "kernel")
    assert fastest(64, timings | times(**{UNPACKED: 1.5}), (7, 2, 1)) == Point(64, "dense")
    assert fastest(64, times(**{DENSE: 1.0}), None) == Point(64, "dense")
    # In eager code a call of cuSPARSELt counts a millisecond at least; CUTLASS has no algorithm, and counts as measured.
    for milliseconds, expected in ((0.9, "kernel"), (1.1, "library")):
        both = times(**{KERNEL: milliseconds, LIBRARY: 0.5})
        assert fastest(64, both, (7, 2, 1), "eager").backend == expected
        assert fastest(64, both, (7, 2, 1), "graph").backend == fastest(64, both, None, "eager").backend == "library"


def test_break_even_points() -> None:
    def row(backend: str, tokens: int, speed_up: float | None, mode: str = "graph") -> dict[str, Any]:
        return {"backend": backend, "out": 64, "in": 128, "mode": mode, "tokens": tokens, "speed_up": speed_up}

    rows = [row(KERNEL, n, s) for n, s in ((1, 1.7), (2, 1.6), (4, 0.9), (8, 1.1), (16, 0.5))]
    rows += [row(LIBRARY, n, s) for n, s in ((1, 1.2), (2, 0.6), (4, 1.0), (8, 1.1), (16, 1.3))]
    rows += [row(OURS, n, s) for n, s in ((4, 0.97), (8, 1.1), (1, 1.7))]
    rows += [
        row(KERNEL, 1, 0.9, "eager"),
        row(LIBRARY, 1, 0.1, "eager"),
        row(DEFAULT, 1, 2.0, "eager"),
        {"backend": UNPACKED, "note": "failed"},
    ]
    graph, eager = summarise(rows)
    assert graph == {"shape": "64x128", "mode": "graph", "kernel_until": 2, "library_from": 4, "lowest": 0.97, "lowest_at": 4}
    assert eager == {"shape": "64x128", "mode": "eager", "kernel_until": None, "library_from": None, "lowest": None, "lowest_at": None}
    assert summarise([]) == []


def test_saved_choices_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_table_name", lambda device: GPU)
    monkeypatch.setattr(linear, "CPU_TOKENS", (1, 64))
    rows = run(tokens=(16,), save=True)
    chosen = {row["tokens"]: row["chosen"] for row in rows if row["backend"] == OURS}
    assert set(chosen) == {1, 16, 64}
    table = load_table(table_path(GPU))
    assert table == {Key("bfloat16", *SHAPE, "eager"): tuple(Point(n, backend) for n, backend in chosen.items())}


def test_nothing_is_saved_unasked() -> None:
    run()
    assert not table_path(GPU).parent.exists()
    assert not choice._TEMPORARY


def test_sparse_linear_uses_what_was_just_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(choice, "has_kernel", lambda device: True)  # else the kernel is no choice on a CPU
    monkeypatch.setattr(linear, "fastest", lambda tokens, timings, algorithm, mode: Point(tokens, "kernel"))
    monkeypatch.setattr(
        linear,
        "checked",
        lambda found, w, x: seen.append(choose(CPU, torch.bfloat16, *SHAPE, len(x), captured=True).backend) or (found, {}),
    )
    run()
    assert seen == ["kernel", "kernel"]
    assert choose(CPU, torch.bfloat16, *SHAPE, 64, captured=True) == Point(choice.KERNEL_MOST, "kernel")  # the built-in threshold
    assert choose(CPU, torch.bfloat16, *SHAPE, choice.KERNEL_MOST + 1, captured=True).backend == "dense"


def test_a_temporary_table() -> None:
    key = Key("bfloat16", 4, 4, "eager")
    with temporary_table([Entry(key, (Point(1, "kernel"),))]):
        with temporary_table([Entry(key, (Point(2, "kernel"),))]):
            assert choice._TEMPORARY[key][0].tokens == 2
        assert choice._TEMPORARY[key][0].tokens == 1
    assert not choice._TEMPORARY


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": ("gpt",)}, "bench linear: expected --model of llama-2-7b, llama-3.1-8b, llama-2-13b, qwen2.5-14b, tiny, got 'gpt'."),
        ({"tokens": (4, 0)}, "bench linear: expected --tokens of at least 1, got 0. Choose another value."),
        ({"shapes": ((8, 6),)}, "bench linear: expected --shape OUTxIN with IN divisible by 4, got 8x6. Choose another."),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        LinearBench(**settings)
    assert message in str(error.value)


def test_a_cpu_has_no_choices_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "Roof", lambda place: pytest.fail("measured"))
    with pytest.raises(BackendError, match="bench linear: expected a CUDA GPU for --save, got none"):
        run(save=True)


@pytest.mark.gpu
def test_on_the_card() -> None:
    rows = list(LinearBench(shapes=((1024, 1024),), tokens=(1, 64, 1024), save=True).run(machine("cuda", quick=True)))
    timed = [row for row in rows if "us" in row]
    assert {row["mode"] for row in timed} == {"graph", "eager"}
    assert {(row["backend"], row["tokens"]) for row in timed} >= {(DENSE, 1), (KERNEL, 1), (OURS, 1), (UNPACKED, 64), (OURS, 1024)}
    assert all(0 < row["of_roof"] < 3 for row in timed if row["mode"] == "graph")  # type: ignore[operator]
    entries = load_table(table_path(torch.cuda.get_device_name()))
    assert {key.mode for key in entries} == {"graph", "eager"}
    assert all([point.tokens for point in points] == list(TOKENS) for points in entries.values())
