"""`pst bench linear`: a linear layer on its packed 2:4 weight, each way to multiply against the dense one, from 1 to 16,384 tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import BackendError, ConfigError
from ..inference.choice import Entry, Key, Point, dtype_name, save_table, temporary_table
from ..inference.library import Algorithm, find_library
from ..progress import SILENT, Progress
from .prox import check_shapes
from .shapes import MODELS
from .table import Row
from .timer import Machine, Roof, Timing
from .ways import (
    DENSE,
    DTYPE,
    KERNEL,
    LIBRARY,
    OURS,
    UNPACKED,
    Failures,
    Layer,
    Shape,
    Way,
    all_ways,
    checked,
    dense_way,
    our_way,
    reason,
    timed,
    traffic,
)

TOKENS = tuple(2**power for power in range(15))  # 1 to 16,384
CPU_SHAPE, CPU_TOKENS = (512, 1024), (1, 16, 128)
MODES = ("graph", "eager")  # replayed by a CUDA graph; as a user calls it
ROUNDS = 7
# Of weights, inputs and outputs in one pass: twenty times the L2 cache of an H200, and a quarter of a millisecond.
ROTATED = 1_000_000_000
BACKENDS = {KERNEL: "kernel", LIBRARY: "library", UNPACKED: "dense"}  # between which SparseLinear chooses, by its names for them
ALL = "all"  # in a row about every way
EAGER_CALL = 1e-3  # seconds of the host that a call of cuSPARSELt takes at most; from 0.3 ms on, from one minute to the next


@dataclass(frozen=True)
class LinearBench:
    """models: their linear layers, and those that run as one; shapes: these too. Neither: the first of MODELS.

    tokens: None: TOKENS. save: SparseLinear uses the choices from now on; TOKENS are measured in any case then.
    """

    models: tuple[str, ...] = ()
    shapes: tuple[Shape, ...] = ()
    tokens: tuple[int, ...] | None = None
    save: bool = False
    rounds: int | None = None

    def __post_init__(self) -> None:
        check_shapes("bench linear", self.shapes)
        for name in self.models:
            if name not in MODELS:
                raise ConfigError(f"bench linear: expected --model of {', '.join(MODELS)}, got {name!r}. Choose one of these.")
        for count in self.tokens or ():
            if count < 1:
                raise ConfigError(f"bench linear: expected --tokens of at least 1, got {count}. Choose another value.")

    def run(self, place: Machine, progress: Progress = SILENT) -> Iterator[Row]:
        """One row per way to multiply, shape, count of tokens and mode. What fails, or is wrong, has a row with the reason.

        Raises: BackendError: `save` without a GPU. OutputError: the choices cannot be written.
        """
        table = _table_name(place.device) if self.save else None
        place = dataclasses.replace(place, rounds=self.rounds or min(place.rounds, ROUNDS), rotated=min(place.rotated, ROTATED))
        progress.note(f"Library: {find_library(place.device).reason}")
        roof = Roof(place)
        shapes, counts = self._shapes(place), self._tokens(place)
        with progress.task("linear", total=len(shapes) * len(counts)) as bar:
            for shape in shapes:
                choices = Choices(shape)
                try:
                    layer = Layer.random(shape, place, counts[0])
                except Exception as error:  # out of memory, or a kernel that fails
                    yield Case(shape).facts(ALL) | {"note": reason(error)}
                    continue
                for tokens in counts:
                    yield from _measured(layer, tokens, choices, place, roof)
                    bar.advance(case=f"{shape[0]}x{shape[1]}, {tokens} tokens")
                del layer
                if table is not None and choices.entries():
                    progress.note(f"{shape[0]}x{shape[1]}: choices saved in {save_table(choices.entries(), table)}")

    def _shapes(self, place: Machine) -> list[Shape]:
        models = self.models
        if not models and not self.shapes:
            if place.device.type == "cpu":
                return [CPU_SHAPE]
            models = (next(iter(MODELS)),)
        return list(dict.fromkeys([*self.shapes, *(shape for name in models for shape in linear_shapes(name))]))

    def _tokens(self, place: Machine) -> list[int]:
        default = CPU_TOKENS if place.device.type == "cpu" else TOKENS
        return sorted({*(self.tokens or default), *(default if self.save else ())})


def _table_name(device: torch.device) -> str:
    """Whose choices are saved. BackendError where there is nothing to choose from."""
    if device.type != "cuda":
        raise BackendError("bench linear: expected a CUDA GPU for --save, got none. Leave it out: a CPU has only one way to multiply.")
    return torch.cuda.get_device_name(device)


def linear_shapes(model: str) -> list[Shape]:
    """(out, in) of a decoder block's linear layers, then of query, key and value in one, and of gate and up."""
    config = MODELS[model]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    alone = [(hidden, hidden), (kv, hidden), (inner, hidden), (hidden, inner)]
    return list(dict.fromkeys([*alone, (hidden + 2 * kv, hidden), (2 * inner, hidden)]))


