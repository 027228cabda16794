"""Timing that can be believed.

Work is captured in a CUDA graph, so that no launch overhead is timed. One pass runs over as many copies of the inputs as exceed the L2
cache several times, so that every read comes from memory. Rivals take turns within one run, so that clocks and temperature treat all alike.
The roof, a large device-to-device copy, is one of the rivals. Reported are the median and the 20 and 80 % quantiles.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

WARMUP_ROUNDS = 2
# Copies of the inputs of one pass take more than this many times the L2 cache together ...
L2_FACTOR = 4
# ... and so many bytes, that a pass lasts about a millisecond: starting a graph takes some 10 microseconds.
ROTATED_BYTES = 4_000_000_000
ROOF_BYTES = 1 << 28  # of one copy's source; as much is written. A graph's copy of 1 GiB takes a slower engine (2.8 TB/s, not 4.2, H200).
ROOF_COPIES = 4
MATMUL_SIZE = 8192


@dataclass(frozen=True)
class Rival:
    """One way to do the work. `work` makes one pass over all copies of the inputs, which are `calls` operations."""

    name: str
    work: Callable[[], object]
    calls: int = 1
    capture: bool = True  # as a CUDA graph; False where the host must take part: timed with events around eager calls
    reset: Callable[[], object] | None = None  # before every pass, not timed
    every: int = 1  # takes part in every n-th round: slow work needs few repeats


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 20 and 80 % quantile."""

    median: float
    low: float
    high: float
    samples: int

    @property
    def us(self) -> float:
        """The median in microseconds, as rows have it: a ratio of two is to the last bit what their columns give."""
        return 1e6 * self.median


class Clock(Protocol):
    def prepare(self, rival: Rival) -> Callable[[], object]:
        """Warms up; returns what starts one pass."""

    def mark(self) -> Any:
        """This moment in the order of the work."""

    def finish(self) -> None:
        """Waits for all work."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks, after `finish`."""


class HostClock:
    """`time.perf_counter`, for work that has ended when the call returns."""

    def prepare(self, rival: Rival) -> Callable[[], object]:
        rival.work()
        return rival.work

    def mark(self) -> float:
        return time.perf_counter()

    def finish(self) -> None:
        pass

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """Events on the current stream. Passes are queued far ahead of the GPU, so that it never waits for the host between two marks."""

    def prepare(self, rival: Rival) -> Callable[[], object]:
        if not rival.capture:
            rival.work()
            torch.cuda.synchronize()
            return rival.work
        # Kernels are compiled, and libraries take their workspaces, before the capture, on a side stream as graphs want it.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            rival.work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rival.work()
        return graph.replay

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def finish(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) / 1e3


def measure(rivals: Sequence[Rival], clock: Clock, rounds: int) -> dict[str, Timing]:
    """Round robin over the rivals, `rounds` times after a warm-up; name -> timing of one call."""
    passes = {rival.name: clock.prepare(rival) for rival in rivals}
    marks: dict[str, list[tuple[Any, Any]]] = {rival.name: [] for rival in rivals}
    for index in range(-WARMUP_ROUNDS, rounds):
        for rival in rivals:
            if index % rival.every:
                continue
            if rival.reset is not None:
                rival.reset()
            start = clock.mark()
            passes[rival.name]()
            end = clock.mark()
            if index >= 0:
                marks[rival.name].append((start, end))
    clock.finish()
    return {rival.name: summary([clock.seconds(*pair) / rival.calls for pair in marks[rival.name]]) for rival in rivals}


def summary(seconds: Sequence[float]) -> Timing:
    """Median and quantiles of one rival's samples."""
    import numpy

    low, median, high = numpy.quantile(seconds, [0.2, 0.5, 0.8]).tolist()
    return Timing(median, low, high, len(seconds))


@dataclass(frozen=True)
class Machine:
    """Where and how carefully to measure."""

    device: torch.device
    clock: Clock
    rounds: int
    rotated: int  # bytes that the copies of one pass take together

    def copies(self, size: int) -> int:
        """How many copies of `size` bytes one pass rotates over."""
        return max(1, math.ceil(self.rotated / size))


def machine(device: str, *, quick: bool = False) -> Machine:
    """The settings for a device: "cuda" or "cpu". `quick`: few rounds, for a smoke test."""
    if device == "cpu":
        return Machine(torch.device("cpu"), HostClock(), 3 if quick else 5, 0)
    least = L2_FACTOR * torch.cuda.get_device_properties(device).L2_cache_size + 1
    return Machine(torch.device(device), CudaClock(), 3 if quick else 30, least if quick else max(least, ROTATED_BYTES))


class Roof:
    """What memory can do: `copy_` of one large tensor. Bytes read and bytes written both count."""

    NAME = "copy of a large tensor"

    def __init__(self, place: Machine) -> None:
        size = ROOF_BYTES if place.device.type == "cuda" else ROOF_BYTES >> 4
        self._source, self._target = (torch.rand(ROOF_COPIES, size // 4, device=place.device) for _ in range(2))
        self._moved = 2 * self._source[0].nbytes
        self._on_gpu = self._source.is_cuda
        self.rival = Rival(self.NAME, self._copy, ROOF_COPIES)

    def _copy(self) -> None:
        for source, target in zip(self._source, self._target, strict=True):
            target.copy_(source)

    def figures(self, timings: Mapping[str, Timing], name: str, moved: float) -> dict[str, object]:
        """The columns of a rival whose call moves `moved` bytes. No share of the roof on a CPU, where caches beat it."""
        timing, roof = timings[name], self._moved / timings[self.NAME].median
        rate = moved / timing.median
        return {
            "us": timing.us,
            "us_20": 1e6 * timing.low,
            "us_80": 1e6 * timing.high,
            "gb_per_s": rate / 1e9,
            "roof_gb_per_s": roof / 1e9 if self._on_gpu else None,
            "of_roof": rate / roof if self._on_gpu else None,
            "samples": timing.samples,
        }


def matmul_rate(place: Machine) -> float:
    """FLOP per second of a large bf16 matrix product of random numbers (zeros would draw less power and run faster)."""
    n = MATMUL_SIZE if place.device.type == "cuda" else MATMUL_SIZE >> 5
    a, b = (torch.randn(n, n, device=place.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    timing = measure([Rival("matmul", lambda: torch.mm(a, b, out=out))], place.clock, place.rounds)["matmul"]
    return 2 * n**3 / timing.median


def scratch_bytes(work: Callable[[], object], device: torch.device, output: int = 0) -> int | None:
    """Bytes of GPU memory that `work` takes beyond what is there and beyond its new `output`, at the highest point; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = work()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before - output
