"""Repair: once the mask is fixed, move the kept weights so that the model loses less. Off by default, because it changes weights.

Least squares, layer by layer, needs one pass over the calibration text and no gradient; masked fine-tuning learns from the dense
model, end to end. Pruned weights stay exactly zero in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal, cast

import torch
from torch import Tensor

from ..errors import ConfigError
from ..models.selection import LayerPlan
from ..models.statistics import Hessian
from ..training.loop import learn, steps_of
from .base import PruneResult, PruneTask, check_inside_blocks
from .proxsparse import ProxSparse, rms
from .walk import taken, walk

Kind = Literal["both", "least-squares", "finetune"]
KINDS = ("both", "least-squares", "finetune")
DAMPENING = 0.01  # of the mean diagonal of the Hessian, towards the weights as they are
ITERATIONS = 60  # of conjugate gradients, preconditioned by the diagonal
# What fine-tuning takes over from the run that learned the mask: how it stores and computes, and what it measures by.
SHARED = ("batch_size", "warmup", "clip", "clip_mode", "weight_bits", "moments", "cuda_graph", "checkpointing")
DISTANCE = ("temperature", "layer_weight")
TRAVEL = 2.0  # lr * steps / sigma of 400 steps of fine-tuning, see `Recipe`: of a mask it is 5


@dataclass(frozen=True)
class Repair:
    """kind: which of the two, least squares first. steps: of fine-tuning; None: as many passes as the auto recipe takes. finetuning:
    settings of its loop; the learning rate follows from the weights.
    """

    kind: Kind = "both"
    steps: int | None = None
    dampening: float = DAMPENING
    finetuning: ProxSparse = field(default_factory=lambda: ProxSparse(forward="learned", lambda1=0.0))

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"repair: expected --repair {', '.join(KINDS)}, got {self.kind!r}. Choose one of these.")
        if self.steps is not None and self.kind == "least-squares":
            raise ConfigError("repair: expected --repair-steps with fine-tuning, got it with --repair least-squares. Leave it out.")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"repair: expected --repair-steps of at least 1, got {self.steps}. Choose another value.")

    def like(self, method: object) -> Repair:
        """With the batches, storage and distance of the method that made the mask, where that learns too."""
        if not isinstance(method, ProxSparse):
            return self
        names = (*SHARED, *DISTANCE) if method.objective.loss == "kl" else SHARED
        return replace(self, finetuning=replace(self.finetuning, **{name: getattr(method, name) for name in names}))

    @property
    def loop(self) -> ProxSparse | None:
        """The settings of fine-tuning; None without."""
        return None if self.kind == "least-squares" else replace(self.finetuning, steps=self.steps)

    def check(self, plan: LayerPlan) -> None:
        """Before any work. ConfigError: least squares, which goes block by block, for a layer outside of the blocks."""
        if self.kind != "finetune":
            check_inside_blocks(plan, "repair", "--repair finetune, which is not block by block")

    def run(self, task: PruneTask, result: PruneResult) -> PruneResult:
        """`result` with the kept weights repaired.

        Args: task: with the dense model, which is changed. result: masks and, where the method has changed them, weights to start from.
        """
        self.check(task.plan)
        summary: dict[str, object] = {"kind": self.kind}
        original = {name: linear.weight.detach().clone() for name, linear in task.linears().items()}
        for name, linear in task.linears().items():
            mask = result.masks[name].to(linear.weight.device)
            start = original[name] if result.weights is None else result.weights[name].to(linear.weight)
            linear.weight.data = start.masked_fill(~mask, 0.0)
        if self.kind != "finetune":
            least_squares(task, original, result.masks, self.dampening)
        if self.loop is not None:
            summary |= finetune(task, original, result.masks, self.loop)
        weights = {name: linear.weight.detach().to("cpu", copy=True) for name, linear in task.linears().items()}
        return replace(result, weights=weights, summary={**result.summary, "repair": summary})


def masked_least_squares(
    w0: Tensor, start: Tensor, mask: Tensor, hessian: Tensor, *, dampening: float, iterations: int = ITERATIONS
) -> Tensor:
    """argmin_w tr((w - w0) H (w - w0)^T) + d ||w - start||^2 over weights that are zero outside the mask; fp32 [out, in].

    Every row is a problem of its own, with its own columns: conjugate gradients on all of them at once, whose matrix products are dense.

    Args:
        w0: what to imitate, start: where to begin, zero outside the mask; [out, in].
        mask: bool [out, in]. hessian: H = X^T X up to a factor, [in, in], symmetric, positive semidefinite.
        dampening: d as a share of the mean diagonal of H, > 0.
    """
    hessian = hessian.to(torch.promote_types(w0.dtype, torch.float32))
    # Inputs that are all zero leave the weights as they are.
    damp = (dampening * hessian.diagonal().mean()).clamp_min(torch.finfo(hessian.dtype).tiny)
    w, kept = start.to(hessian.dtype).clone(), mask.to(hessian.dtype)
    residual = ((w0.to(hessian.dtype) - w) @ hessian) * kept  # the pull towards start is zero there
    scale = 1 / (hessian.diagonal() + damp)
    z = residual * scale
    direction, energy = z.clone(), (residual * z).sum(1, keepdim=True)
    enough = torch.finfo(hessian.dtype).eps ** 2 * energy  # below it there is only rounding, which further steps would amplify
    for _ in range(iterations):
        image = (direction @ hessian + damp * direction) * kept
        curvature = (direction * image).sum(1, keepdim=True)
        length = torch.where((curvature > 0) & (energy > enough), energy / curvature, 0.0)  # a row that is solved stays
        w += length * direction
        residual -= length * image
        z = residual * scale
        new = (residual * z).sum(1, keepdim=True)
        direction = z + torch.where(energy > 0, new / energy, 0.0) * direction
        energy = new
    return w


def least_squares(task: PruneTask, original: Mapping[str, Tensor], masks: Mapping[str, Tensor], dampening: float) -> None:
    """Repairs the layers of one decoder block after the other on the inputs that the repaired blocks before it produce."""
    for linears, hessians in walk(task, "repair", "repair, least squares", Hessian, otherwise="Its kept weights stay as they are."):
        for name, linear in linears.items():
            hessian = taken(hessians, name)
            if hessian is not None:
                mask = masks[name].to(linear.weight.device)
                weight = linear.weight.data
                repaired = masked_least_squares(original[name], weight, mask, hessian, dampening=dampening)
                linear.weight.data = repaired.to(weight.dtype).masked_fill(~mask, 0.0)


def finetune(task: PruneTask, original: dict[str, Tensor], masks: Mapping[str, Tensor], settings: ProxSparse) -> dict[str, object]:
    """Learns the kept weights from the dense model. Empties `original`: the teacher keeps its own. Returns figures for the manifest."""
    linears = task.linears()
    config = settings.loop_config(len(task.windows), checkpointing=settings.checkpoints(task))
    count = steps_of(len(task.windows), config)
    lr = TRAVEL * (count / 400) ** 0.5 * rms(linears) / count
    started = {name: linear.weight.data for name, linear in linears.items()}
    for name, linear in linears.items():
        linear.weight.data = original[name]
    window = task.windows[0].to(next(task.model.parameters()).device)
    losses: list[float] = []

    def record(row: Mapping[str, object]) -> None:
        losses.append(float(cast(float, row["loss"])))
        task.record({"phase": "repair", **row})

    with settings.objective.of(task.model, linears, window) as prepared:
        original.clear()
        hooks = []
        for name, linear in linears.items():
            linear.weight.data = started[name]
            mask = masks[name].to(linear.weight.device)
            hooks.append(linear.weight.register_hook(lambda grad, mask=mask: grad.masked_fill(~mask, 0.0)))
        optimizer = replace(settings, lr=lr).optimizer(task.model, linears, count, seed=task.seed)
        task.progress.note(f"repair: {count} steps of fine-tuning, lr {lr:.4g}")
        config = replace(config, lr=lr)
        try:
            learn(task.model, task.windows, optimizer, config, prepared.loss, seed=task.seed, progress=task.progress, record=record)
        finally:
            for hook in hooks:
                hook.remove()
    few = max(1, count // 10)
    return {"steps": count, "lr": lr, "loss_first_tenth": fmean(losses[:few]), "loss_last_tenth": fmean(losses[-few:])}
