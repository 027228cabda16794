"""A pruned model in another form: written by `export_run`, and the packed one loaded by `load_packed`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import ConfigError, ModelError
from .formats.dense import write_pruned_model
from .formats.folder import FILES, check_apart, check_output, check_space, output_folder
from .formats.manifest import DECODER, PARAMETERS, WEIGHTS_UPDATED, write_manifest
from .formats.masks import save_masks
from .formats.packed import WEIGHT, PackedModel, read_packed, write_packed_model
from .formats.pruned import PrunedFolder
from .formats.records import file_records
from .formats.shards import resolve_names
from .models.checkpoint import listed, one_line
from .models.loading import ModelSource, checked_device, checked_dtype, file_hashes, load_config, load_whole, resolve_model
from .models.selection import plan_layers
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
    Raises: ConfigError: unknown format, or layers chosen for a folder that records them. ModelError: `run` cannot be used, or a layer is
        not 2:4; it and its block are named. OutputError: `output` cannot be written, or would replace `run`.
    """
    if format not in FORMATS:
        raise ConfigError(f"export: expected --format {', '.join(FORMATS)}, got {format!r}. Choose one of these.")
    if Path(run).is_dir():
        check_apart(output, Path(run), inside=True)
    check_output(output, overwrite=overwrite)
    source = resolve_model(run)
    check_apart(output, source.folder, inside=True)

    def choose() -> list[str]:
        model = _skeleton(source, None, trust_remote_code)
        return [f"{name}{WEIGHT}" for name in plan_layers(model, include=include, skip=skip).selected()]

    pruned = PrunedFolder(source.folder, source.weight_files, choose)
    if pruned.recorded and (include or skip):
        raise ConfigError(f"export: expected no --include or --skip, as {run} records its pruned layers, got one. Leave it out.")
    size = sum(path.stat().st_size for path in source.weight_files)
    check_space(output, _needed(format, size, pruned))
    with output_folder(output, overwrite=overwrite, source=source.folder) as out:
        _write(format, pruned, out, _record(run, format, source, pruned), progress)
        written = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    return ExportRecord(format, output, tuple(pruned), written, size)


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
    from .inference.linear import SparseLinear

    place = checked_device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    packed = read_packed(path, verify_hashes=verify_hashes)
    source = ModelSource(str(path), packed.folder, None, packed.weight_files)
    dtype = checked_dtype(source, dtype)
    skeleton = _skeleton(source, dtype, trust_remote_code)
    names = _places(source, skeleton, packed)

    def load() -> tuple[PreTrainedModel, Mapping[str, Any]]:
        # transformers does for all other tensors what it does for any model: names, dtypes, buffers, ties.
        model, info = _with_slots(type(skeleton), list(names.values())).from_pretrained(
            None,
            config=skeleton.config,
            state_dict=dict(packed.others()),
            generation_config=_generation_config(packed.folder),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed, and refused
        )
        model.__class__ = type(skeleton)
        for layer, name in names.items():
            values, metadata = packed.layer(layer)
            bias = model.get_submodule(name).bias
            model.set_submodule(name, SparseLinear.from_packed(values.to(dtype), metadata, bias, device=place))
        return model, info

    model = load_whole(source, place, load)
    model.name_or_path = model.config.name_or_path = str(path)
    model.save_pretrained = refuse_to_save
    if fuse:
        fuse_siblings(model, list(names.values()))
    return model


def _skeleton(source: ModelSource, dtype: torch.dtype | None, trust_remote_code: bool) -> PreTrainedModel:
    """The model that config.json describes, without weights."""
    from transformers import AutoModelForCausalLM

    config = load_config(source, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # code that comes with a model raises anything
        raise ModelError(
            f"{source.spec}: expected a model that transformers can build, got {one_line(error)}. Check config.json."
        ) from error
    return model


def _places(source: ModelSource, skeleton: nn.Module, packed: PackedModel) -> dict[str, str]:
    """Packed layer -> name of the nn.Linear that it replaces."""
    linears = {name: module for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    advice = "The weights belong to another config.json: export again."
    try:
        keys = resolve_names("load_packed", [f"{layer}{WEIGHT}" for layer in packed.layers], [f"{name}{WEIGHT}" for name in linears])
    except ModelError as error:
        raise ModelError(
            f"{source.spec}: expected the packed layers among the linear layers of the model that config.json describes, "
            f"got others ({listed([layer for layer in packed.layers if layer not in linears])}). {advice}"
        ) from error
    places = {key.removesuffix(WEIGHT): name.removesuffix(WEIGHT) for key, name in keys.items()}
    for layer, shape in packed.layers.items():
        expected = tuple(linears[places[layer]].weight.shape)
        if expected != shape:
            raise ModelError(f"{source.spec}: expected {layer} of shape {expected}, which config.json describes, got {shape}. {advice}")
    return places


class _Slot(nn.Module):
    """Stands where a packed layer will be, with its bias alone."""

    def __init__(self, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias


def _with_slots(kind: type[PreTrainedModel], names: Sequence[str]) -> type[PreTrainedModel]:
    """The class `kind`, whose models have slots at `names`: their dense weights are never allocated, nor found missing."""

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:  # noqa: N807
        kind.__init__(self, *arguments, **options)
        for name in names:
            self.set_submodule(name, _Slot(self.get_submodule(name).bias))

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})


def _generation_config(folder: Path) -> Any:
    """generation_config.json of the folder; None without one: transformers then takes it from config.json."""
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None
