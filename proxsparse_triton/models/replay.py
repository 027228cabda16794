"""A forward pass of a model in which the first decoder blocks do not run but hand on what they handed on in an earlier pass.

That is the output of the last of them (hidden states, and what a model gives along with them, such as indices) and what all of them
wrote into arguments that blocks share, such as dictionaries of key-value states. Everything else is made by the model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .states import tensors_mapped

# Two runs of a block on the same inputs differ by this much at most, as sums may change their order on a GPU.
ROUNDING = {torch.float16: 2e-2, torch.bfloat16: 2e-2, torch.float32: 1e-3}
PLAIN = (Tensor, int, float, complex, str, type(None), torch.dtype, torch.device)

Forward = Callable[..., Any]
Call = Callable[[nn.Module, Forward, tuple[Any, ...], dict[str, Any]], Any]  # stands for forward(*args, **kwargs) of a block
State = tuple[Any, dict[Any, dict[Any, Any]]]  # output of a block; argument -> key -> value that was written into it so far


class _EndError(Exception):
    """Ends a forward pass once the last block that matters has run."""


class Pass:
    """What the blocks do: up to call `done` they hand on `state`, those after it run, and after call `last` the pass ends.

    ended: whether call `last` has run. kept: the state after call `keep`, once it has run; its tensors are copies.
    """

    def __init__(self, done: int, state: State | None, keep: int, last: int) -> None:
        self._done, self._keep, self._last = done, keep, last
        self._output: Any
        self._writes: dict[Any, dict[Any, Any]]
        self._output, self._writes = (None, {}) if state is None else state
        self._count = -1
        self.ended = False
        self.kept: State | None = None

    def call(self, block: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._count += 1
        if self._count <= self._done:
            if self._count == self._done:
                _write(_shared(args, kwargs), self._writes)
            return self._output
        self._output = None
        output = self.run(self._count, forward, args, kwargs)
        self.ended = self._count == self._last
        return output

    def run(self, index: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shared = _shared(args, kwargs)
        before = {key: _entries(value) for key, value in shared.items()}
        output = forward(*args, **kwargs)
        for key, value in shared.items():
            new = {at: entry for at, entry in _entries(value).items() if at not in before[key] or entry is not before[key][at]}
            if new:
                self._writes = {**self._writes, key: {**self._writes.get(key, {}), **new}}
        if index == self._keep:
            self.kept = self._state(output)
        return output

    def _state(self, output: Any) -> State:
        copy: State = tensors_mapped(torch.clone, (output, self._writes))
        return copy


class _Witness(Pass):
    """Remembers inputs and states of the blocks that run."""

    def __init__(self, last: int, done: int = -1, state: State | None = None) -> None:
        super().__init__(done, state, -1, last)
        self.inputs: dict[int, Any] = {}
        self.states: dict[int, State] = {}

    def run(self, index: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [_entries(value) if _is_shared(value) else value for value in (*args, *kwargs.values())]
        self.inputs[index] = tensors_mapped(torch.clone, given)
        output = super().run(index, forward, args, kwargs)
        self.states[index] = self._state(output)
        return output


def run(model: nn.Module, blocks: Sequence[nn.Module], window: Tensor, passing: Pass) -> None:
    """A forward pass on one window, as far as `passing` wants it. Hooks on the blocks and in them see what they see in any pass."""

    def end(*_: Any) -> None:
        if passing.ended:
            raise _EndError

    hooks = [block.register_forward_hook(end) for block in dict.fromkeys(blocks)]
    try:
        with _replaced(blocks, passing.call):
            model(input_ids=window[None], use_cache=False)
    except _EndError:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def calls_of(model: nn.Module, blocks: Sequence[nn.Module], window: Tensor) -> list[nn.Module]:
    """The blocks in the order in which a forward pass runs them."""
    calls: list[nn.Module] = []

    def call(block: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls.append(block)
        return forward(*args, **kwargs)

    with _replaced(blocks, call):
        model(input_ids=window[None], use_cache=False)
    return calls


def can_be_replayed(model: nn.Module, blocks: Sequence[nn.Module], window: Tensor) -> bool:
    """Whether blocks get and give the same in a pass of the whole model and in passes that begin with the state after a block.

    The passes of a walk are tried, each of which runs two blocks: one whose state is kept, and one for the hooks. They go from the last
    block to the first, and after a pass on other tokens: a model that keeps something elsewhere than in outputs and arguments of its
    blocks finds there what belongs to another window.
    """
    last = len(blocks) - 1
    whole = _Witness(last)
    run(model, blocks, window, whole)
    if not all(_is_plain(state) for state in whole.states.values()):
        return False
    run(model, blocks, _other(window), Pass(-1, None, -1, last))
    for index in range(last, 0, -1):
        done = index - 2
        again = _Witness(index, done, tensors_mapped(torch.clone, whole.states[done]) if done >= 0 else None)
        try:
            run(model, blocks, window, again)
        except Exception:  # of the model's, at what it did not expect; the pass of the whole model went through
            return False
        for ran in (index - 1, index):
            if not _same(again.inputs.get(ran), whole.inputs[ran], exact=True):
                return False
            if not _same(again.states.get(ran), whole.states[ran], exact=False):
                return False
    return True


def _other(window: Tensor) -> Tensor:
    """As many tokens, each another than that in its place, of any vocabulary."""
    pattern = torch.arange(len(window), device=window.device).remainder(2).to(window.dtype)
    return torch.where(window == pattern, 1 - pattern, pattern)


@contextmanager
def _replaced(blocks: Sequence[nn.Module], call: Call) -> Iterator[None]:
    own = {block: block.__dict__.get("forward") for block in blocks}  # some libraries put hooks there
    for block in own:
        block.__dict__["forward"] = partial(_called, call, block, block.forward)
    try:
        yield
    finally:
        for block, forward in own.items():
            if forward is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = forward


def _called(call: Call, block: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    return call(block, forward, args, kwargs)


def _is_shared(value: object) -> bool:
    """Whether an argument is one that a block can write into for the blocks after it."""
    return isinstance(value, (MutableMapping, list))


def _shared(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Any, Any]:
    return {key: value for key, value in (*enumerate(args), *kwargs.items()) if _is_shared(value)}


def _entries(container: Any) -> dict[Any, Any]:
    return dict(enumerate(container)) if isinstance(container, list) else dict(container)


def _write(shared: Mapping[Any, Any], writes: Mapping[Any, Mapping[Any, Any]]) -> None:
    for key, entries in writes.items():
        for at, value in entries.items():
            if isinstance(shared[key], list):
                shared[key][at : at + 1] = [value]  # at the end it is appended
            else:
                shared[key][at] = value


def _is_plain(tree: Any) -> bool:
    """Whether a tree holds nothing that could change behind its back: no cache, no object of the model's own."""
    return all(isinstance(leaf, PLAIN) for leaf in tree_flatten(tree)[0])


def _same(one: Any, other: Any, *, exact: bool) -> bool:
    """Whether two trees are equal; not `exact`: to the rounding of sums in another order. Objects of the model's own are equal by type."""
    (mine, spec), (theirs, other_spec) = tree_flatten(one), tree_flatten(other)
    return spec == other_spec and all(_same_leaf(a, b, exact) for a, b in zip(mine, theirs, strict=True))


def _same_leaf(a: Any, b: Any, exact: bool) -> bool:
    if not isinstance(a, Tensor):
        return type(a) is type(b) and (not isinstance(a, PLAIN) or a == b)
    if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if bool(((a == b) | (a.isnan() & b.isnan())).all()):
        return True
    if exact or not a.is_floating_point():
        return False
    distance, size = (torch.linalg.vector_norm(x.double()) for x in (a.double() - b.double(), b))
    return bool(distance <= ROUNDING.get(a.dtype, 1e-6) * size)
