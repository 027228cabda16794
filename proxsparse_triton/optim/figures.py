"""What a step tells about itself: figures on the device, and the one flag that has to reach the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import LearningError
from ..ops.sharded import all_sum
from ..sparsity import BLOCK
from .parameters import OPTIMIZER, Parameter


@dataclass(frozen=True)
class Figures:
    """Figures of one step, tensors on the device; reading one waits for the step."""

    norm: Tensor  # of all gradients before clipping; clip="total": penalty gradient included
    penalty: Tensor  # lambda2 sum r^2 at the weights before the step
    shares: dict[str, Tensor]  # share of 2:4 blocks of each prox parameter after the step
    share_24: Tensor  # the same over all of them


@dataclass
class Record:
    """What the launches of one step leave behind."""

    prox: list[Parameter] = field(default_factory=list)
    statistics: list[Tensor] = field(default_factory=list)  # fp64 [4] of each prox parameter, this rank's part
    plain: list[Parameter] = field(default_factory=list)
    plain_squares: list[Tensor] = field(default_factory=list)  # fp64 [parameters] of several launches, summed over ranks
    square: Tensor | None = None  # squared norm of all gradients, where clipping needed it

    def close(self) -> tuple[Figures, NonFinite]:
        parameters = [item.p for item in self.prox]
        nothing = torch.zeros(0, 4, dtype=torch.float64, device=[*self.statistics, *self.plain_squares][0].device)
        rows = all_sum(torch.stack(self.statistics), parameters) if parameters else nothing
        plain = torch.cat([*self.plain_squares, nothing[:, 0]])
        blocks = [item.p.numel() // BLOCK for item in self.prox]
        counts = torch.tensor(blocks, dtype=torch.float64).clamp_min(1).to(rows.device, non_blocking=True)
        square = rows[:, 1].sum() + plain.sum() if self.square is None else self.square
        figures = Figures(
            norm=square.sqrt(),
            penalty=rows[:, 0].sum(),
            shares=dict(zip([item.name for item in self.prox], (rows[:, 2] / counts).unbind(), strict=True)),
            share_24=rows[:, 2].sum() / max(sum(blocks), 1),
        )
        flags = torch.cat([rows[:, 3] != 0, ~plain.isfinite(), ~square.isfinite().view(1)])
        return figures, NonFinite([item.name for item in [*self.prox, *self.plain]], flags)


class NonFinite:
    """Which gradients were not finite: sent to the host without waiting, read one step later."""

    def __init__(self, names: Sequence[str], flags: Tensor) -> None:
        """flags: bool [names + 1], the last for the norm of all."""
        self._names = names
        self._flags = flags
        self._event: torch.cuda.Event | None = None
        if flags.is_cuda:
            self._flags = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True).copy_(flags, non_blocking=True)
            self._event = torch.cuda.current_stream(flags.device).record_event()

    def read(self) -> tuple[list[str], bool]:
        """(names of the broken gradients, is the norm broken). Waits for the step that was watched, not for what was queued after it."""
        if self._event is not None:
            self._event.synchronize()
        *flags, norm = self._flags.tolist()
        return [name for name, flag in zip(self._names, flags, strict=True) if flag], norm


def broken(names: Sequence[str]) -> LearningError:
    where = f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}" if names else "their norm, which overflows"
    return LearningError(
        f"{OPTIMIZER}: expected finite gradients, got inf or nan in {where}; what they belong to has not been changed. "
        "Lower lr or lambda2, raise frozen_eps, or learn in float32."
    )
