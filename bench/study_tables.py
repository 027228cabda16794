"""The tables of docs/recipe.md from a study's CSV, in Markdown: mean and standard deviation over the seeds; and their chart as a picture.

python bench/study_tables.py bench/results/nvidia-h200-study.csv --chart docs
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev

import click

from proxsparse_triton.report.charts import Chart, Curves, Line, Panel

Figures = Mapping[tuple[str, str, int], list[float]]  # (model, case, windows) -> perplexity of each seed

MODELS = {"pylm-28m": "27.8 M", "pylm-2m": "2.4 M", "starcoder2-14m": "Starcoder2"}
WINDOWS = (100, 400, 1600)
DENSE = "dense"

METHODS = {
    DENSE: "dense",
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "sparsegpt, mask only": "SparseGPT, its mask on the original weights",
    "sparsegpt": "SparseGPT, weights **changed**",
    "paper, lambda1 0.25, lr 1e-4, bf16": "`--recipe paper`, lambda1 0.25, lr 1e-4, bf16: published for Llama-2-7B",
    "paper, lambda1 0.1, lr 5e-4": "`--recipe paper`, lambda1 0.1, lr 5e-4: best of a grid, 27.8 M, 400 windows",
    "paper": "`--recipe paper`, lambda1 and lr derived",
    "auto": "**`--recipe auto`**, the default",
    "auto, repair: both": "`--repair`, weights **changed**",
    "wanda, repair: both": "`--repair` of Wanda's mask, weights **changed**",
}
PARTS = {
    "auto": "**all of it**",
    "auto, loss at the learned weights": "the loss at the learned weights (`--forward learned`)",
    "auto, cross-entropy": "cross-entropy (`--loss ce`)",
    "auto, logits only": "logits only (`--layer-weight 0`)",
    "auto, all parameters learn": "all parameters learning (`--train all`)",
    "auto, temperature 2": "temperature 2 (`--temperature 2`)",
    "auto, prox and mask by magnitude": "prox and mask by magnitude (`--prox-scale none`)",
    "auto, no prox": "no prox (`--lambda1 0`)",
    "auto, one pass": "one pass (`--epochs 1`)",
    "auto, four passes": "four passes (`--epochs 4`)",
    "auto, steps halved": "half of the steps (`--steps`)",
    "auto, steps doubled": "twice the steps (`--steps`)",
    "auto, batch of 2": "batch of 2: half of the steps",
    "auto, batch of 4": "batch of 4: a quarter of the steps",
    "auto, repair: least squares": "repair by least squares alone",
    "auto, repair: fine-tuning": "repair by fine-tuning alone",
    "auto, repair: both": "repair by both",
}
LENGTHS = {
    "half": {"wanda, windows half as long": "Wanda", "auto, windows half as long": "auto"},
    "twice": {"wanda, windows twice as long": "Wanda", "auto, windows twice as long": "auto"},
}
DRAWN = {"wanda": "Wanda", "paper": "published algorithm", "sparsegpt": "SparseGPT", "auto": "auto", "auto, repair: both": "auto, repaired"}


def read(path: Path) -> Figures:
    """`dense` is a case of its own; `dense, half` and `dense, twice` are of windows half and twice as long."""
    figures: dict[tuple[str, str, int], list[float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            place = row["model"], row["case"], int(row["samples"])
            figures.setdefault(place, []).append(float(row["perplexity"]))
            length = next((length for length, cases in LENGTHS.items() if row["case"] in cases), None)
            dense = f"{DENSE}, {length}" if length else DENSE
            figures[row["model"], dense, place[2]] = [float(row["dense"])]
    return figures


def cell(values: list[float] | None) -> str:
    if not values:
        return ""
    digits = 3 if mean(values) < 10 else 2
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.{digits}f}" + (f" +- {spread:.{digits}f}" if spread else "")


def table(title: str, cases: Mapping[str, str], figures: Figures, models: Iterable[str] = MODELS) -> Iterator[str]:
    """Markdown: a row a case, a column a model and number of windows."""
    columns = [(m, n) for m in models for n in WINDOWS if any((m, case, n) in figures for case in cases if not case.startswith(DENSE))]
    yield "| " + " | ".join([title, *(f"{MODELS[model]}, {windows}" for model, windows in columns)]) + " |"
    yield "|---" * (1 + len(columns)) + "|"
    for case, label in cases.items():
        yield "| " + " | ".join([label, *(cell(figures.get((model, case, windows))) for model, windows in columns)]) + " |"


def tables(figures: Figures) -> list[str]:
    """Lines of Markdown, an empty one between two tables."""
    short = list(MODELS)[:2]  # the third model has no parts taken away but one
    lengths = {f"{DENSE}, half": "dense, half as long", **{c: f"{label}, half as long" for c, label in LENGTHS["half"].items()}}
    lengths |= {f"{DENSE}, twice": "dense, twice as long", **{c: f"{label}, twice as long" for c, label in LENGTHS["twice"].items()}}
    return [
        *table("perplexity of", METHODS, figures),
        "",
        *table("with", PARTS, figures, short),
        "",
        *table("windows", lengths, figures, short),
    ]


def chart(figures: Figures) -> Chart:
    panels = []
    for model in list(MODELS)[:2]:
        lines = []
        for color, (case, label) in enumerate(DRAWN.items()):
            of_seeds = [(float(n), value) for n in WINDOWS for value in figures.get((model, case, n), [])]
            means = [(float(n), mean(figures[model, case, n])) for n in WINDOWS if (model, case, n) in figures]
            lines += [Line("", tuple(of_seeds), color, "dots"), Line(label, tuple(means), color)]
        level = next((values[0] for (m, case, _), values in figures.items() if (m, case) == (model, DENSE)), None)
        panels.append(Panel(f"{MODELS[model]} parameters", tuple(lines), 220, level=None if level is None else ("dense", level)))
    return Curves(
        "perplexity-over-windows",
        "Held-out perplexity at 2:4, three seeds",
        "Perplexity of each method over calibration windows",
        "calibration windows",
        tuple(panels),
        ticks=tuple(float(n) for n in WINDOWS),
        log=True,
    )


@click.command()
@click.argument("study", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--chart", "folder", type=click.Path(path_type=Path), metavar="FOLDER", help="Write the chart there as PNG. Needs matplotlib."
)
def main(study: Path, folder: Path | None) -> None:
    """Print the tables of STUDY.csv."""
    figures = read(study)
    click.echo("\n".join(tables(figures)))
    if folder is not None:
        from proxsparse_triton.report import png

        if not png.installed():
            raise click.UsageError("expected matplotlib for --chart, got none. Install matplotlib, or leave --chart out.")
        png.check_folder(folder, [chart(figures)])
        click.echo(png.write(folder, [chart(figures)])[0], err=True)


if __name__ == "__main__":
    main()
