"""Random bits, rounding, residual words and 8-bit codes, against published vectors, exact arithmetic and their own inverses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from proxsparse_triton.reference.storage import (
    WORD,
    bf16_bits,
    bits_of,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
    join_residual,
    number_of,
    random_bits,
    random_words,
    round_bf16,
    split_residual,
)

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def numbers(count: int = 4000) -> Tensor:
    """fp32 of all magnitudes, with zeros and both infinities."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=generator) * 10 ** (torch.rand(count, generator=generator) * 60 - 30)
    return torch.cat([x, torch.tensor([0.0, 1.0, -1.0, INF, -INF, 1e-45, 3e38])])


# --- random bits ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "offset", "expected"),
    [
        (0, 0, [0x257A3673, 0xCD26BE2A]),
        (0xFFFFFFFFFFFFFFFF, WORD, [0xAB302C4D, 0x3DC9D239]),
        (0x85A308D3_13198A2E, 0x243F6A88, [0xBEDBBE6B, 0xE4C770B3]),
    ],
)
def test_philox_known_answers(seed: int, offset: int, expected: list[int]) -> None:
    """The Random123 distribution's known-answer vectors of philox2x32 with 7 rounds."""
    assert random_words(seed, offset, 1, CPU).tolist() == [expected]


def test_philox_in_exact_integers() -> None:
    def philox(first: int, second: int, key: int) -> list[int]:
        for _ in range(7):
            product = 0xD256D193 * first
            first, second = (product >> 32) ^ second ^ key, product & WORD
            key = (key + 0x9E3779B9) & WORD
        return [first, second]

    for seed in (0, 1, WORD, 0xFEDCBA9876543210, (1 << 64) - 1):
        for offset in (0, 12345, WORD - 1, 1 << 33):
            words = random_words(seed, offset, 3, CPU)
            for i in range(3):
                assert words[i].tolist() == philox((offset + i) & WORD, seed >> 32, seed & WORD)


def test_random_bits_belong_to_places() -> None:
    """The bits of a row shard with its offset are the whole tensor's."""
    w = torch.empty(6, 8)
    bits = random_bits(w, 7, 0)
    assert bits.shape == w.shape
    assert torch.equal(bits[4:], random_bits(w[4:], 7, 8))
    assert not torch.equal(bits, random_bits(w, 8, 0))


def test_random_bits_are_even_and_independent() -> None:
    """Of neighbouring weights and blocks, and of keys that differ in a bit of either half: bits half the time, correlations by chance."""
    bits = random_bits(torch.empty(1 << 16, 4), 0x0123456789ABCDEF, 0)
    ones = (bits.unsqueeze(-1) >> torch.arange(16) & 1).double()
    assert (ones.mean((0,)) - 0.5).abs().max() < 0.01  # 5 standard deviations
    others = [random_bits(torch.empty(1 << 16, 4), 0x0123456789ABCDEF ^ flip, 0) for flip in (1, 1 << 32)]
    series = torch.cat([bits, bits.roll(1, 0), *others], 1).double().T
    correlation = torch.corrcoef(series) - torch.eye(len(series))
    assert correlation.abs().max() < 0.02


# --- rounding ---------------------------------------------------------------------------------------------------------------------


def test_bits_round_trip() -> None:
    x = numbers()
    assert (bits_of(x) >= 0).all()
    assert torch.equal(number_of(bits_of(x)), x)


def test_bf16_stochastic_rounding_counts_the_dropped_bits() -> None:
    """Over all 65536 draws, exactly as many round up as the dropped bits say: the mean is the number."""
    draws = torch.arange(1 << 16)
    for x in (1.0, -1.003, 0.1, -7.7e-12, 3.5e20):
        value = torch.tensor(x)
        dropped = int(bits_of(value)) & 0xFFFF
        rounded = bf16_bits(round_bf16(value.expand(1 << 16), draws))
        assert set(rounded.tolist()) <= {int(bits_of(value)) >> 16, (int(bits_of(value)) >> 16) + 1}
        assert int((rounded != int(bits_of(value)) >> 16).sum()) == dropped


def test_bf16_rounding_of_special_values() -> None:
    x = torch.tensor([0.0, -0.0, INF, -INF, NAN, 1.5, -2.0])
    for draw in (None, torch.zeros(7, dtype=torch.int64), torch.full((7,), 0xFFFF)):
        rounded = round_bf16(x, draw)
        assert torch.equal(rounded[:4], x[:4].bfloat16())
        assert rounded[4].isnan()
        assert torch.equal(rounded[5:].float(), x[5:])
    # A NaN whose bits are all ones does not wrap around to zero.
    assert round_bf16(number_of(torch.tensor([0x7FFFFFFF])), torch.tensor([0xFFFF])).isnan().all()


