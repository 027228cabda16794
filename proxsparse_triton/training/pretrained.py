"""What the model computes with while its weights are learned: the learned weights, W0 under their mask, or W0 itself.

The model's modules stay as they are; what a forward pass reads in place of a pruned weight is exchanged for the time of learning. So one
set of modules is both student and teacher, and the product, W0 * mask, can be what the loss sees at every step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..models.reading import read_as
from ..ops import masked_weight_24

MIN_SCALE = 1e-20  # as in the operators: a dead feature's weights keep their order
Forward = Literal["learned", "masked"]


class PretrainedWeights:
    """W0 of the weights to prune, and the forward passes that use it.

    Args:
        model: what holds them; every module that reads one of them is given the same.
        linears: parameter name -> layer; the weights are W0 now.
        scales: parameter name -> column_scale fp32 [in_features]; layers without one are masked by magnitude.
        others: further parameters that will learn and that the teacher has to have as they are now.

    W0 is kept in bf16 where that loses nothing, beside the learned weights: 2 bytes a weight. Under autocast its own casts of the masked
    weights wait for the backward pass too, 2 more.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Linear],
        scales: Mapping[str, Tensor] | None = None,
        others: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model = model
        self._weights = {name: cast(nn.Parameter, linear.weight) for name, linear in linears.items()}
        self._scales = dict(scales or {})
        self._others = [(p, p.detach().clone()) for p in (others or {}).values()]
        self.tensors = {name: compact(weight) for name, weight in self._weights.items()}
        self._teaching = False

    @contextmanager
    def forward(self, kind: Forward) -> Iterator[None]:
        """Inside, forward passes compute with the learned weights, or with W0 under the mask of the learned weights, whose gradient is
        taken as that of the learned ones (straight through); inside `teacher` with W0."""
        masked = _MaskedWeights()
        readers = {weight: partial(self._read, kind, name, masked) for name, weight in self._weights.items()}
        with read_as(self._model, readers), masked.formed_again():
            yield

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Inside, with `forward` active, the model is the dense one. No gradients."""
        learned = [p.data for p, _ in self._others]
        self._teaching = True
        for p, original in self._others:
            p.data = original
        torch.clear_autocast_cache()  # which knows a parameter's cast by the parameter alone
        try:
            yield
        finally:
            self._teaching = False
            for (p, _), data in zip(self._others, learned, strict=True):
                p.data = data
            torch.clear_autocast_cache()

    def _read(self, kind: Forward, name: str, masked: _MaskedWeights, weight: nn.Parameter) -> Tensor:
        w0 = self.tensors[name]
        if self._teaching:
            return w0.to(weight.dtype)
        return weight if kind == "learned" else masked.of(weight, w0, self._scales.get(name))


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


@dataclass(frozen=True)
class _Saved:
    """A view of a masked weight that autograd wanted to keep: how to form it again, and the learned weights it belongs to."""

    form: Callable[[], Tensor]
    weight: Tensor
    version: int
    layout: Any  # its shape, strides and offset

    def formed(self) -> Tensor:
        if self.weight._version != self.version:
            raise RuntimeError(
                "PretrainedWeights: expected the learned weights as they were in the forward pass, got weights that have been modified by "
                "an inplace operation. Run the backward pass before the optimiser's step."
            )
        return self.form().as_strided(*self.layout)


class _MaskedWeights:
    """Forms W0 * mask(c |W|) in the forward pass and again in the backward pass, so that no second copy of the weights is kept for it."""

    def __init__(self) -> None:
        # Storage of a masked weight that is alive -> (the weight, what formed it): one or two at a time.
        self._alive: dict[int, tuple[weakref.ref[Tensor], Callable[[], Tensor], Tensor]] = {}

    def of(self, weight: Tensor, w0: Tensor, scale: Tensor | None) -> Tensor:
        masked: Tensor = _StraightThrough.apply(weight, w0, scale)  # type: ignore[no-untyped-call]
        if masked.requires_grad:
            address = masked.untyped_storage()._cdata  # also tells tensors of the meta device apart
            gone = weakref.ref(masked, lambda _: self._alive.pop(address, None))
            self._alive[address] = gone, partial(self.of, weight, w0, scale), weight
        return masked

    @contextmanager
    def formed_again(self) -> Iterator[None]:
        """Inside, autograd keeps the recipe of a masked weight in place of the tensor."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        if not self._alive or tensor.layout is not torch.strided:
            return tensor
        found = self._alive.get(tensor.untyped_storage()._cdata)
        masked = None if found is None else found[0]()
        if found is None or masked is None or tensor.dtype != masked.dtype:
            return tensor
        layout = tensor.shape, tensor.stride(), tensor.storage_offset()
        return _Saved(found[1], found[2], found[2]._version, layout)


def _unpack(saved: Tensor | _Saved) -> Tensor:
    return saved.formed() if isinstance(saved, _Saved) else saved


class _StraightThrough(torch.autograd.Function):
    """W0 * mask(c |W|), with its gradient as that of W."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, w0: Tensor, scale: Tensor | None) -> Tensor:
        return masked_weight_24(w, w0, column_scale=scale)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return upstream, None, None
