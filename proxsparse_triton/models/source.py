"""From what the user typed (a folder, a Hub id, `demo`) to a checked folder on this machine."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ModelError
from ..files import MAX_SMALL, is_regular, open_regular
from .checkpoint import (
    INDEX_SUFFIX,
    check_weight_files,
    find_weight_files,
    is_packed,
    listed,
    one_line,
    read_json_object,
    shard_names,
    unreadable,
    weight_entry,
)

DEMO = "demo"
DEMO_ASSET = "pylm-2m"
CONFIG = "config.json"
ADAPTER = "adapter_config.json"
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
# Everything of a Hub repository that is not weights; sub-folders (onnx/, original/) are other forms of the same model.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "tokenizer*")
SUBFOLDERS = "*/*"
# Those of them that a loader opens; what else lies in a folder (a corpus, a log) is none of the model.
LOADED_FILES = (
    *("config*.json", "generation_config.json", "*processor_config.json", "chat_template*", "*.jinja", "*.py"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
)


@dataclass(frozen=True)
class ModelSource:
    """A model whose files were found and checked.

    spec: what the user typed. folder: where config.json and the weights lie. revision: commit hash of a Hub snapshot, None for
    a local folder. weight_files: safetensors shards in index order, or pickled `.bin` files.
    """

    spec: str
    folder: Path
    revision: str | None
    weight_files: tuple[Path, ...]

    @property
    def is_safetensors(self) -> bool:
        return all(path.suffix == ".safetensors" for path in self.weight_files)


def resolve_model(spec: str, *, revision: str | None = None) -> ModelSource:
    """Find the model and check every file that will be read, without loading it.

    Args:
        spec: `demo` (the built-in model), a local folder, or a Hub id, which is downloaded to the Hub's cache. What exists
            on disk is local; only what could be a Hub id is looked up there.
        revision: branch, tag or commit of a Hub id.
    Raises: ModelError: missing or empty folder, no or broken config.json, a quantised model or an adapter, no weights, absent
        shards, a packed folder, a truncated or corrupt weights file, pickles that hold more than tensors, a Hub id that cannot be fetched.
        ConfigError: a revision for something that is not on the Hub.
    """
    local = _local_path(spec)
    if local is None:
        folder, commit = _download(spec, revision)
        return ModelSource(spec, folder, commit, _checked_files(folder))
    if revision is not None:
        raise ConfigError(f"{spec}: expected a Hub id with a revision, got a local folder. Leave out the revision.")
    _check_folder(local)
    return ModelSource(spec, local, None, _checked_files(local))


def without_weights(spec: str) -> ModelSource | None:
    """The source of a local folder that has config.json but no weights; None for anything else. Raises: ModelError: see `resolve_model`."""
    folder = _local_path(spec)
    if folder is None or not (folder / CONFIG).is_file():
        return None
    config, names = _checked_config(folder), {path.name for path in folder.iterdir()}
    return None if ADAPTER in names or weight_entry(config, names) else ModelSource(spec, folder, None, ())


def file_hashes(source: ModelSource) -> dict[str, str]:
    """File name -> SHA-256 (hex) of config.json and of every weight file, for a run's record."""
    hashes = {}
    for path in (source.folder / CONFIG, *source.weight_files):
        with open_regular(path) as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _local_path(spec: str) -> Path | None:
    """The local path that `spec` means, or None if only the Hub can know it."""
    if spec == DEMO:
        return Path(str(resources.files(__name__.partition(".")[0]) / "assets" / DEMO_ASSET))
    try:
        path = Path(spec).expanduser()
        exists = bool(spec) and path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a home that is unknown
        raise ModelError(f"{spec[:80]}: expected a model folder, got {type(error).__name__}. Check the path.") from error
    if exists:
        return path
    if HUB_ID.fullmatch(spec):
        return None
    raise ModelError(f"{spec!r}: expected a model folder, got no such folder. Check the path, or give a Hub id (org/name) or `demo`.")


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"{folder}: expected a model folder, got a file. Give the folder that holds config.json and the weights.")
    try:
        present = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise ModelError(f"{folder}: expected a readable folder, got {one_line(error)}. Check its permissions.") from error
    if not present:
        raise ModelError(f"{folder}: expected a model folder, got an empty one. Check the path.")
    if ADAPTER in present:  # with peft installed transformers would apply it, without it would not: a result that depends on the machine
        raise ModelError(f"{folder}: expected a whole model, got an adapter ({ADAPTER}). Merge it into its base model first.")
    if CONFIG not in present:
        raise ModelError(f"{folder}: expected {CONFIG}, got {listed(present)}. Give the folder of a Hugging Face model.")
    for name in present:
        _check_small(folder / name)


