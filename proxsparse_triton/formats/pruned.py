"""A dense 2:4 model folder, seen as the layers that are pruned and the weights that each of them keeps."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ModelError
from ..files import read_json
from ..models.checkpoint import FLOAT_DTYPES, is_packed, read_json_object
from ..ops.mask import mask_24
from ..sparsity import BLOCK, KEPT, check_width
from .folder import MANIFEST_NAME, TOOL
from .manifest import PARAMETERS, WEIGHTS_UPDATED
from .masks import StoredMasks, has_format
from .records import changed_files
from .shards import MASKS_NAME, WeightFiles, resolve_names


class PrunedFolder(Mapping[str, Tensor]):
    """Parameter name -> 2:4 mask of every pruned layer of a folder, made when it is asked for: one layer is in memory at a time.

    The layers are those of masks.safetensors or of the manifest's `parameters`, where the folder has one, else what `choose` names.
    Without stored masks a layer keeps its non-zeros, and zeros at the lowest free positions of blocks with fewer than two.

    Raises: ModelError: a layer that is in no file; when a layer is read, one that is not 2:4 or not zero where its mask prunes.
    """

    def __init__(self, folder: Path, weight_files: Sequence[Path], choose: Callable[[], Sequence[str]]) -> None:
        self.folder = folder
        self.weight_files = tuple(weight_files)
        self.files = WeightFiles(weight_files)
        self.manifest: Mapping[str, Any] = own_record(folder)
        self._masks: Mapping[str, Tensor] = own_masks(folder)
        names = listed_parameters("export", folder, self._masks, self.manifest)
        self.recorded = bool(names)
        self.where = resolve_names("export", names or choose(), self.files.shapes)  # parameter name -> key in the weight files

    @property
    def config(self) -> dict[str, Any]:
        return read_json_object(self.folder / "config.json")

    @property
    def config_entry(self) -> dict[str, Any]:
        """What config.json says of the pruning, to be kept."""
        entry = self.config.get("proxsparse")
        return entry if isinstance(entry, dict) else {"pattern": "2:4"}

    @property
    def weights_updated(self) -> bool:
        return self.manifest.get(WEIGHTS_UPDATED) is True

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, name: str) -> Tensor:
        return self.layer(name)[1]

    def layer(self, name: str) -> tuple[Tensor, Tensor]:
        """(weight as stored, mask) of one layer, both [out, in_features] on the CPU."""
        w = self.files.tensor(self.where[name])
        if w.dtype not in FLOAT_DTYPES.values() or w.dim() != 2:
            raise ModelError(
                f"export: expected a floating-point matrix of at least 16 bits, got {w.dtype} {tuple(w.shape)} in {name}. "
                "Dequantize the model first."
            )
        check_width(f"export ({name})", w.shape)
        mask = self._masks.get(name)
        if mask is None:
            return w, _mask_of_nonzeros(name, w, self.recorded)
        if mask.shape != w.shape:
            raise ModelError(
                f"export: expected the mask of {name} in the weight's shape {tuple(w.shape)}, got {tuple(mask.shape)}. Prune again."
            )
        lost = (~mask & (w != 0)).nonzero()
        if len(lost):
            row, column = lost[0].tolist()
            raise ModelError(
                f"export: expected zeros where {MASKS_NAME} prunes, got {len(lost)} non-zero weights in {name}, the first in block "
                f"{(row, column // BLOCK)}. The weights are not those that were pruned: prune again, or export them without the masks."
            )
        return w, mask


def own_record(folder: Path) -> Mapping[str, Any]:
    """The manifest of a folder that pst wrote; empty for any other folder, whatever else goes by that name there.

    Raises: ModelError: it cannot be read in a folder that is ours by its other files, so that nobody knows what it says.
    """
    path = folder / MANIFEST_NAME
    if not os.path.lexists(path):
        return {}
    try:
        manifest = read_json(path)
    except (OSError, ValueError):
        if _configured(folder) or has_format(folder / MASKS_NAME):
            return read_json_object(path)  # which says what is wrong
        return {}
    return manifest if isinstance(manifest, dict) and manifest.get("tool") == TOOL else {}


def own_masks(folder: Path) -> Mapping[str, Tensor]:
    """The masks that lie in a folder, by parameter name; none where there is no file of them, or somebody else's of that name.

    Raises: ModelError: they are ours, by their format or by the folder's other files, and damaged.
    """
    path = folder / MASKS_NAME
    if not os.path.lexists(path):
        return {}
    try:
        return StoredMasks(folder)
    except ModelError:
        if has_format(path) or _configured(folder) or own_record(folder):
            raise
        return {}


def _configured(folder: Path) -> bool:
    """True where config.json says that pst pruned the model."""
    path = folder / "config.json"
    return os.path.lexists(path) and "proxsparse" in read_json_object(path)


def damage(folder: Path) -> list[str]:
    """What of a folder that pst wrote is not as it was written, a line each; of a packed one nothing, whose reading refuses it.

    Raises: ModelError, OSError: it cannot be read.
    """
    return [] if is_packed(read_json_object(folder / "config.json")) else changed_files(folder, own_record(folder))


def check_unchanged(function: str, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ModelError unless the files of a run are those that were written, where its manifest has their hashes.

    What was damaged must not leave with fresh hashes. OSError: a file cannot be read.
    """
    problems = changed_files(folder, manifest)
    if problems:
        more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ModelError(
            f"{function}: expected {folder} as it was written, got {problems[0]}{more}. Copy the run again; "
            f"if the change is yours, {function} a copy of it without {MANIFEST_NAME}."
        )


def listed_parameters(function: str, path: Path, masks: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> list[str]:
    """The masked parameters by the folder's own record; empty if it has none."""
    recorded = manifest.get(PARAMETERS)
    if recorded is None:
        return list(masks)
    if not isinstance(recorded, list) or not all(isinstance(name, str) for name in recorded):
        raise ModelError(
            f"{function}: expected a list of names under {PARAMETERS} in {path / MANIFEST_NAME}, got something else. Restore the file."
        )
    differ = sorted(set(recorded) ^ set(masks)) if masks else []
    if differ:
        raise ModelError(
            f"{function}: expected the same layers in {MASKS_NAME} and {MANIFEST_NAME} of {path}, got {len(differ)} in only one of them: "
            f"{', '.join(differ[:3])}. Prune again."
        )
    return recorded


def _mask_of_nonzeros(name: str, w: Tensor, recorded: bool) -> Tensor:
    """bool like w: the non-zeros of each block, filled up to two."""
    kept = (w != 0).unflatten(-1, (-1, BLOCK))
    count = kept.sum(dim=-1)
    wrong = (count > KEPT).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        advice = "Prune the model again." if recorded else "Prune the layer, or leave it dense with --skip."
        raise ModelError(
            f"export: expected at most {KEPT} non-zeros of every {BLOCK} weights, got {int(count[at])} in block {at} of {name} "
            f"({len(wrong)} blocks have more). {advice}"
        )
    few = count < KEPT
    if few.any():
        kept[few] = mask_24(kept[few].float())
    mask: Tensor = kept.flatten(-2)
    return mask
