"""Run and comparison folders as records: manifest.json, metrics.jsonl and the sizes of the files beside them.

Keys may be missing: folders of earlier versions, and of runs that failed, are read as far as they go.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..models.share import Share, read_share

TOOL = "proxsparse-triton"
MANIFEST, METRICS, MASKS = "manifest.json", "metrics.jsonl", "masks.safetensors"
UNFINISHED = ".partial"
WITHOUT_TEXT = frozenset({"magnitude"})  # in a comparison their manifests name the text of the others
ADVICE = "Name the folder that -o of `pst prune` or `pst compare` named."

Points = list[tuple[float, float]]


@dataclass
class Steps:
    """metrics.jsonl: figures over steps, each without the rows that do not have it, and the layers after the last step."""

    rows: int = 0
    loss: Points = field(default_factory=list)
    share: Points = field(default_factory=list)  # of 2:4 blocks, 0 to 1
    lr: Points = field(default_factory=list)
    changed: Points = field(default_factory=list)  # share of blocks whose mask changed since the last such row, mean over layers
    layers: dict[str, float] = field(default_factory=dict)  # parameter name -> share of 2:4 blocks
    changes: dict[str, float] = field(default_factory=dict)  # parameter name -> sum of its shares of changed blocks
    warnings: dict[str, list[int]] = field(default_factory=dict)  # text -> the steps that said it


@dataclass(frozen=True)
class Run:
    """One run folder, or what is left of it."""

    folder: Path
    group: str  # name of the comparison it is part of, else of its folder
    manifest: Mapping[str, Any]  # empty: the run was not finished
    text: str  # manifest.json as it stands
    steps: Steps
    weights_bytes: int | None
    masks_bytes: int | None
    magnitude_agreement: float | None = None  # of a comparison
    label: str = ""  # unique on a page
    notes: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        name = self.entry("method").get("name") or self.entry("config").get("method")
        return str(name) if name else "unfinished run"

    @property
    def repair(self) -> str | None:
        """How the kept weights were repaired once the mask was fixed; None where they were not."""
        entry = self.entry("method").get("repair")
        kind = entry.get("kind") if isinstance(entry, Mapping) else entry or self.entry("config").get("repair")
        return str(kind) if kind else None

    @property
    def name(self) -> str:
        """The method, and what came after it."""
        return self.method if self.repair is None else f"{self.method} + repair"

    @property
    def model(self) -> str:
        name = self.entry("model").get("spec") or self.entry("config").get("model")
        return str(name) if name else "unknown model"

    @property
    def dense(self) -> float | None:
        return number(self.entry("perplexity").get("dense"))

    @property
    def perplexity(self) -> float | None:
        return number(self.entry("perplexity").get("pruned"))

    @property
    def seconds(self) -> float | None:
        return number(self.manifest.get("seconds"))

    @property
    def peak_memory(self) -> float | None:
        return number(self.manifest.get("peak_memory_bytes"))

    @property
    def samples(self) -> int | None:
        """Calibration windows; None where the method reads no text."""
        samples = number(self.entry("config").get("samples"))
        read = self.entry("calibration") and self.name not in WITHOUT_TEXT
        return int(samples) if read and samples is not None else None

    @property
    def layers(self) -> int | None:
        names = self.manifest.get("parameters")
        return len(names) if isinstance(names, list) else None

    @property
    def share(self) -> Share | None:
        """How much of the decoder is 2:4; None where the manifest does not say."""
        return read_share(self.manifest.get("decoder"))

    @property
    def command(self) -> str | None:
        """The command line, as one line."""
        command = self.manifest.get("command")
        if isinstance(command, list):
            import shlex

            return shlex.join(map(str, command))
        return command if isinstance(command, str) else None

    def entry(self, key: str) -> Mapping[str, Any]:
        """An object of the manifest; empty where it is missing, null or no object."""
        value = self.manifest.get(key)
        return value if isinstance(value, Mapping) else {}


def number(value: object) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def numbers(value: object) -> dict[str, float]:
    """The finite numbers of an object, by name; empty for anything else."""
    if not isinstance(value, Mapping):
        return {}
    return {str(name): found for name, item in value.items() if (found := number(item)) is not None}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of all folders in order, those of a comparison one after the other; a folder named twice is read once.

    Raises: ModelError: no folder at all, or one that pst did not write.
    """
    if not folders:
        raise ModelError(f"report: expected at least one run folder, got none. {ADVICE}")
    found = [run for folder in dict.fromkeys(map(_resolved, folders)) for run in _read(folder)]
    unique = {run.folder: run for run in found}
    return _labelled(list(unique.values()))


def _resolved(folder: Path) -> Path:
    try:
        return Path(folder).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise _not_a_run(Path(folder), f"which cannot be opened ({error})") from error


def _not_a_run(folder: Path, problem: str, advice: str = ADVICE) -> ModelError:
    return ModelError(f"report: expected a run folder of pst, got {folder}, {problem}. {advice}")


