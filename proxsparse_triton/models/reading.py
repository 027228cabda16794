"""What a forward pass finds where it reads a parameter, through whichever module, and whether anything reads it at all.

A layer's `forward` is not the only reader of its weight: state-space mixers multiply by `dt_proj.weight`, fused kernels are handed
weights, and several modules may hold one parameter. So the substitution stands where all of them look: at the module's attribute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .modes import evaluating

Reader = Callable[[nn.Parameter], Tensor]
PROBE = 64  # tokens of the first pass that looks for readers


@contextmanager
def read_as(model: nn.Module, readers: Mapping[nn.Parameter, Reader]) -> Iterator[None]:
    """Inside, a forward pass that reads one of these parameters, through any module of `model` that holds it, gets what its reader
    returns. Outside of forward passes (optimisers, `named_parameters`, state dicts, a user's `layer.weight`) it stays the parameter.

    A forward pass is a call of `model` or of any module in it; what autograd runs again in a backward pass (activation checkpointing)
    counts as one.
    """
    running: list[nn.Module] = []  # modules whose forward pass has begun, the innermost last
    classes: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = []
    handles: list[Any] = []
    try:
        for module in _with_ancestors(model, readers):
            handles.append(module.register_forward_pre_hook(partial(_enter, running), prepend=True))
            handles.append(module.register_forward_hook(partial(_leave, running), always_call=True))
        for module, names in _holders(model, readers).items():
            kind = type(module)
            properties = {name: _attribute(name, reader, running) for name, reader in names.items()}
            swapped = type(kind.__name__, (kind,), {**properties, "__module__": kind.__module__, "__doc__": kind.__doc__})
            classes.append((module, kind, swapped))
            module.__class__ = swapped
        yield
    finally:
        for module, kind, swapped in classes:
            module.__class__ = kind
            for name in _attributes(swapped):  # a class outlives its last object until garbage is collected: it must not hold readers
                delattr(swapped, name)
        for handle in handles:
            handle.remove()


def unread(model: nn.Module, parameters: Mapping[str, nn.Parameter], windows: Sequence[Tensor]) -> list[str]:
    """Names of the parameters that no forward pass over the windows reads, in eval mode, nor over the first one in train mode.

    Stops as soon as all were read, which for most models is after the first tokens: so those come first, in a pass of their own. Every
    look counts as a read, one for the dtype too. Buffers are left as they were (running means move in train mode).

    Args: parameters: any name -> parameter of `model`. windows: int64 [tokens], on any device.
    """
    left = dict(parameters)
    device = next(model.parameters()).device
    buffers: list[tuple[Tensor, Tensor]] = []

    def reader(name: str, parameter: nn.Parameter) -> Tensor:
        left.pop(name, None)
        return parameter

    with torch.no_grad(), read_as(model, {p: partial(reader, name) for name, p in parameters.items()}):
        passes = [(window[:PROBE], True) for window in windows[:1]] + [(windows[0], False)] * bool(windows) + [(w, True) for w in windows]
        for window, evaluates in passes:
            if not left:
                break
            if not evaluates:
                buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
            with evaluating(model, evaluates):
                model(input_ids=window[None].to(device), use_cache=False)
        for buffer, before in buffers:
            buffer.copy_(before)
    return list(left)


def _holders(model: nn.Module, readers: Mapping[nn.Parameter, Reader]) -> dict[nn.Module, dict[str, Reader]]:
    """Module -> attribute -> reader."""
    found: dict[nn.Module, dict[str, Reader]] = {}
    for module in model.modules():
        held = {name: readers[p] for name, p in module._parameters.items() if p is not None and p in readers}
        if held:
            found[module] = held
    return found


def _with_ancestors(model: nn.Module, readers: Mapping[nn.Parameter, Reader]) -> list[nn.Module]:
    """Every module that holds one of the parameters, itself or below: where a forward pass may begin that reads it."""
    return [module for module in model.modules() if any(p in readers for p in module.parameters())]


def _enter(running: list[nn.Module], module: nn.Module, args: Any) -> None:
    running.append(module)


def _leave(running: list[nn.Module], module: nn.Module, args: Any, out: Any) -> None:
    if running and running[-1] is module:  # else an earlier hook failed, and the forward pass never began
        running.pop()


def _attributes(kind: type[nn.Module]) -> list[str]:
    return [name for name, value in vars(kind).items() if isinstance(value, property)]


def _attribute(name: str, reader: Reader, running: list[nn.Module]) -> property:
    def read(module: nn.Module) -> Tensor:
        parameter = module._parameters[name]
        if not running and torch._C._current_graph_task_id() == -1:
            return parameter  # type: ignore[return-value]
        try:
            return reader(parameter)  # type: ignore[arg-type]
        except AttributeError as error:  # nn.Module would answer it with the parameter
            raise RuntimeError(f"{type(module).__name__}.{name} could not be read: {error}") from error

    return property(read)
