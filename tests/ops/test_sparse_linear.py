"""sparse_linear_24: against the dense product in fp64, over orders, dtypes, odd shapes and every launch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proxsparse_triton import mask_24, pack_24, sparse_linear_24, unpack_24
from proxsparse_triton.errors import ConfigError, ShapeError
from proxsparse_triton.ops.sparse_linear import _launch, on_hopper, takes
from proxsparse_triton.reference.metadata import ORDERS, reorder

DTYPES = [torch.bfloat16, torch.float16]
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def packed(rows: int, width: int, dtype: torch.dtype, order: str, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, width, generator=generator).to(dtype).to(device)
    values, metadata = pack_24(w, mask_24(w.abs()))
    return values, metadata if order == "linear" else reorder(metadata, order)


def inputs(*shape: int, dtype: torch.dtype, device: str, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def check(y: Tensor, x: Tensor, values: Tensor, linear: Tensor, bias: Tensor | None) -> None:
    """y rounds a sum in fp32: half an ulp of the result, and for the sum some 2^-22 of the magnitudes added, a step of 32 columns each."""
    w = unpack_24(values, linear, (values.shape[0], x.shape[-1])).double()
    exact = x.double() @ w.T + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ w.abs().T + (0 if bias is None else bias.double().abs())
    bound = HALF_ULP[y.dtype] * exact.abs() * 1.001 + (x.shape[-1] / 32 + 8) * 2.0**-22 * magnitude + 1e-7
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= bound).all()), float(((y.double() - exact).abs() - bound).max())


SHAPES = [
    (16, 16),
    (48, 80),
    (96, 64),
    (64, 96),
    (64, 128),
    (128, 160),
    (192, 448),
]  # out x in: whole and broken tiles of 64 columns, rows of 128


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (7, 12), *SHAPES], ids=str)
def test_reference_against_fp64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, width = shape
    values, metadata = packed(rows, width, dtype, "linear", "cpu")
    x, bias = inputs(5, width, dtype=dtype, device="cpu"), inputs(rows, dtype=dtype, device="cpu", seed=2)
    check(sparse_linear_24(x, values, metadata, bias, backend="reference"), x, values, metadata, bias)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tokens", [1, 3, 8, 13, 19])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_against_fp64(shape: tuple[int, int], order: str, tokens: int, device: str) -> None:
    rows, width = shape
    dtype = DTYPES[tokens % 2]  # both with every shape and order
    if not takes(rows, width, dtype, order):
        pytest.skip("the order has larger tiles")
    values, metadata = packed(rows, width, dtype, order, device)
    linear = packed(rows, width, dtype, "linear", device)[1]
    x = inputs(tokens, width, dtype=dtype, device=device)
    bias = inputs(rows, dtype=dtype, device=device, seed=2) if tokens > 1 else None
    y = sparse_linear_24(x, values, metadata, bias, order=order, backend="triton")
    check(y, x, values, linear, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9, 16, 17, 32, 33, 64, 65, 200])
def test_every_launch_on_the_card(tokens: int, order: str, dtype: torch.dtype) -> None:
    """Each launch of each width, at rows that do not fill its programs and columns that do not fill its turns."""
    for rows, width in ((1088, 1056), (8256, 480), (20544, 288), (4096, 4096)):
        values, metadata = packed(rows, width, dtype, order, "cuda")
        linear = packed(rows, width, dtype, "linear", "cuda")[1]
        x, bias = inputs(tokens, width, dtype=dtype, device="cuda"), inputs(rows, dtype=dtype, device="cuda", seed=2)
        y = sparse_linear_24(x, values, metadata, bias, order=order)
        check(y, x, values, linear, bias)
        assert torch.equal(y, sparse_linear_24(x, values, metadata, bias, order=order)), "not deterministic"


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 9, 16, 31, 64, 65, 97, 128, 129, 200, 333, 600])
def test_the_kernel_for_hopper_on_the_card(tokens: int, dtype: torch.dtype) -> None:
    """Rows that do not fill its programs, columns that its clusters do not part evenly, and turns of 64 columns."""
    for rows, width in ((64, 64), (192, 320), (1088, 1152), (2112, 4160), (20544, 384), (4096, 4096)):
        values, metadata = packed(rows, width, dtype, "hopper", "cuda")
        linear = packed(rows, width, dtype, "linear", "cuda")[1]
        x, bias = inputs(tokens, width, dtype=dtype, device="cuda"), inputs(rows, dtype=dtype, device="cuda", seed=2)
        for b in (bias, None):
            y = sparse_linear_24(x, values, metadata, b, order="hopper", backend="triton")
            check(y, x, values, linear, b)
            assert torch.equal(y, sparse_linear_24(x, values, metadata, b, order="hopper")), "not deterministic"


@pytest.mark.gpu
def test_which_kernel_runs_on_the_card() -> None:
    from proxsparse_triton.kernels import hopper, sparse_linear

    device = torch.device("cuda", torch.cuda.current_device())
    there = torch.cuda.get_device_capability(device) == (9, 0)
    assert on_hopper(device, "hopper", 4096) == there
    assert not on_hopper(device, "linear", 4096)
    assert not on_hopper(device, "hopper", 4128)
    for tokens, rows, own in ((8, 4096, False), (8, 16384, True), (9, 4096, True), (300, 64, True)):
        assert _launch(device, tokens, rows, 4096, "hopper")[1] is (hopper if own and there else sparse_linear).sparse_linear
        assert _launch(device, tokens, rows, 4096, "linear")[1] is sparse_linear.sparse_linear


@pytest.mark.gpu
@pytest.mark.parametrize("width", [3136, 3200])  # turns of 64 columns, and of 128; neither parts evenly
@pytest.mark.parametrize("splits", [1, 2, 3, 4, 6, 8])
def test_clusters_of_every_size_on_the_card(splits: int, width: int) -> None:
    from proxsparse_triton.kernels import hopper
    from proxsparse_triton.kernels.hopper_launch import launches

    if not on_hopper(torch.device("cuda"), "hopper"):
        pytest.skip("needs compute capability 9.0")
    rows = 1088
    values, metadata = packed(rows, width, torch.bfloat16, "hopper", "cuda")
    linear = packed(rows, width, torch.bfloat16, "linear", "cuda")[1]
    for tokens in (13, 100, 300):
        x, bias = inputs(tokens, width, dtype=torch.bfloat16, device="cuda"), inputs(rows, dtype=torch.bfloat16, device="cuda", seed=2)
        forms = {}
        for launch in launches({13: 16, 100: 128}.get(tokens, tokens), width):
            if launch.splits == splits:
                forms[launch.groups, launch.warpgroups, launch.tokens > 128] = launch
        assert forms
        for launch in forms.values():
            y = torch.full((tokens, rows), float("nan"), dtype=torch.bfloat16, device="cuda")
            hopper.sparse_linear(x, values, metadata, bias, y, "hopper", launch)
            check(y, x, values, linear, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4, 100])
def test_in_a_cuda_graph(tokens: int) -> None:
    values, metadata = packed(512, 1024, torch.bfloat16, "hopper", "cuda")
    x = inputs(tokens, 1024, dtype=torch.bfloat16, device="cuda")
    expected = sparse_linear_24(x, values, metadata, order="hopper")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse_linear_24(x, values, metadata, order="hopper")
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_linear_in_x_and_exact_on_one_hot(rows: int, width: int, tokens: int, seed: int) -> None:
    """A one-hot x reads a column of the weight, bit for bit."""
    values, metadata = packed(16 * rows, 16 * width, torch.float16, "linear", "cpu", seed)
    columns = torch.randint(16 * width, (tokens,), generator=torch.Generator().manual_seed(seed))
    x = torch.nn.functional.one_hot(columns, 16 * width).half()
    w = unpack_24(values, metadata, (16 * rows, 16 * width))
    for backend in ("reference", None):
        assert torch.equal(sparse_linear_24(x, values, metadata, backend=backend), w.T[columns])


def test_shapes_of_x(device: str) -> None:
    values, metadata = packed(32, 64, torch.bfloat16, "linear", device)
    x = inputs(2, 3, 64, dtype=torch.bfloat16, device=device)
    y = sparse_linear_24(x, values, metadata)
    assert y.shape == (2, 3, 32)
    assert torch.equal(sparse_linear_24(x[1, 2], values, metadata), y[1, 2])
    strided = inputs(64, 6, dtype=torch.bfloat16, device=device).T
    assert torch.equal(sparse_linear_24(strided, values, metadata), sparse_linear_24(strided.contiguous(), values, metadata))
    assert sparse_linear_24(x[:0], values, metadata).shape == (0, 3, 32)


def test_views_that_start_anywhere(device: str) -> None:
    """A 16-byte copy wants 16-byte addresses: other views are copied first."""
    values, metadata = packed(32, 64, torch.bfloat16, "linear", device)
    room = torch.empty(values.numel() + 1, dtype=values.dtype, device=device)
    shifted = room[1:].view(values.shape).copy_(values)
    x = inputs(1 + 4 * 64, dtype=torch.bfloat16, device=device)[1:].view(4, 64)
    backend = "triton"
    expected = sparse_linear_24(x.clone(), values, metadata, backend=backend)
    assert torch.equal(sparse_linear_24(x, shifted, metadata, backend=backend), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_metadata_and_bias_that_start_anywhere(order: str, device: str) -> None:
    """A 4-byte copy wants 4-byte addresses, and the kernel a bias without gaps."""
    values, metadata = packed(64, 64, torch.bfloat16, order, device)
    x = inputs(4, 64, dtype=torch.bfloat16, device=device)
    spread = inputs(128, dtype=torch.bfloat16, device=device, seed=3)
    shifted = torch.empty(metadata.numel() + 1, dtype=torch.int16, device=device)[1:].view(metadata.shape).copy_(metadata)
    expected = sparse_linear_24(x, values, metadata, spread[::2].clone(), order=order, backend="triton")
    assert torch.equal(sparse_linear_24(x, values, shifted, spread[::2], order=order, backend="triton"), expected)
    one = spread[:1].expand(64)
    expected = sparse_linear_24(x, values, metadata, one.contiguous(), order=order, backend="triton")
    assert torch.equal(sparse_linear_24(x, values, metadata, one, order=order, backend="triton"), expected)


def test_no_rows_and_no_tokens(device: str) -> None:
    values, metadata = packed(16, 64, torch.bfloat16, "linear", device)
    x = inputs(64, 64, dtype=torch.bfloat16, device=device)
    assert sparse_linear_24(x, values[:0], metadata[:0], backend="triton").shape == (64, 0)
    assert sparse_linear_24(x[:0], values, metadata, backend="triton").shape == (0, 16)


def test_more_tokens_than_a_launch_takes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from proxsparse_triton.ops import sparse_linear as module

    values, metadata = packed(16, 32, torch.bfloat16, "linear", device)
    x = inputs(11, 32, dtype=torch.bfloat16, device=device)
    expected = sparse_linear_24(x, values, metadata, backend="triton")
    monkeypatch.setattr(module, "MOST_TOKENS", 4)
    assert torch.equal(sparse_linear_24(x, values, metadata, backend="triton"), expected)


def test_tracers_see_the_operation() -> None:
    """What watches or transforms tensors gets the registered operation, not a kernel that writes unseen."""
    from torch.fx.experimental.proxy_tensor import make_fx

    values, metadata = packed(16, 32, torch.float32, "linear", "cpu")
    graph = make_fx(lambda x: sparse_linear_24(x, values, metadata))(torch.randn(2, 32)).graph
    assert "proxsparse.sparse_linear_24" in str([node.target for node in graph.nodes])


def test_infinite_and_nan_inputs_stay_in_their_token(device: str) -> None:
    values, metadata = packed(64, 96, torch.float16, "linear", device)
    x = inputs(9, 96, dtype=torch.float16, device=device)
    expected = sparse_linear_24(x, values, metadata, backend="triton")
    x[4, 5], x[8, 95] = float("nan"), float("inf")
    y = sparse_linear_24(x, values, metadata, backend="triton")
    others = [0, 1, 2, 3, 5, 6, 7]
    assert torch.equal(y[others], expected[others])
    assert y[4].isnan().any()
    assert not y[8].isfinite().all()


def test_opcheck_and_compile() -> None:
    values, metadata = packed(32, 64, torch.float32, "linear", "cpu")
    x = torch.randn(4, 64)
    torch.library.opcheck(torch.ops.proxsparse.sparse_linear_24, (x, values, metadata, None, "linear", "reference"))
    compiled = torch.compile(sparse_linear_24, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, values, metadata), sparse_linear_24(x, values, metadata))


def test_other_shapes_go_to_the_reference(device: str) -> None:
    values, metadata = packed(6, 12, torch.bfloat16, "linear", device)
    x = inputs(2, 12, dtype=torch.bfloat16, device=device)
    check(sparse_linear_24(x, values, metadata), x, values, metadata, None)
    with pytest.raises(ShapeError, match=r"divisible by \(16, 16\).*got torch.bfloat16 and \(6, 12\). Use backend='reference'"):
        sparse_linear_24(x, values, metadata, backend="triton")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 60)}, ShapeError, r"expected values of shape \(32, 30\), got \(32, 32\)"),
        ({"x": torch.zeros(2, 62)}, ShapeError, "divisible by 4"),
        ({"x": torch.zeros(2, 64, dtype=torch.int32)}, TypeError, "for x, got torch.int32"),
        ({"x": torch.zeros(2, 64, dtype=torch.float16)}, TypeError, "values of x's dtype torch.float16, got torch.float32"),
        ({"values": torch.zeros(4, 4, 32)}, ShapeError, r"values \[out, in_features / 2\], got shape \(4, 4, 32\)"),
        ({"metadata": torch.zeros(32, 4)}, TypeError, "int16 metadata, got torch.float32"),
        ({"metadata": torch.zeros(32, 3, dtype=torch.int16)}, ShapeError, r"metadata of shape \(32, 4\), got \(32, 3\)"),
        ({"order": "hopper"}, ShapeError, r"metadata of shape \(128,\), got \(32, 4\)"),
        ({"order": "volta"}, ConfigError, "expected an order of linear, hopper, ampere, got 'volta'"),
        ({"bias": torch.zeros(31)}, ShapeError, r"bias of shape \(32,\), got \(31,\)"),
        ({"bias": torch.zeros(32, dtype=torch.float16)}, TypeError, "bias of x's dtype torch.float32, got torch.float16"),
        ({"backend": "cuda"}, ConfigError, "expected backend 'triton' or 'reference', got 'cuda'"),
        ({"x": torch.zeros(2, 64, device="meta")}, ConfigError, "expected values on meta, got cpu"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    values, metadata = packed(32, 64, torch.float32, "linear", "cpu")
    arguments = {"x": torch.zeros(2, 64), "values": values, "metadata": metadata, "bias": None, **change}
    with pytest.raises(error, match=message):
        sparse_linear_24(**arguments)  # type: ignore[arg-type]
