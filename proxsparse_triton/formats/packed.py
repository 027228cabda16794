"""The packed folder: a 2:4 model at 9/16 of the bytes of its pruned layers (16-bit weights), bit for bit the same model.

The format, complete:

- config.json is the original's with the key `proxsparse`: `format` = "packed", `format_version` = 1, and `layers`, an object
  {layer: [out, in_features]} in which a layer is the name of its weight in the original without `.weight`.
- packed-00001-of-0000N.safetensors hold, for each of these layers, `{layer}.values` [out, in_features / 2], in the weight's dtype, and
  `{layer}.metadata`, int16 [out, ceil(in_features / 16)], as `ops.pack.pack_24` describes them; every other tensor under its own name,
  as it was. packed.safetensors.index.json names the file of each.
- manifest.json holds under `files` the size and SHA-256 of every other file.
- Tokenizer, generation settings, code and licences are the original's files.

No file has a name that transformers looks for: it refuses the folder, where it would otherwise fill the packed layers at random.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, OutputError, ShapeError
from ..files import is_regular
from ..models.checkpoint import FLOAT_DTYPES, INDEX_SUFFIX, is_packed, listed, read_json_object, shard_names, unreadable
from ..models.source import CONFIG
from ..ops.pack import pack_24, unpack_24
from ..progress import SILENT, Progress, Task
from ..reference.metadata import descending, row_words
from ..sparsity import BLOCK, KEPT, check_width
from .dense import copy_small_files, write_config, write_json
from .folder import FILES, MANIFEST_NAME
from .manifest import read_manifest, write_manifest
from .pruned import PrunedFolder
from .records import file_records, is_record, sha256
from .shards import DTYPES, Entry, WeightFiles, file_layout, read_header, without_config, write_safetensors

FORMAT = "packed"
VERSION = 1
INDEX = f"packed.safetensors{INDEX_SUFFIX}"
WEIGHT, VALUES, METADATA = ".weight", ".values", ".metadata"
ADVICE = "Copy the folder again, or export it again with `pst export`."


@dataclass(frozen=True)
class _Part:
    """One tensor of a shard: what it is called there, and of which tensor of the original it is the whole or a part."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    key: str
    layer: str | None = None  # the parameter that is packed; None: copied as it is


def write_packed_model(
    pruned: PrunedFolder,
    out: Path,
    *,
    record: Mapping[str, object],
    device: torch.device | str = "cpu",
    progress: Progress = SILENT,
) -> None:
    """Write the packed folder of `pruned` to `out`; one tensor is in memory at a time, and the metadata of a shard's layers.

    Args:
        record: what manifest.json holds beside the hashes. device: where layers are packed.
    Raises: ModelError: a layer that is not 2:4 (it and its block are named), or tensors that cannot be packed. ConfigError: `record` is
        not JSON. OSError: as the file system says; `output_folder` explains it.
    """
    if out.resolve() == pruned.folder.resolve():
        raise OutputError(f"write_packed_model: expected an output folder of its own, got the original {out}. Choose another one.")
    layers = {key: name for name, key in pruned.where.items()}
    shards = [_parts(path, layers) for path in pruned.weight_files]
    _check_names([part.name for parts in shards for part in parts])

    out.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    with progress.task("pack", sum(len(parts) for parts in shards)) as task:
        for number, parts in enumerate(shards, 1):
            target = f"packed-{number:05d}-of-{len(shards):05d}.safetensors"
            layout = [(part.name, part.dtype, part.shape) for part in parts]
            write_safetensors(out / target, layout, _tensors(parts, pruned, torch.device(device), task), {"format": "proxsparse-packed"})
            weight_map.update({part.name: target for part in parts})
    write_json(out / INDEX, {"weight_map": weight_map})
    copy_small_files(pruned.folder, out)
    shapes = {key.removesuffix(WEIGHT): list(pruned.files.shapes[key]) for key in layers}
    write_config(out, pruned.config, {**pruned.config_entry, "format": FORMAT, "format_version": VERSION, "layers": shapes})
    write_manifest(out, {**record, FILES: file_records(out)})


