"""A tiny Llama, random or trained for a moment, and a task around it: what the tests of learned masks and of repair share."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from proxsparse_triton.methods.base import PruneResult, PruneTask
from proxsparse_triton.models.selection import plan_layers
from proxsparse_triton.progress import SILENT, Progress

WINDOWS = 8


def tiny(device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(device, dtype)


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


def task(device: str, rows: list[Mapping[str, object]] | None = None, **options: Any) -> PruneTask:
    """Eight windows of 12 random tokens, seed 3; rows of metrics into `rows`. Other options are those of `plan_layers`."""
    model = options.pop("model", None) or tiny(device)
    progress, limit, seed = options.pop("progress", SILENT), options.pop("memory", None), options.pop("seed", 3)
    generator = torch.Generator().manual_seed(1)
    texts = tuple(torch.randint(48, (12,), generator=generator) for _ in range(WINDOWS))
    record = (lambda row: None) if rows is None else rows.append
    return PruneTask(model, plan_layers(model, **options), texts, seed, limit, progress, record)


def same(one: PruneResult, other: PruneResult) -> bool:
    return all(torch.equal(mask, other.masks[name]) for name, mask in one.masks.items())


def texts(count: int, seed: int, length: int = 24) -> Tensor:
    """int64 [count, length] of a language with two words that may come next, given the last two: at best log 2 a token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(48, (count, length), generator=generator)
    either = torch.randint(2, (count, length), generator=generator)
    for i in range(2, length):
        tokens[:, i] = (3 * tokens[:, i - 1] + tokens[:, i - 2] // 8 + either[:, i]) % 48
    return tokens


@cache
def _trained() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=150)
    for step in range(150):
        tokens = texts(32, 100 + step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def trained_task(device: str, dtype: torch.dtype = torch.float32, windows: int = 16, **options: Any) -> PruneTask:
    """A small Llama that has learned this language, and windows of it; without gradients left over. Other options: `plan_layers`."""
    model = copy.deepcopy(_trained()).to(device, dtype)
    progress = options.pop("progress", SILENT)
    return PruneTask(model, plan_layers(model, **options), tuple(texts(windows, 5)), 3, progress=progress)


def heldout_loss(device: str, result: PruneResult | None = None) -> float:
    """Cross-entropy of the trained model on text that no task has, with masks and weights of `result`."""
    model, tokens = copy.deepcopy(_trained()).to(device), texts(64, 7).to(device)
    for name, mask in ({} if result is None else result.masks).items():
        p = model.get_parameter(name)
        kept = p.detach() if result is None or result.weights is None else result.weights[name].to(device, p.dtype)
        p.data = kept * mask.to(device)
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)
