from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from proxsparse_triton import mask_24, pack_24
from proxsparse_triton.inference import library
from proxsparse_triton.inference.library import Library, find_library, judge, order_for, takes
from proxsparse_triton.reference.metadata import reorder

CUDA0 = torch.device("cuda", 0)


@pytest.fixture
def fresh() -> Iterator[None]:
    """What was found out about the device is forgotten, before and after."""
    find_library.cache_clear()
    library._say_refusal.cache_clear()
    yield
    find_library.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cusparselt: int | None, *, hip: str | None = None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cusparselt is not None)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: cusparselt)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(library, "_reads_our_order", lambda device: True)


@pytest.mark.parametrize(
    ("capability", "cusparselt", "name", "order"),
    [
        ((7, 5), 801, None, "linear"),
        ((8, 0), 801, "cutlass", "ampere"),
        ((8, 9), None, "cutlass", "ampere"),
        ((9, 0), 801, "cusparselt", "hopper"),
        ((9, 0), None, None, "linear"),
        ((12, 0), 801, "cusparselt", "hopper"),
    ],
)
@pytest.mark.usefixtures("fresh")
def test_the_capability_decides(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cusparselt: int | None, name: str | None, order: str
) -> None:
    pretend(monkeypatch, capability, cusparselt)
    found = find_library(CUDA0)
    assert (found.name, found.order) == (name, order)
    assert f"{capability[0]}.{capability[1]}" in found.reason
    assert "\n" not in found.reason


@pytest.mark.usefixtures("fresh")
def test_no_library_on_amd_cards_and_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 4), None, hip="6.4")
    assert find_library(CUDA0) == Library(None, "none: an AMD GPU")
    assert find_library(torch.device("cpu")) == Library(None, "none: not a CUDA GPU")


def test_the_slow_version_is_named() -> None:
    assert judge((9, 0), cusparselt=800).reason == ("cuSPARSELt 0.8.0: compute capability 9.0; slow on Hopper, fixed in 0.8.1 (torch 2.12)")
    assert judge((9, 0), cusparselt=801).reason == "cuSPARSELt 0.8.1: compute capability 9.0"
    assert "this torch has none" in judge((9, 0)).reason


@pytest.mark.usefixtures("fresh")
def test_a_library_that_orders_metadata_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (10, 0), 900)
    monkeypatch.setattr(library, "_reads_our_order", lambda device: False)
    found = find_library(CUDA0)
    assert (found.name, found.order) == (None, "linear")
    assert "orders the metadata in another way" in found.reason


@pytest.mark.parametrize(
    ("capability", "dtype", "shape", "expected"),
    [
        ((9, 0), torch.bfloat16, (128, 96), True),
        ((9, 0), torch.bfloat16, (96, 96), False),
        ((9, 0), torch.float16, (128, 48), False),
        ((9, 0), torch.float32, (128, 96), False),
        ((9, 0), torch.float16, (0, 32), False),
        ((8, 0), torch.float16, (32, 64), True),
        ((8, 0), torch.float16, (32, 32), False),
        ((8, 0), torch.float16, (16, 64), False),
    ],
)
def test_shapes(capability: tuple[int, int], dtype: torch.dtype, shape: tuple[int, int], expected: bool) -> None:
    assert takes(judge(capability, cusparselt=801), dtype, *shape) is expected


def test_no_library_takes_nothing() -> None:
    assert not takes(judge(None), torch.bfloat16, 64, 64)


@pytest.mark.usefixtures("fresh")
def test_a_refused_shape_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0), 801)
    with pytest.warns(UserWarning, match=r"cuSPARSELt takes .* 64 x 32 tiles, got torch.float16 96 x 64") as caught:
        assert order_for(CUDA0, torch.float16, 96, 64) == "linear"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert order_for(CUDA0, torch.float16, 96, 64) == "linear"
        assert order_for(CUDA0, torch.float16, 128, 64) == "hopper"
        assert order_for(torch.device("cpu"), torch.float16, 96, 64) == "linear"


def test_inputs_are_padded_and_aligned() -> None:
    x = torch.randn(11, 32)
    padded = library._padded(x)
    assert padded.shape == (16, 32)
    assert torch.equal(padded[:11], x)
    assert not padded[11:].any()
    shifted = torch.randn(8 * 32 + 1)[1:].view(8, 32)
    assert library._padded(shifted).data_ptr() % library.ALIGNMENT == 0


def test_whole_batches_are_not_copied() -> None:
    x = torch.randn(16, 64).half()
    assert library._padded(x) is x
    assert library._padded(x[:15]).shape == (16, 64)


