"""`SparseLinear` on the card: products, graphs, compiling, and the choice of a backend."""

from __future__ import annotations

import pytest
import torch
from inference.twins import DTYPES, pair
from torch import Tensor
from torch.nn import functional as F

from proxsparse_triton import SparseLinear
from proxsparse_triton.inference import multiply
from proxsparse_triton.inference.choice import Point
from proxsparse_triton.inference.library import find_library
from proxsparse_triton.inference.library import multiply as library_product


def close(got: Tensor, layer: SparseLinear, x: Tensor) -> bool:
    """Within the rounding of 16-bit outputs of the product in fp64."""
    bias = None if layer.bias is None else layer.bias.double()
    expected = F.linear(x.double(), layer.weight.double(), bias)
    return bool((got.double() - expected).abs().max() <= 0.01 * expected.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(256, 512), (96, 64), (48, 44)])
@pytest.mark.parametrize("tokens", [1, 7, 64, 300, 4096])
@pytest.mark.filterwarnings("ignore:SparseLinear")
def test_on_the_card(shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> None:
    layer, _ = pair(*shape, dtype=dtype, device="cuda")
    x = torch.randn(tokens, shape[1], device="cuda", dtype=dtype)
    assert close(layer(x), layer, x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:SparseLinear")
def test_to_the_card_and_back_bit_for_bit(dtype: torch.dtype) -> None:
    for shape in ((256, 512), (96, 64), (5, 20)):
        layer, dense = pair(*shape, dtype=dtype)
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        layer.cuda()
        assert all(torch.equal(value.cpu(), before[name]) for name, value in layer.state_dict().items())
        assert torch.equal(layer.weight.cpu(), dense.weight)
        layer.cpu()
        assert layer.layout.order == "linear"
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
        layer.cuda().load_state_dict(before)
        assert torch.equal(layer.weight.cpu(), dense.weight)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 2048])
def test_captured_in_a_graph(tokens: int) -> None:
    layer, _ = pair(1024, 512, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(2):
            x.normal_()
            graph.replay()
            assert close(y, layer, x)


@pytest.mark.gpu
def test_the_library_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the algorithm that an eager call of as many tokens has found."""
    layer, _ = pair(1024, 512, dtype=torch.bfloat16, device="cuda")
    if layer.layout.order == "linear":
        pytest.skip(find_library(layer.packed.device).reason)
    used = []
    monkeypatch.setattr(multiply, "multiply", lambda *a: used.append(torch.cuda.is_current_stream_capturing()) or library_product(*a))
    monkeypatch.setattr(multiply, "choose", lambda *a, **o: Point(4096, "library"))
    x = torch.randn(1000, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.normal_()
        graph.replay()
    assert used == [False, True]
    assert close(y, layer, x)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_on_the_card(mode: str) -> None:
    layer, _ = pair(256, 512, dtype=torch.bfloat16, device="cuda")
    torch._dynamo.reset()
    run = torch.compile(lambda x: layer(x * 2) + 1, fullgraph=True, mode=mode)
    with torch.no_grad():
        for tokens in (1, 33, 300, 1, 33):
            x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
            assert close(run(x) - 1, layer, x * 2)


@pytest.mark.gpu
def test_the_choice_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = pair(1024, 512, dtype=torch.bfloat16, device="cuda")
    used = []
    for name in ("multiply_at", "multiply"):
        real = getattr(multiply, name)
        monkeypatch.setattr(multiply, name, lambda *a, name=name, real=real, **o: used.append(name) or real(*a, **o))
    for backend, expected in (("kernel", ["multiply_at"]), ("library", ["multiply"]), ("dense", [])):
        if backend == "library" and layer.layout.order == "linear":
            continue
        monkeypatch.setattr(multiply, "choose", lambda *a, backend=backend, **o: Point(64, backend))
        used.clear()
        x = torch.randn(16, 512, device="cuda", dtype=torch.bfloat16)
        assert close(layer(x), layer, x)
        assert used == expected
