"""ProxSparse: learn a copy of the weights under the 2:4 regulariser, keep only which two of every four survive.

Source: Liu et al. 2025 (arXiv 2502.00258), Algorithm 1; docs/math.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import median
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ..models.reading import unread
from ..models.selection import LayerPlan
from ..models.statistics import input_norms
from ..ops import mask_24
from ..optim.prox_adamw import ProxAdamW
from ..sparsity import BLOCK
from ..training import memory
from ..training.loop import LoopConfig, learn, steps_of
from ..training.objective import Objective
from ..training.pretrained import compact, kept_dtype, mask_scores
from ..training.watch import MaskWatch
from .base import PruneResult, PruneTask
from .recipes import PROX_SCALES, recipe
from .walk import UNCALLED, UNREACHED, ZERO

Moments = Literal["float32", "bfloat16", "int8"]
ClipMode = Literal["total", "loss", "none"]

ROWS = 256  # of a layer, which show whether the weights fit into bf16
STATISTIC_WINDOWS = 128  # whose inputs are looked at for the column scales


def default_precision(parameters: int, dtype: torch.dtype) -> tuple[int, Moments]:
    """(weight_bits, moments) of a model with so many parameters: exact while memory is no question, then what costs least quality."""
    if dtype != torch.bfloat16:
        return 32, "float32"
    if parameters < 1e9:
        return 24, "float32"
    return (16, "bfloat16") if parameters < 1e10 else (16, "int8")


def root_mean_square(w: Tensor) -> float:
    return math.sqrt(float(w.square().double().mean())) if w.numel() else 0.0


def rms(weights: Mapping[str, nn.Linear]) -> float:
    """Root mean square over all weights together."""
    squares = torch.stack([linear.weight.detach().float().square().sum() for linear in weights.values()]).double().sum()
    return math.sqrt(float(squares) / sum(linear.weight.numel() for linear in weights.values()))


@dataclass(frozen=True)
class ProxSparse:
    """Settings of Algorithm 1; what is None comes from the recipe. lambda1 acts after every step and is not multiplied by the lr.

    With a column scale c, the prox acts on c * w and the mask is that of the largest |c w|; c is normalised so that c * w has the rms
    of w, which leaves lambda1 its meaning.
    """

    recipe: str = "auto"
    loss: Literal["kl", "ce"] | None = None
    forward: Literal["masked", "learned"] | None = None
    prox_scale: Literal["activations", "none"] | None = None
    train: Literal["pruned", "all"] | None = None
    temperature: float | None = None
    layer_weight: float | None = None  # of the hidden states' errors beside the divergence
    lambda1: float | None = None  # None: the recipe's strength for the rms of the weights and the number of steps
    lambda2: float = 0.0
    frozen_eps: float = 0.1
    lr: float | None = None  # None: the recipe's travel for the rms of the weights and the number of steps
    warmup: float = 0.1
    clip: float = 1.0
    clip_mode: ClipMode = "total"  # the norm of which gradient; "none": no clipping, and each gradient is freed once it is used
    batch_size: int = 1
    epochs: int | None = None
    steps: int | None = None  # instead of epochs
    weight_bits: int | None = None  # kept of bf16 weights; None: default_precision
    moments: Moments | None = None  # None: default_precision
    cuda_graph: bool = True  # of forward and backward pass, where that pays
    checkpointing: bool | None = None  # of activations; None: where the step would not fit into the GPU without

    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("lambda1", "lambda2"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"proxsparse: expected a finite {name} >= 0, got {value}. Choose another --{name}.")
        for name in ("frozen_eps", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"proxsparse: expected a finite {name} > 0, got {getattr(self, name)}. Choose another {option}.")
        for name, choices in (
            ("clip_mode", ("total", "loss", "none")),
            ("weight_bits", (16, 24, 32, None)),
            ("moments", ("float32", "bfloat16", "int8", None)),
            ("prox_scale", (*PROX_SCALES, None)),
        ):
            if getattr(self, name) not in choices:
                option, rule = f"--{name.replace('_', '-')}", ", ".join(str(choice) for choice in choices if choice is not None)
                raise ConfigError(f"proxsparse: expected {name} to be one of {rule}, got {getattr(self, name)!r}. Choose another {option}.")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(f"proxsparse: expected --steps or --epochs, got both ({self.steps} and {self.epochs}). Leave one out.")
        # Their own checks, before any work.
        objective = self.objective
        self.loop_config(1)
        for name in ("temperature", "layer_weight"):
            if getattr(self, name) is not None and objective.loss != "kl":
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(
                    f"proxsparse: expected {option} with --loss kl, got {objective.loss} (recipe {self.recipe}). Leave it out."
                )

    @property
    def objective(self) -> Objective:
        """The recipe's, with what was asked for in its place."""
        asked = {name: getattr(self, name) for name in ("loss", "forward", "train", "temperature", "layer_weight")}
        return replace(recipe(self.recipe).objective, **{name: value for name, value in asked.items() if value is not None})

    def loop_config(self, windows: int, *, checkpointing: bool = False) -> LoopConfig:
        """For so many calibration windows."""
        epochs = recipe(self.recipe).epochs(windows) if self.steps is None else 1
        return LoopConfig(
            lr=self.lr,
            warmup=self.warmup,
            batch_size=self.batch_size,
            epochs=epochs if self.epochs is None else self.epochs,
            steps=self.steps,
            checkpointing=checkpointing,
            cuda_graph=self.cuda_graph,
            release_gradients=self.clip_mode == "none",
        )

    def precision(self, model: nn.Module) -> tuple[int, Moments]:
        """(weight_bits, moments) for this model: what was asked for, else the default for its size and dtype.

        Raises: ConfigError: low bits of weights that are not bf16.
        """
        dtype = next(model.parameters()).dtype
        weight_bits, moments = default_precision(sum(p.numel() for p in model.parameters()), dtype)
        if dtype != torch.bfloat16 and self.weight_bits not in (None, 32):
            raise ConfigError(
                f"proxsparse: expected --weight-bits {self.weight_bits} with bf16 weights only, got {dtype}. "
                "Learn with --dtype bfloat16, or leave it out."
            )
        return self.weight_bits or weight_bits, self.moments or moments

    def memory_of_step(
        self, model: nn.Module, pruned: Collection[str], seqlen: int, *, checkpointing: bool, stored: torch.dtype | None = None
    ) -> memory.StepMemory:
        """Memory and arithmetic of one step, from `memory.meta_model`.

        Args:
            pruned: parameter names of the weights to prune.
            stored: dtype of the weights in their file, see `kept_dtype`. None: the model's.
        Raises: ModelError: the step cannot be counted. ConfigError: no activation checkpointing in this model.
        """
        weight_bits, moments = self.precision(model)
        objective = self.objective
        dtype = next(model.parameters()).dtype
        pretrained = kept_dtype(dtype, stored or dtype) if self.lambda2 > 0 or objective.keeps_pretrained else None
        linears = {name: cast(nn.Linear, model.get_submodule(name.removesuffix(".weight"))) for name in pruned}
        with objective.trainable(model, linears):
            kept = memory.resident(model, pruned, memory.Storage(weight_bits, moments, pretrained, objective.loss == "kl"))
        step = memory.trace_step(
            model,
            self.batch_size,
            seqlen,
            checkpoint=checkpointing,
            release=self.clip_mode == "none",
            pruned=linears,
            objective=objective,
        )
        return memory.StepMemory(kept, step)

    def needs_checkpointing(
        self, model: nn.Module, pruned: Collection[str], seqlen: int, limit: int | None, stored: torch.dtype | None = None
    ) -> bool:
        """Whether a step keeps within `limit` bytes (None: no limit) only with activation checkpointing, which costs a third more time.

        Args: model: a `memory.meta_model`. stored: see `memory_of_step`.
        """
        if self.checkpointing is not None:
            return self.checkpointing
        if limit is None or not memory.supports_checkpointing(model):
            return False
        return not memory.fits(self.memory_of_step(model, pruned, seqlen, checkpointing=False, stored=stored).peak, limit)

    def checkpoints(self, task: PruneTask) -> bool:
        """`needs_checkpointing` of a real model; where its steps cannot be counted, the careful answer."""
        limit = task.memory
        device = next(task.model.parameters()).device
        if limit is None and device.type == "cuda":
            limit = torch.cuda.get_device_properties(device).total_memory
        if self.checkpointing is not None or limit is None or not memory.supports_checkpointing(task.model):
            return bool(self.checkpointing)
        seqlen = max(len(window) for window in task.windows)
        try:
            twin = memory.meta_model(task.model.config, next(task.model.parameters()).dtype, kind=type(task.model))
            stored = compact(next(iter(task.linears().values())).weight[:ROWS]).dtype
            needed = self.needs_checkpointing(twin, list(task.linears()), seqlen, limit, stored)
            if needed and task.memory is not None:  # asked for: then it is said where it cannot be had
                peak = self.memory_of_step(twin, list(task.linears()), seqlen, checkpointing=True, stored=stored).peak
                if not memory.fits(peak, limit):
                    task.progress.note(f"A step is predicted to reach {peak / 1e9:.3g} GB, above --gpu-memory. See --plan.")
            return needed
        except ModelError:
            return True

    def optimizer(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Linear],
        steps: int,
        scales: Mapping[str, Tensor] | None = None,
        *,
        seed: int = 0,
    ) -> ProxAdamW:
        """ProxAdamW over all parameters that learn: the selected weights with the prox, others (embeddings, norms, head) without.

        Args: steps: of the run, for strengths that are not given. scales: parameter name -> column_scale.
        """
        weight_bits, moments = self.precision(model)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        chosen, sigma = recipe(self.recipe), rms(linears)

        def group(names: Sequence[str], sigma: float, **more: object) -> dict[str, object]:
            lr = chosen.lr(sigma, steps) if self.lr is None else self.lr
            lambda1 = chosen.lambda1(sigma, steps) if self.lambda1 is None else self.lambda1
            return {"params": [(name, trainable[name]) for name in names], "lr": lr, "lambda1": lambda1, **more}

        pruned = [name for name in trainable if name in linears]
        if chosen.per_tensor or scales:
            sigmas = {name: rms({name: linears[name]}) if chosen.per_tensor else sigma for name in pruned}
            # A tensor of zeros has no scale of its own, and nothing to learn either.
            groups = [group([n], sigmas[n] or sigma, prox=True, column_scale=(scales or {}).get(n)) for n in pruned]
        else:
            groups = [group(pruned, sigma, prox=True)]
        groups.append(group([name for name in trainable if name not in linears], sigma, prox=False))
        return ProxAdamW(
            [some for some in groups if some["params"]],
            lambda2=self.lambda2,
            frozen_eps=self.frozen_eps,
            max_norm=None if self.clip_mode == "none" else self.clip,
            clip="loss" if self.clip_mode == "loss" else "total",
            weight_bits=weight_bits,
            moments=moments,
            seed=seed,
        )

    def column_scales(self, task: PruneTask) -> dict[str, Tensor]:
        """Parameter name -> c, the rms of each input feature over the first windows, such that rms(c * w) = rms(w); {} without scales.

        A layer whose inputs are all zero has none: a note says so.
        """
        if (self.prox_scale or recipe(self.recipe).prox_scale) == "none":
            return {}
        linears = task.linears()
        norms = input_norms(task.model, linears, task.windows[:STATISTIC_WINDOWS])
        scales = {name: norm.mean_square().sqrt() for name, norm in norms.items()}
        dead = [name for name, scale in scales.items() if not (scale > 0).any()]
        uncalled = {name: cast(nn.Parameter, linears[name].weight) for name in dead if not norms[name].calls}
        unreached = unread(task.model, uncalled, task.windows[:STATISTIC_WINDOWS])
        for name in dead:
            why = UNREACHED if name in unreached else UNCALLED if name in uncalled else ZERO
            task.unseen(name, why, "Its mask is learned without activations.")
        return {
            name: scale * (rms({name: linears[name]}) / (root_mean_square(linears[name].weight.detach().float() * scale) or 1.0))
            for name, scale in scales.items()
            if name not in dead
        }

    def check(self, plan: LayerPlan) -> None:
        """Every layer will do."""

    def prune(self, task: PruneTask) -> PruneResult:
        linears = task.linears()
        sigma = rms(linears)
        if not (math.isfinite(sigma) and sigma > 0):
            raise ModelError(
                f"proxsparse: expected finite weights that are not all zero, got a root mean square of {sigma}. Check the model."
            )
        checkpointing = self.checkpoints(task)
        config = self.loop_config(len(task.windows), checkpointing=checkpointing)
        steps = steps_of(len(task.windows), config)
        scales = self.column_scales(task)
        window = task.windows[0].to(next(task.model.parameters()).device)
        with self.objective.of(task.model, linears, window, scales) as prepared:
            optimizer = self.optimizer(task.model, linears, steps, scales, seed=task.seed)
            if prepared.pretrained is not None and self.lambda2 > 0:
                optimizer.share_pretrained({linears[name].weight: w0 for name, w0 in prepared.pretrained.tensors.items()})
            summary = self._summary(task.model, optimizer, steps, sigma, checkpointing)
            task.progress.note(_describe(summary, len(task.windows), config.batch_size))
            watch = MaskWatch(linears, scales, steps, masked=self.objective.forward == "masked")
            learn(
                task.model,
                task.windows,
                optimizer,
                config,
                prepared.loss,
                watch,
                seed=task.seed,
                progress=task.progress,
                record=task.record,
            )
        summary["share_24"] = float(optimizer.figures().share_24)
        masks = {name: mask_24(mask_scores(linear.weight, scales.get(name))).cpu() for name, linear in linears.items()}
        if prepared.pretrained is not None:
            summary["agreement"] = _agreement(masks, prepared.pretrained.tensors, scales)
        return PruneResult(masks, summary=summary)

    def _summary(self, model: nn.Module, optimizer: ProxAdamW, steps: int, sigma: float, checkpointing: bool) -> dict[str, object]:
        """What was derived where it was not asked for. lambda1, lr: of the median tensor."""
        weight_bits, moments = self.precision(model)
        groups = [group for group in optimizer.param_groups if group["prox"]]
        return {
            "recipe": self.recipe,
            **{field.name: getattr(self.objective, field.name) for field in fields(Objective)},
            "prox_scale": self.prox_scale or recipe(self.recipe).prox_scale,
            "lambda1": median(group["lambda1"] for group in groups),
            "lambda2": self.lambda2,
            "lr": median(group["lr"] for group in groups),
            "steps": steps,
            "weight_rms": sigma,
            "weight_bits": weight_bits,
            "moments": moments,
            "checkpointing": checkpointing,
        }


