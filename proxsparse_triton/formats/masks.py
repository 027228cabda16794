"""`masks.safetensors`: which two of every four weights are kept, in a third of a byte per block (0.083 bytes per weight).

The format, complete:

- A safetensors file with one uint8 tensor of one dimension per masked parameter, under the parameter's name.
- Flatten the mask row by row and cut it into blocks of 4. A block keeps one of six pairs of positions; its pattern is the
  pair's place in the list 01, 02, 03, 12, 13, 23.
- Three patterns make one byte, p0 + 6 p1 + 36 p2 (0..215), in block order; the last byte is filled up with pattern 0. A mask
  of n weights takes ceil(n / 12) bytes.
- The file's metadata holds `format` = "proxsparse-masks", `version` = "1" and `shapes`, a JSON object {name: shape} in the
  model's order; other keys are free.

A reader in numpy:

    import json, math
    import numpy as np
    from safetensors import safe_open

    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    table = np.array([[i in pair for i in range(4)] for pair in pairs])
    masks = {}
    with safe_open(path, framework="numpy") as file:
        for name, shape in json.loads(file.metadata()["shapes"]).items():
            byte = file.get_tensor(name)
            patterns = np.stack([byte % 6, byte // 6 % 6, byte // 36], axis=1)
            masks[name] = table[patterns].reshape(-1)[: math.prod(shape)].reshape(shape)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import ConfigError, ModelError, ShapeError
from ..files import open_regular, parse_json
from ..models.checkpoint import one_line
from ..ops.sharded import local, part_like, whole
from ..sparsity import BLOCK, check_mask, check_width
from .folder import atomic_file
from .parameters import find_parameters, weight_in_memory
from .shards import MASKS_NAME, Entry, read_bits, read_header, write_safetensors

FORMAT = "proxsparse-masks"
VERSION = "1"
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
PER_BYTE = 3
BYTES = len(PAIRS) ** PER_BYTE
INVALID = 255
MAX_DIMENSIONS = 64  # numpy's and torch's limit


def _encoding_table() -> NDArray[np.uint8]:
    """[256, 2]: the patterns of the two blocks whose 8 kept flags make a byte, the first flag in the lowest bit."""
    nibbles = np.full(16, INVALID, dtype=np.uint8)
    for pattern, (first, second) in enumerate(PAIRS):
        nibbles[(1 << first) | (1 << second)] = pattern
    byte = np.arange(256)
    return np.stack([nibbles[byte & 15], nibbles[byte >> 4]], axis=1)


def _decoding_table() -> NDArray[np.bool_]:
    """[216, 12]: the kept flags of the three blocks of a byte."""
    table = np.array([[position in pair for position in range(BLOCK)] for pair in PAIRS])
    byte = np.arange(BYTES)
    flags: NDArray[np.bool_] = table[np.stack([byte % 6, byte // 6 % 6, byte // 36], axis=1)].reshape(BYTES, PER_BYTE * BLOCK)
    return flags


_ENCODE = _encoding_table()
_DECODE = _decoding_table()


def save_masks(path: Path, masks: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write masks atomically to `path` (a folder: to masks.safetensors in it); equal masks give equal files.

    Args:
        masks: parameter name -> bool [..., in_features], exactly two of every four True; any device.
        metadata: text that travels in the file's header.
    Raises: ShapeError: a mask is not bool or not 2:4. ConfigError: no masks, or metadata under a reserved key. OutputError.
    """
    extra = dict(metadata or {})
    reserved = sorted(extra.keys() & {"format", "version", "shapes"})
    if not masks or reserved or not all(isinstance(value, str) for value in extra.values()):
        problem = f"the reserved metadata keys {', '.join(reserved)}" if reserved else "metadata that is not text" if masks else "none"
        raise ConfigError(
            f"save_masks: expected masks and metadata of text under keys of its own, got {problem}. "
            "Pass at least one mask and rename the keys."
        )
    packed, shapes = {}, {}
    for name, mask in masks.items():  # once: a mask may be made when it is asked for
        packed[name], shapes[name] = _pack(name, mask), list(mask.shape)
    extra |= {"format": FORMAT, "version": VERSION, "shapes": json.dumps(shapes, ensure_ascii=False)}
    layout = [(name, "U8", (len(data),)) for name, data in packed.items()]
    with atomic_file(path / MASKS_NAME if path.is_dir() else path) as file:
        write_safetensors(file, layout, (torch.from_numpy(data) for data in packed.values()), extra)


