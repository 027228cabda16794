"""Perplexity of a causal language model on windows of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, DataError, ModelError
from ..models.modes import evaluating
from ..progress import SILENT, Progress
from .memory import explain_out_of_memory

# fp32 logits held at once: 16 M values are 64 MB (and as much again inside the softmax), whatever the vocabulary.
CHUNK_LOGITS = 2**24
CHECK_DTYPE = "Check the dtype (float16 overflows in many models: try --dtype bfloat16 or float32) and the weights."


def perplexity(model: nn.Module, tokens: Sequence[Tensor], *, batch_size: int = 1, progress: Progress = SILENT) -> float:
    """Exponential of the mean cross-entropy (natural logarithm) over all predicted tokens.

    exp( sum over windows x and positions t of -log p(x[t] | x[0..t-1])  /  sum over windows of (L - 1) ),   t = 1 .. L-1

    A window is predicted from itself alone: its first token is context only, nothing carries over from the window before. Logits
    are upcast to fp32 a few positions at a time, losses are summed in fp64, so the figure depends on neither batch nor chunk size
    beyond the model's own rounding. All tokens weigh the same, also where windows differ in length.

    Args:
        model: maps `input_ids` int64 [B, L] to an output with `.logits` [B, L, vocabulary]; its training mode is left as it was.
        tokens: windows of token ids, int64 [L] on any device, L at least 2; neighbours of equal length share a batch.
        batch_size: windows per forward pass.
        progress: gets one bar over the windows, with the running perplexity.
    Raises:
        DataError: no windows, a window of the wrong form, or token ids outside the model's vocabulary.
        ConfigError: batch_size below 1.
        ModelError: a loss that is not finite.
        ResourceError: memory ran out.
    Source: the protocol of Frantar et al. 2023 (SparseGPT) and Sun et al. 2024 (Wanda) for equal windows, except that they weigh
        the mean over L - 1 tokens with L, which cancels.
    """
    if batch_size < 1:
        raise ConfigError(f"perplexity: expected batch_size of at least 1, got {batch_size}. Set --batch-size 1 or more.")
    _check_windows(model, tokens)
    device = next(model.parameters()).device
    total, count, done = 0.0, 0, 0
    with evaluating(model), torch.inference_mode(), progress.task("perplexity", total=len(tokens)) as task:
        for batch in _batches(tokens, batch_size):
            work = f"{len(batch)} windows of {batch.shape[1]} tokens on {device}"
            with explain_out_of_memory("perplexity", work, "Lower --batch-size, then --seqlen."):
                losses = _window_losses(model, batch.to(device)).tolist()
            for index, loss in enumerate(losses, start=done + 1):
                if not math.isfinite(loss):
                    raise ModelError(
                        f"perplexity: expected finite losses, got {loss} (model produces non-finite loss on window {index} "
                        f"of {len(tokens)}). {CHECK_DTYPE}"
                    )
            total += math.fsum(losses)
            count += len(batch) * (batch.shape[1] - 1)
            done += len(batch)
            task.advance(len(batch), perplexity=f"{_exp(total / count):.3f}")
    return _exp(total / count)


def finite(value: float | None) -> float | None:
    """A perplexity for a record: JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None


def _exp(mean: float) -> float:
    """exp without OverflowError: a hopeless model has perplexity inf."""
    return math.exp(mean) if mean < 709 else math.inf


def embedding_rows(model: nn.Module) -> int | None:
    """How many token ids the model knows; None where it does not say."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(embeddings, "num_embeddings", None)
    return rows if isinstance(rows, int) else None


def _check_windows(model: nn.Module, tokens: Sequence[Tensor]) -> None:
    """Raise DataError for windows that cannot be evaluated; wrong ids would be a bare IndexError, or kill the CUDA context."""
    if not tokens:
        raise DataError("perplexity: expected at least one window of tokens, got none. Give longer text or a smaller --seqlen.")
    rows = embedding_rows(model)
    for index, window in enumerate(tokens, start=1):
        if window.dim() != 1 or len(window) < 2 or window.is_floating_point():
            raise DataError(
                f"perplexity: expected windows of token ids [L] with L at least 2, got {window.dtype} {tuple(window.shape)} "
                f"as window {index}. The first token of a window is context, only the others are predicted."
            )
        low, high = (int(edge) for edge in window.aminmax())
        if rows is not None and (low < 0 or high >= rows):
            raise DataError(
                f"perplexity: expected token ids from 0 to {rows - 1}, got {low if low < 0 else high} in window {index}. "
                "The tokenizer does not belong to this model."
            )


def _batches(tokens: Sequence[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Windows in their order, stacked to int64 [B, L] with B at most batch_size; a change of length starts a new batch."""
    for _, run in groupby(tokens, key=len):
        windows = list(run)
        for start in range(0, len(windows), batch_size):
            yield torch.stack(windows[start : start + batch_size]).long()


def _window_losses(model: nn.Module, batch: Tensor) -> Tensor:
    """Summed cross-entropy of each window: fp64 [B], for int64 [B, L]. The logits die with this frame, before the next pass."""
    logits: Tensor = model(input_ids=batch, use_cache=False).logits
    step = max(1, CHUNK_LOGITS // logits.shape[-1])
    losses = torch.zeros(len(batch), dtype=torch.float64, device=logits.device)
    for row in range(len(batch)):  # row by row: logits[row, :-1] is contiguous, logits[:, :-1] would be copied whole
        targets = batch[row, 1:].to(logits.device)
        for start in range(0, len(targets), step):
            part = slice(start, min(start + step, len(targets)))
            losses[row] += F.cross_entropy(logits[row, part].float(), targets[part], reduction="none").double().sum()
    return losses
