"""The one protocol of pruning methods.

A method is one file in this folder with a frozen dataclass of its settings, a `prune` function on it, and `METHOD = ThatClass` at the end.
The file's name is the method's name on the command line; nothing else has to be registered.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from ..errors import ConfigError
from ..models.selection import LayerPlan
from ..progress import SILENT, Progress


@dataclass(frozen=True)
class PruneTask:
    """What a method is given. The model is the method's to change: the caller drops it afterwards."""

    model: nn.Module  # on its device, in the learning dtype
    plan: LayerPlan
    windows: tuple[Tensor, ...]  # calibration token windows, int64 [tokens], on the CPU
    seed: int = 42
    memory: int | None = None  # bytes to keep within; None: all of the GPU, no limit on the CPU
    progress: Progress = SILENT
    record: Callable[[Mapping[str, object]], None] = field(default=lambda row: None)  # one row of metrics.jsonl

    def linears(self) -> dict[str, nn.Linear]:
        """Parameter name -> the selected Linear, in model order."""
        modules = dict(self.model.named_modules())
        return {f"{name}.weight": modules[name] for name in self.plan.selected()}

    def linears_of(self, block: int) -> dict[str, nn.Linear]:
        """The selected Linears of one decoder block."""
        prefix = f"{self.plan.blocks}.{block}."
        return {name: linear for name, linear in self.linears().items() if name.startswith(prefix)}

    def unseen(self, name: str, reason: str, otherwise: str) -> None:
        """Notes why a layer's inputs say nothing about its weights (an expert that was never chosen), and what becomes of it."""
        self.progress.note(f"{name}: {reason}. {otherwise}")


@dataclass(frozen=True)
class PruneResult:
    """Masks by parameter name, bool, CPU; updated weights where the method changes them, else the original ones are kept."""

    masks: dict[str, Tensor]
    weights: dict[str, Tensor] | None = None
    summary: Mapping[str, object] = field(default_factory=dict)  # figures for the manifest: derived settings, final shares


def check_inside_blocks(plan: LayerPlan, function: str, instead: str) -> None:
    """ConfigError if a selected layer lies outside the decoder blocks, where what goes block by block never comes.

    Args: function: who asks. instead: what would do it.
    """
    outside = [choice.name for choice in plan.choices if choice.selected and choice.block is None]
    if outside:
        raise ConfigError(
            f"{function}: expected layers inside the decoder blocks {plan.blocks}, got {outside[0]}. "
            f"Leave it out with --skip, or use {instead}."
        )


class Method(Protocol):
    """A frozen dataclass whose fields are the method's settings."""

    needs_calibration: ClassVar[bool]
    # Lambda, lr and the like come from the user: the constructor raises ConfigError for values that make no sense.

    def check(self, plan: LayerPlan) -> None:
        """ConfigError for layers that the method cannot prune; before any work, and once more by `prune`."""

    def prune(self, task: PruneTask) -> PruneResult: ...


_NOT_METHODS = {"base", "presets", "recipes", "repair", "walk"}


def method_names() -> list[str]:
    """Names of all methods, from the files of this folder."""
    package = importlib.import_module(__package__)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name not in _NOT_METHODS)


def method_class(name: str) -> Any:
    """The settings dataclass of a method. ConfigError for an unknown name."""
    if name not in method_names():
        raise ConfigError(f"method: expected one of {', '.join(method_names())}, got {name!r}. Choose one of these.")
    return importlib.import_module(f".{name}", __package__).METHOD


def _whose(given: Sequence[str], known: set[str]) -> str:
    """What to do about settings that a method does not have."""
    unknown = next(key for key in given if key not in known)
    owners = [name for name in method_names() if unknown in {entry.name for entry in dataclasses.fields(method_class(name))}]
    return f"Leave it out, or use --method {' or '.join(owners)}." if owners else "Leave it out."


def build_method(name: str, settings: Mapping[str, object]) -> Method:
    """The method with these settings; settings that are None take the method's default.

    Raises: ConfigError: unknown method, or a setting the method does not have.
    """
    kind = method_class(name)
    known = {entry.name for entry in dataclasses.fields(kind)}
    given = {key: value for key, value in settings.items() if value is not None}
    unknown = [f"--{key.replace('_', '-')}" for key in given if key not in known]
    if unknown:
        raise ConfigError(f"method {name}: expected only its own settings, got {', '.join(unknown)}. {_whose(list(given), known)}")
    method: Method = kind(**given)
    return method
