"""A pruned model in another form: written by `export_run`, and the packed one loaded by `load_packed`."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, ModelError
from .formats.dense import check_small_files, write_pruned_model
from .formats.folder import FILES, check_apart, check_output, check_space, output_folder
from .formats.manifest import DECODER, PARAMETERS, WEIGHTS_UPDATED, write_manifest
from .formats.masks import save_masks
from .formats.packed import WEIGHT, read_packed, write_packed_model
from .formats.pruned import PrunedFolder, check_unchanged
from .formats.records import file_records
from .formats.shards import resolve_names
from .models.checkpoint import listed
from .models.declared import skeleton
from .models.loading import ModelSource, checked_device, checked_dtype, file_hashes, load_config, load_whole, resolve_model
from .models.selection import computes_linear, plan_layers
from .progress import SILENT, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMATS = ("dense", "masks", "packed")
CARRIED = ("model", "method", "perplexity", DECODER)  # what the manifest of an export repeats of the run's


@dataclass(frozen=True)
class ExportRecord:
    """What was written."""

    format: str
    folder: Path
    layers: tuple[str, ...]  # parameter names of the pruned weights
    bytes: int  # of its safetensors files
    source_bytes: int  # of the weight files they were made from


def export_run(
    run: str,
    output: Path,
    *,
    format: str,
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> ExportRecord:
    """Write the 2:4 model `run` to the folder `output`, which appears when it is complete.

    Args:
        run: a run folder, or any dense 2:4 model folder or Hub id. Without a record of its own (masks, manifest) the pruned layers are
            those that `pst prune` would choose, and positions are those of the non-zeros.
        format: dense (the model alone, zeros included), masks (masks.safetensors), packed (kept weights and their positions).
        include, skip: regular expressions on layer names, as in `pst prune`; only where the folder has no record.
    Raises: ConfigError: unknown format, or layers chosen for a folder that records them. ModelError: `run` cannot be used or is not as it
        was written, or a layer is not 2:4 (it and its block are named) or cannot run packed. OutputError: `output` cannot be written, or
        would replace `run`.
    """
    if format not in FORMATS:
        raise ConfigError(f"export: expected --format {', '.join(FORMATS)}, got {format!r}. Choose one of these.")
    if Path(run).is_dir():
        check_apart(output, Path(run))
    check_output(output, overwrite=overwrite)
    source = resolve_model(run)
    check_apart(output, source.folder)

    def choose() -> list[str]:
        model = skeleton(source, load_config(source, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code)
        return [f"{name}{WEIGHT}" for name in plan_layers(model, include=include, skip=skip).selected()]

    pruned = PrunedFolder(source.folder, source.weight_files, choose)
    check_unchanged("export", source.folder, pruned.manifest)
    bare = _packable(source, pruned, trust_remote_code) if format == "packed" else None
    if format != "masks":
        check_small_files(source.folder, progress)
    if pruned.recorded and (include or skip):
        raise ConfigError(f"export: expected no --include or --skip, as {run} records its pruned layers, got one. Leave it out.")
    size = sum(path.stat().st_size for path in source.weight_files)
    check_space(output, _needed(format, size, pruned))
    with output_folder(output, overwrite=overwrite, source=source.folder) as out:
        _write(format, pruned, out, _record(run, format, source, pruned), progress)
        if bare is not None:
            _check_loads(out, source, bare)
        written = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    return ExportRecord(format, output, tuple(pruned), written, size)


def _packable(source: ModelSource, pruned: PrunedFolder, trust_remote_code: bool) -> PreTrainedModel:
    """The skeleton of the model, once every pruned layer is known to be one that can run packed. ModelError: one is not."""
    model = skeleton(source, load_config(source, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code)
    weights = {f"{name}{WEIGHT}": module for name, module in model.named_modules(remove_duplicate=False) if hasattr(module, "weight")}
    advice = "Export the model with --format dense."
    for key, name in resolve_names("export", pruned.where.values(), weights, advice).items():
        if not computes_linear(weights[name]):
            raise ModelError(
                f"export: expected layers that compute as nn.Linear does, got {key}, a {type(weights[name]).__name__}, which would compute "
                f"something else packed. {advice}"
            )
    return model


def _needed(format: str, size: int, pruned: PrunedFolder) -> int:
    """Bytes of the weight files to write, where the original's are `size` and all of one dtype."""
    shapes = pruned.files.shapes
    weights = sum(math.prod(shapes[key]) for key in pruned.where.values())
    if format == "masks":
        return weights // 12
    saved = 7 / 16 * weights / max(1, sum(math.prod(shape) for shape in shapes.values()))
    return size if format == "dense" else round(size * (1 - saved))


def _write(format: str, pruned: PrunedFolder, out: Path, record: Mapping[str, object], progress: Progress) -> None:
    if format == "packed":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        write_packed_model(pruned, out, record=record, device=device, progress=progress)
        return
    if format == "masks":
        save_masks(out, pruned)
    else:
        with progress.task("check", len(pruned)) as task:
            for name in pruned:
                pruned.layer(name)
                task.advance()
        write_pruned_model(pruned.folder, pruned.weight_files, out, {}, config_entry=pruned.config_entry)
    write_manifest(out, {**record, FILES: file_records(out)})


