"""Where the states of windows are kept between two blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import whole_passes
from torch import Tensor
from torch.utils._pytree import tree_map

from proxsparse_triton.models import layerwise, states
from proxsparse_triton.models.layerwise import BlockWalker
from proxsparse_triton.models.selection import decoder_blocks
from proxsparse_triton.models.states import StreamCopies, WindowStates


def each(function: Any, tree: Any) -> Any:
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


class Host:
    """Host memory as a fake: what is copied is NaN until one waits, and a state that is on its way is counted."""

    def __init__(self) -> None:
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.asked = self.most = 0
        self.reused = 0

    def out(self, tree: Any, buffers: Any) -> Any:
        self.reused += buffers is not None
        return each(torch.clone, tree)

    def into(self, tree: Any) -> Any:
        self.asked += 1

        def begin(host: Tensor) -> Tensor:
            device = torch.full_like(host, float("nan") if host.is_floating_point() else -1)
            self.pending.append((device, host))
            return device

        return each(begin, tree)

    def wait(self) -> None:
        for device, host in self.pending:
            device.copy_(host)
        self.pending.clear()


def test_what_is_taken_is_a_copy() -> None:
    kept = WindowStates([3, 3], torch.device("cpu"))
    assert not kept.on_host
    assert kept.take(0) is None
    kept.put(0, (torch.ones(3), {"keys": [torch.zeros(2)], "none": None, "count": 7}))
    hidden, rest = kept.take(0)
    hidden.zero_()
    rest["keys"][0].fill_(5)
    rest["more"] = 1
    hidden, rest = kept.take(0)
    assert hidden.tolist() == [1, 1, 1]
    assert rest["keys"][0].tolist() == [0, 0]
    assert rest.keys() == {"keys", "none", "count"}
    assert kept.take(1) is None


def test_the_next_window_is_on_its_way() -> None:
    host = Host()
    kept = WindowStates([3, 3, 3], torch.device("cpu"), copies=host)
    assert kept.on_host
    for position in range(3):
        kept.put(position, (torch.full((3,), float(position)), None))
    for position in range(3):
        hidden, nothing = kept.take(position)
        assert hidden.tolist() == [position] * 3
        assert nothing is None
        kept.fetch(position + 1)
        assert host.asked == min(position + 2, 3)
        assert len(host.pending) == (position < 2)
        kept.put(position, (hidden + 10, None))
    assert kept.take(1)[0].tolist() == [11] * 3
    assert host.reused == 3


@pytest.mark.parametrize("family", ["llama", "gemma3n, shared keys", "glm_moe_dsa"])
def test_a_walk_with_states_in_host_memory(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same inputs of every layer, to the bit."""
    model, texts = whole_passes.build(family), whole_passes.windows(12, 9, 12)
    _, blocks = decoder_blocks(model)
    found = []
    for host in (None, Host()):
        monkeypatch.setattr(layerwise, "WindowStates", lambda *args, host=host: WindowStates(*args, copies=host))
        walker, seen = BlockWalker(model, blocks, texts), []
        for index, block in walker:
            handle = block.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].clone()) if args else None)
            walker.forward(index)
            handle.remove()
        found.append(seen)
    assert host is not None
    assert host.asked == 2 * 3  # the third block and the fourth begin with a state, on three windows each
    assert not host.pending
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_free_memory_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is free may hold states, as foretold from the first window's."""
    monkeypatch.setattr(states, "StreamCopies", lambda device: Host())
    asked = []

    def free(device: torch.device, memory: int | None) -> float:
        asked.append(memory)
        return 1000.0

    monkeypatch.setattr(states, "_free", free)
    for tokens, on_host in (([10, 40], False), ([10, 41], True)):  # 10 bytes a token
        kept = WindowStates(tokens, torch.device("cuda"), 77)
        kept.put(0, (torch.zeros(100, dtype=torch.uint8), None))
        assert kept.on_host == on_host
        kept.put(1, (torch.zeros(100, dtype=torch.uint8), None))
    assert asked == [77, 77]


def test_free_memory_is_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    assert states._free(torch.device("cuda"), None) == 120
    assert states._free(torch.device("cuda"), 75) == 45


@pytest.mark.gpu
def test_copies_on_a_stream_of_their_own() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    copies = StreamCopies(device)
    kept = WindowStates([1000] * 8, device, copies=copies)
    trees = [(torch.full((1000, 257), float(i), device=device).T, {"ids": torch.arange(i, i + 5, device=device)}) for i in range(8)]
    for position, tree in enumerate(trees):
        kept.put(position, each(torch.clone, tree))
    for step in range(3):
        for position in range(8):
            hidden, rest = kept.take(position)
            kept.fetch(position + 1)
            assert hidden.device == device
            assert hidden.stride() == trees[position][0].stride()
            kept.put(position, (hidden + 1, {"ids": rest["ids"]}))
            busy = hidden @ hidden.T  # keeps the device behind the host
            assert busy.shape == (257, 257)
        for position in range(8):
            hidden, rest = kept.take(position)
            assert bool((hidden == position + step + 1).all())
            assert rest["ids"].tolist() == list(range(position, position + 5))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3n, shared keys"])
def test_a_walk_from_host_memory_on_the_card(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = whole_passes.build(family, "cuda"), whole_passes.windows(12, 9, 12)
    _, blocks = decoder_blocks(model)
    found = []
    for share in (0.5, 0.0):
        monkeypatch.setattr(states, "SHARE", share)
        walker, seen = BlockWalker(model, blocks, texts), []
        for index, block in walker:
            handle = block.register_forward_hook(
                lambda module, args, out, seen=seen: seen.append((out[0] if isinstance(out, tuple) else out).clone())
            )
            walker.forward(index)
            handle.remove()
        assert walker._states.on_host == (share == 0)
        found.append(seen)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
