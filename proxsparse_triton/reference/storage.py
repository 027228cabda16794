"""How a weight and its moments are stored in fewer bits: counter-based random bits, rounding, residual words, 8-bit codes. Plain torch.

Bit patterns are held in int64, where additions of 32-bit numbers do not overflow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..sparsity import BLOCK
from ..step import MOMENT_GROUP

WORD = 0xFFFFFFFF
BF16_NAN = 0x7FC0
BF16_MINUS_ZERO = 0x8000
ROUNDS = 7


def random_words(seed: int, offset: int, blocks: int, device: torch.device) -> Tensor:
    """Philox2x32-7 of the counters offset, offset + 1, ... (modulo 2^32), key and upper counter from the halves of `seed`:
    [blocks, 2] words in int64.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    c0 = torch.arange(offset, offset + blocks, device=device) & WORD
    c1 = torch.full_like(c0, seed >> 32)
    key = seed & WORD
    for _ in range(ROUNDS):
        # A product of two words wraps around in int64 without loss: its 64 bits are right, only their reading as a sign is not.
        product = c0 * 0xD256D193
        c0, c1 = (product >> 32 & WORD) ^ c1 ^ key, product & WORD
        key = (key + 0x9E3779B9) & WORD
    return torch.stack([c0, c1], -1)


def random_bits(w: Tensor, seed: int, offset: int) -> Tensor:
    """16 random bits for each weight of w [..., in_features], int64 of its shape: the lower and upper halves of its block's two words.

    They depend on the weight's place in the whole tensor only, so shards and launch order change nothing. What is rounded of one weight
    (itself and its two moments) shares them: each is right in the mean, and that is what counts.
    """
    words = random_words(seed, offset, w.numel() // BLOCK, w.device)
    return torch.stack([words & 0xFFFF, words >> 16], -1).view(w.shape)


def bits_of(x: Tensor) -> Tensor:
    """The 32 bits of fp32 numbers as int64 in [0, 2^32)."""
    return x.contiguous().view(torch.int32).to(torch.int64) & WORD


def number_of(bits: Tensor) -> Tensor:
    """Inverse of `bits_of`."""
    return torch.where(bits > 0x7FFFFFFF, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def bf16_of(bits: Tensor) -> Tensor:
    """bf16 numbers from their 16 bits in int64."""
    return torch.where(bits > 0x7FFF, bits - (1 << 16), bits).to(torch.int16).view(torch.bfloat16)


def bf16_bits(x: Tensor) -> Tensor:
    """The 16 bits of bf16 numbers as int64 in [0, 2^16)."""
    return x.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF


def round_bf16(x: Tensor, rand16: Tensor | None) -> Tensor:
    """fp32 to bf16: up with the probability of the bits dropped, (bits + rand16) >> 16; to nearest even without random bits."""
    if rand16 is None:
        return x.to(torch.bfloat16)
    return bf16_of(torch.where(x.isnan(), BF16_NAN, (bits_of(x) + rand16) >> 16))


def join_residual(w: Tensor, residual: Tensor) -> Tensor:
    """fp32 weight of a bf16 part and the low bits beside it: 8 (int8 residual) or 16 (int16) more bits of mantissa."""
    low = 8 if residual.dtype == torch.int8 else 16
    bits = (bf16_bits(w) << low) + residual.to(torch.int64)
    return number_of((bits << (16 - low)) & WORD)


def split_residual(x: Tensor, dtype: torch.dtype, rand8: Tensor | None) -> tuple[Tensor, Tensor]:
    """(bf16, residual) of fp32 weights, the bf16 part to nearest. int16: exact. int8: to 24 bits, stochastic where rand8 is given.

    A bf16 part of -0.0 (a negative weight below 5e-41) is stored as +0.0 with residual 0.
    """
    low = 8 if dtype == torch.int8 else 16
    bits = bits_of(x)
    if low == 8:
        bits = (bits + (0x7F + (bits >> 8 & 1) if rand8 is None else rand8)) >> 8
    high = (bits + (1 << (low - 1))) >> low
    rest = bits - (high << low)
    nan, minus_zero = x.isnan(), high == BF16_MINUS_ZERO
    high = torch.where(nan, BF16_NAN, torch.where(minus_zero, 0, high))
    return bf16_of(high), torch.where(nan | minus_zero, 0, rest).to(dtype)


def _grouped(x: Tensor) -> Tensor:
    """[groups, MOMENT_GROUP] of the flattened tensor, zeros behind its end."""
    flat = x.flatten()
    padding = -len(flat) % MOMENT_GROUP
    return torch.nn.functional.pad(flat, (0, padding)).view(-1, MOMENT_GROUP)


def _shares(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """(scale [groups], magnitude / scale of its group like `magnitude`, 0 where the scale is 0)."""
    groups = _grouped(magnitude)
    scale = groups.amax(-1)
    share = torch.where(scale[:, None] > 0, groups / scale[:, None], 0.0)
    return scale, share.flatten()[: magnitude.numel()].view(magnitude.shape)


def _per_weight(scale: Tensor, like: Tensor) -> Tensor:
    return scale.repeat_interleave(MOMENT_GROUP)[: like.numel()].view(like.shape)


def decode_first(codes: Tensor, scale: Tensor) -> Tensor:
    """m = scale sgn(c) (|c| / 127)^2, codes int8."""
    c = codes.float()
    return _per_weight(scale, codes) * c.sign() * (c / 127).square()


def decode_second(codes: Tensor, scale: Tensor) -> Tensor:
    """v = scale (c / 255)^4, codes uint8."""
    return _per_weight(scale, codes) * (codes.float() / 255).square().square()


def encode_first(m: Tensor, uniform: Tensor | float) -> tuple[Tensor, Tensor]:
    """(int8 codes, scale): between two neighbouring codes the upper one where `uniform` in (0, 1) is below m's place between them."""
    scale, share = _shares(m.abs())
    low = (share.sqrt() * 127).floor().clamp_max(126)
    upper = (share * 127**2 - low.square()) / (2 * low + 1)
    code = low + (uniform < upper)
    return torch.where(m < 0, -code, code).to(torch.int8), scale


def encode_second(v: Tensor, uniform: Tensor | float) -> tuple[Tensor, Tensor]:
    """(uint8 codes, scale), as `encode_first`; never 0 for v > 0, since the update divides by its root."""
    scale, share = _shares(v)
    low = (share.sqrt().sqrt() * 255).floor().clamp_max(254)
    below, above = low.square().square(), (low + 1).square().square()
    code = low + (uniform < (share * 255**4 - below) / (above - below))
    return torch.where(v > 0, code.clamp_min(1), code).to(torch.uint8), scale
