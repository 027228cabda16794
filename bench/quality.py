"""Perplexity of every method on one model by one protocol, as CSV.

python bench/quality.py MODEL --calibration calibration.jsonl.gz --heldout heldout.jsonl.gz --seqlen 1024 --eval-windows 400 -o results.csv
"""

from __future__ import annotations

import csv
import datetime
import subprocess
import tempfile
from pathlib import Path

import click

PAPER: dict[str, object] = {"recipe": "paper"}
# name in the table -> (method, settings)
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "sparsegpt": ("sparsegpt", {}),
    "sparsegpt, mask only": ("sparsegpt", {"mask_only": True}),
    "proxsparse, lambda1 0.1, lr 5e-4": ("proxsparse", {**PAPER, "lambda1": 0.1, "lr": 5e-4}),
    "proxsparse, derived lambda1, lr 5e-4": ("proxsparse", {**PAPER, "lr": 5e-4}),
    "proxsparse, derived lambda1 and lr": ("proxsparse", PAPER),
    "proxsparse, recipe auto": ("proxsparse", {}),
    "proxsparse, lambda1 0.1, lr 5e-4, lambda2 0.01": ("proxsparse", {**PAPER, "lambda1": 0.1, "lr": 5e-4, "lambda2": 0.01}),
}


@click.command()
@click.argument("model")
@click.option("--calibration", required=True)
@click.option("--heldout", required=True)
@click.option("--seqlen", type=int, required=True)
@click.option("--samples", type=int, default=400)
@click.option("--eval-windows", type=int, required=True)
@click.option("--seed", type=int, default=0)
@click.option("--only", multiple=True, help="Cases whose name contains this.")
@click.option("--commit", help="Recorded with the figures. [default: git's HEAD]")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(model: str, output: Path, only: tuple[str, ...], commit: str | None, **protocol: object) -> None:
    """Run all cases and write one CSV row each."""
    import torch

    from proxsparse_triton.commands.console import console_progress
    from proxsparse_triton.comparison import compare
    from proxsparse_triton.formats.manifest import versions
    from proxsparse_triton.pipeline import RunConfig

    if commit is None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    fixed = {"model": Path(model).name, "device": device, "commit": commit or "unknown", "date": str(datetime.date.today()), **versions()}
    rows: list[dict[str, object]] = []
    with console_progress() as progress, tempfile.TemporaryDirectory() as scratch:
        for name, (method, settings) in CASES.items():
            if only and not any(part in name for part in only):
                continue
            config = RunConfig(
                model=model,
                output=Path(scratch) / str(len(rows)),
                calibration=str(protocol["calibration"]),
                evaluation=str(protocol["heldout"]),
                samples=int(str(protocol["samples"])),
                seqlen=int(str(protocol["seqlen"])),
                evaluation_windows=int(str(protocol["eval_windows"])),
                seed=int(str(protocol["seed"])),
            )
            result = compare(config, [method], {method: settings}, progress)
            (row,) = result.rows
            base = {"seqlen": config.seqlen, "samples": config.samples, "eval_windows": config.evaluation_windows, "seed": config.seed}
            if not rows:
                rows.append({"case": "dense", "perplexity": row.record.dense_perplexity, **base, **fixed})
            figures = {"seconds": round(row.record.seconds, 2), "peak_bytes": row.record.peak_memory, "agreement": row.magnitude_agreement}
            rows.append({"case": name, "perplexity": row.record.perplexity, **figures, **base, **fixed})
            click.echo(f"{name}: {row.record.perplexity:.4f} in {row.record.seconds:.1f} s", err=True)
            _write(output, rows)
    for entry in rows:
        click.echo(f"{entry['case']:50s} {entry['perplexity']:8.4f} {entry.get('seconds', '')}")


def _write(output: Path, rows: list[dict[str, object]]) -> None:
    columns = list(dict.fromkeys(key for row in [*rows[1:], rows[0]] for key in row))
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
