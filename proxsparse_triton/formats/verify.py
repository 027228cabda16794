"""Is a model folder 2:4, layer by layer, and are its kept weights the original's? Reads one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..models.share import Share, read_share, share_of, weights_in_files
from ..progress import SILENT, Progress
from ..sparsity import BLOCK, KEPT, count_negative_zeros, kept_per_block
from .manifest import DECODER, PARAMETERS, WEIGHTS_UPDATED
from .packed import PackedModel, is_packed_folder, read_packed
from .pruned import listed_parameters, own_masks, own_record
from .records import changed_files
from .shards import WeightFiles, bits, model_files, resolve_names

IN_A_BLOCK = re.compile(r"(^|\.)\d+\.")  # decoder blocks are numbered: model.layers.0.mlp..., h.0.attn...
_Tensors = WeightFiles | PackedModel
NOT_PRUNED = frozenset({"wte", "wpe", "lm_head", "shared", "gate", "router"})  # embeddings, heads, expert routers


@dataclass(frozen=True)
class LayerReport:
    """What was found in one weight matrix. A count is None where there is nothing to compare with."""

    name: str  # the key in the weight files
    shape: tuple[int, ...]
    required: bool  # must be 2:4 for the folder to pass
    blocks: int
    wrong_blocks: int  # more than two non-zeros
    negative_zeros: int
    zeros: float  # share of the weights
    not_zeroed: int | None  # pruned by the mask, yet not +0.0
    changed: int | None  # kept, yet not the original's bits
    problem: str  # empty when the layer is as it should be


@dataclass(frozen=True)
class VerifyReport:
    """The layers that were checked and everything that is wrong, each problem in one line."""

    path: str
    original: str | None
    masks: bool  # the folder holds masks, and they were checked against the weights
    weights_updated: bool  # the manifest says that the method changes kept weights
    layers: tuple[LayerReport, ...]
    problems: tuple[str, ...]
    decoder: Share  # how much of it was found 2:4; its size is the manifest's, or by names and shapes in the files
    changed_files: tuple[str, ...] = ()  # those of the problems that are files which are not as they were written

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def only_files(self) -> bool:
        """True where files were changed and nothing else is wrong: the weights are 2:4."""
        return bool(self.problems) and self.problems == self.changed_files


def verify_folder(path: Path, *, original: Path | None = None, progress: Progress = SILENT) -> VerifyReport:
    """Check every pruned layer of the model folder `path`.

    Which layers: those of masks.safetensors or of the manifest's `parameters`, where the folder has one; every such layer
    must have at most two non-zeros per block and, with masks, +0.0 in each pruned slot. In any other checkpoint every
    floating-point matrix whose width divides by 4 is reported, embeddings, heads and expert routers left out; those inside
    the decoder blocks must be 2:4, and at least one layer must be.

    A packed folder is 2:4 by its form: its files must be those that were written, and the positions in each block must ascend.

    Every file must be the one that was written, where the manifest has its hash.

    With `original`, kept weights must be the original's bit for bit (unless the manifest says that the method updates them),
    and so must every tensor that is not pruned.

    Raises: ModelError: `path` or `original` is not a model folder, a file is corrupt, or a listed parameter is in no file.
    """
    manifest = own_record(path)
    files, masks, listed = _opened(path, manifest)
    # Only our own manifests tell whether the method updates weights.
    hint = "" if manifest else " (as they do where the method updates them, of which this folder has no record: leave out --original)"
    before = _Original(original, files, hint) if original is not None else None
    keys = resolve_names("verify", listed, files.shapes)
    stored = {keys[name]: name for name in masks}
    names = list(keys.values()) or [name for name, shape in files.shapes.items() if _is_candidate(name, shape)]
    updated = manifest.get(WEIGHTS_UPDATED) is True

    layers: list[LayerReport] = []
    with progress.task("verify", len(names)) as task:
        for name in names:
            w = files.tensor(name)
            if w.is_floating_point() or keys:
                required = bool(keys) or IN_A_BLOCK.search(name) is not None
                mask = masks[stored[name]] if name in stored else None
                layers.append(_check_layer(name, w, required=required, mask=mask, before=before, updated=updated))
            task.advance()
    problems = [f"{layer.name}: {layer.problem}" for layer in layers if layer.problem]
    if not keys and not any(layer.wrong_blocks == 0 for layer in layers):
        problems.insert(0, "not one layer that is 2:4")
    # Those of a packed folder are compared when it is opened.
    changed = [] if is_packed_folder(path) else changed_files(path, manifest)
    problems += changed
    if before is not None:
        problems += before.other_problems({layer.name for layer in layers}, files)
    return VerifyReport(
        path=str(path),
        original=None if original is None else str(original),
        masks=bool(masks),
        weights_updated=updated,
        layers=tuple(layers),
        problems=tuple(problems),
        decoder=_share(files, [layer.name for layer in layers if layer.wrong_blocks == 0], read_share(manifest.get(DECODER))),
        changed_files=tuple(changed),
    )


def recorded_share(path: Path) -> Share | None:
    """How much of the decoder is 2:4 by the folder's own record (manifest, masks, packed layers); None where it has none.

    Masks that cannot be read tell nothing: the share is of the weights, which are whole without them.

    Raises: ModelError: see `verify_folder`; no tensor is read.
    """
    manifest = own_record(path)
    if (share := read_share(manifest.get(DECODER))) is not None:
        return share
    try:
        masks = own_masks(path)
    except ModelError:
        return None
    if not (manifest.get(PARAMETERS) or masks or is_packed_folder(path)):
        return None
    files, _, listed = _opened(path, manifest)
    return _share(files, list(resolve_names("verify", listed, files.shapes).values()))


def _share(files: _Tensors, pruned: Sequence[str], recorded: Share | None = None) -> Share:
    found = share_of(weights_in_files(files.shapes, pruned), pruned)
    if recorded is None or found.pruned > recorded.total:
        return found
    return replace(recorded, pruned=found.pruned)


def _opened(path: Path, manifest: Mapping[str, Any]) -> tuple[_Tensors, Mapping[str, Tensor], list[str]]:
    """The dense tensors of the folder, its masks by parameter name, and the layers that its own record says are pruned."""
    if is_packed_folder(path):
        packed = read_packed(path)
        return packed, packed.masks, list(packed.masks)
    files = WeightFiles(model_files(path))
    masks = own_masks(path)
    return files, masks, listed_parameters("verify", path, masks, manifest)


class _Original:
    """The original's tensors under the keys of the folder that is checked."""

    def __init__(self, folder: Path, pruned: _Tensors, hint: str) -> None:
        self.hint = hint
        self._files = WeightFiles(model_files(folder))
        absent = [key for key in pruned.shapes if key not in self._files.shapes]
        present = set(self._files.shapes) - set(pruned.shapes)
        # Equal keys are the rule; a differing prefix is tried for the rest.
        self._keys = {key: key for key in pruned.shapes if key in self._files.shapes} | (
            resolve_names("verify --original", absent, present) if absent else {}
        )

    def bits(self, key: str) -> Tensor:
        return bits(self._files.tensor(self._keys[key]))

    def other_problems(self, checked: set[str], pruned: _Tensors) -> list[str]:
        """Tensors that nothing prunes must be the original's; a tensor that only the original has was lost."""
        others = [key for key in pruned.shapes if key not in checked]
        changed = [key for key in others if not _same(bits(pruned.tensor(key)), self.bits(key))]
        lost = sorted(set(self._files.shapes) - set(self._keys.values()))
        problems = [f"{key}: differs from the original, though it is not pruned" for key in changed]
        return problems + [f"{key}: is missing, the original has it" for key in lost]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _is_candidate(name: str, shape: tuple[int, ...]) -> bool:
    parts = name.split(".")
    known = any(part in NOT_PRUNED or "embed" in part for part in parts)
    return len(shape) == 2 and shape[-1] % BLOCK == 0 and shape[-1] > 0 and not known


