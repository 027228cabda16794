"""A small model and its training by `ProxAdamW`, shared by the tests of the optimizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from proxsparse_triton import ProxAdamW

NAN, INF = float("nan"), float("inf")


class Model(nn.Module):
    """Two weights to prune, a bias, and an embedding-like weight whose width is not a multiple of 4."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(6, 16, dtype=dtype)
        self.middle = nn.Linear(16, 24, bias=False, dtype=dtype)
        self.leave = nn.Linear(24, 8, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.middle(torch.tanh(self.enter(x))))).float().square().mean()

    def pruned(self) -> list[tuple[str, Tensor]]:
        return [("middle.weight", self.middle.weight), ("leave.weight", self.leave.weight)]

    def rest(self) -> list[tuple[str, Tensor]]:
        return [("enter.weight", self.enter.weight), ("enter.bias", self.enter.bias)]


def build(model: Model, **options: object) -> ProxAdamW:
    settings = {"lr": 0.01, "weight_decay": 0.1, "lambda1": 0.5, "lambda2": 0.05, **options}
    return ProxAdamW([{"params": model.pruned()}, {"params": model.rest(), "prox": False}], **settings)


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(dtype)


def backward(model: Model, step: int) -> None:
    model.zero_grad()
    (50 * model(batch(step, model.middle.weight.dtype))).backward()


def train(model: Model, optimizer: torch.optim.Optimizer, steps: range = range(10)) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
