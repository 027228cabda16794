"""What a `SparseLinear` holds: one packed weight in every order; moved, cast, saved, loaded and overwritten."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from inference.twins import DTYPES, SHAPES, pair, weight
from torch import Tensor, nn

from proxsparse_triton import SparseLinear, pack_24
from proxsparse_triton.inference.blob import Layout


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
