from __future__ import annotations

import copy
import gc
import io
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proxsparse_triton import SparseLinear, mask_24
from proxsparse_triton.inference import group as groups
from proxsparse_triton.inference.group import GroupMember, SparseGroup

NAMES = ("q_proj", "k_proj", "v_proj")
COUNTS = (64, 32, 32)
WIDTH = 64


class Attention(nn.Module):
    """Three layers of one input, as in grouped-query attention."""

    def __init__(self, bias: bool, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        super().__init__()
        for name, count in zip(NAMES, COUNTS, strict=True):
            layer = nn.Linear(WIDTH, count, bias=bias, dtype=dtype, device=device).requires_grad_(False)
            layer.weight.masked_fill_(~mask_24(layer.weight.abs()), 0)
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.get_submodule(name)(x) for name in NAMES], dim=-1)


def same(a: Tensor, b: Tensor) -> bool:
    """But for the order of the sums, which follows the number of rows."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def fused(dense: Attention) -> Attention:
    model = copy.deepcopy(dense)
    layers = [SparseLinear.from_dense(getattr(model, name).weight, bias=getattr(model, name).bias) for name in NAMES]
    group = SparseGroup.of(layers, "fused_q_proj")
    model.add_module(group.slot, group)
    for name, member in zip(NAMES, group.members(), strict=True):
        setattr(model, name, member)
    return model


@pytest.fixture(params=[False, True], ids=["no bias", "bias"])
def both(request: pytest.FixtureRequest) -> tuple[Attention, Attention]:
    dense = Attention(request.param)
    return dense, fused(dense)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product that was computed."""
    computed: list[int] = []
    real = SparseGroup.rows

    def rows(self: SparseGroup, x: Tensor, first: int, count: int, bias: Tensor | None) -> Tensor:
        computed.append(count)
        return real(self, x, first, count, bias)

    monkeypatch.setattr(SparseGroup, "rows", rows)
    return computed


def test_one_product_serves_all(both: tuple[Attention, Attention], products: list[int]) -> None:
    dense, model = both
    for x in (torch.randn(WIDTH), torch.randn(1, 1, WIDTH), torch.randn(2, 5, WIDTH), torch.randn(2, 0, WIDTH), torch.randn(WIDTH, 3).t()):
        products.clear()
        assert same(model(x), dense(x))
        assert products == [sum(COUNTS)]
        assert model.q_proj(x).is_contiguous()


@pytest.mark.parametrize("names", [*itertools.permutations(NAMES), NAMES[:1], NAMES[1:], (*NAMES, *NAMES), ("k_proj",) * 3])
def test_in_any_order_any_number_of_times(both: tuple[Attention, Attention], products: list[int], names: tuple[str, ...]) -> None:
    dense, model = both
    x = torch.randn(3, WIDTH)
    for name in names:
        assert same(getattr(model, name)(x), getattr(dense, name)(x))
    assert len(products) == len(names) // len(set(names))  # a member gets its rows once


def test_interleaved_inputs_and_groups(both: tuple[Attention, Attention], products: list[int]) -> None:
    """Two groups may share an input, as attention and MLP in parallel do, under one name or two."""
    dense, model = both
    other_dense = Attention(False)
    other = fused(other_dense)
    x, z = torch.randn(3, WIDTH), torch.randn(4, WIDTH)
    for name in NAMES:
        for t in (x, z):
            assert same(getattr(model, name)(t), getattr(dense, name)(t))
    assert len(products) == 2
    other.fused_q_proj.slot = "fused_gate_proj"  # type: ignore[assignment, union-attr]
    products.clear()
    for name in NAMES:
        for m, d in ((model, dense), (other, other_dense)):
            assert same(getattr(m, name)(x), getattr(d, name)(x))
    assert len(products) == 2
    other.fused_q_proj.slot = "fused_q_proj"  # type: ignore[assignment, union-attr]
    for name in NAMES:
        for m, d in ((model, dense), (other, other_dense)):
            assert same(getattr(m, name)(x), getattr(d, name)(x))


