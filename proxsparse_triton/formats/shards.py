"""Weight files of a model folder: found, read one tensor at a time, written with deterministic bytes.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, then the tensors' bytes; the header gives
every tensor its dtype, shape and byte range. Reading the ranges ourselves lets `dense.py` copy a file bit for bit, order and
metadata included, which loading and saving does not (the library sorts the tensors and shuffles the metadata).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ModelError
from ..models.checkpoint import (
    METADATA,
    check_safetensors,
    find_weight_files,
    load_pickle,
    one_line,
    read_json_object,
    unreadable,
)

MASKS_NAME = "masks.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
NARROW = frozenset({"F4", "F6_E2M3", "F6_E3M2"})  # several values in a byte: torch has no arithmetic for them
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: its dtype code, shape, and byte range [start, end) in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """`raw` is everything before the first tensor's bytes; `entries` are in the order of the bytes; `metadata` are the file's texts."""

    raw: bytes
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Raises: ModelError: missing, truncated, corrupt or not safetensors."""
    try:
        raw, header = check_safetensors(path)  # ranges, sizes, the file's length
    except OSError as error:
        raise unreadable(path, error) from error
    metadata = header.pop(METADATA, {})
    entries = [
        Entry(name, field["dtype"], tuple(field["shape"]), len(raw) + field["data_offsets"][0], len(raw) + field["data_offsets"][1])
        for name, field in header.items()
    ]
    return Header(raw, tuple(sorted(entries, key=lambda entry: (entry.start, entry.end))), metadata)


def read_bits(file: BufferedReader, entry: Entry) -> Tensor:
    """One tensor as integers of its width, in its shape: the bit patterns, untouched by any floating-point rule."""
    width = DTYPES[entry.dtype].itemsize
    if entry.end == entry.start:
        return torch.empty(entry.shape, dtype=INTEGERS[width])
    buffer = bytearray(entry.end - entry.start)
    file.seek(entry.start)
    if file.readinto(buffer) != len(buffer):
        raise ModelError(
            f"read_bits: expected {len(buffer)} bytes of {entry.name}, got the end of the file. The file changed while it was read."
        )
    return torch.frombuffer(buffer, dtype=INTEGERS[width]).reshape(entry.shape)


def bits(tensor: Tensor) -> Tensor:
    """`tensor` seen as integers of its width: [shape], CPU, contiguous."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(INTEGERS[tensor.dtype.itemsize])


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


def write_safetensors(
    path: Path, layout: Sequence[tuple[str, str, Sequence[int]]], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file whose bytes depend on nothing but the arguments; one tensor in memory at a time.

    Args:
        layout: (name, dtype code, shape) in the order of `tensors`.
    Raises: OSError: as the file system says; the caller explains it.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name, code, shape in layout:
        end = start + math.prod(shape) * DTYPES[code].itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8, as the library writes them
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor_bytes(tensor))


def load_bin(path: Path) -> dict[str, Tensor]:
    """`models.checkpoint.load_pickle`, with every failure in one line. Raises: ModelError."""
    try:
        return load_pickle(path)
    except OSError as error:
        raise unreadable(path, error) from error


def file_layout(function: str, path: Path) -> tuple[Entry, ...]:
    """The tensors of a weight file; the byte ranges only mean something for safetensors."""
    if path.suffix == ".safetensors":
        return read_header(path).entries
    state = load_bin(path)
    for name, tensor in state.items():
        if tensor.dtype not in CODES:
            raise ModelError(
                f"{function}: expected dtypes that safetensors can store, got {tensor.dtype} in {name} of {path}. Convert the model first."
            )
    # Wide types first, so that every tensor starts at a multiple of its width.
    order = sorted(state, key=lambda name: -state[name].dtype.itemsize)
    return tuple(Entry(name, CODES[state[name].dtype], tuple(state[name].shape), 0, 0) for name in order)


class WeightFiles:
    """Every tensor of some weight files by name, safetensors or .bin, read one at a time."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, Path] = {}
        self._bin: tuple[Path, dict[str, Tensor]] | None = None
        self.dtypes: dict[str, str] = {}  # their codes, of those in safetensors files
        for path in files:
            if path.suffix == ".safetensors":
                entries = read_header(path).entries
                found = {entry.name: entry.shape for entry in entries}
                self.dtypes.update({entry.name: entry.dtype for entry in entries})
            else:
                found = {name: tuple(tensor.shape) for name, tensor in self._load(path).items()}
            self.shapes.update(found)
            self._where.update(dict.fromkeys(found, path))

    def tensor(self, name: str) -> Tensor:
        """The tensor `name` as stored, on the CPU. Raises: ModelError: its dtype is unknown to torch, or narrower than a byte."""
        path = self._where[name]
        dtype = self.dtypes.get(name)
        if dtype in NARROW:
            raise ModelError(f"{path}: expected weights of at least 8 bits, got {dtype} in {name}. Dequantize the model first.")
        if path.suffix != ".safetensors":
            return self._load(path)[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ModelError(f"WeightFiles: expected a dtype that torch can read, got {name} of {path} ({error}). Update torch.") from error
        return tensor

    def _load(self, path: Path) -> dict[str, Tensor]:
        if self._bin is None or self._bin[0] != path:
            self._bin = (path, load_bin(path))
        return self._bin[1]


def model_files(folder: Path) -> tuple[Path, ...]:
    """The weight files that a loader would take from a model folder, in index order.

    Raises: ModelError: not a folder, no config.json, no weights, or an index that names absent files.
    """
    actual = without_config(folder)
    if actual:
        raise ModelError(f"verify: expected a model folder, got {folder}, which {actual}. Name a folder with config.json and weights.")
    return find_weight_files(folder, read_json_object(folder / "config.json"))


def without_config(folder: Path) -> str:
    """What `folder` is, that it has no config.json; "" if something lies there under that name."""
    try:
        if os.path.lexists(folder / "config.json"):
            return ""
        return "has no config.json" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
    except (OSError, ValueError) as error:  # a name too long, a NUL in it, a folder that may not be entered
        return f"cannot be opened ({one_line(error)})"


def resolve_names(
    function: str, names: Iterable[str], keys: Iterable[str], advice: str = "Use the model that the masks were made for."
) -> dict[str, str]:
    """For every parameter name its key in the files: the same, or the one key that differs by a leading prefix only.

    Base models are saved without the prefix that the language model puts before them: `h.0.mlp.c_fc.weight` in the file is
    `transformer.h.0.mlp.c_fc.weight` in the model, `decoder.layers...` is `model.decoder.layers...`; or the other way round.

    Raises: ModelError: some names have no key, several, or share one; three of them are named.
    """
    known = set(keys)
    by_suffix: dict[str, set[str]] = {}
    for key in known:
        for suffix in _suffixes(key):
            by_suffix.setdefault(suffix, set()).add(key)
    found: dict[str, str] = {}
    unknown: list[str] = []
    taken: set[str] = set()
    for name in names:
        # Without the same key: a key that ends with the name, or one that the name ends with.
        alike = by_suffix.get(name, set()) | {suffix for suffix in _suffixes(name) if suffix in known}
        candidates = {name} if name in known else alike
        if len(candidates) != 1 or candidates & taken:
            unknown.append(name)
            continue
        found[name] = candidates.pop()
        taken.add(found[name])
    if unknown:
        raise ModelError(
            f"{function}: expected every masked parameter in the weight files, got {len(unknown)} without a key of their own: "
            f"{', '.join(unknown[:3])}. {advice}"
        )
    return found


def _suffixes(name: str) -> Iterable[str]:
    """`a.b.c` -> `b.c`, `c`."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(1, len(parts)))
