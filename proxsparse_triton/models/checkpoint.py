"""Are the weight files of a model folder whole? Answered from their headers, before anything is loaded.

The libraries below would answer too, but late, with a traceback, or not at all: transformers initialises tensors that it
does not find at random and only logs a warning.
"""

from __future__ import annotations

import errno
import os
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ModelError
from ..files import MAX_JSON, UnfitFileError, is_regular, open_regular, parse_json, read_regular

SAFE_WEIGHTS = "model.safetensors"
PICKLED_WEIGHTS = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
# The order in which transformers looks for them: what is validated and hashed must be what is loaded.
ENTRIES = (SAFE_WEIGHTS, SAFE_WEIGHTS + INDEX_SUFFIX, PICKLED_WEIGHTS, PICKLED_WEIGHTS + INDEX_SUFFIX)

METADATA = "__metadata__"  # of a safetensors header: texts beside the tensors
LENGTH_BYTES = 8
MOST_BYTES = 1 << 62  # beyond what any file has; keeps sums of sizes inside 64 bits
MAX_HEADER = 100_000_000  # safetensors' own limit
GIT_LFS_POINTER = b"version https://git-lfs"
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
AGAIN = "Copy or download it again."


def listed(names: Collection[str], limit: int = 3) -> str:
    """`a, b, c and 4 more`: the first few of `names` for a one-line message."""
    shown = ", ".join(list(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def one_line(error: BaseException, limit: int = 200) -> str:
    """Type and text of a library's error on one line."""
    text = " ".join(str(error).split()).rstrip(" .")
    return f"{type(error).__name__}: {text[:limit]}{'...' if len(text) > limit else ''}" if text else type(error).__name__


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises: ModelError: the file is missing, unreadable, no regular file, too large, not UTF-8, not JSON, nested too deeply, or no object.
    """
    try:
        value = parse_json(read_regular(path, MAX_JSON))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: expected a JSON file, got no such file. {AGAIN}") from error
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise ModelError(f"{path}: expected JSON, got {one_line(error)}. {AGAIN}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, got a {type(value).__name__}. {AGAIN}")
    return value


def unreadable(path: Path, error: OSError) -> ModelError:
    """The error to raise for a file of a model that cannot be opened or read."""
    if isinstance(error, UnfitFileError):
        advice = "Move it out of the folder." if error.errno == errno.EFBIG else "Put the file itself in its place."
        return ModelError(f"{path}: expected a file, got {error.strerror}. {advice}")
    return ModelError(f"{path}: expected a readable file, got {one_line(error)}. Check its permissions.")


def is_packed(config: Mapping[str, Any]) -> bool:
    """True for the config.json of a folder that `pst export --format packed` wrote: it holds no weights as transformers knows them."""
    entry = config.get("proxsparse")
    return isinstance(entry, Mapping) and entry.get("format") == "packed"


def weight_entry(config: Mapping[str, Any], present: Collection[str]) -> str | None:
    """Name of the weights file or shard index that transformers would open, out of the file names `present`; None if there is none."""
    explicit = config.get("transformers_weights")
    if isinstance(explicit, str):
        return explicit if explicit in present else None
    return next((name for name in ENTRIES if name in present), None)


def shard_names(index: Path) -> list[str]:
    """The weight files that a shard index names, each once, in its order.

    Raises: ModelError: the index does not parse, or names files outside its folder.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: expected a weight_map from tensors to files, got none. {AGAIN}")
    wrong = [str(name)[:80] for name in weight_map.values() if not isinstance(name, str) or not name or PurePosixPath(name).name != name]
    if wrong:
        raise ModelError(f"{index}: expected plain file names in weight_map, got {listed(wrong)}. {AGAIN}")
    return list(dict.fromkeys(weight_map.values()))


def find_weight_files(folder: Path, config: Mapping[str, Any]) -> tuple[Path, ...]:
    """The weight files of `folder` that transformers would read, in index order; all exist.

    Raises: ModelError: no weights, an index that does not parse, or shards that are absent.
    """
    present = sorted(path.name for path in folder.iterdir() if is_regular(path))
    entry = weight_entry(config, present)
    if entry is None:
        wanted = config.get("transformers_weights") or f"{SAFE_WEIGHTS} or {SAFE_WEIGHTS}{INDEX_SUFFIX}"
        raise ModelError(
            f"{folder}: expected weights in {wanted}, got {listed(present, 5)}. "
            "Save the model with save_pretrained, or convert it to safetensors."
        )
    if not entry.endswith(INDEX_SUFFIX):
        return (folder / entry,)
    names = shard_names(folder / entry)
    absent = [name for name in names if name not in present]
    if absent:
        raise ModelError(
            f"{folder}: expected the {len(names)} shards that {entry} names, got {len(absent)} missing: {listed(absent)}. "
            "Copy or download them again."
        )
    return tuple(folder / name for name in names)


def check_weight_files(files: Sequence[Path]) -> None:
    """Raise ModelError unless every file is a whole safetensors file, or a pickle that loads without running code."""
    for path in files:
        try:
            if path.suffix == ".safetensors":
                check_safetensors(path)
            else:
                load_pickle(path)
        except OSError as error:
            raise unreadable(path, error) from error


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name -> dtype, shape, data_offsets (without `__metadata__`). As `raw_header` raises."""
    header = raw_header(path)[1]
    header.pop(METADATA, None)
    return header


def raw_header(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Everything before the first tensor's bytes, and the header in it, each entry of the form that the format asks for.

    Raises: ModelError: the file is empty, a Git LFS pointer, corrupt, or its size is not what the header says. OSError: unreadable.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(max(LENGTH_BYTES, len(GIT_LFS_POINTER)))
        if start.startswith(GIT_LFS_POINTER):
            raise ModelError(f"{path}: expected a safetensors file, got a Git LFS pointer. Fetch the weights with `git lfs pull`.")
        if len(start) < LENGTH_BYTES:
            raise ModelError(f"{path}: expected a safetensors file, got {size} bytes. {AGAIN}")
        (length,) = struct.unpack("<Q", start[:LENGTH_BYTES])
        if not 2 <= length <= MAX_HEADER:
            raise ModelError(
                f"{path}: expected a safetensors header, got a header length of {length}. The file is corrupt; {AGAIN.lower()}"
            )
        if LENGTH_BYTES + length > size:
            raise ModelError(
                f"{path}: expected a header of {length} bytes, got a file of {size} bytes. The file is truncated; {AGAIN.lower()}"
            )
        file.seek(0)
        raw = file.read(LENGTH_BYTES + length)
    try:
        header = parse_json(raw[LENGTH_BYTES:])
    except ValueError as error:
        raise _corrupt(path, one_line(error)) from error
    if not isinstance(header, dict):
        raise _corrupt(path, "no object")
    wrong = next((name for name, entry in header.items() if not (_is_metadata(entry) if name == METADATA else _is_entry(entry))), None)
    if wrong is not None:
        raise _corrupt(path, f"no dtype, shape and data_offsets of whole numbers for {wrong[:80]!r}")
    expected = len(raw) + max((entry["data_offsets"][1] for name, entry in header.items() if name != METADATA), default=0)
    if size != expected:
        what = "truncated" if size < expected else "corrupt"
        raise ModelError(f"{path}: expected {expected} bytes as its header says, got {size}. The file is {what}; {AGAIN.lower()}")
    return raw, header


def _corrupt(path: Path, actual: str) -> ModelError:
    return ModelError(
        f"{path}: expected a safetensors header, got one that does not parse ({actual}). The file is corrupt; {AGAIN.lower()}"
    )


def _is_metadata(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(value, str) for value in entry.values())


def _is_entry(entry: Any) -> bool:
    """A dtype, sizes and a range of bytes: what JSON lets stand there else are 1e999, true, negative numbers, texts."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(type(number) is int and 0 <= number < MOST_BYTES for number in (*shape, *offsets)) and offsets[0] <= offsets[1]


def weight_shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the weight files, by its key. Raises: as `check_weight_files`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            if path.suffix == ".safetensors":
                shapes.update({name: tuple(entry["shape"]) for name, entry in safetensors_header(path).items()})
            else:
                shapes.update({name: tuple(tensor.shape) for name, tensor in load_pickle(path).items()})
        except OSError as error:
            raise unreadable(path, error) from error
    return shapes


def stored_dtype(files: Sequence[Path]) -> torch.dtype:
    """The floating type that holds most bytes of the safetensors `files`.

    Raises: ModelError: they hold no fp64, fp32, fp16 or bf16 at all, or mostly something else (a quantised model).
    """
    held: Counter[str] = Counter()
    for path in files:
        for entry in safetensors_header(path).values():
            held[entry["dtype"]] += entry["data_offsets"][1] - entry["data_offsets"][0]
    most = held.most_common(1)[0][0] if held else "no tensors"
    if most not in FLOAT_DTYPES:
        raise ModelError(
            f"{files[0].parent}: expected weights in fp32, fp16 or bf16, got mostly {most}. Prune the dense original of a quantised model."
        )
    return FLOAT_DTYPES[most]


def check_safetensors(path: Path) -> tuple[bytes, dict[str, Any]]:
    """`raw_header` of `path`, whatever it is called, which must be whole for the safetensors library too. Raises: as `raw_header`."""
    found = raw_header(path)
    try:
        with safe_open(path, framework="pt") as file:  # overlapping offsets, shapes that do not fit, unknown types
            file.keys()
    except SafetensorError as error:
        raise ModelError(f"{path}: expected a safetensors file, got {one_line(error)}. The file is corrupt; {AGAIN.lower()}") from error
    return found


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch .bin file, mapped from the disk where its format allows it; nothing in it is executed.

    Raises: ModelError: refused by torch's safe loading, damaged, not a flat dict of names and tensors, or a tensor that claims more than
        the file holds. OSError: unreadable.
    """
    advice = "Convert the model to safetensors, where you trust the file."
    open_regular(path).close()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, for a file that is about to be refused
            # mmap spares the memory, but only the zip format of torch >= 1.6 has it.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(os.fspath(path)))
    except OSError:
        raise
    except Exception as error:  # a pickle is a program: a refused or damaged one fails in any way it likes
        raise ModelError(
            f"{path}: expected pickled tensors that torch.load(weights_only=True) accepts, "
            f"got pickled code or a damaged file ({type(error).__name__}). {advice}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise ModelError(f"{path}: expected a state dict of tensors by name, got something else. {advice}")
    for name, tensor in state.items():
        problem = _tensor_problem(tensor)
        if problem:
            raise ModelError(f"{path}: expected dense tensors that the file holds, got {problem} in {name[:80]}. {advice}")
    return state


def _tensor_problem(tensor: Tensor) -> str:
    """Why a pickled tensor is none to read; "" for an ordinary one."""
    if tensor.layout != torch.strided:
        return "a sparse tensor"
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.is_meta:
        return "a tensor without data"
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:  # strides of 0 claim any size
        return f"shape {tuple(tensor.shape)} on {tensor.untyped_storage().nbytes()} bytes"
    return ""
