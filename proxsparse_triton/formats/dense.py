"""The pruned model as an ordinary Hugging Face folder: the original's files with +0.0 in the pruned slots.

Weight files are rewritten byte by byte from the original rather than loaded and saved, so that everything that is not pruned,
the order and the metadata included, is the original bit for bit; one tensor is in memory at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader, BufferedWriter
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ModelError, OutputError, ShapeError
from ..files import MAX_SMALL, is_regular, open_regular
from ..models.checkpoint import read_json_object
from ..progress import SILENT, Progress
from .folder import MANIFEST_NAME
from .manifest import plain
from .masks import check_masks
from .shards import (
    DTYPES,
    INDEX_NAME,
    Entry,
    bits,
    file_layout,
    load_bin,
    read_bits,
    read_header,
    resolve_names,
    tensor_bytes,
    write_safetensors,
)

MASKABLE = frozenset({"F64", "F32", "F16", "BF16"})
COPIED = frozenset({".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".bpe", ".spm", ".md"})
TRAINING_STATE = ("trainer_state", "training_args", "optimizer", "scheduler")
LEGAL = ("license", "licence", "notice", "copying", "use_policy")
CHUNK = 1 << 24


def write_pruned_model(
    folder: Path,
    weight_files: Sequence[Path],
    out: Path,
    masks: Mapping[str, Tensor],
    *,
    weights: Mapping[str, Tensor] | None = None,
    config_entry: Mapping[str, object],
) -> None:
    """Rewrite the model of `folder` to `out` with +0.0 in every pruned slot.

    Safetensors shards keep their names, keys, dtypes, order and metadata, and every kept weight its bits. PyTorch .bin files
    become safetensors (pytorch_model-00001-of-00002.bin -> model-00001-of-00002.safetensors). model.safetensors.index.json is
    always written: without one some loaders read every *.safetensors of a folder, masks.safetensors too. Tokenizer files,
    generation_config.json, custom code and licences are copied; other weights, optimizer state and the README are not.
    config.json loses `quantization_config` and gains `proxsparse`; it is written last.

    Args:
        folder: the original model. weight_files: its weight files, in index order.
        masks: parameter name -> bool mask of the weight's shape; names may differ from the files' keys by a leading prefix.
        weights: updated tensors by parameter name, cast to the stored dtype and masked where there is a mask.
        config_entry: JSON values that config.json keeps under `proxsparse`.
    Raises: ModelError: unreadable files, names without a key, quantized weights, values that overflow the stored dtype.
        ShapeError: a mask or weight of another shape, or a mask that is not 2:4. ConfigError: config_entry is not JSON.
        OutputError: `out` is `folder`. OSError: as the file system says; `output_folder` explains it.
    """
    if out.resolve() == folder.resolve():
        raise OutputError(f"write_pruned_model: expected an output folder of its own, got the original {folder}. Choose another one.")
    entry = plain("write_pruned_model", dict(config_entry))
    config = read_json_object(folder / "config.json")
    check_masks("write_pruned_model", masks)
    layouts = {path: file_layout("write_pruned_model", path) for path in weight_files}
    keys = [item.name for layout in layouts.values() for item in layout]
    changes = _Changes(keys, masks, weights or {})
    for layout in layouts.values():
        for item in layout:
            changes.check(item)

    out.mkdir(parents=True, exist_ok=True)
    names = {path: _target_name(folder, path) for path in weight_files}
    for path in weight_files:
        target = out / names[path]
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            _rewrite(path, target, changes)
        else:
            _convert(path, target, layouts[path], changes)
    _write_index(folder, out, {names[path]: layout for path, layout in layouts.items()})
    copy_small_files(folder, out)
    write_config(out, config, entry)


def check_parameters(weight_files: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """What `write_pruned_model` would refuse after the work: parameters without a key of their own, other shapes, quantized weights.

    Args: shapes: of the parameters to prune, by name.
    Raises: ModelError, ShapeError.
    """
    advice = "This architecture stores its weights under other names than it runs with, which is not supported for it yet."
    entries = [item for path in weight_files for item in file_layout("prune", path)]
    resolve_names("prune", shapes, [item.name for item in entries], advice)
    changes = _Changes([item.name for item in entries], {n: torch.empty(s, dtype=torch.bool, device="meta") for n, s in shapes.items()}, {})
    for item in entries:
        changes.check(item)


class _Changes:
    """What happens to each key of the weight files: its mask, its new values, or nothing."""

    def __init__(self, keys: Sequence[str], masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        # One call for both, so that a mask and its weight cannot end up at different keys.
        names = resolve_names("write_pruned_model", {**masks, **weights}, keys)
        self._masks = {names[name]: mask for name, mask in masks.items()}
        self._weights = {names[name]: weight for name, weight in weights.items()}

    def __contains__(self, key: str) -> bool:
        return key in self._masks or key in self._weights

    def check(self, entry: Entry) -> None:
        """Raise unless the mask and the new values of `entry` fit it."""
        for kind, tensors in (("mask", self._masks), ("weight", self._weights)):
            tensor = tensors.get(entry.name)
            if tensor is not None and tuple(tensor.shape) != entry.shape:
                raise ShapeError(
                    f"write_pruned_model: expected the {kind} of {entry.name} in the stored shape {entry.shape}, "
                    f"got {tuple(tensor.shape)}. Use the model that the masks were made for."
                )
        if entry.name in self and entry.dtype not in MASKABLE:
            raise ModelError(
                f"write_pruned_model: expected floating-point weights of at least 16 bits, got {entry.dtype} in {entry.name}. "
                "Dequantize the model first."
            )

    def apply(self, key: str, dtype: torch.dtype, stored: Tensor | None) -> Tensor:
        """The tensor to write as integers; `stored` (integers, overwritten) is used where there are no new values."""
        weight = self._weights.get(key)
        if weight is not None:
            cast = weight.detach().to(device="cpu", dtype=dtype, copy=True)
            if torch.isfinite(weight).all() and not torch.isfinite(cast).all():
                raise ModelError(
                    f"write_pruned_model: expected values that {dtype} can hold, got an overflow in {key}. "
                    "Store the model in bfloat16 or float32."
                )
            stored = bits(cast)
        if stored is None:
            raise ValueError(f"{key} has neither stored nor new values")
        mask = self._masks.get(key)
        # Integers keep every kept bit, NaN payloads included, and the pattern 0 is +0.0 in each floating type.
        return stored if mask is None else stored.masked_fill_(~mask.cpu(), 0)

    def replaces(self, key: str) -> bool:
        return key in self._weights


def _rewrite(path: Path, target: Path, changes: _Changes) -> None:
    """Copy a safetensors file, replacing the bytes of the changed tensors only."""
    header = read_header(path)
    with open_regular(path) as source, target.open("wb") as sink:
        sink.write(header.raw)
        for entry in header.entries:
            if entry.name in changes:
                stored = None if changes.replaces(entry.name) else read_bits(source, entry)
                sink.write(tensor_bytes(changes.apply(entry.name, DTYPES[entry.dtype], stored)))
            else:
                _copy_range(source, sink, entry)


def _copy_range(source: BufferedReader, sink: BufferedWriter, entry: Entry) -> None:
    source.seek(entry.start)
    left = entry.end - entry.start
    while left:
        chunk = source.read(min(left, CHUNK))
        if not chunk:
            raise ModelError(
                f"write_pruned_model: expected {left} more bytes of {entry.name}, got the end of the file. "
                "The original changed while it was read."
            )
        sink.write(chunk)
        left -= len(chunk)


def _convert(path: Path, target: Path, layout: Sequence[Entry], changes: _Changes) -> None:
    """Write a .bin file as safetensors; shared tensors are written once under each of their names."""
    state = load_bin(path)

    def tensors() -> Iterator[Tensor]:
        for entry in layout:
            stored = state[entry.name]
            # Never write through the mapped or shared memory of the original.
            yield changes.apply(entry.name, stored.dtype, bits(stored).clone()) if entry.name in changes else bits(stored)

    write_safetensors(target, [(entry.name, entry.dtype, entry.shape) for entry in layout], tensors(), {"format": "pt"})


def _target_name(folder: Path, path: Path) -> str:
    """The file's name in the output: the same place below the folder, .bin renamed to safetensors."""
    name = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
    if ".." in name.parts or name.suffix not in {".safetensors", ".bin"}:
        raise ModelError(f"write_pruned_model: expected .safetensors or .bin files inside {folder}, got {path}. Convert the model first.")
    if name.suffix == ".bin":
        stem = name.stem
        name = name.with_name(f"{'model' + stem.removeprefix('pytorch_model') if stem.startswith('pytorch_model') else stem}.safetensors")
    return name.as_posix()


