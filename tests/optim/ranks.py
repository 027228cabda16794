"""What two ranks run for test_distributed.py: `python ranks.py RANK FOLDER` writes FOLDER/RANK.json, scenario -> traceback or nothing."""

from __future__ import annotations

import copy
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from proxsparse_triton import (
    ProxAdamW,
    accumulate_frozen_penalty,
    apply_masks,
    attach_prox,
    frozen_penalty,
    mask_24,
    masked_weight_24,
    pack_24,
    prox_24,
)
from proxsparse_triton.errors import ConfigError, LearningError, ShapeError

WORLD = 2
COLUMNS = 128  # one group of 8-bit moments a row


class Model(nn.Module):
    """Uneven shards (5 rows on two ranks), an empty one (1 row), and plain parameters of both kinds."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.uneven = nn.Linear(COLUMNS, 5, dtype=dtype)
        self.single = nn.Linear(COLUMNS, 1, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.uneven(x).square().sum() + self.single(x).square().sum()


def build(model: nn.Module, **options: object) -> ProxAdamW:
    named = list(model.named_parameters())
    weights = [pair for pair in named if pair[0].endswith("weight")]
    rest = [pair for pair in named if not pair[0].endswith("weight")]
    groups = [{"params": weights, "column_scale": torch.linspace(0.5, 2, COLUMNS)}, {"params": rest, "prox": False}]
    return ProxAdamW(groups, lr=0.01, lambda1=5.0, lambda2=0.05, weight_decay=0.1, seed=3, **options)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype, steps: int = 4) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(3, COLUMNS, generator=generator).to(dtype)
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x.detach()


def compare(dtype: torch.dtype, exact: bool, **options: object) -> None:
    """The same batch on every rank: averaged gradients are those of one process, and so must be everything else."""
    single, sharded = Model(dtype), Model(dtype)
    fully_shard(sharded)
    mine, theirs = build(sharded, **options), build(single, **options)
    run(sharded, mine, dtype)
    run(single, theirs, dtype)
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-7}
    for (name, p), q in zip(sharded.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q.detach(), **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        state, expected = mine.state[p], theirs.state[q]
        assert set(state) == set(expected)
        for key in expected:
            if key == "step":
                assert float(state[key]) == float(expected[key]) == 4
            else:
                torch.testing.assert_close(whole(state[key]).flatten(), expected[key].flatten(), **tolerance)
    one, other = mine.figures(), theirs.figures()
    torch.testing.assert_close(one.norm, other.norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(one.penalty, other.penalty, rtol=1e-5, atol=0)
    assert one.share_24 == other.share_24 > 0
    assert {name: share.item() for name, share in one.shares.items()} == {name: share.item() for name, share in other.shares.items()}


def equal() -> None:
    compare(torch.float32, True)
    compare(torch.bfloat16, True, weight_bits=16, moments="int8")
    compare(torch.bfloat16, True, weight_bits=24, moments="bfloat16")


def clipped() -> None:
    compare(torch.float32, False, max_norm=0.5)
    compare(torch.float32, False, max_norm=0.5, clip="loss")


def broken_gradient() -> None:
    """Only rank 1 holds row 4, both ranks learn of it, and nothing moves anywhere."""
    for options in ({}, {"max_norm": 1.0}):
        model = Model(torch.float32)
        fully_shard(model)
        optimizer = build(model, **options)
        run(model, optimizer, torch.float32, 1)
        p = model.uneven.weight
        before = [whole(q).clone() for q in model.parameters()]
        if rank == 1:
            p.grad.to_local()[-1, -1] = torch.nan
        optimizer.step()
        with pytest.raises(LearningError, match=r"inf or nan in uneven\.weight;"):
            optimizer.check()
        assert torch.equal(whole(p)[4, -4:], before[0][4, -4:])
        if options:
            assert all(torch.equal(whole(q), b) for q, b in zip(model.parameters(), before, strict=True))


def columns() -> None:
    """Shards of whole blocks of columns are fine, others are refused by name; fp32 draws no random bits."""
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    w, grad = torch.randn(3, 16), torch.randn(3, 16)
    single = nn.Parameter(w.clone())
    sharded = nn.Parameter(distribute_tensor(w, mesh, [Shard(1)]))
    scale = torch.linspace(0.5, 2, 16)
    for p, g in ((single, grad), (sharded, distribute_tensor(grad, mesh, [Shard(1)]))):
        p.grad = g
        ProxAdamW([{"params": [p], "column_scale": scale}], lr=0.01, lambda1=0.5).step()
    assert torch.equal(whole(sharded), single.detach())
    narrow = nn.Parameter(distribute_tensor(torch.randn(3, 12), mesh, [Shard(1)]))
    for make in (lambda: ProxAdamW([("narrow", narrow)]), lambda: attach_prox(torch.optim.SGD([narrow]), [("narrow", narrow)], 0.1)):
        with pytest.raises(
            ShapeError, match=r"expected columns per rank divisible by 4 in narrow, got 6 of 12 on 2 ranks\. Shard it by rows"
        ):
            make()
    with pytest.raises(ShapeError, match="expected rows of a multiple of 128 weights"):
        ProxAdamW([("short", nn.Parameter(distribute_tensor(torch.randn(3, 64), mesh, [Shard(0)])))], moments="int8")


def state_dict() -> None:
    """Through torch's distributed checkpoint: the whole state is that of one process; and a rank's own, bit for bit."""
    single, sharded = Model(torch.bfloat16), Model(torch.bfloat16)
    fully_shard(sharded)
    options = {"weight_bits": 24, "moments": "int8"}
    mine, theirs = build(sharded, **options), build(single, **options)
    run(sharded, mine, torch.bfloat16)
    run(single, theirs, torch.bfloat16)
    full = get_optimizer_state_dict(sharded, mine, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        for name, q in single.named_parameters():
            for key, value in theirs.state[q].items():
                saved = full["state"][name][key]
                assert saved == value if key == "step" else torch.equal(saved.flatten(), value.flatten()), (name, key)
    again = Model(torch.bfloat16)
    fully_shard(again)
    for p, q in zip(again.parameters(), sharded.parameters(), strict=True):
        p.detach().copy_(q.detach())
    resumed = build(again, **options)
    resumed.load_state_dict(mine.state_dict())
    run(sharded, mine, torch.bfloat16, 2)
    run(again, resumed, torch.bfloat16, 2)
    assert all(torch.equal(whole(p), whole(q)) for p, q in zip(sharded.parameters(), again.parameters(), strict=True))


def attached() -> None:
    """attach_prox before sharding: the optimizer's parameters are replaced, and it follows them."""
    single, sharded = Model(torch.float32), Model(torch.float32)
    shares = []
    for model in (single, sharded):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        handle = attach_prox(optimizer, [model.uneven.weight, model.single.weight], 5.0, lambda2=0.05)
        if model is sharded:
            fully_shard(model)
            optimizer.param_groups[0]["params"] = list(model.parameters())
        run(model, optimizer, torch.float32)
        shares.append(handle.share_24())
    for p, q in zip(sharded.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q.detach(), rtol=1e-6, atol=1e-7)
    assert shares[0] == shares[1] > 0