class PackedModel:
    """A packed folder that was checked, read one tensor at a time.

    Under the original's keys it offers the dense tensors as `WeightFiles` does: `shapes` and `tensor`.

    folder, config (config.json), layers: name -> (out, in_features). weight_files: the shards.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], layers: Mapping[str, tuple[int, int]], weight_files: Sequence[Path]
    ) -> None:
        self.folder = folder
        self.config = config
        self.layers = layers
        self.weight_files = tuple(weight_files)
        self._files = WeightFiles(weight_files)
        parts = {f"{name}{suffix}" for name in layers for suffix in (VALUES, METADATA)}
        self._others = [key for key in self._files.shapes if key not in parts]
        self.shapes: dict[str, tuple[int, ...]] = {f"{name}{WEIGHT}": shape for name, shape in layers.items()}
        self.shapes.update({key: self._files.shapes[key] for key in self._others})

    @property
    def other_dtypes(self) -> dict[str, torch.dtype]:
        """Of every tensor that is not packed, by its key."""
        return {key: DTYPES[self._files.dtypes[key]] for key in self._others}

    def layer(self, name: str) -> tuple[Tensor, Tensor]:
        """(values, metadata) of one of `layers`. Raises: ModelError: positions in a block that do not ascend, which no kernel looks at."""
        values, metadata = self._files.tensor(f"{name}{VALUES}"), self._files.tensor(f"{name}{METADATA}")
        wrong = descending(metadata)
        if wrong is not None:
            raise ModelError(
                f"{self.folder}: expected well-formed metadata in {name}, got positions that do not ascend in block {wrong}. {ADVICE}"
            )
        return values, metadata

    def others(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is not packed, under its own name."""
        return ((key, self._files.tensor(key)) for key in self._others)

    def tensor(self, key: str) -> Tensor:
        """The tensor that the original has under `key`; a packed layer with +0.0 in the pruned slots. ModelError: broken metadata."""
        name = key.removesuffix(WEIGHT)
        return self.unpacked(name, *self.layer(name)) if name in self.layers else self._files.tensor(key)

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """The original's key -> bool mask of each packed layer, kept zeros included, made when it is asked for. ModelError as `tensor`."""
        return _Masks(self)

    def unpacked(self, name: str, values: Tensor, metadata: Tensor) -> Tensor:
        """`values` at the positions of one of `layers`."""
        try:
            return unpack_24(values, metadata, self.layers[name], backend="reference")  # which looks at the positions
        except ShapeError as error:
            raise ModelError(f"{self.folder}: expected well-formed metadata in {name}, got: {error}") from error


class _Masks(Mapping[str, Tensor]):
    def __init__(self, packed: PackedModel) -> None:
        self._packed = packed

    def __getitem__(self, key: str) -> Tensor:
        name = key.removesuffix(WEIGHT)
        values, metadata = self._packed.layer(name)
        return self._packed.unpacked(name, torch.ones_like(values), metadata) != 0

    def __iter__(self) -> Iterator[str]:
        return (f"{name}{WEIGHT}" for name in self._packed.layers)

    def __len__(self) -> int:
        return len(self._packed.layers)


def is_packed_folder(path: Path) -> bool:
    """True for a folder whose config.json says that it is packed."""
    return is_regular(path / CONFIG) and is_packed(read_json_object(path / CONFIG))


def read_packed(path: str | Path, *, verify_hashes: bool = True) -> PackedModel:
    """Open a packed folder. Everything is checked before a tensor is read; files are hashed as streams.

    Args:
        verify_hashes: compare every file with the size and hash in the manifest. Without it the headers of the shards are checked.
    Raises: ModelError: not a packed folder, another version, files absent, truncated or changed, or tensors that do not fit config.json.
    """
    folder = Path(path)
    config = _checked_config(folder)
    layers = _layers(folder, config["proxsparse"])
    recorded = _check_files(folder, verify_hashes)
    names = shard_names(folder / INDEX)
    absent = [name for name in names if not is_regular(folder / name)]
    if absent:
        raise ModelError(f"{folder}: expected the shards that {INDEX} names, got {len(absent)} missing: {listed(absent)}. {ADVICE}")
    unknown = sorted({CONFIG, INDEX, *names} - recorded)
    if unknown:
        raise ModelError(
            f"{folder}: expected size and hash of every file of the model in {MANIFEST_NAME}, got none of {listed(unknown)}. {ADVICE}"
        )
    entries: dict[str, Entry] = {}
    where = {}
    for name in names:
        found = {entry.name: entry for entry in read_header(folder / name).entries}
        entries.update(found)
        where.update(dict.fromkeys(found, name))
    if where != read_json_object(folder / INDEX)["weight_map"]:
        raise ModelError(f"{folder}: expected the tensors that {INDEX} names, got others in the shards. {ADVICE}")
    for name, shape in layers.items():
        _check_layer(folder, name, shape, entries)
    return PackedModel(folder, config, layers, [folder / name for name in names])


