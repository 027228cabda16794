"""Model folders for the tests of the dense format."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from proxsparse_triton.formats.dense import write_pruned_model
from proxsparse_triton.formats.masks import save_masks
from proxsparse_triton.formats.shards import model_files


def prune(folder: Path, out: Path, masks: dict[str, Tensor], **arguments: object) -> None:
    write_pruned_model(folder, model_files(folder), out, masks, config_entry={"method": "magnitude"}, **arguments)  # type: ignore[arg-type]
    save_masks(out, masks)


def tiny(folder: Path, tensors: dict[str, Tensor] | None = None, config: str = "{}", metadata: dict[str, str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config, encoding="utf-8")
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", metadata)
    return folder
