"""The timer on a clock of our own: who runs when, what is timed, and what the figures mean."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from proxsparse_triton.benchmarks import timer
from proxsparse_triton.benchmarks.timer import (
    WARMUP_ROUNDS,
    HostClock,
    Machine,
    Rival,
    Roof,
    Timing,
    machine,
    matmul_rate,
    measure,
    scratch_bytes,
)


class FakeClock:
    """Time passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.prepared: list[str] = []
        self.finished = False

    def work(self, name: str, *durations: float) -> Callable[[], None]:
        """Takes the durations in turn, then the last one for ever."""
        left = list(durations)

        def run() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run

    def prepare(self, rival: Rival) -> Callable[[], object]:
        self.prepared.append(rival.name)
        return rival.work

    def mark(self) -> float:
        return self.now

    def finish(self) -> None:
        self.finished = True

    def seconds(self, start: float, end: float) -> float:
        assert self.finished, "events are read after the work has ended"
        return end - start


def test_rivals_take_turns_and_the_warm_up_is_not_counted() -> None:
    clock = FakeClock()
    slow_start = (100.0,) * WARMUP_ROUNDS
    found = measure([Rival("a", clock.work("a", *slow_start, 2.0)), Rival("b", clock.work("b", 3.0))], clock, 4)
    assert clock.prepared == ["a", "b"]
    assert clock.log == ["a", "b"] * (WARMUP_ROUNDS + 4)
    assert found == {"a": Timing(2.0, 2.0, 2.0, 4), "b": Timing(3.0, 3.0, 3.0, 4)}


def test_seconds_of_one_call_and_quantiles() -> None:
    clock = FakeClock()
    passes = [9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]  # 2 of warm-up, 6 counted
    found = measure([Rival("a", clock.work("a", *passes), calls=10)], clock, 6)["a"]
    assert found.median == pytest.approx(0.35)
    assert (found.low, found.high) == (pytest.approx(0.2), pytest.approx(0.5))
    assert found.samples == 6


def test_a_reset_is_not_timed() -> None:
    clock = FakeClock()
    found = measure([Rival("a", clock.work("a", 1.0), reset=clock.work("reset", 50.0))], clock, 3)
    assert found["a"].median == 1.0
    assert clock.log == ["reset", "a"] * (WARMUP_ROUNDS + 3)


def test_slow_rivals_take_part_in_few_rounds() -> None:
    clock = FakeClock()
    found = measure([Rival("fast", clock.work("f", 1.0)), Rival("slow", clock.work("s", 7.0), every=4)], clock, 9)
    assert (found["fast"].samples, found["slow"].samples) == (9, 3)
    assert found["slow"].median == 7.0


def test_copies_exceed_the_cache() -> None:
    place = Machine(torch.device("cpu"), HostClock(), 1, 1000)
    assert [place.copies(size) for size in (1, 400, 999, 1000, 5000)] == [1000, 3, 2, 1, 1]


def test_a_machine_without_gpu() -> None:
    place = machine("cpu")
    assert isinstance(place.clock, HostClock)
    assert place.copies(10) == 1
    assert machine("cpu", quick=True).rounds < place.rounds


def test_the_cuda_settings_rotate_past_l2(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = type("Properties", (), {"L2_cache_size": 50 * 2**20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for quick in (False, True):
        assert machine("cuda", quick=quick).rotated > 4 * properties.L2_cache_size
    assert machine("cuda").rotated >= timer.ROTATED_BYTES


def test_host_clock_times_real_work() -> None:
    x = torch.randn(200, 200)
    found = measure([Rival("one", lambda: x @ x), Rival("many", lambda: [x @ x for _ in range(20)])], HostClock(), 5)
    assert 0 < found["one"].median < found["many"].median


def test_figures_of_a_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer, "ROOF_BYTES", 1 << 16)
    roof = Roof(machine("cpu"))
    timings = {"a": Timing(2e-3, 1e-3, 3e-3, 7), Roof.NAME: Timing(1e-3, 1e-3, 1e-3, 7)}
    figures = roof.figures(timings, "a", 4e6)
    assert [figures[key] for key in ("us", "us_20", "us_80")] == pytest.approx([2000, 1000, 3000])
    assert figures["gb_per_s"] == pytest.approx(2.0)
    assert figures["of_roof"] is None  # a share of the copy bandwidth means nothing in a CPU's caches
    assert measure([roof.rival], HostClock(), 2)[Roof.NAME].median > 0


def test_the_roof_counts_bytes_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer, "ROOF_BYTES", 1 << 16)
    roof = Roof(machine("cpu"))
    moved = 2 * ((1 << 16) >> 4)
    monkeypatch.setattr(roof, "_on_gpu", True)  # a CPU has no roof
    timings = {"a": Timing(4.0, 4.0, 4.0, 1), Roof.NAME: Timing(2.0, 2.0, 2.0, 1)}
    figures = roof.figures(timings, "a", moved)
    assert figures["roof_gb_per_s"] == pytest.approx(moved / 2.0 / 1e9)
    assert figures["of_roof"] == pytest.approx(0.5)


def test_scratch_is_not_known_on_a_cpu() -> None:
    assert scratch_bytes(lambda: None, torch.device("cpu")) is None


def test_matmul_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer, "measure", lambda rivals, clock, rounds: {"matmul": Timing(0.5, 0.5, 0.5, rounds)})
    assert matmul_rate(machine("cpu")) == 2 * (timer.MATMUL_SIZE >> 5) ** 3 / 0.5


@pytest.mark.gpu
def test_a_graph_replays_every_copy() -> None:
    place = machine("cuda", quick=True)
    inputs = [torch.full((1 << 20,), float(i), device="cuda") for i in range(8)]
    outputs = [torch.zeros_like(x) for x in inputs]

    def work() -> None:
        for x, out in zip(inputs, outputs, strict=True):
            torch.add(x, 1, out=out)

    replay = place.clock.prepare(Rival("add", work, 8))
    for out in outputs:
        out.zero_()
    replay()
    place.clock.finish()
    assert [out[0].item() for out in outputs] == [i + 1 for i in range(8)]
    timings = measure([Rival("add", work, 8), Rival("eager", work, 8, capture=False)], place.clock, 5)
    assert 0 < timings["add"].median <= timings["eager"].median * 1.5


@pytest.mark.gpu
def test_the_roof_and_scratch_on_the_card() -> None:
    place = machine("cuda", quick=True)
    roof = Roof(place)
    figures = roof.figures(measure([roof.rival], place.clock, 5), Roof.NAME, 2 * timer.ROOF_BYTES)
    assert figures["of_roof"] == pytest.approx(1.0)
    assert 100 < figures["gb_per_s"] < 20_000  # type: ignore[operator]
    assert scratch_bytes(lambda: torch.empty(1 << 20, dtype=torch.uint8, device="cuda"), place.device, 1 << 20) == 0
    assert scratch_bytes(lambda: torch.empty(1 << 22, dtype=torch.uint8, device="cuda"), place.device) == 1 << 22
