"""Recipes of ProxSparse, as data: what the loss is, what it sees, what learns, and how strong prox and steps are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError
from ..training.objective import Objective

PROX_SCALES = ("none", "activations")


@dataclass(frozen=True)
class Recipe:
    """Settings of Algorithm 1 that no model needs its own values of.

    strength: s = lambda1 * steps * sigma, and travel: lr * steps / sigma after 400 steps, are dimensionless; sigma is the rms of the pruned
    weights, of each tensor or of all together. prox_scale: "activations" measures the prox and the mask by the rms of each input feature.
    """

    objective: Objective
    prox_scale: Literal["none", "activations"]
    per_tensor: bool
    strength: float
    travel: float
    travel_growth: float  # travel is that of 400 steps times (steps / 400)^growth
    windows: int  # that are learned from in all: fewer are passed over again
    passes: int  # at most

    def lambda1(self, sigma: float, steps: int) -> float:
        return self.strength / (steps * sigma)

    def epochs(self, windows: int) -> int:
        """Passes over so many windows."""
        return max(1, min(self.passes, -(-self.windows // windows)))

    def lr(self, sigma: float, steps: int) -> float:
        return self.travel * math.pow(steps / 400, self.travel_growth) * sigma / steps


RECIPES = {
    # The published Llama-2-7B setting has lambda1 * steps * sigma = 2 and lr * steps / sigma = 2.
    "paper": Recipe(Objective("ce", "learned", "all"), "none", False, strength=2.0, travel=2.0, travel_growth=0.0, windows=1, passes=1),
    "auto": Recipe(
        Objective("kl", "masked", "pruned"), "activations", True, strength=1.0, travel=5.0, travel_growth=0.5, windows=800, passes=4
    ),
}


def recipe(name: str) -> Recipe:
    """ConfigError for an unknown name."""
    if name not in RECIPES:
        raise ConfigError(f"proxsparse: expected --recipe {' or '.join(RECIPES)}, got {name!r}. Choose one of these.")
    return RECIPES[name]
