"""The published settings (Liu et al. 2025, Table of hyper-parameters and the released scripts), by model.

400 texts of C4, batch 1, AdamW, everything in bf16. lambda2 and frozen_eps are given where a published checkpoint used them.
"""

from __future__ import annotations

from ..errors import ConfigError

PRESETS: dict[str, dict[str, float | int]] = {
    "llama-2-7b": {"lambda1": 0.25, "lr": 1e-4, "seqlen": 4096},
    "llama-2-13b": {"lambda1": 0.5, "lr": 1e-4, "seqlen": 4096, "lambda2": 0.25, "frozen_eps": 0.5},
    "llama-3.1-8b": {"lambda1": 0.85, "lr": 5e-5, "seqlen": 4096},
    "mistral-7b-v0.1": {"lambda1": 20.0, "lr": 5e-5, "seqlen": 4096},
    "mistral-7b-v0.3": {"lambda1": 25.0, "lr": 5e-5, "seqlen": 4096},
    "openllama-7b-v2": {"lambda1": 1.0, "lr": 1e-4, "seqlen": 2048},
    "qwen2.5-14b": {"lambda1": 0.2, "lr": 1e-4, "seqlen": 4096},
}


def preset(name: str) -> dict[str, float | int]:
    """Settings of one preset. ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}. Choose one, or give --lambda1 and --lr.")
    return dict(PRESETS[name])
