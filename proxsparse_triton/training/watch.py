"""How the mask is coming along: what changed since the last look, and what to tell the user while there is still time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor, nn

from ..ops import mask_24
from ..sparsity import BLOCK
from .pretrained import mask_scores

LOOKS = 20  # over a run
SAMPLE = 2**18  # weights of a layer that are looked at: shares are within 0.2 % of those of all its blocks
TOO_EARLY, TOO_LATE = 0.5, 0.3  # shares of blocks: committed when the learning rate peaks, undecided with LAST of the steps left
LAST = 0.1
START, QUARTER = 0.05, 0.25  # shares of the steps: losses are averaged over the first START, and over as many before QUARTER
ENOUGH = 5  # steps to average over: texts differ


class MaskWatch:
    """Shares of blocks, of evenly spaced rows of each layer, whose mask is not what it was at the last look."""

    def __init__(self, linears: Mapping[str, nn.Linear], scales: Mapping[str, Tensor], steps: int, *, masked: bool) -> None:
        """masked: the loss sees W0 under the mask."""
        self._linears, self._scales, self.masked = linears, scales, masked
        self.every = max(1, steps // LOOKS)
        self._rows: dict[str, slice] = {}
        for name, linear in linears.items():
            rows, columns = linear.weight.shape
            self._rows[name] = slice(None, None, max(1, -(-rows * columns // SAMPLE)))
        self._masks = {name: self._mask(name) for name in linears}

    def _mask(self, name: str) -> Tensor:
        return mask_24(mask_scores(self._linears[name].weight.detach()[self._rows[name]], self._scales.get(name)))

    def changes(self) -> dict[str, Tensor]:
        """Parameter name -> share since the last call, on the device."""
        shares = {}
        for name, before in self._masks.items():
            now = self._masks[name] = self._mask(name)
            shares[name] = (now != before).unflatten(-1, (-1, BLOCK)).any(-1).double().mean()
        return shares


@dataclass(frozen=True)
class Pace:
    """When a run of so many steps peaks its learning rate, and what to say about its loss and commitment."""

    steps: int
    peak: int  # step, 0-based
    masked: bool  # the loss sees the mask itself: then undecided blocks are no harm

    def warnings(self, share_24: float, losses: Sequence[float]) -> list[str]:
        """After as many steps as there are losses, with so many blocks 2:4. Empty: all is well, or it was not the moment to say so."""
        step = len(losses) - 1
        return [text for text in (self._commitment(step, share_24), self._loss(losses)) if text is not None]

    def _commitment(self, step: int, share_24: float) -> str | None:
        if step == self.peak and share_24 > TOO_EARLY:
            return (
                f"{100 * share_24:.0f} % of the blocks committed before the learning rate peaked (step {step + 1} of {self.steps}), "
                "ahead of what the text can say about them: lower --lambda1."
            )
        if not self.masked and step == self.steps - 1 - int(LAST * self.steps) and 1 - share_24 > TOO_LATE:
            return (
                f"{100 * (1 - share_24):.0f} % of the blocks undecided with {self.steps - 1 - step} of {self.steps} steps left: "
                "raise --lambda1, or learn longer with --epochs or --steps."
            )
        return None

    def _loss(self, losses: Sequence[float]) -> str | None:
        """Of W0 under the mask: it starts as that of a mask by weight and activation, and a rate that suits it falls from there. One that
        is ten times too high does not, and nothing diverges either: W0 stays what it is.
        """
        width = int(START * self.steps)
        if not self.masked or width < ENOUGH or len(losses) != int(QUARTER * self.steps):
            return None
        start, now = fmean(losses[:width]), fmean(losses[-width:])
        if now <= start:
            return None
        return (
            f"The loss is {now:.3f} after a quarter of the steps and was {start:.3f} at the start, "
            "so the mask is getting worse than the one it began with: lower --lr."
        )
