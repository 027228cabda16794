"""Whether a packed model says what its dense original says: perplexity and greedy tokens of both, on the GPU if there is one.

python bench/packed.py RUN PACKED --heldout heldout.jsonl.gz --seqlen 1024 --eval-windows 400 -o OUT.csv

Both multiply in bf16 and sum in fp32, in other orders. Where the greedy tokens part, `gap` is by how much the dense model in fp32 prefers
its first choice there (difference of logits): a coin toss, if it is below what rounding to bf16 moves logits by.
"""

from __future__ import annotations

import csv
import datetime
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

PROMPT, CONTINUED, PROMPTS = 64, 64, 32  # tokens, tokens, windows


@click.command()
@click.argument("run")
@click.argument("packed")
@click.option("--heldout", required=True)
@click.option("--seqlen", type=int, required=True)
@click.option("--eval-windows", type=int, required=True)
@click.option("--commit", help="Recorded with the figures. [default: git's HEAD]")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(run: str, packed: str, heldout: str, seqlen: int, eval_windows: int, commit: str | None, output: Path) -> None:
    """Compare the dense folder RUN and the folder PACKED exported from it; one CSV row per model."""
    import torch

    from proxsparse_triton import load_packed
    from proxsparse_triton.calibration.sources import open_source
    from proxsparse_triton.calibration.windows import evaluation_windows
    from proxsparse_triton.evaluation.perplexity import perplexity
    from proxsparse_triton.formats.manifest import versions
    from proxsparse_triton.inference.convert import weight_bytes
    from proxsparse_triton.models.loading import load_model, load_tokenizer, resolve_model

    place = "cuda" if torch.cuda.is_available() else "cpu"
    source = resolve_model(run)
    windows, _ = evaluation_windows(open_source(heldout, split="all"), load_tokenizer(source), windows=eval_windows, seqlen=seqlen)
    prompts = [window[:PROMPT] for window in windows.tokens[:PROMPTS]]
    models = {
        "dense": load_model(source, dtype=torch.bfloat16, device=place),
        "packed": load_packed(packed, device=place, dtype=torch.bfloat16),
    }
    exact = load_model(source, dtype=torch.float32, device=place)
    said = {name: [_greedy(model, prompt) for prompt in prompts] for name, model in models.items()}
    static = {
        name: [_greedy(model, prompt, cache_implementation="static") for prompt in prompts[: PROMPTS // 4]]
        for name, model in models.items()
    }
    gaps = [gap for pair in zip(said["dense"], said["packed"], strict=True) if (gap := _gap(exact, *pair)) is not None]
    bytes_of = weight_bytes(models["packed"])
    commit = commit or subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    device = torch.cuda.get_device_name() if place == "cuda" else "cpu"
    rows = [
        {
            "model": Path(run).name,
            "form": name,
            "perplexity": perplexity(model, windows.tokens, batch_size=8),
            "windows": eval_windows,
            "seqlen": seqlen,
            "pruned_bytes": bytes_of.packed if name == "packed" else bytes_of.dense,
            "continuations": len(prompts),
            "same_as_dense": sum(a == b for a, b in zip(said["dense"], said[name], strict=True)),
            "with_static_cache": len(static[name]),
            "same_with_static_cache": sum(a == b for a, b in zip(static["dense"], static[name], strict=True)),
            "largest_gap": max(gaps, default=0.0),
            "device": device,
            "commit": commit,
            "date": str(datetime.date.today()),
            **versions(),
        }
        for name, model in models.items()
    ]
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        click.echo(", ".join(f"{key} {value}" for key, value in row.items()))


def _greedy(model: Any, prompt: Any, **options: Any) -> list[int]:
    """Prompt and continuation."""
    import torch

    with torch.inference_mode():
        ids = prompt[None].to(next(model.parameters()).device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=CONTINUED, pad_token_id=0, **options)
    tokens: list[int] = out[0].tolist()
    return tokens


def _gap(exact: Any, first: Sequence[int], second: Sequence[int]) -> float | None:
    """How much more the exact model likes the better of the two tokens at which the continuations part; None where they do not."""
    import torch

    at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    if at is None:
        return None
    with torch.inference_mode():
        logits = exact(torch.tensor([first[:at]], device=next(exact.parameters()).device)).logits[0, -1]
    return abs(float(logits[first[at]] - logits[second[at]]))


if __name__ == "__main__":
    main()