# --- residual words ---------------------------------------------------------------------------------------------------------------


def test_sixteen_more_bits_are_exact() -> None:
    x = numbers()
    high, low = split_residual(x, torch.int16, None)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join_residual(high, low), x)
    small = x.abs() < 3e38
    assert ((high.float() - x).abs() <= 2.0**-8 * x.abs() + 1e-40)[small].all()  # to nearest: half an ulp


def test_eight_more_bits() -> None:
    x = numbers()
    x = x[x.abs() < 3e38]
    nearest = join_residual(*split_residual(x, torch.int8, None))
    assert ((nearest - x).abs() <= 2.0**-16 * x.abs() + 1e-43).all()
    below = number_of(bits_of(x) >> 8 << 8)
    for draw, expected in ((0, below), (0xFF, torch.where(below == x, below, number_of((bits_of(x) >> 8 << 8) + 0x100)))):
        assert torch.equal(join_residual(*split_residual(x, torch.int8, torch.full(x.shape, draw))), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_residual_of_special_values(dtype: torch.dtype) -> None:
    high, low = split_residual(torch.tensor([0.0, -0.0, -1e-42, NAN, INF]), dtype, None)
    assert not torch.signbit(high[:3]).any()
    assert (high[:3] == 0).all()
    assert (low == 0).all()
    assert high[3].isnan()
    assert high[4] == INF


# --- 8-bit codes ------------------------------------------------------------------------------------------------------------------


def moments(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    m = torch.randn(count, generator=generator) * 10 ** (torch.rand(count, generator=generator) * 4 - 6)
    return m, (m * torch.randn(count, generator=generator)).square() + 1e-20


@pytest.mark.parametrize("count", [1, 128, 300])
def test_codes_are_fixed_points(count: int) -> None:
    """What a code stands for is coded as that code again, however it is rounded."""
    m, v = moments(count)
    for encode, decode, x, dtype in ((encode_first, decode_first, m, torch.int8), (encode_second, decode_second, v, torch.uint8)):
        codes, scale = encode(x, 0.5)
        assert (codes.dtype, scale.dtype, scale.shape) == (dtype, torch.float32, (math.ceil(count / 128),))
        decoded = decode(codes, scale)
        for uniform in (0.002, 0.5, 0.998):
            assert torch.equal(encode(decoded, uniform)[0], codes)


def test_codes_are_nearest() -> None:
    m, v = moments(512)
    for encode, decode, x, levels in (
        (encode_first, decode_first, m, [c / 127 * abs(c / 127) for c in range(-127, 128)]),
        (encode_second, decode_second, v, [(c / 255) ** 4 for c in range(1, 256)]),
    ):
        codes, scale = encode(x, 0.5)
        ladder = torch.tensor(levels, dtype=torch.float64) * scale.double().repeat_interleave(128)[:, None]
        best = (ladder - x.double()[:, None]).abs().amin(-1)
        error = (decode(codes, scale).double() - x).abs()
        assert (error <= best * (1 + 1e-3) + 1e-6 * scale.max()).all()


def test_codes_are_unbiased() -> None:
    """Over all 256 draws the mean of what is decoded is the moment, to a 256th of the distance between neighbours."""
    m, v = moments(128)
    uniform = ((torch.arange(256) + 0.5) / 256)[:, None].expand(256, 128)
    for encode, decode, x in ((encode_first, decode_first, m), (encode_second, decode_second, v)):
        decoded = [decode(*encode(x, u)) for u in uniform]
        mean = torch.stack(decoded).double().mean(0)
        step = torch.stack(decoded).amax(0) - torch.stack(decoded).amin(0)
        fine = (x > x.amax() / 255**4) if encode is encode_second else torch.ones_like(x, dtype=torch.bool)
        assert ((mean - x).abs() <= step / 256 + 1e-6 * x.abs().max())[fine].all()


def test_groups_of_zeros_and_tiny_second_moments() -> None:
    x = torch.zeros(256)
    x[200] = 1.0
    x[201] = 1e-30
    codes, scale = encode_second(x, 0.998)
    assert scale.tolist() == [0.0, 1.0]
    assert codes[200] == 255
    assert codes[201] == 1  # a second moment above 0 never becomes 0
    assert codes.long().sum() == 256
    for encode, decode in ((encode_first, decode_first), (encode_second, decode_second)):
        assert torch.equal(decode(*encode(torch.zeros(4, 8), 0.5)), torch.zeros(4, 8))