def test_an_input_that_was_written_to_is_computed_again(both: tuple[Attention, Attention], products: list[int]) -> None:
    dense, model = both
    x = torch.randn(3, WIDTH)
    model.q_proj(x)
    x.mul_(2)
    assert same(model.k_proj(x), dense.k_proj(x))
    x[0] = 0  # through a view
    assert same(model.v_proj(x), dense.v_proj(x))
    assert len(products) == 3


def test_weights_that_were_loaded_in_between(both: tuple[Attention, Attention]) -> None:
    """The result belongs to an input and to weights."""
    dense, model = both
    x = torch.randn(3, WIDTH)
    model.q_proj(x)
    other = Attention(dense.q_proj.bias is not None)
    model.load_state_dict(fused(other).state_dict())
    assert same(model.k_proj(x), other.k_proj(x))
    model.q_proj(x)
    model.bfloat16().float()
    other.bfloat16().float()
    assert same(model.v_proj(x), other.v_proj(x))


def test_nothing_lives_longer_than_the_input(both: tuple[Attention, Attention], products: list[int]) -> None:
    _, model = both
    kept = []
    real = SparseGroup.rows

    def rows(self: SparseGroup, *arguments: Any) -> Tensor:
        y = real(self, *arguments)
        kept.append(weakref.ref(y))
        return y

    SparseGroup.rows = rows  # type: ignore[method-assign]
    try:
        x = torch.randn(3, WIDTH)
        model(x)
        assert kept[-1]() is None  # all have taken theirs
        model.q_proj(x)
        assert kept[-1]() is not None
        seen = weakref.ref(x)
        del x
        gc.collect()
        assert seen() is None
        assert kept[-1]() is None
    finally:
        SparseGroup.rows = real  # type: ignore[method-assign]


def test_from_hooks(both: tuple[Attention, Attention]) -> None:
    """A hook that calls a sibling, and one that changes the output in place."""
    dense, model = both
    x = torch.randn(3, WIDTH)
    seen = []
    model.q_proj.register_forward_hook(lambda module, args, output: seen.append(model.v_proj(args[0])))
    model.k_proj.register_forward_hook(lambda module, args, output: output.zero_())
    y = model(x)
    assert same(seen[0], dense.v_proj(x))
    assert same(y[:, :64], dense.q_proj(x))
    assert not y[:, 64:96].any()
    assert same(y[:, 96:], dense.v_proj(x))


@pytest.mark.parametrize("x", [torch.randn(1, WIDTH), torch.randn(3, WIDTH)], ids=["one token", "three"])
def test_outputs_written_to_in_place_stay_apart(both: tuple[Attention, Attention], x: Tensor) -> None:
    """Siblings' outputs may be views of one result, but never of the same entries; the same member's are computed or copied."""
    dense, model = both
    q = model.q_proj(x)
    q.zero_()
    assert same(model.k_proj(x), dense.k_proj(x))
    assert same(model.q_proj(x), dense.q_proj(x))


def test_with_gradients_members_compute_alone(both: tuple[Attention, Attention], products: list[int]) -> None:
    dense, model = both
    x = torch.randn(3, WIDTH, requires_grad=True)
    got = torch.autograd.grad(model(x).pow(2).sum(), x)[0]
    torch.testing.assert_close(got, torch.autograd.grad(dense(x).pow(2).sum(), x)[0])
    assert products == list(COUNTS)
    products.clear()
    with torch.no_grad():
        assert same(model(x), dense(x))
    assert products == [sum(COUNTS)]


def test_gradients_after_a_result_without(both: tuple[Attention, Attention]) -> None:
    dense, model = both
    x = torch.randn(3, WIDTH, requires_grad=True)
    with torch.no_grad():
        model.q_proj(x)
    assert torch.autograd.grad(model.k_proj(x).sum(), x)[0].shape == x.shape
    with torch.inference_mode():
        z = torch.randn(3, WIDTH)
        assert same(model(z), dense(z))  # inference tensors do not say when they are written to
        z.mul_(3)
        assert same(model(z), dense(z))


