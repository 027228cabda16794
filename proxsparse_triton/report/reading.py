"""Run and comparison folders as records: manifest.json, metrics.jsonl and the sizes of the files beside them.

Keys may be missing: folders of earlier versions, and of runs that failed, are read as far as they go.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..files import MAX_JSON, is_regular, parse_json, read_regular
from ..models.share import Share, read_share
from .steps import Steps, number, printable, read_steps

TOOL = "proxsparse-triton"
MANIFEST, METRICS, MASKS = "manifest.json", "metrics.jsonl", "masks.safetensors"
UNFINISHED = ".partial"
WITHOUT_TEXT = frozenset({"magnitude"})  # in a comparison their manifests name the text of the others
ADVICE = "Name the folder that -o of `pst prune` or `pst compare` named."
MOST_RUNS = 1000  # of a page


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


def read_runs(folders: Sequence[Path], left_out: list[str] | None = None) -> list[Run]:
    """The runs of all folders in order, those of a comparison one after the other; a folder named twice is read once.

    Args:
        left_out: gets a line for each folder that is damaged, or of another kind, as long as another one can be shown.
    Raises: ModelError: no folder at all, one that is not there, or none that pst wrote and that can be read.
    """
    if not folders:
        raise ModelError(f"report: expected at least one run folder, got none. {ADVICE}")
    unique: dict[Path, Run] = {}
    problems: list[ModelError] = []
    for folder in dict.fromkeys(map(_resolved, folders)):
        try:
            unique.update({run.folder: run for run in _read(folder)})
        except ModelError as error:
            if left_out is None or not os.path.isdir(folder):
                raise
            problems.append(error)
    if problems and not unique:
        raise problems[0]
    runs = list(unique.values())
    if left_out is not None:
        left_out += [f"Left out: {problem}" for problem in problems]
        left_out += [f"Only the first {MOST_RUNS:,} of {len(runs):,} runs are shown."] if len(runs) > MOST_RUNS else []
    return _labelled(runs[:MOST_RUNS])


def _resolved(folder: Path) -> Path:
    try:
        return Path(folder).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise _not_a_run(Path(folder), f"which cannot be opened ({error})") from error


def _not_a_run(folder: Path, problem: str, advice: str = ADVICE) -> ModelError:
    return ModelError(f"report: expected a run folder of pst, got {folder}, {problem}. {advice}")


def _read(folder: Path) -> Iterator[Run]:
    """The runs of one folder."""
    if not os.path.isdir(folder):
        raise _not_a_run(folder, "which is a file" if os.path.exists(folder) else "which does not exist")
    if not os.path.lexists(folder / MANIFEST):
        if not os.path.lexists(folder / METRICS):
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
        text = read_regular(folder / MANIFEST, MAX_JSON).decode()
        manifest = printable(parse_json(text))
    except (OSError, ValueError) as error:
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
        inside = folder / sub if _is_name(sub) and not (folder / sub).is_symlink() else None
        agreement = number(entry.get("magnitude_agreement"))
        problem = f"The folder {sub[:200]} is missing"
        if inside is not None and os.path.lexists(inside / MANIFEST):
            try:
                own, text = _manifest(inside)
            except ModelError as error:
                problem = f"The {MANIFEST} of {sub} cannot be read ({' '.join(str(error).split())})"
            else:
                yield replace(_run(inside, name, own, text), magnitude_agreement=agreement)
                continue
        dense = manifest.get("perplexity")
        figures = {"dense": dense.get("dense") if isinstance(dense, Mapping) else None, "pruned": entry.get("perplexity")}
        known = {**entry, "method": {**entry, "name": entry.get("method")}, "perplexity": figures}
        note = f"{problem}; these are the figures of the comparison's {MANIFEST}."
        # Under a name that no folder has, so that nothing is read, and several such entries stay apart.
        run = Run(inside or folder / f"{sub[:200]}?", name, known, json.dumps(entry, indent=2), Steps(), None, None, notes=(note,))
        yield replace(run, magnitude_agreement=agreement)


def _is_name(sub: str) -> bool:
    """True for the name of a direct sub-folder: never outside of the comparison, and never the comparison itself."""
    return Path(sub).name == sub and sub not in ("", "..") and "\0" not in sub and len(sub.encode()) < 256


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
        weights_bytes=sum(path.stat().st_size for path in weights if is_regular(path)) or None,
        masks_bytes=masks.stat().st_size if is_regular(masks) else None,
        notes=(*notes, *problems),
    )


def _labelled(runs: list[Run]) -> list[Run]:
    """With the first of these labels that no other run of the page has: method; with its windows; with its folder; with its path."""

    def labels(run: Run) -> tuple[str, ...]:
        windows = "" if run.samples is None else f", {run.samples:,} windows"
        return run.name, f"{run.name}{windows}", f"{run.name} ({run.group})", f"{run.name} ({run.folder})"

    levels = [Counter(column) for column in zip(*map(labels, runs), strict=True)]
    chosen = []
    for run in runs:
        own = labels(run)
        chosen.append(next((label for label, counts in zip(own, levels, strict=True) if counts[label] == 1), own[-1]))
    return [replace(run, label=label) for run, label in zip(runs, chosen, strict=True)]
