"""The orders of metadata against PyTorch's conversion (ampere) and against the formula written out as a loop (hopper)."""

from __future__ import annotations

import pytest
import torch
from adversarial import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from proxsparse_triton.errors import ConfigError, ShapeError
from proxsparse_triton.reference.mask import mask_24
from proxsparse_triton.reference.metadata import ORDERS, join_nibbles, reorder, restore, row_words, split_words
from proxsparse_triton.reference.pack import pack_24


def random_metadata(rows: int, words: int, seed: int = 0) -> torch.Tensor:
    """Any 16 bits: an order moves nibbles, whatever they are."""
    return torch.randint(-(1 << 15), 1 << 15, (rows, words), dtype=torch.int16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(32, 32), (32, 64), (64, 32), (64, 160), (96, 96), (256, 512)])
def test_ampere_is_pytorchs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    w = torch.where(mask_24(w.abs()), w, 0.0)
    expected_values, expected = sparse_semi_structured_from_dense_cutlass(w)
    values, metadata = pack_24(w, None)
    assert same_bits(values, expected_values)
    assert torch.equal(reorder(metadata, "ampere"), expected.flatten())
    assert torch.equal(restore(expected, "ampere", shape), metadata)


def hopper_by_hand(metadata: torch.Tensor) -> list[int]:
    """The nibbles in cuSPARSELt's order on sm_90."""
    rows, words = metadata.shape
    nibbles = split_words(metadata, 4 * words).tolist()
    stored = [-1] * (4 * rows * words)
    tiles = words // 2
    for r in range(rows):
        for g in range(4 * words):
            rt, ri, gt, gi = r // 32, r % 32, g // 8, g % 8
            place = (rt % 2) * 256 + gt * 512 + (rt // 2) * tiles * 512
            place += (ri % 8) * 16 + (ri // 8) % 2 + (ri // 16) * 128 + (gi % 4) * 4 + (2 if gi >= 4 else 0)
            stored[place] = nibbles[r][g]
    return stored


@pytest.mark.parametrize(("rows", "words"), [(64, 2), (64, 6), (192, 4), (128, 10)])
def test_hopper_is_the_formula(rows: int, words: int) -> None:
    metadata = random_metadata(rows, words)
    assert split_words(reorder(metadata, "hopper")[None], 4 * rows * words)[0].tolist() == hopper_by_hand(metadata)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (192, 96), (256, 512), (1024, 2048)])
def test_hopper_is_cusparselts(shape: tuple[int, int], dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() != (9, 0) or not torch.backends.cusparselt.is_available():
        pytest.skip("needs a Hopper GPU and cuSPARSELt")
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    w = torch.where(mask_24(w.abs()), w, 0.0)
    values, metadata = pack_24(w, None)
    blob = torch._cslt_compress(w).flatten()[: values.numel() + metadata.numel()]
    assert same_bits(blob[: values.numel()].view(values.shape), values)
    assert torch.equal(blob[values.numel() :].view(torch.int16), reorder(metadata, "hopper"))


@settings(deadline=None, max_examples=40)
@given(
    tiles=st.tuples(st.integers(0, 4), st.integers(0, 5)),
    seed=st.integers(0, 1 << 30),
    order=st.sampled_from(ORDERS),
    start=st.integers(0, 5),
)
def test_round_trip(tiles: tuple[int, int], seed: int, order: str, start: int) -> None:
    rows, words = 64 * tiles[0], 2 * tiles[1]
    metadata = random_metadata(rows, words, seed)
    before = metadata.clone()
    stored = reorder(metadata, order)
    assert (stored.dtype, stored.shape) == (torch.int16, (rows * words,))
    # Behind the values of a library's blob, so that it starts anywhere.
    blob = torch.cat([torch.zeros(start, dtype=torch.int16), stored])
    assert torch.equal(restore(blob[start:], order, (rows, 16 * words)), metadata)
    assert torch.equal(blob[start:], stored)
    assert torch.equal(reorder(metadata.t().contiguous().t(), order), stored)
    assert torch.equal(metadata, before)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(0, 5), blocks=st.integers(0, 13), seed=st.integers(0, 1 << 30))
def test_nibbles_round_trip(rows: int, blocks: int, seed: int) -> None:
    nibbles = torch.randint(16, (rows, blocks), dtype=torch.int16, generator=torch.Generator().manual_seed(seed))
    words = join_nibbles(nibbles)
    assert words.shape == (rows, row_words(4 * blocks))
    assert torch.equal(split_words(words, blocks), nibbles)
    assert (split_words(words, 4 * words.shape[1])[:, blocks:] == 0b0100).all()


def test_linear_takes_any_shape() -> None:
    metadata = random_metadata(5, 2)
    assert torch.equal(restore(reorder(metadata, "linear"), "linear", (5, 20)), metadata)


def test_errors() -> None:
    metadata = random_metadata(64, 2)
    with pytest.raises(ConfigError, match="reorder: expected an order of linear, hopper, ampere, got 'volta'"):
        reorder(metadata, "volta")
    with pytest.raises(TypeError, match=r"restore: expected int16 metadata, got torch\.uint8\. View the library's bytes as int16\."):
        restore(metadata.view(torch.uint8), "hopper", (64, 32))
    with pytest.raises(ShapeError, match=r"reorder: expected metadata \[out, words\], got shape \(128,\)\. Pass it as"):
        reorder(metadata.flatten(), "hopper")
    with pytest.raises(ShapeError, match=r"restore: expected 256 words for a weight of shape \(64, 64\), got 128\. Pass"):
        restore(metadata, "hopper", (64, 64))
    message = r"reorder: expected out divisible by 64 and in_features by 32 for the order 'hopper', got shape \(32, 64\)\. Keep this"
    with pytest.raises(ShapeError, match=message):
        reorder(metadata.view(32, 4), "hopper")
    with pytest.raises(ShapeError, match=r"reorder: expected out divisible by 32 .* 'ampere', got shape \(64, 48\)"):
        reorder(random_metadata(64, 3), "ampere")
    with pytest.raises(ShapeError, match=r"restore: expected out divisible by 32 .* 'ampere', got shape \(64, 28\)"):
        restore(metadata, "ampere", (64, 28))