def test_autocast(both: tuple[Attention, Attention]) -> None:
    dense, model = both
    x = torch.randn(3, WIDTH)
    with torch.no_grad():
        model.q_proj(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
            torch.testing.assert_close(y, dense(x))
        assert y.dtype == torch.bfloat16
        assert same(model(x), dense(x))


def test_from_several_threads(both: tuple[Attention, Attention]) -> None:
    dense, model = both
    wrong = []

    def run() -> None:
        for _ in range(50):
            x = torch.randn(3, WIDTH)
            if not same(model(x), dense(x)):
                wrong.append(x)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Compiled.


class Block(nn.Module):
    """Attention's input as the graph's, or computed in it; changed between the members or not; with or without the last of them."""

    def __init__(self, attention: Attention, *, computed: bool, changed: bool, partial: bool) -> None:
        super().__init__()
        self.attention, self.computed, self.changed, self.partial = attention, computed, changed, partial

    def forward(self, x: Tensor) -> Tensor:
        if self.computed:
            x = x * 2
        q, k = self.attention.q_proj(x), self.attention.k_proj(x)
        if self.changed:
            x.mul_(2)
        return torch.cat([q, k] if self.partial else [q, k, self.attention.v_proj(x)], dim=-1)


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiled_whole(
    both: tuple[Attention, Attention],
    computed: bool,
    changed: bool,
    partial: bool,
    mode: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense, model = both
    torch._dynamo.reset()
    plain, block = (Block(a, computed=computed, changed=changed, partial=partial) for a in (dense, model))
    calls = []
    from proxsparse_triton.inference import multiply

    real = multiply._compute
    monkeypatch.setattr(multiply, "_compute", lambda *arguments: calls.append(1) or real(*arguments))
    run = torch.compile(block, fullgraph=True, backend="aot_eager")
    with mode():
        x = torch.empty(3, WIDTH)
        for _ in range(3):  # one buffer, written to again and again
            x.normal_()
            expected = plain(x.clone())
            calls.clear()
            assert same(run(x), expected)
            assert len(calls) == (2 if changed and not partial else 1)


def test_compiled_after_eager_and_eager_after_compiled(both: tuple[Attention, Attention]) -> None:
    dense, model = both
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, WIDTH)
    with torch.no_grad():
        model.q_proj(x)
        x.mul_(2)
        assert same(run(x), dense(x))
        assert same(model(x), dense(x))
        torch.compile(model.q_proj, fullgraph=True, backend="aot_eager")(x)
        x.mul_(2)
        assert same(model.k_proj(x), dense.k_proj(x))


def test_compiled_with_gradients(both: tuple[Attention, Attention]) -> None:
    dense, model = both
    torch._dynamo.reset()
    x = torch.randn(3, WIDTH, requires_grad=True)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(run(x).pow(2).sum(), x)[0]
    torch.testing.assert_close(got, torch.autograd.grad(dense(x).pow(2).sum(), x)[0])


def test_compiled_across_a_graph_break(both: tuple[Attention, Attention]) -> None:
    dense, model = both
    torch._dynamo.reset()

    def broken(attention: Attention, x: Tensor) -> Tensor:
        x = x + 1
        q = attention.q_proj(x)
        torch._dynamo.graph_break()
        x.mul_(2)
        k = attention.k_proj(x)
        torch._dynamo.graph_break()
        return torch.cat([q, k, attention.v_proj(x)], dim=-1)

    run = torch.compile(broken, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(3, WIDTH)
            assert same(run(model, x), broken(dense, x))


# State.


def test_members_save_and_load_like_single_layers(both: tuple[Attention, Attention]) -> None:
    dense, model = both
    single = copy.deepcopy(dense)
    for name in NAMES:
        layer = getattr(dense, name)
        setattr(single, name, SparseLinear.from_dense(layer.weight, bias=layer.bias))
    state, expected = model.state_dict(), single.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)

    other = fused(Attention(dense.q_proj.bias is not None))
    packed = other.fused_q_proj.packed
    assert str(other.load_state_dict(expected)) == "<All keys matched successfully>"
    assert other.fused_q_proj.packed is packed
    x = torch.randn(2, WIDTH)
    assert same(other(x), dense(x))
    single.load_state_dict(state)

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other.to("meta")
    other.load_state_dict(torch.load(buffer, weights_only=True), assign=True)
    assert same(other(x), dense(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("k_proj.values"), "Missing key.*k_proj.values"),
        (lambda s: s.update({"k_proj.weight": torch.zeros(1)}), "Unexpected key.*k_proj.weight"),
        (lambda s: s.update({"k_proj.values": torch.zeros(64, 32)}), r"k_proj: expected values of shape \(32, 32\), got \(64, 32\)"),
        (lambda s: s.update({"k_proj.values": torch.zeros(32, 32).half()}), "k_proj: expected torch.float32 values, got torch.float16"),
        (lambda s: s.update({"k_proj.metadata": torch.zeros(32, 4)}), "k_proj: expected int16 metadata, got torch.float32"),
        (lambda s: s.update({"k_proj.bias": torch.zeros(3)}), r"k_proj: expected a bias of shape \(32,\), got \(3,\)"),
    ],
)
def test_state_that_does_not_fit_is_refused(change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    model = fused(Attention(True))
    before = model.k_proj.weight
    state = dict(model.state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    assert same(model.k_proj.weight, before)
    model.load_state_dict({}, strict=False)


def test_moving_copying_and_looking(both: tuple[Attention, Attention]) -> None:
    dense, model = both
    x = torch.randn(2, WIDTH)
    model.q_proj(x)  # a copy must not take this result for its own
    twin = copy.deepcopy(model)
    assert twin.q_proj.group is twin.fused_q_proj is not model.fused_q_proj
    twin.load_state_dict(fused(Attention(dense.q_proj.bias is not None)).state_dict())
    assert not torch.equal(twin.k_proj(x), dense.k_proj(x))
    assert same(model.k_proj(x), dense.k_proj(x))
    for name in NAMES:
        member, layer = getattr(model, name), getattr(dense, name)
        assert isinstance(member, GroupMember)
        assert torch.equal(member.weight, layer.weight)
        assert (member.bias is None) == (layer.bias is None)
        assert (member.in_features, member.out_features) == (layer.in_features, layer.out_features)
    assert "rows of fused_q_proj" in repr(model.q_proj)
    assert [name for name, _ in model.named_buffers()] == ["fused_q_proj.packed"]
    model.half()
    assert same(model.v_proj.weight, dense.v_proj.weight.half())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(x.half()), model(x.half()))


# On the card.


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 300])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.filterwarnings("ignore:SparseLinear")
def test_captured_in_a_graph(tokens: int, bias: bool) -> None:
    dense = Attention(bias, torch.bfloat16, "cuda")
    model = fused(dense)
    x = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model.q_proj(x)  # and the others not: this result must not get into the graph
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        for _ in range(2):
            x.normal_()
            graph.replay()
            torch.testing.assert_close(y, dense(x), rtol=0.02, atol=0.02)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:SparseLinear")
def test_on_two_streams(products: list[int]) -> None:
    dense = Attention(False, torch.bfloat16, "cuda")
    model = fused(dense)
    x = torch.randn(4, WIDTH, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        model.q_proj(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            model.k_proj(x)
    assert len(products) == 2


def test_the_table_of_siblings() -> None:
    names = [name for siblings in groups.SIBLINGS for name in siblings]
    assert len(names) == len(set(names))
