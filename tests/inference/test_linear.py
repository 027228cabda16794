"""`SparseLinear` as a layer: inputs, gradients, autocast, compiling, and the backends of its product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inference.twins import DTYPES, SHAPES, pair, weight
from torch import Tensor
from torch.nn import functional as F

from proxsparse_triton import SparseLinear, mask_24, pack_24
from proxsparse_triton.errors import ConfigError, ShapeError
from proxsparse_triton.inference import multiply
from proxsparse_triton.inference.choice import Point


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_the_dense_layer(shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    layer, dense = pair(*shape, bias=bias, dtype=dtype)
    x = torch.randn(2, 3, shape[1]).to(dtype)
    assert torch.equal(layer(x), dense(x))
    assert torch.equal(layer.weight, dense.weight)
    assert (layer.in_features, layer.out_features, layer.layout.dtype) == (shape[1], shape[0], dtype)


# Inputs.


def test_one_dimension_no_tokens_and_views() -> None:
    layer, dense = pair(12, 8)
    assert torch.equal(layer(torch.ones(8)), dense(torch.ones(8)))
    assert layer(torch.empty(0, 8)).shape == (0, 12)
    assert layer(torch.empty(3, 0, 8)).shape == (3, 0, 12)
    x = torch.randn(8, 5).t()
    torch.testing.assert_close(layer(x), dense(x))
    wide = torch.randn(4, 3, 16)[:, ::2, ::2]
    torch.testing.assert_close(layer(wide), dense(wide))
    assert layer(wide).is_contiguous()


def test_bad_inputs() -> None:
    layer, _ = pair(12, 8)
    with pytest.raises(TypeError, match=r"SparseLinear: expected torch.float32 as the weight has, got torch.float16\. Convert"):
        layer(torch.ones(1, 8).half())
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        layer(torch.ones(1, 8, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"SparseLinear: expected \[..., 8\], got \(1, 12\)"):
        layer(torch.ones(1, 12))
    with pytest.raises(ShapeError, match=r"expected \[..., 8\], got \(\)"):
        layer(torch.tensor(1.0))
    with pytest.raises(ConfigError, match="SparseLinear: expected an input on cpu, got meta"):
        layer(torch.ones(1, 8, device="meta"))


def test_bad_weights() -> None:
    values, metadata = pack_24(weight(6, 16))
    with pytest.raises(ShapeError, match=r"pack_24: expected at most 2 non-zeros of every 4 weights, got 4 in block \(0, 0\)"):
        SparseLinear.from_dense(torch.ones(6, 16))
    with pytest.raises(TypeError, match=r"expected float32, float16 or bfloat16 weights, got torch\.float64"):
        SparseLinear.from_dense(weight(6, 16).double())
    with pytest.raises(ShapeError, match=r"from_packed: expected metadata of shape \(6, 1\) for values of \(6, 8\), got \(6, 2\)"):
        SparseLinear.from_packed(values, torch.zeros(6, 2, dtype=torch.int16))
    with pytest.raises(ShapeError, match=r"from_packed: expected values \[out, in_features / 2\] of two a block, got \(6, 7\)"):
        SparseLinear.from_packed(values[:, 1:], metadata)
    with pytest.raises(TypeError, match=r"from_packed: expected int16 metadata, got torch\.int32"):
        SparseLinear.from_packed(values, metadata.int())
    with pytest.raises(ShapeError, match=r"from_packed: expected a bias of shape \(6,\), got \(7,\)"):
        SparseLinear.from_packed(values, metadata, torch.zeros(7))
    with pytest.raises(TypeError, match=r"from_packed: expected a bias of torch\.float32 as the values, got torch\.float16"):
        SparseLinear.from_packed(values, metadata, torch.zeros(6).half())
    with pytest.raises(ShapeError, match="SparseLinear: expected the last dimension divisible by 4"):
        SparseLinear(6, 4)


def test_a_mask_says_what_is_kept() -> None:
    w = torch.randn(8, 16)
    mask = mask_24(w.abs())
    assert torch.equal(SparseLinear.from_dense(w, mask).weight, w.masked_fill(~mask, 0))


def test_a_new_layer_is_zero() -> None:
    layer = SparseLinear(8, 12, dtype=torch.bfloat16)
    assert not layer(torch.ones(3, 8, dtype=torch.bfloat16)).any()
    assert torch.equal(layer.weight, torch.zeros(12, 8, dtype=torch.bfloat16))
    assert SparseLinear(8, 12, bias=False).bias is None
    assert repr(layer) == "SparseLinear(in_features=8, out_features=12, bias=True, dtype=bfloat16, order=linear)"


# Gradients and autocast.


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_flow_to_the_input_and_the_bias(compiled: bool) -> None:
    layer, dense = pair(12, 8)
    for module in (layer, dense):
        assert module.bias is not None
        module.bias.requires_grad_(True)
    x = torch.randn(2, 5, 8, requires_grad=True)
    run: Callable[[Tensor], Tensor] = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    got = torch.autograd.grad(run(x).pow(3).sum(), [x, layer.bias])
    expected = torch.autograd.grad(dense(x).pow(3).sum(), [x, dense.bias])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_graph_keeps_no_dense_weight() -> None:
    layer, _ = pair(64, 64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 64, requires_grad=True))
    assert [t.data_ptr() for t in kept] == [layer.packed.data_ptr()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [*DTYPES, torch.float64])
def test_autocast_as_a_linear_layer(dtype: torch.dtype, given: torch.dtype) -> None:
    layer, dense = pair(12, 8, dtype=dtype)
    x = torch.randn(3, 8).to(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if given == torch.float64:
            with pytest.raises((TypeError, RuntimeError)):
                layer(x)
            return
        got, expected = layer(x), dense(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)


def test_autocast_to_another_dtype_than_the_weights() -> None:
    layer, dense = pair(12, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        got, expected = layer(torch.ones(1, 8)), dense(torch.ones(1, 8))
    assert got.dtype == torch.float16
    assert torch.equal(got, expected)


# Compiling.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiled_whole_and_for_any_number_of_tokens(dtype: torch.dtype, mode: Callable[[], Any]) -> None:
    layer, dense = pair(12, 8, dtype=dtype)
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with mode():
        for tokens in (2, 3, 100):
            x = torch.randn(tokens, 8).to(dtype)
            assert torch.equal(run(x), dense(x))


def test_the_operation_is_registered_as_torch_wants_it() -> None:
    layer, _ = pair(12, 8)
    place = (12, 8, "linear", 0, 12)
    for x in (torch.randn(3, 8), torch.randn(2, 0, 8), torch.randn(8), torch.randn(3, 8, requires_grad=True)):
        torch.library.opcheck(multiply._sparse_linear, (x, layer.packed, layer.bias, *place))
    torch.library.opcheck(multiply._sparse_linear, (torch.randn(3, 8), layer.packed, None, 12, 8, "linear", 0, 12))
    torch.library.opcheck(multiply._dense, (layer.packed, torch.empty(0), *place))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["kernel", "library", "dense"])
def test_every_backend(monkeypatch: pytest.MonkeyPatch, order: str, backend: str) -> None:
    """Which of them runs is faked; the kernel is the reference here, and the library stands for any."""
    layer, dense = pair(64, 64, dtype=torch.bfloat16)
    used = []

    def product(name: str, whole: Tensor, values: Tensor, metadata: Tensor, x: Tensor, bias: Tensor, algorithm: object) -> Tensor:
        used.append((name, algorithm))
        return F.linear(x, layer.weight, bias)

    monkeypatch.setattr(multiply, "choose", lambda *arguments, **options: Point(64, backend, (4, 3, 2)))
    monkeypatch.setattr(multiply, "find_library", lambda device: type("Found", (), {"name": "cusparselt"}))
    monkeypatch.setattr(multiply, "multiply", product)
    x = torch.randn(5, 64).bfloat16()
    torch.testing.assert_close(layer(x), dense(x), rtol=0.02, atol=0.02)
    assert used == ([("cusparselt", (4, 3, 2))] if backend == "library" else [])


def test_cusparselt_without_an_algorithm_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, dense = pair(64, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(multiply, "choose", lambda *arguments, **options: Point(64, "library"))
    monkeypatch.setattr(multiply, "find_library", lambda device: type("Found", (), {"name": "cusparselt"}))
    monkeypatch.setattr(multiply, "found_algorithm", lambda *arguments, **options: None)
    x = torch.randn(5, 64).bfloat16()
    assert torch.equal(layer(x), dense(x))