def _agreement(masks: Mapping[str, Tensor], original: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, float]:
    """Shares of blocks that are as magnitude would have them, and as Wanda would on the dense model's inputs."""
    found = {}
    for method, of in (("magnitude", {}), ("wanda", scales)):
        if method == "wanda" and not scales:
            continue
        same = total = 0
        for name, w0 in original.items():
            equal = (mask_24(mask_scores(w0, of.get(name))).cpu() == masks[name]).unflatten(-1, (-1, BLOCK)).all(-1)
            same, total = same + int(equal.sum()), total + equal.numel()
        found[method] = same / max(total, 1)
    return found


def _describe(summary: Mapping[str, Any], windows: int, batch_size: int) -> str:
    passes = summary["steps"] / -(-windows // batch_size)
    return (
        f"proxsparse, recipe {summary['recipe']}: {summary['steps']} steps of {batch_size} window{'s' * (batch_size > 1)} "
        f"({passes:.3g} pass{'es' * (passes != 1)} over {windows}), loss {summary['loss']} at the {summary['forward']} weights, "
        f"prox scale {summary['prox_scale']}, lambda1 {summary['lambda1']:.4g}, lambda2 {summary['lambda2']:.4g}, lr {summary['lr']:.4g}, "
        f"weight rms {summary['weight_rms']:.4g}, {summary['weight_bits']}-bit weights, {summary['moments']} moments"
        f"{', checkpointing' if summary['checkpointing'] else ''}"
    )


METHOD = ProxSparse
