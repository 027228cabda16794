"""Run and comparison folders as `pst prune` and `pst compare` leave them, without a model: what the report is tested with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
NAMES = tuple(f"model.layers.{block}.{projection}.weight" for block in range(3) for projection in PROJECTIONS)
DENSE = 10.5


def manifest(name: str = "proxsparse", pruned: float | None = 12.25, samples: int = 16, **changes: Any) -> dict[str, Any]:
    """Of a finished run; `changes` replace its keys."""
    text = {"windows": samples, "seqlen": 128, "source": "stdlib (calibration)", "fingerprint": "c"}
    return {
        "tool": "proxsparse-triton",
        "version": "0.1.0",
        "created": "2026-11-27T00:23:56+00:00",
        "versions": {"python": "3.11.7", "torch": "2.11.0"},
        "platform": "Linux",
        "gpu": None,
        "device": "cpu",
        "model": {"spec": "demo", "revision": None, "files": {"model.safetensors": "ab"}},
        "config": {"model": "demo", "method": name, "samples": samples, "seqlen": 128, "seed": 42, "dtype": "float32", "settings": {}},
        "method": {"name": name, "settings": {"lambda1": None, "lambda2": 0.25}, "lambda1": 1.3561590, "steps": 4, "share_24": 0.875},
        "parameters": list(NAMES),
        "weights_updated": False,
        "skipped": {"lm_head": "output head"},
        "calibration": text,
        "evaluation": {"windows": 8, "seqlen": 128, "source": "stdlib (heldout)", "fingerprint": "e"},
        "perplexity": {"dense": DENSE, "pruned": pruned},
        "seconds": 83.25,
        "peak_memory_bytes": 1_636_264_448,
        **changes,
    }


def rows(count: int = 4) -> list[dict[str, Any]]:
    """Of metrics.jsonl: the loss falls from 3 to 2; layer i ends with 1 - i/100 of its blocks 2:4."""
    found = []
    for step in range(1, count + 1):
        done = step / count
        layers = {name: done * (1 - index / 100) for index, name in enumerate(NAMES)}
        share = sum(layers.values()) / len(layers)
        found.append(
            {"step": step, "loss": 3 - done, "penalty": 0.0, "grad_norm": 1.0, "lr": 1e-3 * done, "share_24": share, "layers": layers}
        )
    return found


def write_run(folder: Path, content: Mapping[str, Any] | None, steps: Sequence[Mapping[str, Any]] = ()) -> Path:
    """`content` None: an unfinished run."""
    folder.mkdir(parents=True, exist_ok=True)
    if content is not None:
        (folder / "manifest.json").write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps), encoding="utf-8")
    return folder


def write_comparison(folder: Path, perplexities: Mapping[str, float], samples: int = 16) -> Path:
    """One run folder a method; proxsparse has steps."""
    entries = []
    for method, perplexity in perplexities.items():
        write_run(folder / method, manifest(method, perplexity, samples), rows() if method == "proxsparse" else ())
        entry = {"method": method, "folder": method, "perplexity": perplexity, "seconds": 2.5, "peak_memory_bytes": 10**9}
        entries.append({**entry, "magnitude_agreement": 1.0 if method == "magnitude" else 0.625})
    content = {"tool": "proxsparse-triton", "comparison": entries, "perplexity": {"dense": DENSE}}
    (folder / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
