"""What the inputs of a Linear look like over the calibration text, gathered by forward hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn


class Statistic(Protocol):
    """Accumulates over batches of inputs x [tokens, in_features]."""

    def add(self, x: Tensor) -> None: ...


class InputNorm:
    """||x_j||_2 of each input feature j over all tokens, the statistic of Wanda; fp32 [in_features]."""

    def __init__(self, linear: nn.Linear) -> None:
        self._squares = torch.zeros(linear.in_features, dtype=torch.float32, device=linear.weight.device)
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        self._squares += x.float().square().sum(dim=0)
        self._tokens += x.shape[0]

    def value(self) -> Tensor:
        return self._squares.sqrt()

    def mean_square(self) -> Tensor:
        return self._squares / max(self._tokens, 1)


class Hessian:
    """H = 2/n sum x x^T, the Hessian of the layer's squared output error; fp32 [in_features, in_features]."""

    def __init__(self, linear: nn.Linear) -> None:
        size = linear.in_features
        self._sum = torch.zeros(size, size, dtype=torch.float32, device=linear.weight.device)
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        x = x.float()
        self._sum.addmm_(x.T, x)
        self._tokens += x.shape[0]

    def value(self) -> Tensor:
        return self._sum * (2.0 / max(self._tokens, 1))


def input_rms(model: nn.Module, linears: Mapping[str, nn.Linear], windows: Sequence[Tensor]) -> dict[str, Tensor]:
    """sqrt(mean of x_j^2) of each input feature j over all tokens: fp32 [in_features]; zeros for a layer that no token reached.

    Args: linears: any name -> layer of `model`. windows: int64 [tokens], on any device.
    """
    norms = {name: InputNorm(linear) for name, linear in linears.items()}
    device, training = next(model.parameters()).device, model.training
    head = getattr(model, "get_output_embeddings", lambda: None)()
    with_head = any(linear is head for linear in linears.values())
    runs = model if with_head else getattr(model, "base_model", model)  # the logits of a large vocabulary only where they are asked for
    model.eval()
    try:
        with torch.no_grad(), observe(linears, norms):
            for window in windows:
                runs(input_ids=window[None].to(device), use_cache=False)
    finally:
        model.train(training)
    return {name: norm.mean_square().sqrt() for name, norm in norms.items()}


@contextmanager
def observe(linears: Mapping[str, nn.Linear], statistics: Mapping[str, Statistic]) -> Iterator[None]:
    """While active, every forward pass of `linears[name]` adds its inputs to `statistics[name]`."""

    def hook(statistic: Statistic):  # type: ignore[no-untyped-def]
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            statistic.add(inputs[0].detach().flatten(0, -2))

        return add

    handles = [linear.register_forward_pre_hook(hook(statistics[name])) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
