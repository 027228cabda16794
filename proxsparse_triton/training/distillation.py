"""Kullback-Leibler divergence from the dense model's next-token distributions: every position of a text teaches the whole vocabulary.

The teacher is the same model with its pretrained weights in place, so there is no second model in memory, and the head runs in chunks of
tokens, so neither model's logits ever exist all at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from .batches import Batch
from .loss import CHUNK, PROBE, chunk_rows, separable_head

TEMPERATURE = 2.0


class DistillationLoss:
    """Mean divergence KL(teacher || model) over all real positions of a batch, at a temperature: fp32 scalar.

    tau^2 mean_t sum_v p0 (log p0 - log p),   p0 = softmax(z0 / tau),  p = softmax(z / tau)

    The head runs in chunks where the model is provably `head(base(tokens))` and `chunkable`; otherwise whole logits are compared.

    Args:
        model: transformers causal language model.
        window: any token window, int64 [tokens], on the model's device.
        teacher: inside this context the model's forward pass is the teacher's.
        temperature: tau > 0.
        chunkable: False where the head is not the teacher's (it learns, or is pruned).
        chunk: logits of one model that may exist at once; half of what cross-entropy takes, since there are two.
    Source: Hinton et al. 2015 (arXiv 1503.02531).
    """

    def __init__(
        self,
        model: nn.Module,
        window: Tensor,
        teacher: Callable[[], AbstractContextManager[None]],
        *,
        temperature: float = TEMPERATURE,
        chunkable: bool = True,
        chunk: int = CHUNK // 2,
    ) -> None:
        self._model, self._teacher, self._temperature, self._chunk = model, teacher, temperature, chunk
        self._parts = separable_head(model, window[None, :PROBE]) if chunkable else None

    @property
    def chunked(self) -> bool:
        return self._parts is not None

    def __call__(self, batch: Batch) -> Tensor:
        arguments: dict[str, Any] = {"input_ids": batch.tokens, "use_cache": False}
        if batch.mask is not None:
            arguments["attention_mask"] = batch.mask.long()
        real = None if batch.mask is None else batch.mask.flatten()
        if self._parts is None:
            target = self._of_teacher(self._model, arguments).logits.flatten(0, 1)
            return divergence(self._model(**arguments).logits.flatten(0, 1), target, real, temperature=self._temperature)
        base, head = self._parts
        target = self._of_teacher(base, arguments).last_hidden_state.flatten(0, 1)
        hidden = base(**arguments).last_hidden_state.flatten(0, 1)
        return linear_divergence(hidden, target, head.weight, head.bias, real, temperature=self._temperature, chunk=self._chunk)

    def _of_teacher(self, module: nn.Module, arguments: dict[str, Any]) -> Any:
        """Without dropout, whatever the model learns with."""
        training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad(), self._teacher():
                return module(**arguments)
        finally:
            self._model.train(training)


def divergence(logits: Tensor, target: Tensor, real: Tensor | None = None, *, temperature: float = TEMPERATURE) -> Tensor:
    """tau^2 mean_t sum_v p0 (log p0 - log p) of whole logits.

    Args: logits, target (the teacher's): [N, vocabulary]. real: bool [N], the positions that count; None: all.
    Returns: scalar, fp32 (fp64 for fp64).
    Raises: ModelError: a teacher with another vocabulary.
    """
    if logits.shape != target.shape:
        raise ModelError(
            f"distillation: expected a teacher with the model's vocabulary, logits {tuple(logits.shape)}, got {tuple(target.shape)}. "
            "Use a teacher with the same tokenizer."
        )
    kind = torch.promote_types(logits.dtype, torch.float32)
    log_p, log_p0 = (F.log_softmax(z.to(kind) / temperature, -1) for z in (logits, target))
    each = (log_p0.exp() * (log_p0 - log_p)).sum(-1) * temperature**2
    return each.mean() if real is None else each.masked_fill(~real, 0).sum() / real.sum()


def linear_divergence(
    hidden: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    real: Tensor | None = None,
    *,
    temperature: float = TEMPERATURE,
    chunk: int = CHUNK // 2,
) -> Tensor:
    """`divergence` of z = W h + b from z0 = W h0 + b, a chunk of rows at a time; forward and gradient together, so differentiate it once.

    Args:
        hidden, target: [N, in], of the model and of the teacher; the gradient is that of `hidden` alone.
        weight: [vocabulary, in], bias: [vocabulary] or None: the head of both.
        real: bool [N], the positions that count; None: all.
        chunk: logits of one model that may exist at once, rounded to whole rows.
    Returns: scalar, fp32 (fp64 for fp64).
    """
    if real is None:
        real = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    rows = chunk_rows(chunk, weight.shape[0])
    loss: Tensor = _LinearDivergence.apply(hidden, target, weight, bias, real, temperature, rows)  # type: ignore[no-untyped-call]
    return loss


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, real: Tensor, temperature: float, rows: int
    ) -> Tensor:
        kind = torch.promote_types(hidden.dtype, torch.float32)
        share = real.to(kind) / real.sum()
        total = torch.zeros((), dtype=kind, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            log_p0 = F.log_softmax(F.linear(target[part], weight, bias) / temperature, -1, dtype=kind)
            log_p = F.log_softmax(F.linear(hidden[part], weight, bias) / temperature, -1, dtype=kind)
            p0 = log_p0.exp()
            each = log_p0.sub_(log_p).mul_(p0).sum(-1)
            total += (each * share[part]).sum() * temperature**2
            if gradient is not None:  # d/dz = tau (p - p0), times the row's share
                difference = log_p.exp_().sub_(p0).mul_(temperature * share[part, None])
                torch.mm(difference.to(hidden.dtype), weight, out=gradient[part])
        ctx.gradient = gradient
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise ConfigError("linear_divergence: expected one backward pass, got a second. Compute the loss again.")
        return gradient.mul_(upstream), None, None, None, None, None, None
