"""Distance from the dense model: of its next-token distributions, where every position of a text teaches the whole vocabulary, and of its
hidden states, where every layer has a goal of its own.

The teacher is the same model with its pretrained weights in place, so there is no second model in memory, and the head runs in chunks of
tokens, so neither model's logits ever exist all at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from ..models.modes import evaluating
from .batches import Batch
from .gradients import GradientsInForward, gradient_dtype
from .layer_errors import layer_errors
from .loss import CHUNK, PROBE, chunk_rows, separable_head

TEMPERATURE = 1.0
LAYER_WEIGHT = 1.0


class DistillationLoss:
    """Mean divergence KL(teacher || model) over all real positions t of a batch, and relative errors of the hidden states: fp32 scalar.

    tau^2 mean_t sum_v p0 (log p0 - log p)  +  a sum_l mean_t ||h_l - h0_l||^2 / ||h0_l||^2,   p0 = softmax(z0 / tau),  p = softmax(z / tau)

    h_l leaves decoder block l, the last one the final norm too.

    The head runs in chunks where the model is provably `head(base(tokens))` and `chunkable`; otherwise whole logits are compared.

    Args:
        model: transformers causal language model.
        window: any token window, int64 [tokens], on the model's device.
        teacher: inside this context the model's forward pass is the teacher's.
        temperature: tau > 0. layer_weight: a >= 0.
        chunkable: False where the head is not the teacher's (it learns, or is pruned).
        chunk: logits of one model that may exist at once; half of what cross-entropy takes, since there are two.
    Raises: ModelError: layer_weight > 0 and a model that does not tell its hidden states (then, or when it is called).
    Source: Hinton et al. 2015 (arXiv 1503.02531); the hidden states as in FitNets, Romero et al. 2015 (arXiv 1412.6550).
    """

    def __init__(
        self,
        model: nn.Module,
        window: Tensor,
        teacher: Callable[[], AbstractContextManager[None]],
        temperature: float = TEMPERATURE,
        layer_weight: float = LAYER_WEIGHT,
        *,
        chunkable: bool = True,
        chunk: int = CHUNK // 2,
    ) -> None:
        self._model, self._teacher, self._chunk = model, teacher, chunk
        self._temperature, self._layer_weight = temperature, layer_weight
        self._parts = separable_head(model, window[None, :PROBE]) if chunkable else None
        if layer_weight and not _takes((self._parts or (model,))[0], "output_hidden_states"):
            raise self._without_states()

    @property
    def chunked(self) -> bool:
        return self._parts is not None

    def __call__(self, batch: Batch) -> Tensor:
        arguments: dict[str, Any] = {"input_ids": batch.tokens, "use_cache": False}
        if batch.mask is not None:
            arguments["attention_mask"] = batch.mask.long()
        if self._layer_weight:
            arguments["output_hidden_states"] = True
        real = None if batch.mask is None else batch.mask.flatten()
        body, head = self._parts or (self._model, None)
        target = self._of_teacher(body, arguments)
        out = body(**arguments)
        if head is None:
            loss = divergence(out.logits.flatten(0, 1), target.logits.flatten(0, 1), real, temperature=self._temperature)
        else:
            last, last0 = (output.last_hidden_state.flatten(0, 1) for output in (out, target))
            loss = linear_divergence(last, last0, head.weight, head.bias, real, temperature=self._temperature, chunk=self._chunk)
            del last0
        if self._layer_weight:
            hidden, targets = self._between(out), self._between(target)
            del out, target  # each target is needed no longer than its own layer's error
            loss = loss + self._layer_weight * layer_errors(hidden, targets, real)
        return loss

    def _between(self, output: Any) -> list[Tensor]:
        """Hidden states after each block."""
        states = getattr(output, "hidden_states", None)
        if not states or len(states) < 2:
            raise self._without_states()
        return list(states[1:])  # the first are the embeddings

    def _without_states(self) -> ModelError:
        return ModelError(
            f"distillation: expected hidden states of every decoder block, got none from {type(self._model).__name__}. "
            "Use --layer-weight 0."
        )

    def _of_teacher(self, module: nn.Module, arguments: dict[str, Any]) -> Any:
        """Without dropout, whatever the model learns with."""
        with evaluating(self._model), torch.no_grad(), self._teacher():
            return module(**arguments)


def _takes(module: nn.Module, argument: str) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return argument in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


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
        hidden, target: [N, in], of the model and of the teacher; the gradient is that of `hidden` alone. fp16 takes an fp32 copy
            of the head.
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


class _LinearDivergence(GradientsInForward):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, real: Tensor, temperature: float, rows: int
    ) -> Tensor:
        kind = torch.promote_types(hidden.dtype, torch.float32)
        share = real.to(kind) / real.sum()
        total = torch.zeros((), dtype=kind, device=hidden.device)
        kept = gradient_dtype(hidden.dtype)
        gradient = torch.empty_like(hidden, dtype=kept) if ctx.needs_input_grad[0] else None
        head = weight.to(kept)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            log_p0 = F.log_softmax(F.linear(target[part], weight, bias) / temperature, -1, dtype=kind)
            log_p = F.log_softmax(F.linear(hidden[part], weight, bias) / temperature, -1, dtype=kind)
            p0 = log_p0.exp()
            each = log_p0.sub_(log_p).mul_(p0).sum(-1)
            total += (each * share[part]).sum() * temperature**2
            if gradient is not None:  # d/dz = tau (p - p0), times the row's share
                difference = log_p.exp_().sub_(p0).mul_(temperature * share[part, None])
                torch.mm(difference.to(kept), head, out=gradient[part])
        ctx.name, ctx.gradients = "linear_divergence", (gradient,)
        return total
