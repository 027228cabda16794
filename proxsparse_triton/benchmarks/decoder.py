"""Greedy decoding with a static cache, as `pst bench decode` times it: one function serves the prompt and every token after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError

MULTIPLE = 64  # of the cache's length: attention kernels want masks aligned


def next_logits(model: nn.Module, tokens: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """Logits [batch, vocabulary] after `tokens` [batch, n], which stand at `positions` [n]. Their keys and values go to the cache.

    The mask is made here, additive and 4-dimensional, which transformers passes on as it is: its own looks at values on the host.
    """
    length = cache.layers[0].max_cache_len
    dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
    seen = torch.arange(length, device=tokens.device) <= positions[:, None]
    mask = torch.zeros(seen.shape, dtype=dtype, device=tokens.device).masked_fill(~seen, torch.finfo(dtype).min)
    out = model(
        input_ids=tokens,
        attention_mask=mask.expand(len(tokens), 1, -1, -1),
        position_ids=positions[None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = out.logits[:, -1]
    return logits


def step(model: nn.Module, tokens: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """The most likely next token [batch, 1]."""
    return next_logits(model, tokens, positions, cache).argmax(-1, keepdim=True)


class Decoder:
    """One batch of prompts in one model. Tokens, positions and cache are written in place: a CUDA graph can replay what reads them."""

    def __init__(self, model: nn.Module, prompt: Tensor, new_tokens: int) -> None:
        """prompt [batch, n]; new_tokens: the most that `advance` is called for between two calls of `rewind`."""
        from transformers import StaticCache

        config: Any = model.config
        count = prompt.shape[1]
        length = -(-(count + new_tokens) // MULTIPLE) * MULTIPLE
        self.model, self.prompt = model, prompt
        self.cache = StaticCache(config=config, max_cache_len=length)
        if any(layer.max_cache_len != length for layer in self.cache.layers):
            raise ConfigError(
                f"bench decode: expected a prompt and new tokens within the model's attention window, got {length} positions. "
                "Use a shorter --prompt or fewer --new-tokens."
            )
        self.token = prompt.new_zeros(len(prompt), 1)
        self.position = prompt.new_zeros(1)
        self.step: Callable[..., Tensor] = step  # or its compiled form
        self._first = prompt.new_zeros(len(prompt), 1)
        self.prefill()
        self.rewind()

    @torch.no_grad()
    def prefill(self) -> None:
        """The prompt in one pass, up to the first new token; `rewind` before `advance`."""
        self._start(0)
        count = self.prompt.shape[1]
        self._first.copy_(step(self.model, self.prompt, torch.arange(count, device=self.prompt.device), self.cache))

    def rewind(self) -> None:
        """Back to the first new token."""
        self._start(self.prompt.shape[1])
        self.token.copy_(self._first)

    @torch.no_grad()
    def advance(self) -> None:
        """One token."""
        self.token.copy_(self.step(self.model, self.token, self.position, self.cache))
        self.position.add_(1)

    @torch.no_grad()
    def logits(self, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """fp32 logits [2, batch, vocabulary] after the prompt, and after one token more: `first` [batch, 1], by default the likeliest.

        Returns: the logits, and that token.
        """
        self._start(0)
        count = self.prompt.shape[1]
        prompt = next_logits(self.model, self.prompt, torch.arange(count, device=self.prompt.device), self.cache)
        token = prompt.argmax(-1, keepdim=True) if first is None else first
        after = next_logits(self.model, token, self.position + count, self.cache)
        self.rewind()
        return torch.stack([prompt, after]).float(), token

    def _start(self, position: int) -> None:
        self.position.fill_(position)
        lengths = [layer.cumulative_length for layer in self.cache.layers if torch.is_tensor(layer.cumulative_length)]
        torch._foreach_zero_(lengths)  # in one launch: this is a part of what is timed
        torch._foreach_add_(lengths, position)
        for layer in self.cache.layers:
            if hasattr(layer, "cumulative_length_int"):  # of layers with an attention window
                layer.cumulative_length_int = position


def compiled_step(decoder: Decoder) -> tuple[Callable[..., Tensor], str]:
    """`step` compiled for this decoder's model and batch, and how: in one graph, or, where that fails, in several."""
    torch.compiler.reset()
    try:
        return _compile(decoder, fullgraph=True), "one graph"
    except Exception:  # compilers raise anything
        torch.compiler.reset()
        return _compile(decoder, fullgraph=False), "several graphs"


def _compile(decoder: Decoder, *, fullgraph: bool) -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(step, fullgraph=fullgraph, dynamic=False)
    decoder.rewind()
    with torch.no_grad():
        compiled(decoder.model, decoder.token, decoder.position, decoder.cache)
    decoder.rewind()
    return compiled
