"""Will it fit, and how long will it take: predicted from config.json, before a weight is read."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import ConfigError, ModelError
from .methods.base import build_method
from .methods.proxsparse import ProxSparse
from .methods.repair import Repair
from .models.checkpoint import one_line, stored_dtype
from .models.declared import skeleton
from .models.loading import ModelSource, load_config, resolve_model
from .models.selection import LayerPlan, plan_layers
from .models.share import NOTHING, Share
from .models.source import DEMO, without_weights
from .models.states import SHARE
from .pipeline import RunConfig, checked_seqlen
from .training import memory
from .training.loop import steps_of

# Dense bf16 tensor-core TFLOP/s and memory TB/s by the vendor's data sheet; fp32 learning runs on TF32, at half the rate. First match wins.
GPUS = {
    r"B200": (2250, 8.0),
    r"H200": (989, 4.8),
    r"GH200": (989, 4.0),
    r"H100.*PCIe": (756, 2.0),
    r"H100.*NVL": (835, 3.9),
    r"H100": (989, 3.35),
    r"A100.*80": (312, 2.0),
    r"A100": (312, 1.55),
    r"L40S": (362, 0.86),
    r"RTX 5090": (210, 1.79),
    r"RTX 4090": (165, 1.0),
    r"A6000": (155, 0.77),
    r"A10G?\b": (70, 0.6),
    r"L4\b": (121, 0.3),
    r"RTX 3090": (71, 0.94),
    r"T4\b": (65, 0.3),
}
# Of the data sheet's TFLOP/s over forward and backward passes: Llama-2-7B and Qwen2.5-14B, bf16, H200. Small models reach less.
UTILISATION = 0.46
CONJUGATE_GRADIENTS = 8  # fp32 tensors of a layer that least squares holds at once
BANDWIDTH = 0.8  # of the data sheet's TB/s in the optimiser's pass over the weights


@dataclass(frozen=True)
class MemoryPlan:
    """items: bytes at the highest point of a step: weights, moments, pretrained (W0), residual, gradients, activations, logits, workspace;
    with repair those of its own highest point, masks and hidden states included, where that is higher.

    steps, and seconds of all steps together: with those of fine-tuning. seconds: None where the GPU's speed is not known.
    """

    items: dict[str, int]
    seconds: float | None
    steps: int
    settings: ProxSparse  # with weight_bits, moments and checkpointing as they will be
    share: Share = NOTHING  # of the decoder's weights that are pruned

    @property
    def peak(self) -> int:
        return sum(self.items.values())


def predict(
    config: Any,
    dtype: torch.dtype,
    settings: ProxSparse,
    seqlen: int,
    batch_size: int | None = None,
    device_name: str | None = None,
    *,
    samples: int = 400,
    repair: Repair | None = None,
    limit: int | None = None,
    stored: torch.dtype | None = None,
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> MemoryPlan:
    """Peak memory and time of learning with `settings` a model that a transformers `config` describes; no file is read.

    Args:
        batch_size: instead of that of `settings`. samples: calibration windows. repair: what follows, if anything.
        device_name: as CUDA names the GPU, for the time.
        limit: bytes to keep within; decides about checkpointing where `settings` do not. None: no limit.
        stored: dtype of the weights in their file, which decides how W0 is kept. None: `dtype`.
    Raises: ModelError: a model that cannot be built, or whose steps depend on the values of its tensors. ConfigError: settings that this
        model cannot take.
    """
    if batch_size is not None:
        settings = dataclasses.replace(settings, batch_size=batch_size)
    asked = settings
    model = memory.meta_model(config, dtype, trust_remote_code=trust_remote_code)
    layers = plan_layers(model, include=include, skip=skip)
    pruned = [f"{name}.weight" for name in layers.selected()]
    weight_bits, moments = settings.precision(model)
    checkpointing = settings.needs_checkpointing(model, pruned, seqlen, limit, stored)
    settings = dataclasses.replace(settings, weight_bits=weight_bits, moments=moments, checkpointing=checkpointing)
    step = settings.memory_of_step(model, pruned, seqlen, checkpointing=checkpointing, stored=stored)
    steps = steps_of(samples, settings.loop_config(samples))
    seconds, phases = _seconds(step, steps, dtype, device_name), [step.items]
    if repair is not None and repair.kind != "finetune":
        phases.append(_least_squares(model, layers, samples, seqlen, config, limit))
    if repair is not None and (loop := repair.like(asked).loop) is not None:
        checkpointing = loop.needs_checkpointing(model, pruned, seqlen, limit, stored)
        again = loop.memory_of_step(model, pruned, seqlen, checkpointing=checkpointing, stored=stored)
        more = steps_of(samples, loop.loop_config(samples))
        steps, seconds = steps + more, None if seconds is None else seconds + (_seconds(again, more, dtype, device_name) or 0.0)
        phases.append({**again.items, "masks": sum(model.get_parameter(name).numel() for name in pruned)})
    return MemoryPlan(max(phases, key=lambda items: sum(items.values())), seconds, steps, settings, layers.share())


def _least_squares(model: torch.nn.Module, layers: LayerPlan, samples: int, seqlen: int, config: Any, limit: int | None) -> dict[str, int]:
    """Of repair, block by block: the model twice, for each layer of a block its Hessian, and hidden states of all windows, or of two where
    the others go to host memory (`models/states.py`).
    """
    chosen = [choice for choice in layers.choices if choice.selected]
    hessians: Counter[int | None] = Counter()
    for choice in chosen:
        hessians[choice.block] += 4 * choice.shape[1] ** 2
    itemsize = next(model.parameters()).itemsize
    width = getattr(config.get_text_config(), "hidden_size", None) or min(choice.shape[1] for choice in chosen)
    others = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "pretrained": itemsize * sum(math.prod(choice.shape) for choice in chosen),
        "Hessians": max(hessians.values()),
        "workspace": CONJUGATE_GRADIENTS * 4 * max(math.prod(choice.shape) for choice in chosen),
    }
    states = itemsize * samples * seqlen * width
    fit = limit is None or states <= SHARE * (limit - sum(others.values()))
    return {**others, "hidden states": states if fit else 2 * itemsize * seqlen * width}


def _seconds(step: memory.StepMemory, steps: int, dtype: torch.dtype, device_name: str | None) -> float | None:
    rate = next((rates for name, rates in GPUS.items() if device_name and re.search(name, device_name)), None)
    if rate is None:
        return None
    flops = rate[0] * 1e12 * UTILISATION / (1 if dtype == torch.bfloat16 else 2)
    # The optimiser reads what is kept, and the gradients twice, for their norm and for the step; it writes all but W0.
    moved = 2 * sum(step.kept.values()) - step.kept["pretrained"] + 2 * step.kept["weights"]
    return steps * (step.step.flops / flops + moved / (rate[1] * 1e12 * BANDWIDTH))


@dataclass(frozen=True)
class RunPlan:
    """The prediction for one run. memory: bytes of the GPU it is held against; None where none is known.

    change: options that make it fit, () where none are needed or none help; then `changed` is the plan with them.
    """

    plan: MemoryPlan
    memory: int | None
    change: tuple[str, ...] = ()
    changed: MemoryPlan | None = None

    @property
    def fits(self) -> bool | None:
        return None if self.memory is None else memory.fits(self.plan.peak, self.memory)


# What to change, each on top of those before: first what costs time, then what costs quality.
REMEDIES: tuple[tuple[str, Any], ...] = (
    ("checkpointing", True),
    ("dtype", torch.bfloat16),
    ("batch_size", 1),
    ("moments", "bfloat16"),
    ("moments", "int8"),
    ("weight_bits", 16),
    ("clip_mode", "none"),
)


def plan_run(config: RunConfig) -> RunPlan:
    """Peak memory and time of `pipeline.prune(config)`, from the model's configuration alone.

    Raises: ConfigError: a method other than proxsparse. ModelError: see `predict`.
    """
    settings = build_method(config.method, config.settings)
    if not isinstance(settings, ProxSparse):
        raise ConfigError(f"plan: expected --method proxsparse, got {config.method}. Other methods need the model and little more.")
    source = config_source(config.model, config.revision)
    model_config = load_config(source, trust_remote_code=config.trust_remote_code)
    if source.weight_files:
        skeleton(source, model_config, trust_remote_code=config.trust_remote_code)  # which looks at the sizes, before they are counted with
    in_files = bool(source.weight_files) and source.is_safetensors
    gpu = torch.cuda.get_device_properties(0) if config.place == "cuda" and torch.cuda.is_available() else None
    limit = config.memory or (gpu.total_memory if gpu else None)
    arguments: dict[str, Any] = {
        "seqlen": checked_seqlen(config.seqlen, model_config),
        "device_name": gpu.name if gpu else None,
        "samples": config.samples,
        "repair": config.repairing(),
        "limit": limit,
        "stored": stored_dtype(source.weight_files) if in_files else getattr(model_config, "dtype", None),
        "include": config.include,
        "skip": config.skip,
        "trust_remote_code": config.trust_remote_code,
    }
    plan = predict(model_config, config.torch_dtype, settings, **arguments)
    run = RunPlan(plan, limit)
    return run if run.fits in (True, None) else _remedied(run, model_config, config.torch_dtype, settings, arguments)


def _remedied(run: RunPlan, model_config: Any, dtype: torch.dtype, settings: ProxSparse, arguments: dict[str, Any]) -> RunPlan:
    """`run` with the first remedies that make it fit."""
    plan, options = run.plan, {}
    for name, value in REMEDIES:
        now: Any = dtype if name == "dtype" else getattr(plan.settings, name)
        if now == value or (name == "moments" and memory.MOMENT_BYTES[now] <= memory.MOMENT_BYTES[value]):
            continue
        if name == "dtype":
            dtype = value
        else:
            settings = dataclasses.replace(settings, **{name: value})
        option = f"--{name.replace('_', '-')}"
        options[option] = option if value is True else f"{option} {str(value).removeprefix('torch.')}"
        try:
            plan = predict(model_config, dtype, settings, **arguments)
        except ConfigError:  # no activation checkpointing in this model
            settings = dataclasses.replace(settings, checkpointing=None)
            del options[option]
            continue
        if run.memory is not None and memory.fits(plan.peak, run.memory):
            return dataclasses.replace(run, change=tuple(options.values()), changed=plan)
    return run


def config_source(spec: str, revision: str | None) -> ModelSource:
    """The model's configuration; a folder need hold no more, and of a Hub id only the small files are fetched.

    Raises: ModelError: no model, or it cannot be fetched.
    """
    if spec == DEMO or os.path.exists(os.path.expanduser(spec)):
        return without_weights(spec) or resolve_model(spec, revision=revision)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(spec, revision=revision, allow_patterns=["*.json", "*.py"], ignore_patterns="*/*"))
    except Exception as error:  # whatever a download raises: it failed, and --debug shows why
        raise ModelError(
            f"{spec}: expected a model folder or a Hub id that can be fetched, got {one_line(error)}. Check the spelling and the network."
        ) from error
    return ModelSource(spec, folder, folder.name, ())