def _check_small(path: Path) -> None:
    """Raise ModelError for a file that the libraries below would read whole, if there is no end of it."""
    if not any(fnmatch(path.name, pattern) for pattern in LOADED_FILES) or path.is_dir():
        return
    try:
        open_regular(path, MAX_SMALL).close()
    except FileNotFoundError:  # a link that leads nowhere; what needs the file says so
        return
    except OSError as error:
        raise unreadable(path, error) from error


def _checked_config(folder: Path) -> dict[str, Any]:
    config = read_json_object(folder / CONFIG)
    if is_packed(config):
        raise ModelError(
            f"{folder}: expected dense weights, got a packed folder (pst export --format packed). "
            "Load it with proxsparse_triton.load_packed, or use the dense folder it was exported from."
        )
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ModelError(
            f"{folder}: expected dense weights, got a quantised model ({method or 'quantization_config'}). Prune the dense original."
        )
    return config


def _checked_files(folder: Path) -> tuple[Path, ...]:
    files = find_weight_files(folder, _checked_config(folder))
    check_weight_files(files)
    return files


def _download(spec: str, revision: str | None) -> tuple[Path, str]:
    """Fetch the configuration, then only the weights that will be read; (snapshot folder, commit hash)."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(spec, revision=revision, allow_patterns=list(SMALL_FILES), ignore_patterns=SUBFOLDERS))
        _check_folder(folder)
        config = _checked_config(folder)  # a quantised model is refused before its weights travel
        commit = folder.name
        entry = weight_entry(config, _remote_names(spec, commit, folder, config))
        if entry is not None:
            names = shard_names(folder / entry) if entry.endswith(INDEX_SUFFIX) else [entry]
            if not all(is_regular(folder / name) for name in names):
                snapshot_download(spec, revision=commit, allow_patterns=names, ignore_patterns=SUBFOLDERS)
    except ModelError:
        raise
    except Exception as error:  # whatever a download raises (HTTP, proxy, certificates, disk): it failed, and --debug shows why
        raise ModelError(f"{spec}: {_hub_problem(error, revision)}") from error
    return folder, commit


def _remote_names(spec: str, commit: str, folder: Path, config: Mapping[str, Any]) -> set[str]:
    """File names of the repository; where the Hub does not answer, of what an earlier download left."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(spec, revision=commit)  # unlike list_repo_files it does not retry for half a minute
        return {file.rfilename for file in info.siblings or []}
    except Exception:
        left = {path.name for path in folder.iterdir()}
        if weight_entry(config, left) is None:
            raise
        return left


def _hub_problem(error: Exception, revision: str | None) -> str:
    """Rule, finding and advice for an exception of huggingface_hub."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "expected a model you may read, got a gated one. Accept its terms on the Hub and log in with `hf auth login`."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"expected a revision of this model, got {revision!r}, which the Hub does not have. Check --revision."
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return "expected a model folder or a Hub id, got neither (or a private model). Check the spelling, or log in with `hf auth login`."
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return (
            "expected a model folder or a Hub id, got no such folder, and the Hub cannot be reached. "
            "Check the spelling and the network, or give a local folder or `demo`."
        )
    return f"expected a download from the Hub, got {one_line(error)}. Try again, or give a local folder."
