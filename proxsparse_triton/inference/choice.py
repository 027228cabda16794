"""How a packed layer multiplies a batch: chosen by device, shape, tokens, and whether a CUDA graph replays it.

Three backends: `kernel` (ours reads the packed weight as it is), `library` (cuSPARSELt or CUTLASS, for many tokens), `dense` (unpack to a
temporary weight, then `F.linear`: always possible). A measured table in the user's cache folder decides, and where it has nothing
to say the thresholds below.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ConfigError, OutputError
from ..ops import sparse_linear
from ..ops.dispatch import have_triton, kernels_compile
from .library import CUSPARSELT, Algorithm, find_library, takes

BACKENDS = ("kernel", "library", "dense")
MODES = ("graph", "eager")
VERSION = 2

# H200, bf16, 4096 x 4096 to 28672 x 8192, bench/results/nvidia-h200-linear.csv. In CUDA graphs the kernel for Hopper is faster than a dense
# weight at every count, and than cuSPARSELt up to 128 tokens and mostly up to 512, where it takes up to 1.3 times as long for some shapes.
# The kernel for other cards and orders was faster than cuSPARSELt up to 128, and faster than unpacking up to 512.
KERNEL_TOKENS = {True: 512, False: 128}  # of the kernel for Hopper, of the other
KERNEL_MOST = 512  # of the other kernel, where there is no library
# In eager code cuSPARSELt builds a plan in each call: 0.3 to 1.1 ms of the host, the time of some thousand tokens. A graph replays without.
EAGER_LIBRARY_TOKENS = 4096
UNBOUNDED = 2**62


@dataclass(frozen=True)
class Point:
    """What to use up to `tokens`. algorithm: of cuSPARSELt; None: not measured."""

    tokens: int
    backend: str
    algorithm: Algorithm | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"Point: expected a backend of {', '.join(BACKENDS)}, got {self.backend!r}. Choose one of these.")
        if self.tokens < 1:
            raise ConfigError(f"Point: expected at least one token, got {self.tokens}. Leave the point out.")


@dataclass(frozen=True)
class Key:
    """One layer in one mode. dtype: as in `str(torch.bfloat16)` without `torch.`. mode: "graph" or "eager"."""

    dtype: str
    out_features: int
    in_features: int
    mode: str

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"Key: expected a mode of {', '.join(MODES)}, got {self.mode!r}. Choose one of these.")


@dataclass(frozen=True)
class Entry:
    """The measured points of one layer in one mode, by ascending tokens."""

    key: Key
    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        counts = [point.tokens for point in self.points]
        if not counts or counts != sorted(set(counts)):
            raise ConfigError(f"Entry: expected points by ascending tokens, got {counts}. Sort them.")


Table = Mapping[Key, tuple[Point, ...]]


def pick(points: Sequence[Point], tokens: int) -> Point:
    """The point of the smallest count that is not below `tokens`; beyond the last, the last."""
    return next((point for point in points if tokens <= point.tokens), points[-1])


def default_points(library: str | None, mode: str, *, hopper: bool = False) -> tuple[Point, ...]:
    """The thresholds where nothing was measured. hopper: the kernel is the one that is fast at every count."""
    if library is None:
        return Point(KERNEL_MOST, "kernel"), Point(UNBOUNDED, "dense")
    if library != CUSPARSELT or mode != "eager":
        return Point(KERNEL_TOKENS[hopper], "kernel"), Point(UNBOUNDED, "library")
    if hopper:
        return (Point(UNBOUNDED, "kernel"),)
    return Point(KERNEL_MOST, "kernel"), Point(EAGER_LIBRARY_TOKENS - 1, "dense"), Point(UNBOUNDED, "library")


def possible(points: Iterable[Point], *, kernel: bool, library: bool) -> tuple[Point, ...]:
    """`points` with dense in place of what cannot run."""
    able = {"kernel": kernel, "library": library, "dense": True}
    return tuple(point if able[point.backend] else Point(point.tokens, "dense") for point in points)


def choose(device: torch.device, dtype: torch.dtype, out_features: int, in_features: int, tokens: int, *, captured: bool) -> Point:
    """The backend, and for cuSPARSELt the algorithm, of one product. captured: inside a CUDA graph."""
    mode = "graph" if captured or _WARMING_UP.get() else "eager"
    return pick(_points(device, dtype, out_features, in_features, mode), tokens)


_WARMING_UP = ContextVar("warming_up", default=False)


@contextmanager
def warm_up() -> Iterator[None]:
    """Inside the block layers multiply in eager code as they will in a CUDA graph.

    Run the model in it once before a capture, with as many tokens as will be captured: kernels are compiled then, libraries loaded, and
    cuSPARSELt's algorithms searched for, none of which a capture allows.
    """
    token = _WARMING_UP.set(True)
    try:
        yield
    finally:
        _WARMING_UP.reset(token)


@functools.cache
def _points(device: torch.device, dtype: torch.dtype, out_features: int, in_features: int, mode: str) -> tuple[Point, ...]:
    library = find_library(device)
    taken = takes(library, dtype, out_features, in_features)
    measured = _measured(device, Key(dtype_name(dtype), out_features, in_features, mode))
    if measured is None and dtype == torch.float16:  # the same bytes, kernels and tensor cores
        measured = _measured(device, Key(dtype_name(torch.bfloat16), out_features, in_features, mode))
    order = library.order if taken else "linear"
    kernel = has_kernel(device) and sparse_linear.takes(out_features, in_features, dtype, order)
    hopper = kernel and sparse_linear.on_hopper(device, order, in_features)
    points = measured or default_points(library.name if taken else None, mode, hopper=hopper)
    return possible(points, kernel=kernel, library=taken)


def _measured(device: torch.device, key: Key) -> tuple[Point, ...] | None:
    return _TEMPORARY.get(key) or measured_table(device).get(key)


def has_kernel(device: torch.device) -> bool:
    """Whether our kernel runs there: it is for the sparse tensor cores of NVIDIA."""
    return device.type == "cuda" and torch.version.hip is None and have_triton() and kernels_compile(device)


def describe(device: torch.device) -> dict[str, str]:
    """What will be used on a device and why, for people."""
    kernel = has_kernel(device)
    missing = "not a CUDA GPU" if device.type != "cuda" else "install triton" if not have_triton() else "needs NVIDIA Ampere or newer"
    if device.type != "cuda":
        table = "none: not a CUDA GPU"
    else:
        path = table_path(torch.cuda.get_device_name(device))
        layers = len(measured_table(device))
        table = f"{path}, {layers} entries" if layers else f"none in {path.parent}: built-in thresholds"
    most = KERNEL_TOKENS[sparse_linear.on_hopper(device, find_library(device).order)]
    return {
        "packed layers, few tokens": f"own kernel, up to {most}" if kernel else f"unpacked weight: {missing}",
        "packed layers, many tokens": find_library(device).reason,
        "packed layers, measured": table,
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The table in the cache folder.


def table_path(device_name: str) -> Path:
    """Where the table of a GPU is kept: PROXSPARSE_CACHE_DIR, or proxsparse-triton in XDG_CACHE_HOME or ~/.cache; one a torch version."""
    own, shared = os.environ.get("PROXSPARSE_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else Path(shared or Path.home() / ".cache") / "proxsparse-triton"
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', device_name).strip('-')}_torch-{torch.__version__}.json"


def measured_table(device: torch.device) -> Table:
    """The table of a device, read once; empty where none was measured, and with one warning where it cannot be read."""
    return _read_once(table_path(torch.cuda.get_device_name(device))) if device.type == "cuda" else {}


@functools.cache
def _read_once(path: Path) -> Table:
    try:
        return load_table(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:  # ConfigError is a ValueError
        problem = f"{type(error).__name__}: {error}"
        warnings.warn(f"SparseLinear: ignored the measured table {path} ({problem}). Measure again, or delete it.", stacklevel=2)
        return {}


def load_table(path: Path) -> Table:
    """Read a table. Raises what reading and decoding raise: OSError, ValueError, KeyError, TypeError."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["version"] != VERSION:
        raise ConfigError(f"load_table: expected version {VERSION}, got {content['version']!r}. Measure again.")
    entries = [_entry(item) for item in content["entries"]]
    return {entry.key: entry.points for entry in entries}