def _write_index(folder: Path, out: Path, layouts: Mapping[str, Sequence[Entry]]) -> None:
    """The original's index byte for byte where it describes these files, else a new one."""
    original = folder / INDEX_NAME
    held = {name: {entry.name for entry in layout} for name, layout in layouts.items()}
    if original.is_file():
        weight_map = read_json_object(original).get("weight_map")
        if isinstance(weight_map, dict) and weight_map and all(key in held.get(name, ()) for key, name in weight_map.items()):
            shutil.copyfile(original, out / INDEX_NAME)
            return
    entries = [(name, entry) for name, layout in layouts.items() for entry in layout]
    total = sum(_size(entry) for _, entry in entries)
    write_json(out / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": {entry.name: name for name, entry in entries}})


def _size(entry: Entry) -> int:
    if entry.end:
        return entry.end - entry.start
    return torch.Size(entry.shape).numel() * DTYPES[entry.dtype].itemsize


def copy_small_files(folder: Path, out: Path) -> None:
    """Tokenizer, generation settings, chat templates, custom code and licences; weights and pickles never.

    What else lies there and is no small file (a corpus, a pipe) is left out.

    Raises: as `check_small_files`.
    """
    check_small_files(folder)
    for path in _small_files(folder):
        target = out / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        with open_regular(path, MAX_SMALL) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)


