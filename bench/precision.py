"""What each precision of learning costs in perplexity and memory: one mask per storage, all measured on the fp32 model.

python bench/precision.py MODEL --calibration calibration.jsonl.gz --heldout heldout.jsonl.gz --seqlen 1024 --eval-windows 400 -o OUT.csv
"""

from __future__ import annotations

import csv
import datetime
import subprocess
import time
from pathlib import Path

import click

# name in the table -> (dtype of learning, settings of ProxSparse); the first is the yardstick.
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "fp32, fp32 moments": ("float32", {}),
    "fp32, bf16 moments": ("float32", {"moments": "bfloat16"}),
    "fp32, 8-bit moments": ("float32", {"moments": "int8"}),
    "bf16, nothing set": ("bfloat16", {}),
    "bf16 + word, fp32 moments": ("bfloat16", {"weight_bits": 32, "moments": "float32"}),
    "bf16 + byte, bf16 moments": ("bfloat16", {"weight_bits": 24, "moments": "bfloat16"}),
    "bf16 stochastic, fp32 moments": ("bfloat16", {"weight_bits": 16, "moments": "float32"}),
    "bf16 stochastic, bf16 moments": ("bfloat16", {"weight_bits": 16, "moments": "bfloat16"}),
    "bf16 stochastic, 8-bit moments": ("bfloat16", {"weight_bits": 16, "moments": "int8"}),
}


@click.command()
@click.argument("model")
@click.option("--calibration", required=True)
@click.option("--heldout", required=True)
@click.option("--seqlen", type=int, required=True)
@click.option("--samples", type=int, default=400)
@click.option("--eval-windows", type=int, required=True)
@click.option("--lambda1", type=float, default=0.1)
@click.option("--lambda2", type=float, default=0.0)
@click.option("--lr", type=float, default=5e-4)
@click.option("--seeds", type=int, default=1, help="Calibration orders 0, 1, ...")
@click.option("--only", multiple=True, help="Cases whose name contains this.")
@click.option("--commit", help="Recorded with the figures. [default: git's HEAD]")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(model: str, output: Path, **options: object) -> None:
    """Learn one mask per case and seed and write one CSV row each."""
    import torch

    from proxsparse_triton.calibration.sources import open_source
    from proxsparse_triton.calibration.windows import calibration_windows, evaluation_windows
    from proxsparse_triton.formats.manifest import versions
    from proxsparse_triton.models.loading import load_tokenizer, resolve_model

    commit = (
        options["commit"]
        or subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    )
    place = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.cuda.get_device_name() if place == "cuda" else "cpu"
    fixed = {"model": Path(model).name, "device": device, "commit": commit, "date": str(datetime.date.today()), **versions()}
    source = resolve_model(model)
    tokenizer = load_tokenizer(source)
    seqlen, count = int(str(options["seqlen"])), int(str(options["eval_windows"]))
    heldout, digests = evaluation_windows(open_source(str(options["heldout"]), split="all"), tokenizer, windows=count, seqlen=seqlen)
    settings = {"recipe": "paper", **{name: options[name] for name in ("lambda1", "lambda2", "lr")}}
    rows: list[dict[str, object]] = []
    for name, (dtype, precision) in CASES.items():
        only = options["only"]
        if only and not any(part in name for part in only):  # type: ignore[attr-defined]
            continue
        for seed in range(int(str(options["seeds"]))):
            windows = calibration_windows(
                open_source(str(options["calibration"]), split="all"),
                tokenizer,
                samples=int(str(options["samples"])),
                seqlen=seqlen,
                seed=seed,
                exclude=digests,
            )
            figures = _learn(source, dtype, {**settings, **precision}, windows.tokens, heldout.tokens, seed, place)
            rows.append({"case": name, "seed": seed, **figures, **settings, "seqlen": seqlen, "samples": len(windows.tokens), **fixed})
            click.echo(f"{name:34s} seed {seed}  {figures['perplexity']:.4f}  {figures['seconds']} s  {figures['peak_bytes']} bytes")
            with output.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


def _learn(source, dtype, settings, windows, heldout, seed, place):  # type: ignore[no-untyped-def]
    """Perplexity, seconds and peak memory of one mask."""
    import torch

    from proxsparse_triton.evaluation.memory import peak_memory, reset_peak_memory
    from proxsparse_triton.evaluation.perplexity import perplexity
    from proxsparse_triton.formats.masks import apply_masks
    from proxsparse_triton.methods.base import PruneTask, build_method
    from proxsparse_triton.models.loading import load_model
    from proxsparse_triton.models.selection import plan_layers

    model = load_model(source, dtype=getattr(torch, dtype), device=place)
    reset_peak_memory(place)
    start = time.perf_counter()
    result = build_method("proxsparse", settings).prune(PruneTask(model, plan_layers(model), windows, seed=seed))
    seconds, peak = time.perf_counter() - start, peak_memory(place)
    del model
    model = load_model(source, dtype=torch.float32, device=place)
    apply_masks(model, result.masks)
    summary = {name: result.summary[name] for name in ("weight_bits", "moments", "share_24")}
    return {"perplexity": perplexity(model, heldout), "seconds": round(seconds, 2), "peak_bytes": peak, "dtype": dtype, **summary}


if __name__ == "__main__":
    main()