def _entry(item: Mapping[str, object]) -> Entry:
    dtype, out_features, in_features, mode, points = (item[name] for name in ("dtype", "out", "in", "mode", "points"))
    if not (isinstance(points, list) and isinstance(out_features, int) and isinstance(in_features, int)):
        raise TypeError(f"expected sizes and a list of points, got {item}")
    return Entry(Key(str(dtype), out_features, in_features, str(mode)), tuple(_point(*point) for point in points))


def _point(tokens: int, backend: str, algorithm: Sequence[int] | None) -> Point:
    if algorithm is None:
        return Point(tokens, backend)
    alg_id, split_k, split_k_mode = (int(number) for number in algorithm)
    return Point(tokens, backend, (alg_id, split_k, split_k_mode))


def save_table(entries: Iterable[Entry], device_name: str) -> Path:
    """Add `entries` to the table of a GPU, replacing those of the same layers, and use it from now on. Returns its path.

    Raises: OutputError: the cache folder cannot be written.
    """
    path = table_path(device_name)
    _forget()
    table = {**_read_once(path), **{entry.key: entry.points for entry in entries}}
    items = [
        {
            "dtype": key.dtype,
            "out": key.out_features,
            "in": key.in_features,
            "mode": key.mode,
            "points": [[point.tokens, point.backend, point.algorithm] for point in points],
        }
        for key, points in table.items()
    ]
    text = json.dumps({"version": VERSION, "device": device_name, "torch": torch.__version__, "entries": items}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=path.stem, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)  # a reader sees the old table or the new one
    except OSError as error:
        raise OutputError(
            f"save_table: expected a cache folder to write, got {path.parent} ({error}). Name another in PROXSPARSE_CACHE_DIR."
        ) from error
    _forget()
    return path


_TEMPORARY: dict[Key, tuple[Point, ...]] = {}


@contextmanager
def temporary_table(entries: Iterable[Entry]) -> Iterator[None]:
    """Inside the block `entries` come before what was saved. Nothing is written."""
    before = dict(_TEMPORARY)
    _TEMPORARY.update({entry.key: entry.points for entry in entries})
    _points.cache_clear()
    try:
        yield
    finally:
        _TEMPORARY.clear()
        _TEMPORARY.update(before)
        _points.cache_clear()


def _forget() -> None:
    _read_once.cache_clear()
    _points.cache_clear()
