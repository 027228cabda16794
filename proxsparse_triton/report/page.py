"""Run folders in, one HTML page out, with pictures beside it where matplotlib is installed."""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ..errors import ConfigError, OutputError
from ..files import open_regular
from ..marks import HEAD_BYTES
from ..marks import PAGE_MARK as MARKER
from . import figures, png, sections
from .charts import Chart
from .reading import TOOL, Run, read_runs
from .style import STYLE
from .text import plural

SUFFIXES = (".html", ".htm")


@dataclass(frozen=True)
class Report:
    """What was written."""

    page: Path
    pictures: tuple[Path, ...]
    notes: tuple[str, ...]  # what could not be read or drawn, a line each


def write_report(folders: Sequence[Path], output: Path, *, pictures: bool = True) -> Report:
    """Write the page of run and comparison folders to `output`, and its charts to `pictures_folder(output, folders)`, as PNG.

    The page needs no library, no script and no network. A folder that still ends in .partial is called by its name to be.

    Args:
        pictures: False: the page alone. Without matplotlib there are none either, and a note says so.
    Raises: ModelError: not a run folder. ConfigError: `output` is no name of a page. OutputError: it cannot be written, or holds something
        that pst did not write.
    """
    check_page(output)
    left_out: list[str] = []
    runs = read_runs(folders, left_out)
    charts: list[Chart] = []
    text = page(runs, charts)
    notes = [*left_out, *(f"{run.label}: {note}" for run in runs for note in run.notes)]
    folder = pictures_folder(output, folders)
    if pictures and not png.installed():
        notes.append(f"No PNG pictures: matplotlib cannot be imported. Install it with pip install '{TOOL}[report]'.")
        pictures = False
    if pictures:
        png.check_folder(folder, charts)
    with _explained(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(f".{output.name}.partial")
        try:
            partial.write_text(text, encoding="utf-8", errors="replace", newline="\n")
            partial.replace(output)
        finally:
            partial.unlink(missing_ok=True)
        drawn = png.write(folder, charts) if pictures else ()
    return Report(output, drawn, tuple(notes))


def pictures_folder(output: Path, folders: Sequence[Path]) -> Path:
    """`output` without its suffix; with -report in its place where that is the name of one of the runs."""
    folder = output.with_suffix("")
    runs = {str(path.resolve()).removesuffix(".partial") for path in folders}
    return output.with_name(f"{output.stem}-report") if str(folder.resolve()) in runs else folder


def check_page(output: Path) -> None:
    """Raise unless a page may be written to `output`: ConfigError for its name, OutputError for what is there already."""
    if output.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"report: expected a page with a name in {', '.join(SUFFIXES)}, got {output}. Choose another name with -o.")
    with _explained(output):
        if output.is_dir():
            raise OutputError(f"report: expected the name of a page, got the folder {output}. Choose another name with -o.")
        if not output.exists():
            return
        with open_regular(output) as file:
            head = file.read(HEAD_BYTES)
    if MARKER.encode() not in head:
        raise OutputError(f"report: expected a page that pst wrote, got the file {output}, which is kept. Choose another name with -o.")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(f"report: expected a place to write {path}, got {reason}. Choose another one with -o.") from error


def page(runs: Sequence[Run], charts: list[Chart] | None = None) -> str:
    """The whole page; what it draws is added to `charts`."""
    charts = [] if charts is None else charts
    title = _title(runs)
    if len(runs) == 1:  # no heading above those of its parts
        body = _one(runs[0], "", charts, alone=True).replace("<h3>", '<h2 class="part">').replace("</h3>", "</h2>")
    else:
        body = _several(runs, charts)
    try:
        version = importlib.metadata.version(TOOL)
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    return (
        f'<!doctype html>\n{MARKER}\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n{body}\n"
        f"<footer>Written by pst report, {TOOL} {escape(version)}.</footer>\n</main>\n</body>\n</html>\n"
    )


def _title(runs: Sequence[Run]) -> str:
    models = list(dict.fromkeys(run.model for run in runs))
    what = ", ".join(models) if len(models) < 4 else plural(len(models), "model")
    if len(runs) == 1:
        return f"{what} pruned to 2:4 with {runs[0].name}" if runs[0].manifest else f"{runs[0].method} in {runs[0].folder.name}"
    return f"{what} pruned to 2:4: {plural(len(runs), 'run')}"


def _several(runs: Sequence[Run], charts: list[Chart]) -> str:
    anchors = {run.label: f"run-{index}" for index, run in enumerate(runs, start=1)}
    alike = figures.measured_alike(runs)
    shown: list[Chart] = []
    reasons: list[str] = []
    for kind, stem in ((figures.perplexities, "perplexity"), (figures.over_windows, "windows")):
        made = [kind(members, stem if len(alike) < 2 else f"{stem}-{index}") for index, members in enumerate(alike or [[]], start=1)]
        found = [item for item in made if not isinstance(item, str)]
        shown += found
        reasons += [] if found else [item for item in made[:1] if isinstance(item, str)]
    charts += shown
    parts = [sections.overview(runs, anchors)]
    if len(alike) > 1:
        parts.append('<p class="muted">Perplexities are compared only between runs on the same model, text and dtype.</p>')
    parts += [sections.chart(item) for item in shown]
    parts.append(sections.left_out(reasons))
    stems = _stems(runs)
    for run in runs:
        parts.append(
            f'<section id="{anchors[run.label]}"><h2>{escape(run.label)}</h2>{_one(run, stems[run.label], charts, alone=False)}</section>'
        )
    return "\n".join(parts)


def _stems(runs: Sequence[Run]) -> dict[str, str]:
    """Label -> the start of its pictures' names, all different."""
    counts = Counter(slugs := [re.sub(r"[^a-z0-9]+", "-", run.label.lower()).strip("-")[-60:] for run in runs])
    return {
        run.label: f"{slug}-" if slug and counts[slug] == 1 else f"run-{index}-"
        for index, (run, slug) in enumerate(zip(runs, slugs, strict=True), start=1)
    }


def _one(run: Run, stem: str, charts: list[Chart], *, alone: bool) -> str:
    """Everything about one run."""
    parts = [sections.lead(run), sections.tiles(run)]
    parts += [f'<p class="muted">{escape(note)}</p>' for note in run.notes]
    reasons = []
    drawn = [figures.curves(run, f"{stem}curves"), figures.commitment(run, f"{stem}commitment"), figures.changes(run, f"{stem}changes")]
    for item in drawn:
        if isinstance(item, str):
            reasons.append(item)
        else:
            charts.append(item)
            parts.append(sections.chart(item))
    if not run.steps.rows:
        reasons = ["what is drawn over steps and layers, as metrics.jsonl has no steps."]
    parts.append(sections.warnings(run))
    for name, section in (("agreement with other masks", sections.agreement(run)), ("layers that lose most", sections.restored(run))):
        if section is None:
            reasons.append(f"{name}: not in manifest.json.")
        else:
            parts.append(section)
    parts += [sections.settings(run, unfolded=alone), sections.repeat(run), sections.left_out(reasons)]
    return "\n".join(part for part in parts if part)