def _check_layer(name: str, w: Tensor, *, required: bool, mask: Tensor | None, before: _Original | None, updated: bool) -> LayerReport:
    if mask is not None and mask.shape != w.shape:
        raise ModelError(
            f"verify: expected the mask of {name} in the weight's shape {tuple(w.shape)}, got {tuple(mask.shape)}. Prune again."
        )
    pattern = bits(w)
    w = w.float() if w.dtype.itemsize == 1 else w  # 8-bit floats cannot be compared; the conversion keeps zeros and signs
    wrong = int((kept_per_block(w) > KEPT).sum())
    not_zeroed = None if mask is None else int((~mask & (pattern != 0)).sum())
    changed = None
    problems = []
    if wrong and required:
        problems.append(f"{wrong} of {w.numel() // BLOCK} blocks keep more than {KEPT} of {BLOCK} weights")
    if not_zeroed:
        problems.append(f"{not_zeroed} pruned weights are not +0.0")
    if before is not None:
        stored = before.bits(name)
        if stored.shape != pattern.shape or stored.dtype != pattern.dtype:
            problems.append("is stored in another shape or dtype than the original")
        else:
            changed = int(((mask if mask is not None else w != 0) & (pattern != stored)).sum())
            if changed and not updated:
                problems.append(f"{changed} kept weights differ from the original{before.hint}")
    return LayerReport(
        name=name,
        shape=tuple(w.shape),
        required=required,
        blocks=w.numel() // BLOCK,
        wrong_blocks=wrong,
        negative_zeros=count_negative_zeros(w),
        zeros=float((w == 0).sum()) / max(w.numel(), 1),
        not_zeroed=not_zeroed,
        changed=changed,
        problem="; ".join(problems),
    )