def refusals() -> None:
    model = Model(torch.float32)
    fully_shard(model)
    optimizer = build(model)
    weight = model.uneven.weight
    for make, text in (
        (optimizer.release_gradients, "expected parameters that are not sharded, got uneven.weight"),
        (lambda: optimizer.share_pretrained({weight: torch.zeros(weight.shape)}), "sharded like it"),
    ):
        with pytest.raises(ConfigError, match=text):
            make()


def operations() -> None:
    """On each rank's part, and the same as on the whole; what cannot be is refused on both ranks."""
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    w, w0, scale = torch.randn(5, 16), torch.randn(5, 16), torch.linspace(0.5, 2, 16)
    grad = torch.zeros_like(w)
    value = accumulate_frozen_penalty(w, w0, 0.3, 0.1, grad)
    for placements in ([Shard(0)], [Shard(1)], [Replicate()]):
        one, other = (distribute_tensor(x, mesh, placements) for x in (w, w0))
        assert torch.equal(whole(mask_24(one.abs())), mask_24(w.abs()))
        assert torch.equal(whole(prox_24(one, 0.3, column_scale=scale)), prox_24(w, 0.3, column_scale=scale))
        assert torch.equal(whole(masked_weight_24(one, other, column_scale=scale)), masked_weight_24(w, w0, column_scale=scale))
        inside = one.clone()
        assert prox_24(inside, 0.3, out=inside) is inside
        assert torch.equal(whole(inside), prox_24(w, 0.3))
        sums = torch.zeros_like(one)
        torch.testing.assert_close(accumulate_frozen_penalty(one, other, 0.3, 0.1, sums), value)
        assert torch.equal(whole(sums), grad)
        p = nn.Parameter(one)
        penalty = frozen_penalty(p, other, 0.3, 0.1)
        (2 * penalty).backward()
        torch.testing.assert_close(penalty.detach(), value)
        torch.testing.assert_close(whole(p.grad), 2 * grad)
    sharded, narrow = distribute_tensor(w, mesh, [Shard(0)]), distribute_tensor(torch.randn(3, 12), mesh, [Shard(1)])
    partial = DTensor.from_local(w, mesh, [Partial()])
    for make, error, text in (
        (lambda: prox_24(sharded, 0.3, out=w), ConfigError, "prox_24: expected out as a DTensor with the placements"),
        (lambda: prox_24(w, 0.3, out=sharded), ConfigError, "prox_24: expected out not sharded"),
        (lambda: masked_weight_24(sharded, w0), ConfigError, "masked_weight_24: expected w0 as a DTensor"),
        (lambda: frozen_penalty(sharded, w0, 0.1, 0.1), ConfigError, "frozen_penalty: expected w0 as a DTensor"),
        (lambda: mask_24(partial), ConfigError, "mask_24: expected scores sharded or replicated, got partial sums"),
        (lambda: mask_24(narrow), ShapeError, "mask_24: expected columns per rank divisible by 4 in scores, got 6 of 12"),
        (lambda: pack_24(sharded), TypeError, "pack_24: expected a plain tensor, got a DTensor"),
    ):
        with pytest.raises(error) as caught:
            make()
        assert text in str(caught.value)