class Choices:
    """The fastest backend of every measured count of tokens, in each mode."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._points: dict[str, list[Point]] = {}

    def add(self, mode: str, point: Point) -> None:
        self._points.setdefault(mode, []).append(point)

    def entries(self) -> list[Entry]:
        return [Entry(self.key(mode), tuple(points)) for mode, points in self._points.items()]

    def key(self, mode: str) -> Key:
        return Key(dtype_name(DTYPE), *self._shape, mode)


def fastest(tokens: int, timings: Mapping[str, Timing], algorithm: Algorithm | None, mode: str = "graph") -> Point:
    """The choice for a count of tokens: dense, which is always possible, where nothing was measured.

    In eager code cuSPARSELt counts with what a call can cost the host, not with what it happened to cost in this minute.
    """
    least = EAGER_CALL if mode == "eager" and algorithm is not None else 0.0
    seconds = {name: max(timings[name].median, least if name == LIBRARY else 0.0) for name in BACKENDS if name in timings}
    best = min(seconds, key=lambda name: seconds[name], default=UNPACKED)
    return Point(tokens, BACKENDS[best], algorithm if best == LIBRARY else None)


@dataclass(frozen=True)
class Case:
    """What the rows of one run share."""

    shape: Shape
    tokens: int | None = None
    mode: str | None = None

    def facts(self, name: str) -> Row:
        return {
            "bench": "linear",
            "backend": name,
            "out": self.shape[0],
            "in": self.shape[1],
            "dtype": dtype_name(DTYPE),
            "tokens": self.tokens,
            "mode": self.mode,
        }

    def rows(self, ways: Sequence[Way], timings: Mapping[str, Timing], failures: Failures, roof: Roof) -> Iterator[Row]:
        """Of the ways that have timings, and of failures."""
        for way in ways:
            if way.name in timings:
                yield self.facts(way.name) | {
                    **roof.figures(timings, way.name, traffic(self.shape, self.tokens or 0, packed=way.name != DENSE)),
                    "speed_up": timings[DENSE].us / timings[way.name].us,
                    "dense_us": timings[DENSE].us,
                    "algorithm": None if way.algorithm is None else "/".join(map(str, way.algorithm)),
                }
        for name, note in failures.items():
            yield self.facts(name) | {"note": note}


def _measured(layer: Layer, tokens: int, choices: Choices, place: Machine, roof: Roof) -> Iterator[Row]:
    """The rows of a count of tokens; the choice among them is added to `choices`."""
    shape = layer.shape
    try:
        generator = torch.Generator(place.device).manual_seed(tokens)
        x = torch.randn(tokens, shape[1], generator=generator, device=place.device).to(DTYPE)
        ways, failures = all_ways(layer, x)
    except Exception as error:  # out of memory, or a kernel that fails
        yield Case(shape, tokens).facts(ALL) | {"note": reason(error)}
        return
    count = min(place.copies(traffic(shape, tokens)), len(layer.dense))
    searched = next((way.algorithm for way in ways if way.name == LIBRARY), None)
    for mode in MODES if place.device.type == "cuda" else MODES[1:]:
        case, capture = Case(shape, tokens, mode), mode == "graph"
        timings, failed = timed(ways, count, place, roof, capture=capture)
        yield from case.rows(ways, timings, failures | failed, roof)
        if not timings:
            continue
        point = fastest(tokens, timings, searched, mode)
        choices.add(mode, point)
        # The dispatcher with what was just measured, against dense at the same moment. It is checked in eager code, hence both keys.
        with temporary_table(Entry(choices.key(one), (point,)) for one in MODES):
            right, wrong = checked([dataclasses.replace(our_way(layer, x), algorithm=point.algorithm)], layer.dense[0], x)
            timings, failed = timed([dense_way(layer, x), *right], count, place, roof, capture=capture)
        yield from (row | {"chosen": point.backend} for row in case.rows(right, timings, failed | wrong, roof))


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Per layer and mode: where the kernel and the library break even with dense, and where SparseLinear is least against it.

    kernel_until: the most tokens up to which no measured count is slower; library_from: the fewest from which on none is. None: none.
    """
    groups: dict[tuple[Any, ...], dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if row.get("speed_up") is not None:
            group = groups.setdefault((row["out"], row["in"], row["mode"]), {})
            group.setdefault(row["backend"], []).append((row["tokens"], row["speed_up"]))
    found: list[Row] = []
    for (out_features, in_features, mode), group in groups.items():
        least = min(group.get(OURS, ()), key=lambda pair: pair[1], default=(None, None))
        facts: Row = {
            "shape": f"{out_features}x{in_features}",
            "mode": mode,
            "kernel_until": _last_even(sorted(group.get(KERNEL, ()))),
            "library_from": _last_even(sorted(group.get(LIBRARY, ()), reverse=True)),
            "lowest": least[1],
            "lowest_at": least[0],
        }
        found.append(facts)
    return found


def _last_even(ratios: Sequence[tuple[int, float]]) -> int | None:
    """The last count, in this order, before the first that is slower than dense."""
    even = None
    for tokens, ratio in ratios:
        if ratio < 1:
            break
        even = tokens
    return even
