from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proxsparse_triton import SparseLinear, mask_24, pack_24
from proxsparse_triton.errors import ConfigError, ShapeError
from proxsparse_triton.inference import blob, multiply
from proxsparse_triton.inference.blob import Layout
from proxsparse_triton.inference.choice import Point
from proxsparse_triton.inference.library import find_library
from proxsparse_triton.inference.library import multiply as library_product

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(64, 32), (128, 96), (3, 4), (5, 20), (48, 44)]


def weight(out: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    w = torch.randn(out, width, device=device).to(dtype)
    return w.masked_fill(~mask_24(w.abs()), 0)


def pair(
    out: int, width: int, *, bias: bool = True, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[SparseLinear, nn.Linear]:
    """A packed layer and its dense twin."""
    dense = nn.Linear(width, out, bias=bias, dtype=dtype, device=device).requires_grad_(False)
    dense.weight.copy_(weight(out, width, dtype, device))
    return SparseLinear.from_dense(dense.weight, bias=dense.bias), dense


@pytest.fixture(params=["linear", "hopper", "ampere"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device whose library reads this order."""

    def order_for(device: torch.device, dtype: torch.dtype, out: int, width: int) -> str:
        rows, columns = {"hopper": (64, 32), "ampere": (32, 64)}.get(request.param, (1, 1))
        return request.param if dtype != torch.float32 and out % rows == 0 and width % columns == 0 else "linear"

    monkeypatch.setattr(blob, "order_for", order_for)
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_the_dense_layer(shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    layer, dense = pair(*shape, bias=bias, dtype=dtype)
    x = torch.randn(2, 3, shape[1]).to(dtype)
    assert torch.equal(layer(x), dense(x))
    assert torch.equal(layer.weight, dense.weight)
    assert (layer.in_features, layer.out_features, layer.layout.dtype) == (shape[1], shape[0], dtype)


@pytest.mark.parametrize("shape", [(128, 128), (64, 192)])
def test_every_order_holds_the_same_weight(order: str, shape: tuple[int, int]) -> None:
    layer, dense = pair(*shape, dtype=torch.bfloat16)
    assert layer.layout.order == order
    assert torch.equal(layer.weight, dense.weight)
    values, metadata = pack_24(dense.weight)
    state = layer.state_dict()
    assert torch.equal(state["values"], values)
    assert torch.equal(state["metadata"], metadata)
    # Rows of it: whole tiles, and others.
    for first, rows in ((0, 64), (0, shape[0]), (shape[0] - 64, 64), (3, 17), (32, 32)):
        assert torch.equal(layer.layout.dense(layer.packed, first, rows), dense.weight[first : first + rows])


def test_rows_are_views_where_the_order_allows(order: str) -> None:
    layer, _ = pair(192, 64, dtype=torch.float16)
    parts = layer.layout.parts(layer.packed, 64, 64)
    views = parts.metadata.untyped_storage().data_ptr() == layer.packed.untyped_storage().data_ptr()
    assert views == (order != "ampere")
    assert parts.values.untyped_storage().data_ptr() == layer.packed.untyped_storage().data_ptr()


@pytest.mark.parametrize(("first", "rows"), [(0, 192), (64, 64), (0, 128), (32, 96), (3, 17), (16, 8)])
def test_addresses_are_where_the_views_begin(order: str, first: int, rows: int) -> None:
    layer, _ = pair(192, 64, dtype=torch.float16)
    places, parts = layer.layout.addresses(layer.packed, first, rows), layer.layout.parts(layer.packed, first, rows)
    if places is None:  # copies, or no multiples of 16 bytes
        inside = parts.metadata.untyped_storage().data_ptr() == layer.packed.untyped_storage().data_ptr()
        assert not inside or parts.metadata.data_ptr() % 16 or parts.values.data_ptr() % 16
    else:
        assert places == (parts.values.data_ptr(), parts.metadata.data_ptr())
        assert parts.order == layer.layout.order
    assert (places is not None) or (first, rows) != (0, 192)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_copy_of_nine_sixteenths(dtype: torch.dtype) -> None:
    layer, dense = pair(128, 64, bias=False, dtype=dtype)
    assert [name for name, _ in layer.named_buffers()] == ["packed"]
    assert not list(layer.parameters())
    expected = dense.weight.nbytes // 2 + dense.weight.numel() // 8
    assert layer.packed.nbytes == expected
    assert layer.packed.untyped_storage().nbytes() == expected


def test_the_blob_is_what_the_library_reads(order: str) -> None:
    """Values, then metadata, without a gap."""
    layer, dense = pair(64, 64, dtype=torch.bfloat16)
    values, _ = pack_24(dense.weight)
    whole = layer.packed.view(torch.bfloat16)
    assert whole.numel() == 64 * 64 // 2 + 64 * 64 // 16
    assert torch.equal(whole[: values.numel()], values.flatten())
    assert torch.equal(whole[values.numel() :].view(torch.int16), layer.layout.metadata(layer.packed))


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


# Moving, casting, saving, loading.

MOVES: list[tuple[str, Callable[[nn.Module], nn.Module], torch.dtype]] = [
    ("half", lambda m: m.half(), torch.float16),
    ("to", lambda m: m.to(torch.bfloat16), torch.bfloat16),
    ("to cpu in bf16", lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
    ("float", lambda m: m.half().float(), torch.float32),
    ("type", lambda m: m.type(torch.float16), torch.float16),
    ("cpu", lambda m: m.cpu(), torch.float32),
    ("deepcopy", copy.deepcopy, torch.float32),
    ("share", lambda m: m.share_memory(), torch.float32),
]


@pytest.mark.parametrize(("move", "dtype"), [(move, dtype) for _, move, dtype in MOVES], ids=[name for name, *_ in MOVES])
@pytest.mark.usefixtures("order")
def test_moved_as_a_linear_layer(move: Callable[[nn.Module], nn.Module], dtype: torch.dtype) -> None:
    layer, dense = pair(64, 64)
    moved, twin = move(layer), move(dense)
    assert isinstance(moved, SparseLinear)
    assert isinstance(twin, nn.Linear)
    assert moved.layout.dtype == twin.weight.dtype == dtype
    assert moved.packed.dtype == torch.uint8
    assert torch.equal(moved.weight, twin.weight)
    x = torch.randn(3, 64).to(dtype)
    assert torch.equal(moved(x), twin(x))


def test_the_order_follows_the_device(order: str) -> None:
    layer, _ = pair(64, 64)
    assert layer.layout.order == "linear"  # of fp32
    before = layer.state_dict()["metadata"]
    layer.bfloat16()
    assert layer.layout.order == order
    assert torch.equal(layer.state_dict()["metadata"], before)
    assert layer.float().layout.order == "linear"
    assert torch.equal(layer.state_dict()["metadata"], before)


def test_nothing_is_copied_where_nothing_changes() -> None:
    layer, _ = pair(64, 64)
    packed = layer.packed
    assert layer.to("cpu").float().packed is packed


@pytest.mark.filterwarnings("ignore:for bias")
def test_on_meta_and_back() -> None:
    layer, dense = pair(12, 8)
    state = layer.state_dict()
    layer.to("meta")
    assert layer.packed.is_meta
    assert layer(torch.empty(3, 8, device="meta")).shape == (3, 12)
    assert layer.weight.shape == (12, 8)
    with pytest.raises(RuntimeError, match="expected a layer with memory, got one on meta"):
        copy.deepcopy(layer).load_state_dict(state)
    assigned = copy.deepcopy(layer)
    assigned.load_state_dict(state, assign=True)
    layer.to_empty(device="cpu").load_state_dict(state)
    for module in (assigned, layer):
        assert torch.equal(module(torch.ones(2, 8)), dense(torch.ones(2, 8)))


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_a_dtype_it_cannot_have_changes_nothing() -> None:
    layer, dense = pair(12, 8)
    for change in (layer.double, lambda: layer.to(torch.complex64), lambda: layer.type(torch.int8)):
        with pytest.raises(TypeError, match="SparseLinear: expected float32, float16 or bfloat16 weights"):
            change()
        assert torch.equal(layer(torch.ones(2, 8)), dense(torch.ones(2, 8)))


def test_state_dict_is_portable(order: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    layer, dense = pair(64, 64, dtype=torch.bfloat16)
    state = layer.state_dict()
    assert {name: (tuple(value.shape), value.dtype) for name, value in state.items()} == {
        "bias": ((64,), torch.bfloat16),
        "values": ((64, 32), torch.bfloat16),
        "metadata": ((64, 4), torch.int16),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    save_file(dict(state), tmp_path / "layer.safetensors")
    for loaded in (torch.load(buffer, weights_only=True), load_file(tmp_path / "layer.safetensors")):
        other = SparseLinear(64, 64, dtype=torch.bfloat16)
        packed = other.packed
        assert str(other.load_state_dict(loaded, strict=True)) == "<All keys matched successfully>"
        assert other.packed is packed  # a captured graph still reads it
        assert torch.equal(other.weight, dense.weight)
        assert torch.equal(other(torch.ones(1, 64).bfloat16()), layer(torch.ones(1, 64).bfloat16()))


def test_loading_into_a_model_by_prefix() -> None:
    layer, _ = pair(12, 8)
    model = nn.Sequential(nn.ReLU(), SparseLinear(8, 12))
    model.load_state_dict({f"1.{name}": value for name, value in layer.state_dict().items()})
    assert torch.equal(model[1].weight, layer.weight)


def test_assigned_weights_may_have_another_dtype() -> None:
    layer, _ = pair(12, 8)
    state = copy.deepcopy(layer).half().state_dict()
    layer.load_state_dict(state, assign=True)
    assert layer.layout.dtype == torch.float16
    assert torch.equal(layer.state_dict()["values"], state["values"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("values"), "Missing key.*values"),
        (lambda s: s.pop("metadata"), "Missing key.*metadata"),
        (lambda s: s.pop("bias"), "Missing key.*bias"),
        (lambda s: s.update(weight=torch.zeros(12, 8)), "Unexpected key.*weight"),
        (lambda s: s.update(values=torch.zeros(12, 6)), r"SparseLinear: expected values of shape \(12, 4\), got \(12, 6\)"),
        (lambda s: s.update(values=torch.zeros(12, 4).half()), r"expected torch.float32 values, got torch.float16. Convert the layer"),
        (lambda s: s.update(values=torch.zeros(12, 4).long()), "expected torch.float32 values, got torch.int64"),
        (lambda s: s.update(metadata=torch.zeros(12, 2).short()), r"expected metadata of shape \(12, 1\), got \(12, 2\)"),
        (lambda s: s.update(metadata=torch.zeros(12, 1)), "expected int16 metadata, got torch.float32"),
        (lambda s: s.update(bias=torch.zeros(3)), "size mismatch for bias"),
    ],
)
def test_state_that_does_not_fit_is_refused(change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    layer, dense = pair(12, 8)
    state = dict(layer.state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert torch.equal(layer.weight, dense.weight)


def test_not_strict() -> None:
    layer, dense = pair(12, 8)
    layer.load_state_dict({}, strict=False)
    assert torch.equal(layer.weight, dense.weight)


def test_a_layer_can_be_saved_whole() -> None:
    layer, dense = pair(12, 8)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(torch.ones(1, 8)), dense(torch.ones(1, 8)))


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_can_be_overwritten(order: str, shape: tuple[int, int]) -> None:
    for first, rows in ((0, shape[0]), (shape[0] // 3, shape[0] // 2)):
        old, new = weight(*shape, torch.float16), weight(rows, shape[1], torch.float16)
        layout = Layout(*shape, torch.float16, "linear").on(torch.device("cpu"), torch.float16)
        packed = layout.join(*pack_24(old))
        layout.write(packed, first, *pack_24(new))
        expected = old.clone()
        expected[first : first + rows] = new
        assert torch.equal(layout.dense(packed, 0, shape[0]), expected)


# On the card.


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
