"""`manifest.json`: everything needed to understand and repeat a run, as plain JSON.

The caller decides what stands in it. Three keys are read back, where present: by `verify` `parameters`, the names of the masked
parameters, and `weights_updated`, true when the method changed kept weights; by `pst eval` and the report `decoder`, the share of the
decoder's weights that is 2:4 (`models/share.py`).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, ModelError
from ..models.checkpoint import read_json_object
from .folder import MANIFEST_NAME, TOOL, atomic_file

PARAMETERS = "parameters"
WEIGHTS_UPDATED = "weights_updated"
DECODER = "decoder"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on, without importing them."""
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "safetensors"):
        found[package] = package_version(package, "not installed")
    return found


def write_manifest(out: Path, manifest: Mapping[str, object]) -> None:
    """Write `out`/manifest.json, sorted and indented, atomically.

    Adds `tool`, `version`, `created` (UTC), `versions`, `platform` and `gpu` (null without one); except for `tool`, a value
    of the caller's stands, so that a manifest can be read, extended and written again.

    Raises: ConfigError: a value is not JSON, NaN and infinity included (JSON has no such numbers). OutputError.
    """
    record = {
        "version": package_version(TOOL, "unknown"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "platform": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **manifest,
        "tool": TOOL,
    }
    text = json.dumps(plain("write_manifest", record), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with atomic_file(out / MANIFEST_NAME) as file:
        file.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")  # names need not be UTF-8; JSON has these escapes


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run folder, or of the file itself.

    Raises: ModelError: missing, not JSON, or not written by this tool.
    """
    path = path / MANIFEST_NAME if path.is_dir() else path
    manifest = read_json_object(path)
    if manifest.get("tool") != TOOL:
        raise ModelError(
            f"read_manifest: expected a manifest of {TOOL}, got tool {manifest.get('tool')!r} in {path}. Name a folder that pst wrote."
        )
    return manifest


def original_of(manifest: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """(spec, revision) of the model that a run started from: `model` in its manifest, a string or an object with `spec`."""
    model = manifest.get("model")
    if isinstance(model, Mapping):
        spec, revision = model.get("spec"), model.get("revision")
    else:
        spec, revision = model, manifest.get("revision")
    return (spec if isinstance(spec, str) else None), (revision if isinstance(revision, str) else None)


def plain(function: str, value: object, where: str = "") -> Any:
    """`value` in JSON's own types: dataclasses, mappings, sequences, paths, dtypes and devices are converted.

    Raises: ConfigError: anything else, keys that are not strings, NaN and infinity; the message names where.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(
                f"{function}: expected finite numbers, got {value} at {where or 'the top'}. Store null where a figure is unknown."
            )
        return value
    if isinstance(value, os.PathLike | torch.dtype | torch.device):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{function}: expected string keys, got {key!r} at {where or 'the top'}. Convert the key.")
        return {key: plain(function, item, f"{where}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(function, item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise ConfigError(
        f"{function}: expected JSON values, got a {type(value).__name__} at {where or 'the top'}. Convert it to a number, text or list."
    )


def package_version(package: str, absent: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return absent