class StoredMasks(Mapping[str, Tensor]):
    """The masks of a run folder or of a masks file, each decoded when it is asked for: `load_masks` for models beyond the memory."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self._path = path / MASKS_NAME if path.is_dir() else path
        with self._explained():
            header = read_header(self._path)
        self._entries = {entry.name: entry for entry in header.entries}
        self._shapes = _shapes(self._path, header.metadata, set(self._entries))

    def __getitem__(self, name: str) -> Tensor:
        shape, entry = self._shapes[name], self._entries[name]
        _check_entry(self._path, entry, shape)
        with self._explained(), open_regular(self._path) as file:
            data = read_bits(file, entry)
        return _unpack(self._path, name, data.numpy(), shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (ModelError, OSError) as error:
            reason = str(error) if isinstance(error, ModelError) else one_line(error)
            raise ModelError(
                f"load_masks: expected a masks file written by this tool, got {self._path} ({reason.rstrip('.')}). "
                f"Name a run folder or its {MASKS_NAME}."
            ) from error


def has_format(path: Path) -> bool:
    """True for a masks file of this tool, of any version; False for anything else and for a file that cannot be read."""
    try:
        return read_header(path).metadata.get("format") == FORMAT
    except (ModelError, OSError):
        return False


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """Read the masks of a run folder or of a masks file: parameter name -> bool mask of the weight's shape, CPU.

    Raises: ModelError: no such file, corrupt, another format or version, or a tensor that does not fit its shape.
    """
    return dict(StoredMasks(path))


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the pruned weights of `model` to +0.0, in place; kept weights stay bit for bit. Nothing changes unless all fits.

    Tied parameters are handled once, under any of their names. Applying the same masks again changes nothing. The names may lack what
    DDP, FSDP, torch.compile, activation checkpointing or peft have put into the model's. Of a sharded parameter (DTensor) each rank
    sets its part, of one that accelerate has offloaded to the CPU the values are set where it keeps them.

    Args: masks: parameter name -> bool mask of the weight's shape; the same on every rank.
    Raises: ModelError: names that the model does not have, two masks that disagree on one tied parameter, or weights that are not in
        memory (meta, offloaded to disk). ShapeError: a mask of another shape, or not 2:4.
    """
    function = "apply_masks"
    names = find_parameters(function, model, masks)
    weights: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name in masks:
        mask = whole(masks[name])
        _patterns(function, name, mask)
        weight = weight_in_memory(function, model, names[name])
        if mask.shape != weight.shape:
            within = "Call it inside FSDP.summon_full_params(model)."
            raise ShapeError(
                f"{function}: expected the mask of {name} in the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}. "
                + (within if "_fsdp_wrapped_module" in names[name] else "Use the model that the masks were made for.")
            )
        # Offloaded modules hold parameters of their own, so tied ones are known by their memory; empty parts have none.
        other = first.setdefault(local(weight).data_ptr() or id(model.get_parameter(names[name])), name)
        if other == name:
            weights[name] = weight
        elif not torch.equal(whole(masks[other]).cpu(), mask.cpu()):
            raise ModelError(f"{function}: expected one mask for the tied parameter {name}, got two that disagree. Keep one of them.")
    with torch.no_grad():
        for name, weight in weights.items():
            # Multiplying would write -0.0 for negative weights and keep NaN alive.
            part = local(weight)
            part.masked_fill_(~part_like(whole(masks[name]).to(part.device), weight), 0.0)


def check_masks(function: str, masks: Mapping[str, Tensor]) -> None:
    """Raise ShapeError unless every mask is bool and exactly 2:4; several times faster than `sparsity.check_mask` on the CPU."""
    for name, mask in masks.items():
        _patterns(function, name, mask)


def _patterns(function: str, name: str, mask: Tensor) -> NDArray[np.uint8]:
    """bool [..., in_features] -> the pattern 0..5 of each block, uint8 [blocks]."""
    check_width(function, mask.shape)
    if mask.dtype != torch.bool:
        check_mask(function, name, mask)
    flags = np.packbits(mask.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(-1), bitorder="little")
    patterns: NDArray[np.uint8] = _ENCODE[flags].reshape(-1)[: mask.numel() // BLOCK]
    if patterns.size and patterns.max() == INVALID:
        check_mask(function, name, mask)  # says which block is wrong; too slow to run on every good mask
    return patterns


def _pack(name: str, mask: Tensor) -> NDArray[np.uint8]:
    """bool [..., in_features] -> uint8 [ceil(blocks / 3)]."""
    patterns = _patterns("save_masks", name, mask)
    padded = np.zeros(-(-patterns.size // PER_BYTE) * PER_BYTE, dtype=np.uint8)
    padded[: patterns.size] = patterns
    p0, p1, p2 = padded.reshape(-1, PER_BYTE).T
    packed: NDArray[np.uint8] = p0 + 6 * p1 + 36 * p2
    return packed


def _check_entry(path: Path, entry: Entry, shape: tuple[int, ...]) -> None:
    """Raise ModelError unless these are the bytes of a mask of this shape."""
    expected = -(-math.prod(shape) // (PER_BYTE * BLOCK))
    if entry.dtype != "U8" or entry.shape != (expected,):
        raise ModelError(
            f"load_masks: expected {expected} uint8 values for {entry.name} of shape {shape}, "
            f"got {entry.dtype} {entry.shape} in {path}. The file is corrupt: copy it again."
        )


def _unpack(path: Path, name: str, data: NDArray[np.uint8], shape: tuple[int, ...]) -> Tensor:
    """uint8 [ceil(blocks / 3)] -> bool [shape]."""
    count = math.prod(shape)
    if data.size and data.max() >= BYTES:
        raise ModelError(
            f"load_masks: expected bytes below {BYTES} for {name}, got {data.max()} in {path}. The file is corrupt: copy it again."
        )
    return torch.from_numpy(_DECODE[data].reshape(-1)[:count].reshape(shape))


def _shapes(path: Path, metadata: Mapping[str, str], names: set[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the metadata, checked: one for every tensor, and nothing else."""
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
        raise ModelError(
            f"load_masks: expected the format {FORMAT} version {VERSION}, "
            f"got {metadata.get('format')!r} version {metadata.get('version')!r} in {path}. "
            "Name a masks file of this tool, or update the tool."
        )
    try:
        shapes = {name: tuple(shape) for name, shape in parse_json(metadata["shapes"]).items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"load_masks: expected a JSON object of shapes in the metadata of {path}, got something else. The file is corrupt."
        ) from error
    for name in sorted(names ^ shapes.keys()):
        holds = "a tensor without a shape" if name in names else "a shape without a tensor"
        raise ModelError(f"load_masks: expected a tensor and a shape for each mask, got {holds} for {name} in {path}. The file is corrupt.")
    for name, shape in shapes.items():
        if not 0 < len(shape) <= MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**31 for size in shape) or shape[-1] % BLOCK:
            raise ModelError(f"load_masks: expected a shape in blocks of {BLOCK} for {name}, got {shape} in {path}. The file is corrupt.")
    return shapes