def _read(folder: Path) -> Iterator[Run]:
    """The runs of one folder."""
    if not folder.is_dir():
        raise _not_a_run(folder, "which is a file" if folder.exists() else "which does not exist")
    if not (folder / MANIFEST).exists():
        if not (folder / METRICS).exists():
            raise _not_a_run(folder, f"which has neither {MANIFEST} nor {METRICS}")
        note = f"This run did not finish: it has no {MANIFEST}, only the steps that were taken."
        yield _run(folder, folder.name, {}, "", (note,))
        return
    manifest, text = _manifest(folder)
    name = folder.name.removesuffix(UNFINISHED)  # a page is written before the folder gets its own name
    if isinstance(manifest.get("comparison"), list):
        yield from _comparison(folder, name, manifest)
    elif "export" in manifest:
        source = manifest["export"].get("source") if isinstance(manifest["export"], Mapping) else None
        raise _not_a_run(folder, f"which is an export of {source}", "Name the run itself.")
    elif "method" not in manifest and "config" not in manifest:
        raise _not_a_run(folder, f"whose {MANIFEST} has neither a method nor a comparison")
    else:
        yield _run(folder, name, manifest, text)


def _manifest(folder: Path) -> tuple[dict[str, Any], str]:
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise _not_a_run(folder, f"whose {MANIFEST} cannot be read ({error})", "Copy the folder again, or run again.") from error
    if not isinstance(manifest, dict) or manifest.get("tool") != TOOL:
        tool = manifest.get("tool") if isinstance(manifest, dict) else None
        raise _not_a_run(folder, f"whose {MANIFEST} has the tool {tool!r}, not {TOOL!r}")
    return manifest, text


def _comparison(folder: Path, name: str, manifest: Mapping[str, Any]) -> Iterator[Run]:
    for entry in manifest["comparison"]:
        if not isinstance(entry, Mapping):
            continue
        sub = str(entry.get("folder", entry.get("method", "")))
        inside = folder / Path(sub).name  # never outside of the comparison
        agreement = number(entry.get("magnitude_agreement"))
        if (inside / MANIFEST).exists():
            own, text = _manifest(inside)
            yield replace(_run(inside, name, own, text), magnitude_agreement=agreement)
        else:
            dense = manifest.get("perplexity")
            figures = {"dense": dense.get("dense") if isinstance(dense, Mapping) else None, "pruned": entry.get("perplexity")}
            known = {**entry, "method": {**entry, "name": entry.get("method")}, "perplexity": figures}
            note = f"The folder {sub} is missing; these are the figures of the comparison's {MANIFEST}."
            yield replace(_run(inside, name, known, json.dumps(entry, indent=2), (note,)), magnitude_agreement=agreement)


def _run(folder: Path, group: str, manifest: Mapping[str, Any], text: str, notes: tuple[str, ...] = ()) -> Run:
    steps, problems = read_steps(folder / METRICS)
    masks = folder / MASKS
    weights = [path for pattern in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern) if path != masks]
    return Run(
        folder=folder,
        group=group,
        manifest=manifest,
        text=text,
        steps=steps,
        weights_bytes=sum(path.stat().st_size for path in weights) or None,
        masks_bytes=masks.stat().st_size if masks.exists() else None,
        notes=(*notes, *problems),
    )


def read_steps(path: Path) -> tuple[Steps, list[str]]:
    """metrics.jsonl, and what could not be read of it. A missing file has no steps."""
    steps, broken, last = Steps(), [], 0
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for last, line in enumerate(file, start=1):
                row = _row(line)
                if row is not None:
                    if row.get("phase") != "repair":  # steps of their own, after those of the mask
                        _add(steps, row)
                elif line.strip():
                    broken.append(last)
    except FileNotFoundError:
        return steps, []
    except OSError as error:
        return steps, [f"{path.name} cannot be read: {error.strerror}."]
    if broken == [last] and last:
        return steps, [f"The last line of {path.name} is half-written and was ignored."]
    lines = ", ".join(map(str, broken[:5])) + (" ..." if len(broken) > 5 else "")
    return steps, [f"{len(broken)} lines of {path.name} are no JSON objects and were ignored: {lines}."] if broken else []


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _add(steps: Steps, row: Mapping[str, Any]) -> None:
    steps.rows += 1
    given = number(row.get("step"))
    step = float(steps.rows) if given is None else given
    for points, key in ((steps.loss, "loss"), (steps.share, "share_24"), (steps.lr, "lr")):
        value = number(row.get(key))
        if value is not None:
            points.append((step, value))
    steps.layers = numbers(row.get("layers")) or steps.layers
    changes = numbers(row.get("mask_changes"))
    if changes:
        steps.changed.append((step, sum(changes.values()) / len(changes)))
        for name, share in changes.items():
            steps.changes[name] = steps.changes.get(name, 0.0) + share
    warnings = row.get("warnings")
    for warning in warnings if isinstance(warnings, list) else []:
        steps.warnings.setdefault(str(warning), []).append(int(step))


def _labelled(runs: list[Run]) -> list[Run]:
    """With the first of these labels that no other run of the page has: method; with its windows; with its folder; with its path."""

    def labels(run: Run) -> tuple[str, ...]:
        windows = "" if run.samples is None else f", {run.samples:,} windows"
        return run.name, f"{run.name}{windows}", f"{run.name} ({run.group})", f"{run.name} ({run.folder})"

    chosen = []
    for run in runs:
        own = labels(run)
        alone = [sum(labels(other)[level] == own[level] for other in runs) == 1 for level in range(len(own))]
        chosen.append(own[alone.index(True)])
    return [replace(run, label=label) for run, label in zip(runs, chosen, strict=True)]
