"""Runs to export: a model pruned by magnitude, as `pst prune` leaves it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from proxsparse_triton.formats.dense import write_pruned_model
from proxsparse_triton.formats.manifest import write_manifest
from proxsparse_triton.formats.masks import save_masks
from proxsparse_triton.formats.packed import write_packed_model
from proxsparse_triton.formats.pruned import PrunedFolder
from proxsparse_triton.formats.records import file_records
from proxsparse_triton.formats.shards import model_files
from proxsparse_triton.ops import mask_24

ASSET = Path(__file__).parents[1] / "proxsparse_triton" / "assets" / "pylm-2m"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in model_files(folder) for name, tensor in load_file(path).items()}


def magnitude_run(out: Path, source: Path = ASSET, *, pattern: tuple[str, ...] = (".self_attn.", ".mlp.")) -> Path:
    """`source` with the matrices whose names hold one of `pattern` pruned by magnitude, with masks and a manifest."""
    masks: dict[str, Tensor] = {}
    for path in model_files(source):
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
        chosen = [name for name, w in state.items() if w.dim() == 2 and any(part in name for part in pattern)]
        masks.update({name: mask_24(state[name].abs()) for name in chosen})
    entry = {"method": "magnitude", "pattern": "2:4"}
    write_pruned_model(source, model_files(source), out, masks, config_entry=entry)
    save_masks(out, masks)
    write_manifest(out, {"model": {"spec": str(source)}, "method": {"name": "magnitude"}, "parameters": list(masks)})
    return out


def opened(folder: Path, layers: tuple[str, ...] = ()) -> PrunedFolder:
    return PrunedFolder(folder, model_files(folder), lambda: layers)


def pack(folder: Path, out: Path, layers: tuple[str, ...] = ()) -> Path:
    write_packed_model(opened(folder, layers), out, record={})
    return out


def rehash(folder: Path) -> None:
    """Makes the manifest agree with what the files hold now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = file_records(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
