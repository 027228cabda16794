"""Cross-entropy of the next token, with the output head in chunks of tokens: the logits of a large vocabulary never exist all at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import Batch
from .gradients import GradientsInForward, gradient_dtype

IGNORED = -100
# Logits of one chunk, 10 bytes each at the highest point (bf16, fp32, and their fp32 log-probabilities): 1.3 GB. A window of 4096 tokens is
# one chunk of a vocabulary of 32,000, four or five of 128,256 or 152,064, each still a matrix product of full speed.
CHUNK = 2**27
ROW_STEP = 128  # chunks are multiples of a matrix product's tile
PROBE = 4  # tokens of the forward pass that shows how the model is put together


class NextTokenLoss:
    """Mean cross-entropy of the next token over all real positions of a batch: fp32 scalar.

    The head runs in chunks where the model is provably `head(base(tokens))`; otherwise the model's own logits are used.

    Args:
        model: transformers causal language model.
        window: any token window, int64 [tokens], on the model's device.
        chunkable: False where the head computes with something else than its weight.
        chunk: logits that may exist at once.
    """

    def __init__(self, model: nn.Module, window: Tensor, *, chunkable: bool = True, chunk: int = CHUNK) -> None:
        self._model, self._chunk = model, chunk
        self._parts = separable_head(model, window[None, :PROBE]) if chunkable else None

    @property
    def chunked(self) -> bool:
        return self._parts is not None

    def __call__(self, batch: Batch) -> Tensor:
        arguments: dict[str, Any] = {"input_ids": batch.tokens, "use_cache": False}
        targets = F.pad(batch.tokens[:, 1:], (0, 1), value=IGNORED)
        if batch.mask is not None:
            arguments["attention_mask"] = batch.mask.long()
            targets = targets.masked_fill(~F.pad(batch.mask[:, 1:], (0, 1)), IGNORED)
        if self._parts is None:
            logits = self._model(**arguments).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)
        base, head = self._parts
        hidden = base(**arguments).last_hidden_state
        return linear_cross_entropy(hidden.flatten(0, 1), head.weight, head.bias, targets.flatten(), chunk=self._chunk)


def separable_head(model: nn.Module, tokens: Tensor) -> tuple[nn.Module, nn.Linear] | None:
    """(base, head) if the model's forward pass is `head(base(tokens))` and nothing else; None if it is not, or cannot be shown.

    Shown on the tensors of one forward pass, whatever their values: the base gets the tokens and no other tensor, its last hidden state
    goes into the head as it is, and the head's result comes out as it is. Scaled, soft-capped or cast logits are other tensors, or
    tensors that were written to.
    """
    base, head = getattr(model, "base_model", None), getattr(model, "get_output_embeddings", lambda: None)()
    if base is None or base is model or type(head) is not nn.Linear:
        return None
    seen: dict[str, Tensor] = {}
    versions: dict[str, int] = {}

    def note(name: str, tensor: object) -> None:
        if isinstance(tensor, Tensor):
            seen[name], versions[name] = tensor, tensor._version

    def after_base(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if all(value is tokens for value in (*args, *kwargs.values()) if isinstance(value, Tensor)):
            note("hidden", getattr(out, "last_hidden_state", None))

    def after_head(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        note("input", args[0] if args else None)
        note("output", out)

    handles = [base.register_forward_hook(after_base, with_kwargs=True), head.register_forward_hook(after_head)]
    try:
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if seen.keys() != {"hidden", "input", "output"} or any(seen[name]._version != version for name, version in versions.items()):
        return None
    return (base, head) if _same_memory(seen["hidden"], seen["input"]) and logits is seen["output"] else None


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """True for a tensor and a view of all of it; also on the meta device, where every address is 0."""

    def layout(tensor: Tensor) -> tuple[object, ...]:
        return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype

    return layout(one) == layout(other)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """mean over targets >= 0 of  logsumexp(z) - z[target],  z = W h + b.

    Forward and gradient are computed together, a chunk of rows at a time, so that the backward pass has nothing left to do: the same
    arithmetic as `F.cross_entropy(F.linear(hidden, weight, bias).float(), targets)`, except that the gradient of W is rounded to its
    dtype once a chunk. May be differentiated once.

    Args:
        hidden: [N, in], any floating dtype; fp16 takes an fp32 copy of the head.
        weight: [vocabulary, in], bias: [vocabulary] or None, of the same dtype.
        targets: int64 [N]; `IGNORED` where there is nothing to predict.
        chunk: logits that may exist at once, rounded to whole rows.
    Returns: scalar, fp32 (fp64 for fp64).
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, chunk_rows(chunk, weight.shape[0]))  # type: ignore[no-untyped-call]
    return loss


def chunk_rows(chunk: int, vocabulary: int) -> int:
    """Rows of logits, at least one, that hold no more than `chunk` values."""
    rows = chunk // vocabulary
    return max(1, rows - rows % ROW_STEP if rows > ROW_STEP else rows)


class _LinearCrossEntropy(GradientsInForward):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int) -> Tensor:
        for_hidden, for_weight, for_bias, *_ = ctx.needs_input_grad
        kind = torch.promote_types(hidden.dtype, torch.float32)
        real = targets != IGNORED
        share = real.to(kind) / real.sum()  # of each row in the mean; no row at all: 0 / 0, as in F.cross_entropy
        total = torch.zeros((), dtype=kind, device=hidden.device)
        kept = gradient_dtype(hidden.dtype)
        grad_hidden = torch.empty_like(hidden, dtype=kept) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=kept) if for_weight else None
        grad_bias = torch.zeros_like(bias, dtype=kept) if for_bias and bias is not None else None
        head = weight.to(kept) if for_hidden else weight
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            log_p = F.log_softmax(F.linear(hidden[part], weight, bias), -1, dtype=kind)
            total += F.nll_loss(log_p, targets[part], ignore_index=IGNORED, reduction="sum")
            at = targets[part, None].clamp(min=0)
            grad = log_p.exp_()
            grad.scatter_(1, at, grad.gather(1, at) - 1)
            grad = grad.mul_(share[part, None]).to(kept)
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden[part].to(kept))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.name, ctx.gradients = "linear_cross_entropy", (grad_hidden, grad_weight, grad_bias)
        return total / real.sum()
