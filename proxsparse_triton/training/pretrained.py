"""What the pruned layers compute with while their weights are learned: the learned weights, W0 under their mask, or W0 itself.

The model's modules stay as they are: the layers' `forward` is replaced for the time of learning, so one set of modules is both student and
teacher, and the product, W0 * mask, can be what the loss sees at every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import masked_weight_24

MIN_SCALE = 1e-20  # as in the operators: a dead feature's weights keep their order
Forward = Literal["learned", "masked"]


class PretrainedWeights:
    """W0 of the layers to prune, and the forward passes that use it.

    Args:
        linears: parameter name -> layer; the weights are W0 now.
        scales: parameter name -> column_scale fp32 [in_features]; layers without one are masked by magnitude.
        others: further parameters that will learn and that the teacher has to have as they are now.

    W0 is kept in bf16 where that loses nothing, beside the learned weights: 2 bytes a weight.
    """

    def __init__(
        self, linears: Mapping[str, nn.Linear], scales: Mapping[str, Tensor] | None = None, others: Mapping[str, Tensor] | None = None
    ) -> None:
        self._linears = dict(linears)
        self._scales = dict(scales or {})
        self._others = [(p, p.detach().clone()) for p in (others or {}).values()]
        self.tensors = {name: compact(linear.weight) for name, linear in self._linears.items()}
        self._teaching = False

    @contextmanager
    def forward(self, kind: Forward) -> Iterator[None]:
        """Inside, the layers compute with the learned weights, or with W0 under the mask of the learned weights, whose gradient is taken
        as that of the learned ones (straight through); inside `teacher` with W0."""
        before = {name: linear.__dict__.get("forward") for name, linear in self._linears.items()}  # of who wraps modules too
        for name, linear in self._linears.items():
            linear.forward = partial(self._run, kind, linear, self.tensors[name], self._scales.get(name))  # type: ignore[method-assign]
        try:
            yield
        finally:
            for name, linear in self._linears.items():
                del linear.__dict__["forward"]
                if before[name] is not None:
                    linear.__dict__["forward"] = before[name]

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Inside, with `forward` active, the model is the dense one. No gradients."""
        learned = [p.data for p, _ in self._others]
        self._teaching = True
        for p, original in self._others:
            p.data = original
        try:
            yield
        finally:
            self._teaching = False
            for (p, _), data in zip(self._others, learned, strict=True):
                p.data = data

    def _run(self, kind: Forward, linear: nn.Linear, w0: Tensor, scale: Tensor | None, x: Tensor) -> Tensor:
        if self._teaching:
            return F.linear(x, w0.to(x.dtype), linear.bias)
        if kind == "learned":
            return F.linear(x, linear.weight, linear.bias)
        out: Tensor = _MaskedLinear.apply(x, linear.weight, linear.bias, w0, scale)  # type: ignore[no-untyped-call]
        return out


def compact(weight: Tensor) -> Tensor:
    """A copy of the weight, in bf16 where that loses nothing."""
    weight = weight.detach()
    low = weight.to(torch.bfloat16)
    if weight.dtype == torch.bfloat16:
        return low.clone()
    lossless = weight.device.type != "meta" and torch.equal(low.to(weight.dtype), weight)
    return low if lossless else weight.clone()


def kept_dtype(learning: torch.dtype, stored: torch.dtype) -> torch.dtype:
    """That of `compact` for weights which were stored in one dtype and learn in another: fp16 values do not fit into bf16."""
    return torch.bfloat16 if torch.bfloat16 in (learning, stored) else learning


def mask_scores(w: Tensor, scale: Tensor | None) -> Tensor:
    """|c w|, fp32 (fp64 for fp64), as `masked_weight_24` compares them: the mask that the loss saw is `mask_24` of these."""
    scores = w.detach().abs().to(torch.promote_types(w.dtype, torch.float32))
    return scores if scale is None else scores * scale.clamp_min(MIN_SCALE).to(scores.dtype)


class _MaskedLinear(torch.autograd.Function):
    """x (W0 * mask(c |W|))^T + b, with dW = the gradient of W0 * mask: the masked weight is formed again in the backward pass, so that no
    second copy of the weights is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, w0: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.masked = partial(masked_weight_24, w0=w0, column_scale=scale)
        return F.linear(x, ctx.masked(w), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        for_x, for_w, for_bias, *_ = ctx.needs_input_grad
        rows = upstream.reshape(-1, upstream.shape[-1])
        return (
            upstream @ ctx.masked(w) if for_x else None,
            rows.T @ x.reshape(-1, x.shape[-1]) if for_w else None,
            rows.sum(0) if for_bias else None,
            None,
            None,
        )
