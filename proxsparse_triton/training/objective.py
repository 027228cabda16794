"""What is learned from: the loss, what of the weights it sees, and which parameters learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..errors import ConfigError
from .batches import Batch
from .distillation import LAYER_WEIGHT, TEMPERATURE, DistillationLoss
from .loss import NextTokenLoss
from .pretrained import Forward, PretrainedWeights

Loss = Callable[[Batch], Tensor]
CHOICES = {"loss": ("kl", "ce"), "forward": ("masked", "learned"), "train": ("pruned", "all")}


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to learn. pretrained: W0 of the layers to prune, where the objective keeps it."""

    loss: Loss
    pretrained: PretrainedWeights | None


@dataclass(frozen=True)
class Objective:
    """loss: "kl", divergence from the dense model at `temperature` and `layer_weight` times the errors of its hidden states, or "ce",
    cross-entropy of the text. forward: the loss sees W0 under the mask of the learned weights ("masked"), or the learned weights. train:
    only the weights to prune learn, or all parameters.
    """

    loss: Literal["kl", "ce"] = "kl"
    forward: Forward = "masked"
    train: Literal["pruned", "all"] = "pruned"
    temperature: float = TEMPERATURE
    layer_weight: float = LAYER_WEIGHT

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"learning: expected --{name} {' or '.join(choices)}, got {getattr(self, name)!r}. Choose one of these.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"learning: expected a finite temperature > 0, got {self.temperature}. The default is {TEMPERATURE:g}.")
        if not (math.isfinite(self.layer_weight) and self.layer_weight >= 0):
            raise ConfigError(f"learning: expected a finite layer_weight >= 0, got {self.layer_weight}. The default is {LAYER_WEIGHT:g}.")

    @property
    def keeps_pretrained(self) -> bool:
        return self.loss == "kl" or self.forward == "masked"

    @contextmanager
    def of(
        self, model: nn.Module, linears: Mapping[str, nn.Linear], window: Tensor, scales: Mapping[str, Tensor] | None = None
    ) -> Iterator[Prepared]:
        """Prepares a model whose weights are the pretrained ones; afterwards its layers compute with their own weights again.

        Args:
            linears: parameter name -> layer to prune. window: any token window on the model's device.
            scales: parameter name -> column_scale of its mask; see `PretrainedWeights`.
        """
        with ExitStack() as stack:
            stack.enter_context(self.trainable(model, linears))
            others = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in linears} if self.loss == "kl" else {}
            pretrained = PretrainedWeights(model, linears, scales, others) if self.keeps_pretrained else None
            head = getattr(model, "get_output_embeddings", lambda: None)()
            own_head = any(linear is head for linear in linears.values())
            if pretrained is not None:
                stack.enter_context(pretrained.forward(self.forward))
            if self.loss == "ce" or pretrained is None:
                yield Prepared(NextTokenLoss(model, window, chunkable=not (own_head and self.forward == "masked")), pretrained)
                return
            chunkable = not own_head and not others
            strengths = self.temperature, self.layer_weight
            loss = DistillationLoss(model, window, pretrained.teacher, *strengths, chunkable=chunkable)
            yield Prepared(loss, pretrained)

    @contextmanager
    def trainable(self, model: nn.Module, pruned: Mapping[str, object]) -> Iterator[None]:
        """Inside, only the parameters that learn require gradients."""
        frozen = [p for name, p in model.named_parameters() if p.requires_grad and name not in pruned] if self.train == "pruned" else []
        for p in frozen:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in frozen:
                p.requires_grad_(True)
