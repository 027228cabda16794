"""Every method and every part of the recipe, over calibration windows and seeds, as CSV: one row a run.

python bench/study.py MODEL --calibration calibration.jsonl.gz --heldout heldout.jsonl.gz --seqlen 1024 --eval-windows 400 \
    --samples 100 --samples 400 --samples 1600 --seeds 3 --jobs 8 -o study.csv

Runs share the GPUs, all that are visible, so `seconds` are those of a busy machine where --jobs is more than their number. Rows that are in
the file already are not run again.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click


@dataclass(frozen=True)
class Case:
    """A method, its settings, and what differs in the run: `config` are fields of RunConfig, `length` a factor on seqlen."""

    method: str = "proxsparse"
    settings: Mapping[str, object] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    length: float = 1.0
    steps: float = 1.0  # a factor on the recipe's steps


CASES: dict[str, Case] = {
    "auto": Case(),
    "auto, repair: both": Case(config={"repair": "both"}),
    "auto, repair: least squares": Case(config={"repair": "least-squares"}),
    "auto, repair: fine-tuning": Case(config={"repair": "finetune"}),
    "auto, cross-entropy": Case(settings={"loss": "ce"}),
    "auto, loss at the learned weights": Case(settings={"forward": "learned"}),
    "auto, prox and mask by magnitude": Case(settings={"prox_scale": "none"}),
    "auto, all parameters learn": Case(settings={"train": "all"}),
    "auto, no prox": Case(settings={"lambda1": 0.0}),
    "auto, logits only": Case(settings={"layer_weight": 0.0}),
    "auto, temperature 2": Case(settings={"temperature": 2.0}),
    "auto, one pass": Case(settings={"epochs": 1}),
    "auto, four passes": Case(settings={"epochs": 4}),
    "auto, batch of 2": Case(settings={"batch_size": 2}),
    "auto, batch of 4": Case(settings={"batch_size": 4}),
    "auto, steps doubled": Case(steps=2.0),
    "auto, steps halved": Case(steps=0.5),
    "auto, windows half as long": Case(length=0.5),
    "auto, windows twice as long": Case(length=2.0),
    "paper": Case(settings={"recipe": "paper"}),
    "paper, lambda1 0.1, lr 5e-4": Case(settings={"recipe": "paper", "lambda1": 0.1, "lr": 5e-4}),
    "paper, lambda1 0.25, lr 1e-4, bf16": Case(settings={"recipe": "paper", "lambda1": 0.25, "lr": 1e-4}, config={"dtype": "bfloat16"}),
    "magnitude": Case("magnitude"),
    "wanda": Case("wanda"),
    "wanda, windows half as long": Case("wanda", length=0.5),
    "wanda, windows twice as long": Case("wanda", length=2.0),
    "wanda, repair: both": Case("wanda", config={"repair": "both"}),
    "sparsegpt": Case("sparsegpt"),
    "sparsegpt, mask only": Case("sparsegpt", {"mask_only": True}),
}


@click.command()
@click.argument("model")
@click.option("--calibration", required=True)
@click.option("--heldout", required=True)
@click.option("--seqlen", type=int, required=True)
@click.option("--eval-windows", type=int, required=True)
@click.option("--samples", type=int, multiple=True, required=True)
@click.option("--seeds", type=int, default=3)
@click.option("--only", multiple=True, help="Cases of this name.")
@click.option("--jobs", type=int, default=1, help="Runs at a time.")
@click.option("--commit", help="Recorded with the figures. [default: git's HEAD]")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(samples: tuple[int, ...], seeds: int, only: tuple[str, ...], jobs: int, commit: str | None, output: Path, **protocol: Any) -> None:
    """Run the cases, the longest first, and write each row when it is there."""
    unknown = [name for name in only if name not in CASES]
    if unknown:
        raise click.UsageError(f"expected --only of {', '.join(CASES)}, got {unknown[0]!r}")
    if commit is None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    fixed = {"commit": commit or "unknown", "date": str(datetime.date.today()), "jobs": jobs}
    done, name_of_model = set(), Path(protocol["model"]).name
    if output.exists():
        with output.open(newline="") as file:
            done = {(row["case"], int(row["samples"]), int(row["seed"])) for row in csv.DictReader(file) if row["model"] == name_of_model}
    wanted = [
        (name, count, seed)
        for count in sorted(samples, reverse=True)
        for name in (only or CASES)
        for seed in range(seeds)
        if (name, count, seed) not in done
    ]
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(jobs):
        numbers.put(number)
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_choose_gpu, initargs=(numbers,)) as pool:
        futures: dict[Future[dict[str, object]], tuple[str, int, int]] = {pool.submit(_run, *one, protocol): one for one in wanted}
        for future in as_completed(futures):
            name, count, seed = futures[future]
            try:
                row = {**future.result(), **fixed}
            except Exception as error:  # one case that fails must not lose the others
                click.echo(f"{name}, {count} windows, seed {seed}: {type(error).__name__}: {error}", err=True)
                continue
            new = not output.exists()
            with output.open("a", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                if new:
                    writer.writeheader()
                writer.writerow(row)
            click.echo(f"{row['perplexity']:.4f}  {name}, {count} windows, seed {seed}, {row['seconds']:.0f} s")


def _choose_gpu(numbers: Any) -> None:
    """Each worker has one of the GPUs, and its share of the cores."""
    import torch

    torch.set_num_threads(max(1, min(4, (os.cpu_count() or 1) // 8)))
    if torch.cuda.is_available():
        torch.cuda.set_device(numbers.get() % torch.cuda.device_count())


def _run(name: str, samples: int, seed: int, protocol: Mapping[str, Any]) -> dict[str, object]:
    import torch

    from proxsparse_triton.formats.manifest import versions
    from proxsparse_triton.methods.recipes import recipe
    from proxsparse_triton.pipeline import RunConfig, prune

    case = CASES[name]
    settings = dict(case.settings)
    if case.steps != 1:
        settings["steps"] = round(case.steps * samples * recipe("auto").epochs(samples))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        config = RunConfig(
            model=protocol["model"],
            output=Path(scratch) / "run",
            method=case.method,
            settings=settings,
            calibration=protocol["calibration"],
            evaluation=protocol["heldout"],
            samples=samples,
            seqlen=round(case.length * protocol["seqlen"]),
            evaluation_windows=protocol["eval_windows"],
            seed=seed,
        )
        record = prune(dataclasses.replace(config, **dict(case.config)))
    return {
        "model": Path(protocol["model"]).name,
        "case": name,
        "samples": samples,
        "seqlen": config.seqlen,
        "seed": seed,
        "perplexity": record.perplexity,
        "dense": record.dense_perplexity,
        "eval_windows": protocol["eval_windows"],
        "steps": record.summary.get("steps"),
        "seconds": round(record.seconds, 1),
        "whole_run_seconds": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": record.peak_memory,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **versions(),
    }


if __name__ == "__main__":
    main()
