"""What the masks and the learning passes should be, computed without any of the shortcuts that the package takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from families.building import logits
from torch import Tensor, nn

from proxsparse_triton.models.selection import LayerPlan
from proxsparse_triton.training.objective import Objective, Prepared

NEAR_TIE = 1e-5  # of the score that is kept: the norms are summed in fp32, here in fp64


def not_wandas(model: nn.Module, plan: LayerPlan, windows: Sequence[Tensor], stored: Mapping[str, Tensor]) -> dict[str, int]:
    """Parameter -> blocks of four in which `stored` is not what Wanda keeps, near ties left out.

    For each decoder block a pass of the whole model over every window, with all blocks before it pruned. A weight counts what reaches it
    inside that block, through whichever module; without any input other than zero it is judged by magnitude. Changes the model.
    """
    wrong = {}
    for index in range(len(model.get_submodule(plan.blocks))):
        prefix = f"{plan.blocks}.{index}."
        mine = {name: model.get_parameter(name) for name in stored if name.startswith(prefix)}
        for name, norm in _norms(model, model.get_submodule(prefix[:-1]), mine, windows).items():
            w = mine[name]
            wrong[name] = _disagreements(w.detach().double().abs() * (norm if norm.any() else 1.0), stored[name])
            w.data.masked_fill_(~stored[name], 0.0)
    return wrong


def _norms(model: nn.Module, block: nn.Module, mine: Mapping[str, nn.Parameter], windows: Sequence[Tensor]) -> dict[str, Tensor]:
    squares = {name: torch.zeros(p.shape[1], dtype=torch.float64) for name, p in mine.items()}
    inside = False

    def entered(*_: object) -> None:
        nonlocal inside
        inside = True

    def left(*_: object) -> None:
        nonlocal inside
        inside = False

    def adding(square: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inside:
                square.add_(inputs[0].detach().flatten(0, -2).double().square().sum(0))

        return add

    handles = [block.register_forward_pre_hook(entered), block.register_forward_hook(left)]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            handles += [module.register_forward_pre_hook(adding(squares[name])) for name, p in mine.items() if module.weight is p]
    for window in windows:
        logits(model, window)
    for handle in handles:
        handle.remove()
    return {name: square.sqrt() for name, square in squares.items()}


def _disagreements(scores: Tensor, mask: Tensor) -> int:
    four = scores.unflatten(-1, (-1, 4))
    best = four.topk(2, -1).values.sum(-1)
    kept = (four * mask.unflatten(-1, (-1, 4))).sum(-1)
    return int((kept < best * (1 - NEAR_TIE)).sum())


@contextmanager
def learning(model: nn.Module, names: Sequence[str], window: Tensor, **objective: Any) -> Iterator[Prepared]:
    """Inside, `model` computes as the student; inside `.pretrained.teacher()` as the teacher."""
    linears: Any = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    with Objective(**objective).of(model, linears, window) as prepared:
        yield prepared


def moved(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Moves the weights that learn away from the pretrained ones; returns the dense model with W0 under the mask of the moved ones."""
    masked, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    for name in names:
        w = model.get_parameter(name)
        w.data = w.data + 0.5 * w.data.std() * torch.randn(w.shape, generator=generator)
        lowest = w.data.abs().unflatten(-1, (-1, 4)).topk(2, largest=False).indices
        masked.get_parameter(name).data.unflatten(-1, (-1, 4)).scatter_(-1, lowest, 0.0)
    return masked


def text_gradients(model: nn.Module, names: Sequence[str], tokens: Tensor) -> dict[str, Tensor]:
    """Of the cross-entropy of the next tokens, by autograd; zeros where nothing depends on a weight."""
    given = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
    torch.nn.functional.cross_entropy(given.float(), tokens[1:]).backward()
    return gradients(model, names)


def gradients(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    parameters = {name: model.get_parameter(name) for name in names}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
