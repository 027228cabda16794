"""Whether a tensor still holds what it held earlier in the same torch.compile trace.

A graph cannot ask a tensor for its version. The tracer can: it runs the model on fake tensors, whose versions move with the real ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.comptime import ComptimeContext, comptime

_NOTES = "_proxsparse_notes"
_ANSWER = {"unchanged": False}  # from one callback of the tracer to the next


def note(x: torch.Tensor, slot: str) -> None:
    """Remember x's version under `slot`, for the rest of the trace."""
    comptime(_note)


def unchanged(x: torch.Tensor, slot: str) -> bool:
    """Whether x was noted under `slot` in this trace, and not written to since. A constant of the graph."""
    comptime(_look)
    answer: bool = _answer()
    return answer


def _note(context: ComptimeContext) -> None:
    x, slot = _arguments(context)
    x.__dict__.setdefault(_NOTES, {})[slot] = x._version


def _look(context: ComptimeContext) -> None:
    x, slot = _arguments(context)
    _ANSWER["unchanged"] = x.__dict__.get(_NOTES, {}).get(slot) == x._version


def _arguments(context: ComptimeContext) -> tuple[Any, Any]:
    """The fake tensor x, and slot, of the function that called `comptime`."""
    return context.get_local("x").as_fake(), context.get_local("slot").as_python_constant()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _answer() -> bool:
    return _ANSWER["unchanged"]