def masks() -> None:
    """apply_masks on a sharded model, with masks that are whole or sharded themselves."""
    single = Model(torch.float32)
    found = {f"{name}.weight": mask_24(getattr(single, name).weight.detach().abs()) for name in ("uneven", "single")}
    apply_masks(single, found)
    for sharded_masks in (False, True):
        sharded = Model(torch.float32)
        fully_shard(sharded)
        mine = {name: mask_24(sharded.get_parameter(name).detach().abs()) for name in found} if sharded_masks else found
        apply_masks(sharded, mine)
        assert all(torch.equal(whole(p), q) for p, q in zip(sharded.parameters(), single.parameters(), strict=True))


def partial_gradients() -> None:
    """A backward pass may leave sums of the ranks to whoever reads the gradient: they are read as what they mean."""
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    w, part = torch.randn(3, 16), torch.randn(3, 16)
    for make in (lambda p: ProxAdamW([p], lr=0.1, lambda1=0.1, lambda2=0.3), attached_sgd):
        single, sharded = nn.Parameter(w.clone()), nn.Parameter(distribute_tensor(w, mesh, [Replicate()]))
        one, other = make(single), make(sharded)
        for _ in range(2):
            single.grad = WORLD * part
            sharded.grad = DTensor.from_local(part, mesh, [Partial()])
            one.step()
            other.step()
        torch.testing.assert_close(whole(sharded), single.detach())


def attached_sgd(p: nn.Parameter) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([p], lr=0.1)
    attach_prox(optimizer, [p], 0.1, lambda2=0.3)
    return optimizer


def initialised() -> None:
    """torch makes the state of a fresh optimizer by a step with lr 0: no weight moves, and a resumed run goes on as if never stopped."""
    for kind in ("ProxAdamW", "attach_prox"):
        for full in (False, True):
            options = StateDictOptions(full_state_dict=full)
            model, fresh = Model(torch.float32), Model(torch.float32)
            fresh.uneven.weight.data.add_(1)
            optimizers = [sharded_optimizer(kind, m) for m in (model, fresh)]
            run(model, optimizers[0], torch.float32, 2)
            weights = get_model_state_dict(model, options=options)
            state = get_optimizer_state_dict(model, optimizers[0], options=options)
            weights, state = copy.deepcopy((weights, state))
            set_model_state_dict(fresh, weights, options=options)
            before = [whole(p).clone() for p in fresh.parameters()]
            set_optimizer_state_dict(fresh, optimizers[1], state, options=options)
            assert all(torch.equal(whole(p), q) for p, q in zip(fresh.parameters(), before, strict=True))
            for m, optimizer in zip((model, fresh), optimizers, strict=True):
                run(m, optimizer, torch.float32, 2)
            assert all(torch.equal(whole(p), whole(q)) for p, q in zip(model.parameters(), fresh.parameters(), strict=True))


def sharded_optimizer(kind: str, model: Model) -> torch.optim.Optimizer:
    fully_shard(model)
    if kind == "ProxAdamW":
        return build(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    attach_prox(optimizer, [model.uneven.weight, model.single.weight], 5.0, lambda2=0.05)
    return optimizer


SCENARIOS = (
    equal,
    clipped,
    broken_gradient,
    columns,
    state_dict,
    attached,
    refusals,
    operations,
    masks,
    partial_gradients,
    initialised,
)

if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    # A rank that waits for one that has failed gives up.
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=20)
    )
    results = {}
    for scenario in SCENARIOS:
        try:
            scenario()
            results[scenario.__name__] = ""
        except Exception:
            results[scenario.__name__] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    torch.distributed.destroy_process_group()