def check_small_files(folder: Path, progress: Progress = SILENT) -> None:
    """Raise ModelError unless what `copy_small_files` would take is this model's own, and note what it leaves out.

    A link that leads out of the folder would publish with the model what somebody else's file holds. The Hub's cache is made of links
    too: those of a snapshot lead to the blobs of the same repository, which may lie on another disk, or, in caches that were filled by
    hand or moved, of another copy of it.
    """
    home = folder.resolve()
    homes = (home, (home.parent.parent / "blobs").resolve()) if home.parent.name == "snapshots" else (home,)
    for path in (folder / "config.json", folder / INDEX_NAME, *_small_files(folder)):
        real = path.resolve()
        if not (_is_blob(real) or any(real.is_relative_to(inside) for inside in homes)):
            raise ModelError(
                f"{folder}: expected files of the model's own, got the link {path.name} to {real}, outside of its folder, which would be "
                "copied. Put the file itself in its place."
            )
    for path in _candidates(folder):
        if is_regular(path) and not _fits(path):
            progress.note(f"{path.name} is not copied with the model: it is no small file that can be read.")


def _is_blob(real: Path) -> bool:
    """True for a file of a repository in the Hub's cache: models--org--name/blobs/HASH."""
    return real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")


def _small_files(folder: Path) -> list[Path]:
    return [path for path in _candidates(folder) if _fits(path)]


def _candidates(folder: Path) -> list[Path]:
    templates = folder / "additional_chat_templates"
    nested = list(templates.glob("*.jinja")) if templates.is_dir() else []
    return [path for path in sorted([*folder.iterdir(), *nested]) if _wanted(path.name)]


def _fits(path: Path) -> bool:
    """False for what is no small file that can be read: those that a loader opens were checked, so it is none of the model."""
    try:
        open_regular(path, MAX_SMALL).close()
    except OSError:
        return False
    return True


def _wanted(name: str) -> bool:
    lower = name.lower()
    if (
        lower.startswith((".", "readme", *TRAINING_STATE))
        or lower in {"config.json", MANIFEST_NAME}
        or (".index." in lower and lower.endswith(".json"))
    ):
        return False
    return Path(lower).suffix in COPIED or lower.startswith(LEGAL)


def write_config(out: Path, config: Mapping[str, object], entry: object) -> None:
    """`config` with `entry` under `proxsparse`, and without `quantization_config`, which would send loaders the wrong way."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    write_json(out / "config.json", {**kept, "proxsparse": entry})


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", errors="backslashreplace")