def _parts(path: Path, layers: Mapping[str, str]) -> list[_Part]:
    """What a shard of the original becomes. layers: key -> parameter name of what is packed."""
    parts = []
    for entry in file_layout("write_packed_model", path):
        if entry.dtype not in DTYPES:
            raise ModelError(f"export: expected dtypes that torch can store, got {entry.dtype} in {entry.name}. Convert the model first.")
        if entry.name not in layers:
            parts.append(_Part(entry.name, entry.dtype, entry.shape, entry.name))
            continue
        if not entry.name.endswith(WEIGHT) or len(entry.shape) != 2 or DTYPES[entry.dtype] not in FLOAT_DTYPES.values():
            raise ModelError(
                f"export: expected the weight of a linear layer of at least 16 bits, got {entry.dtype} {entry.shape} in {entry.name}. "
                "Export the model with --format dense."
            )
        check_width(f"export ({entry.name})", entry.shape)
        name, (rows, width) = entry.name.removesuffix(WEIGHT), entry.shape
        parts.append(_Part(f"{name}{VALUES}", entry.dtype, (rows, width // BLOCK * KEPT), entry.name, layers[entry.name]))
        parts.append(_Part(f"{name}{METADATA}", "I16", (rows, row_words(width)), entry.name, layers[entry.name]))
    # Wide types first, so that every tensor starts at a multiple of its width.
    return sorted(parts, key=lambda part: -DTYPES[part.dtype].itemsize)


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ModelError(
            f"export: expected one tensor under each name, got several called {listed(twice)}. Rename the others in the original."
        )


def _tensors(parts: Sequence[_Part], pruned: PrunedFolder, device: torch.device, task: Task) -> Iterator[Tensor]:
    """The tensors of `parts`, in order; metadata waits for its turn, which comes after the values of the same layer."""
    waiting: dict[str, Tensor] = {}
    for part in parts:
        if part.layer is None:
            yield pruned.files.tensor(part.key)
        elif part.name.endswith(METADATA):
            yield waiting.pop(part.layer)
        else:
            w, mask = pruned.layer(part.layer)
            values, metadata = pack_24(w.to(device), mask.to(device))
            waiting[part.layer] = metadata.cpu()
            yield values.cpu()
        task.advance()


def _checked_config(folder: Path) -> dict[str, Any]:
    actual = without_config(folder)
    if actual:
        raise ModelError(
            f"{folder}: expected a packed folder, got one that {actual}. Name a folder that `pst export --format packed` wrote."
        )
    config = read_json_object(folder / CONFIG)
    if not is_packed(config):
        raise ModelError(
            f"{folder}: expected a packed folder, got a model of another kind. Load it with AutoModelForCausalLM.from_pretrained, "
            "or pack it with `pst export --format packed`."
        )
    version = config["proxsparse"].get("format_version")
    if version != VERSION:
        raise ModelError(f"{folder}: expected version {VERSION} of the packed format, got {version!r}. Update proxsparse-triton.")
    return config


def _layers(folder: Path, entry: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """The packed layers that config.json lists."""
    listed_layers = entry.get("layers")
    layers = {}
    for name, shape in listed_layers.items() if isinstance(listed_layers, dict) else ():
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size >= 0 for size in shape) or shape[1] % BLOCK:
            raise ModelError(f"{folder}: expected [out, in_features] for the packed layer {name} in config.json, got {shape!r}. {ADVICE}")
        layers[name] = (shape[0], shape[1])
    if not layers:
        raise ModelError(f"{folder}: expected the packed layers in config.json, got none. {ADVICE}")
    return layers


def _check_files(folder: Path, verify_hashes: bool) -> set[str]:
    """The files of the manifest. Raise ModelError unless they are there and, with `verify_hashes`, as they were written."""
    files = read_manifest(folder).get(FILES)
    if not isinstance(files, dict) or not files or not all(is_record(name, record) for name, record in files.items()):
        raise ModelError(f"{folder}: expected sizes and hashes under {FILES} in {MANIFEST_NAME}, got something else. {ADVICE}")
    absent = [name for name in files if not is_regular(folder / name)]
    if absent:
        raise ModelError(
            f"{folder}: expected the {len(files)} files that {MANIFEST_NAME} lists, got {len(absent)} missing: {listed(absent)}. {ADVICE}"
        )
    for name, record in files.items() if verify_hashes else ():
        _check_content(folder / name, record["bytes"], record["sha256"])
    return set(files)


def _check_content(path: Path, size: int, digest: str) -> None:
    try:
        actual_size = path.stat().st_size
        actual = sha256(path) if actual_size == size else None
    except OSError as error:
        raise unreadable(path, error) from error
    if actual is None:
        raise ModelError(f"{path}: expected {size} bytes as {MANIFEST_NAME} says, got {actual_size}. The file was cut or changed. {ADVICE}")
    if actual != digest:
        raise ModelError(
            f"{path}: expected SHA-256 {digest[:12]}... as {MANIFEST_NAME} says, got {actual[:12]}... The file was changed. {ADVICE} "
            "If the change is yours, load it in Python with verify_hashes=False."
        )


def _check_layer(folder: Path, name: str, shape: tuple[int, int], entries: Mapping[str, Entry]) -> None:
    rows, width = shape
    for suffix, expected, dtypes in (
        (VALUES, (rows, width // BLOCK * KEPT), FLOAT_DTYPES.keys()),
        (METADATA, (rows, row_words(width)), {"I16"}),
    ):
        entry = entries.get(f"{name}{suffix}")
        if entry is None or entry.shape != expected or entry.dtype not in dtypes:
            got = "none" if entry is None else f"{entry.dtype} {entry.shape}"
            raise ModelError(
                f"{folder}: expected {name}{suffix} as {' or '.join(dtypes)} {expected}, got {got}. "
                f"The weights belong to another config.json. {ADVICE}"
            )