def _record(run: str, format: str, source: ModelSource, pruned: PrunedFolder) -> dict[str, object]:
    return {
        **{key: pruned.manifest[key] for key in CARRIED if key in pruned.manifest},
        "export": {"format": format, "source": run, "revision": source.revision, "files": file_hashes(source)},
        PARAMETERS: list(pruned),
        WEIGHTS_UPDATED: pruned.weights_updated,
    }


def load_packed(
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify_hashes: bool = True,
    fuse: bool = True,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a packed folder, in eval mode, its pruned layers as `SparseLinear`. Its `save_pretrained` refuses.

    Args:
        path: a folder that `pst export --format packed` wrote.
        device: None: the GPU if there is one.
        dtype: of weights and activations; None: as most weights are stored.
        verify_hashes: read every file once more first, to compare it with its hash in manifest.json.
        fuse: as in `sparsify_model`.
        trust_remote_code: run Python files that lie beside the weights.
    Raises: ModelError: not a packed folder, files absent or changed, packed layers that the model in config.json does not have (all
        before a model is built), or other tensors than it has. ConfigError, BackendError, ResourceError: as for the model's loading
        elsewhere.
    """
    from .inference.convert import fuse_siblings, refuse_to_save
    from .inference.slots import fill_slots

    place = checked_device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    packed = read_packed(path, verify_hashes=verify_hashes)
    source = ModelSource(str(path), packed.folder, None, packed.weight_files)
    dtype = checked_dtype(source, dtype)
    config = load_config(source, trust_remote_code=trust_remote_code)
    bare = skeleton(source, config, held=packed.shapes, dtype=dtype, trust_remote_code=trust_remote_code)
    places = _places(source, bare, packed.layers)

    def load() -> tuple[PreTrainedModel, Mapping[str, Any]]:
        options = {"dtype": dtype, "generation_config": _generation_config(packed.folder)}
        model, info = _without_packed(bare, places, dict(packed.others()), options)
        model.__class__ = type(bare)
        for layer, names in places.items():
            values, metadata = packed.layer(layer)
            fill_slots(model, names, values.to(dtype), metadata, device=place)
        return model, info

    model = load_whole(source, place, load)
    model.name_or_path = model.config.name_or_path = str(path)
    model.save_pretrained = refuse_to_save
    if fuse:
        fuse_siblings(model, [names[0] for names in places.values() if len(names) == 1])
    return model


def _without_packed(
    bare: PreTrainedModel, places: Mapping[str, Sequence[str]], others: Mapping[str, Tensor], options: Mapping[str, Any]
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """The model with slots at `places`, and transformers' loading info.

    transformers does for all other tensors what it does for any model: names, dtypes, buffers, ties.
    """
    from .inference.slots import with_slots

    loaded: tuple[PreTrainedModel, Mapping[str, Any]] = with_slots(type(bare), list(places.values())).from_pretrained(
        None,
        config=bare.config,
        state_dict=others,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they are listed, and refused
        **options,
    )
    return loaded


def _check_loads(out: Path, source: ModelSource, bare: PreTrainedModel) -> None:
    """Raise ModelError unless `load_packed` can make a model of the folder that was just written; no tensor of it is read.

    transformers loads to the meta device only with accelerate; without it the names and the shapes of the packed layers are compared.
    """
    packed = read_packed(out, verify_hashes=False)
    places = _places(source, bare, packed.layers)
    if importlib.util.find_spec("accelerate") is None:
        return
    meta = torch.device("meta")
    others = {key: torch.empty(packed.shapes[key], dtype=dtype, device=meta) for key, dtype in packed.other_dtypes.items()}
    load_whole(source, meta, lambda: _without_packed(bare, places, others, {"device_map": {"": meta}}))


def _places(source: ModelSource, model: nn.Module, layers: Mapping[str, tuple[int, int]]) -> dict[str, list[str]]:
    """Packed layer -> names of the linear layers of `model` that it replaces: of several that share a weight all."""
    from .inference.slots import sharing

    holders = sharing(model)
    linears = {f"{name}{WEIGHT}": module for name, module in model.named_modules(remove_duplicate=False) if computes_linear(module)}
    advice = "The weights belong to another config.json: export again."
    try:
        keys = resolve_names("load_packed", [f"{layer}{WEIGHT}" for layer in layers], linears)
    except ModelError as error:
        raise ModelError(
            f"{source.spec}: expected the packed layers among the linear layers of the model that config.json describes, "
            f"got others ({listed([layer for layer in layers if f'{layer}{WEIGHT}' not in linears])}). {advice}"
        ) from error
    places = {key.removesuffix(WEIGHT): holders[name] for key, name in keys.items()}
    for layer, shape in layers.items():
        expected = tuple(linears[keys[f"{layer}{WEIGHT}"]].weight.shape)
        if expected != shape:
            raise ModelError(f"{source.spec}: expected {layer} of shape {expected}, which config.json describes, got {shape}. {advice}")
    return places


def _generation_config(folder: Path) -> Any:
    """generation_config.json of the folder; None without one: transformers then takes it from config.json."""
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None
