"""ProxSparse for pretrained language models: learn 2:4 sparsity masks and use them.

The names below are imported when they are first used, so that `import proxsparse_triton` costs nothing and needs neither
Triton nor a GPU.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "prox_24": "ops.prox",
    "frozen_penalty": "ops.frozen_penalty",
    "accumulate_frozen_penalty": "ops.frozen_penalty",
    "mask_24": "ops.mask",
    "masked_weight_24": "ops.masked",
    "pack_24": "ops.pack",
    "unpack_24": "ops.pack",
    "sparse_linear_24": "ops.sparse_linear",
    "prox_adamw_": "ops.prox_adamw",
    "ProxAdamW": "optim.prox_adamw",
    "attach_prox": "optim.attach",
    "prunable_parameters": "models.parameters",
    "load_masks": "formats.masks",
    "apply_masks": "formats.masks",
    "load_packed": "export",
    "sparsify_model": "inference.convert",
    "SparseLinear": "inference.linear",
    "warm_up": "inference.choice",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
