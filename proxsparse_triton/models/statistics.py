"""What the inputs of a Linear look like over the calibration text, gathered by forward hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .modes import evaluating


class Statistic(ABC):
    """Accumulates over batches of inputs x [tokens, in_features]. calls: how often; tokens: how many rows there were."""

    def __init__(self) -> None:
        self.calls = self.tokens = 0

    def add(self, x: Tensor) -> None:
        self.calls += 1
        self.tokens += x.shape[0]
        self._accumulate(x.float())

    @abstractmethod
    def value(self) -> Tensor: ...

    @abstractmethod
    def squares(self) -> Tensor:
        """Sum over tokens of x_j^2; fp32 [in_features]."""

    @abstractmethod
    def _accumulate(self, x: Tensor) -> None: ...


class InputNorm(Statistic):
    """||x_j||_2 of each input feature j over all tokens, the statistic of Wanda; fp32 [in_features]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._squares = torch.zeros(linear.in_features, dtype=torch.float32, device=linear.weight.device)

    def _accumulate(self, x: Tensor) -> None:
        self._squares += x.square().sum(dim=0)

    def squares(self) -> Tensor:
        return self._squares

    def value(self) -> Tensor:
        return self._squares.sqrt()

    def mean_square(self) -> Tensor:
        return self._squares / max(self.tokens, 1)


class Hessian(Statistic):
    """H = 2/n sum x x^T, the Hessian of the layer's squared output error; fp32 [in_features, in_features]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        size = linear.in_features
        self._sum = torch.zeros(size, size, dtype=torch.float32, device=linear.weight.device)

    def _accumulate(self, x: Tensor) -> None:
        self._sum.addmm_(x.T, x)

    def squares(self) -> Tensor:
        return self._sum.diagonal()

    def value(self) -> Tensor:
        return self._sum * (2.0 / max(self.tokens, 1))


def input_norms(model: nn.Module, linears: Mapping[str, nn.Linear], windows: Sequence[Tensor]) -> dict[str, InputNorm]:
    """Statistics of each layer's inputs over all tokens of the windows, from passes of the whole model as it is.

    Every use of a weight counts: the tokens of all layers of `model` that share it.

    Args: linears: any name -> layer of `model`. windows: int64 [tokens], on any device.
    """
    norms = {name: InputNorm(linear) for name, linear in linears.items()}
    device = next(model.parameters()).device
    base = getattr(model, "base_model", model)
    inside = {id(parameter) for parameter in base.parameters()}
    # The logits of a large vocabulary only where they are asked for.
    runs = base if all(id(linear.weight) in inside for linear in linears.values()) else model
    with evaluating(model), torch.no_grad(), observe(linears, norms, within=model):
        for window in windows:
            runs(input_ids=window[None].to(device), use_cache=False)
    return norms


@contextmanager
def observe(linears: Mapping[str, nn.Linear], statistics: Mapping[str, Statistic], *, within: nn.Module | None = None) -> Iterator[None]:
    """While active, every forward pass of `linears[name]` adds its inputs to `statistics[name]`.

    within: so does every forward pass of another nn.Linear below this module that has the same weight.
    """

    def hook(statistic: Statistic):  # type: ignore[no-untyped-def]
        def add(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            statistic.add(x.detach().reshape(-1, x.shape[-1]))

        return add

    users: dict[int, dict[nn.Module, None]] = {id(linear.weight): {linear: None} for linear in linears.values()}
    for module in () if within is None else within.modules():
        if isinstance(module, nn.Linear) and id(module.weight) in users:
            users[id(module.weight)][module] = None
    handles = [
        module.register_forward_pre_hook(hook(statistics[name]), with_kwargs=True)
        for name, linear in linears.items()
        for module in users[id(linear.weight)]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