def test_the_call_of_cusparselt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products run on a card only; what is passed is checked here."""
    x, bias = torch.randn(3, 32).half(), torch.randn(64).half()

    def product(blob, dense, *, bias, transpose_result, alg_id, split_k, split_k_mode):  # type: ignore[no-untyped-def]
        assert (blob.shape, dense.shape) == ((64, 18), (32, 8))
        assert (transpose_result, alg_id, split_k, split_k_mode) == (True, 5, 2, 1)
        return torch.arange(8 * 64).view(8, 64).half()

    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    y = library.multiply("cusparselt", torch.empty(64 * 18).half(), torch.empty(64, 16).half(), torch.empty(0), x, bias, (5, 2, 1))
    assert torch.equal(y, torch.arange(3 * 64).view(3, 64).half())
    assert y.is_contiguous()


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_call_of_cutlass(monkeypatch: pytest.MonkeyPatch, with_bias: bool) -> None:
    w = torch.randn(32, 64)
    values, metadata = pack_24(w * mask_24(w.abs()))
    x, bias = torch.randn(3, 64), torch.randn(32) if with_bias else None
    dense = w * mask_24(w.abs())

    def product(values, words, columns):  # type: ignore[no-untyped-def]
        assert words.shape == (32, 4)
        return dense @ columns

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", product)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", lambda bias, *rest: product(*rest) + bias[:, None])
    y = library.multiply("cutlass", torch.empty(0), values, reorder(metadata, "ampere"), x, bias, (0, 1, -1))
    torch.testing.assert_close(y, F.linear(x, dense, bias))
    assert y.is_contiguous()


def test_algorithms_are_searched_once_and_not_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []

    def search(blob: torch.Tensor, x: torch.Tensor) -> tuple[int, int, int]:
        searched.append(x.shape[0])
        return len(searched), 1, -1

    monkeypatch.setattr(library, "_FOUND", {})
    monkeypatch.setattr(library, "search_algorithm", search)
    blob = torch.empty(0)
    assert library.found_algorithm(blob, torch.empty(1000, 64), 128, captured=True) is None
    assert library.found_algorithm(blob, torch.empty(1000, 64), 128, captured=False) == (1, 1, -1)
    assert library.found_algorithm(blob, torch.empty(1024, 64), 128, captured=True) == (1, 1, -1)
    assert library.found_algorithm(blob, torch.empty(1025, 64), 128, captured=False) == (2, 1, -1)
    assert library.found_algorithm(blob, torch.empty(1024, 64), 256, captured=False) == (3, 1, -1)
    assert searched == [1000, 1025, 1024]


def packed_on_the_card(out: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dense, blob, values, metadata) in the order of the card's library."""
    w = torch.randn(out, width, device="cuda", dtype=dtype)
    w = w.masked_fill(~mask_24(w.abs()), 0)
    values, metadata = pack_24(w)
    flat = reorder(metadata, find_library(CUDA0).order)
    return w, torch.cat([values.flatten(), flat.view(dtype)]), values, flat


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 63, 64, 256, 1000, 4096])
def test_the_library_against_dense(dtype: torch.dtype, tokens: int) -> None:
    found = find_library(CUDA0)
    if found.name is None:
        pytest.skip(found.reason)
    w, blob, values, metadata = packed_on_the_card(1024, 768, dtype)
    x, bias = torch.randn(tokens, 768, device="cuda", dtype=dtype), torch.randn(1024, device="cuda", dtype=dtype)
    algorithm = library.search_algorithm(blob, x) if found.name == "cusparselt" else (0, 1, -1)
    for b in (None, bias):
        y = library.multiply(found.name, blob, values, metadata, x, b, algorithm)
        expected = F.linear(x.double(), w.double(), None if b is None else b.double())
        error = (y.double() - expected).abs().max() / expected.abs().max()
        assert y.shape == (tokens, 1024)
        assert error < (0.01 if dtype == torch.bfloat16 else 0.002)


@pytest.mark.gpu
def test_cusparselt_compresses_to_our_blob() -> None:
    if find_library(CUDA0).name != "cusparselt":
        pytest.skip(find_library(CUDA0).reason)
    for out, width in ((64, 32), (192, 96), (1024, 768)):
        w, blob, _, _ = packed_on_the_card(out, width, torch.bfloat16)
        assert torch.equal(torch._cslt_compress(w).flatten()[: blob.numel()].view(torch.int16), blob.view(torch.int16))
