"""`pst bench learn`: the whole learning loop at the shapes of real models, against the same loop with plain AdamW and no prox."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ResourceError
from ..evaluation.memory import is_out_of_memory, peak_memory, reset_peak_memory
from ..methods.proxsparse import ClipMode, Moments, ProxSparse
from ..models.selection import plan_layers
from ..planning import MemoryPlan, predict
from ..progress import SILENT, Progress
from ..training.batches import Batch
from ..training.loop import learn
from ..training.loss import NextTokenLoss
from ..training.memory import checkpointing
from .shapes import MODELS, TINY, build, config_of, step_flops
from .table import Row
from .timer import Machine, Timing, matmul_rate, summary

OURS, PLAIN = "ProxAdamW", "plain AdamW, no prox"
TURNS = 2  # of each loop, alternating
SKIPPED = 3  # first steps of a turn: kernels are compiled, the state is allocated
TOKENS, TINY_TOKENS = 4096, 64
LAMBDA1, LAMBDA2, FROZEN_EPS, LR = 0.25, 0.25, 0.5, 1e-4  # published; none of them changes the time of a step but lambda2 = 0
RUN_STEPS = 400  # of the paper


@dataclass(frozen=True)
class LearnBench:
    """lambda2 0: off. weight_bits, moments, checkpointing: as `pst prune` has them; None: its default for the model and this GPU."""

    models: tuple[str, ...] | None = None
    steps: int = 20
    tokens: int | None = None
    lambda2: float = LAMBDA2
    weight_bits: int | None = None
    moments: Moments | None = None
    checkpointing: bool | None = None
    clip_mode: ClipMode = "total"
    recipe: str = "paper"
    loss: Literal["kl", "ce"] | None = None
    rival: bool = True

    def __post_init__(self) -> None:
        for option, value, least in (("--steps", self.steps, 2), ("--tokens", TOKENS if self.tokens is None else self.tokens, 2)):
            if value < least:
                raise ConfigError(f"bench learn: expected {option} of at least {least}, got {value}. Choose another value.")
        if not (math.isfinite(self.lambda2) and self.lambda2 >= 0):
            raise ConfigError(f"bench learn: expected a finite --lambda2 >= 0, got {self.lambda2}. Choose another value.")
        for name in self.models or ():
            if name not in MODELS:
                raise ConfigError(f"bench learn: expected --model of {', '.join(MODELS)}, got {name!r}. Choose one of these.")

    def run(self, place: Machine, progress: Progress = SILENT) -> Iterator[Row]:
        """One row per loop and model. A loop that does not fit has a row without figures.

        Raises: ResourceError: not even the model fits.
        """
        default = TINY if place.device.type == "cpu" else next(iter(MODELS))
        for name in self.models or (default,):
            yield from self._model(name, place, progress)

    def _model(self, name: str, place: Machine, progress: Progress) -> Iterator[Row]:
        config = config_of(name)
        case = self._case(name, config, place)
        plan = case.plan
        progress.note(f"{name}: {case.precision}, predicted peak {plan.peak / 1e9:.1f} GB")
        try:
            model = build(config, place.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ResourceError(f"bench learn: expected room for {name}, got out of memory. Choose a smaller --model.") from error
        flops = step_flops(model, config, case.tokens)
        generator = torch.Generator().manual_seed(0)
        windows = list(torch.randint(config.vocab_size, (self.steps, case.tokens), generator=generator))
        loops = (OURS, PLAIN) if self.rival else (OURS,)
        turns: dict[str, list[Turn | None]] = {loop: [] for loop in loops}
        rates = []
        with progress.task(f"learn {name}", total=TURNS * len(loops)) as bar:
            for _ in range(TURNS):
                rates.append(matmul_rate(replace(place, rounds=min(place.rounds, 10))))
                for loop in loops:
                    turns[loop].append(_turn(loop, model, windows, case, place))
                    bar.advance(loop=loop)
        figures = {loop: _figures([turn for turn in turns[loop] if turn], case.tokens, flops, sum(rates) / len(rates)) for loop in loops}
        for loop in loops:
            yield _row(loop, case, self.steps, figures)

    def _case(self, name: str, config: Any, place: Machine) -> Case:
        """The prediction of `pst prune --plan`, which also decides what was left open."""
        settings = ProxSparse(
            recipe=self.recipe,
            loss=self.loss,
            lambda1=LAMBDA1,
            lambda2=self.lambda2,
            frozen_eps=FROZEN_EPS,
            lr=LR,
            weight_bits=self.weight_bits,
            moments=self.moments,
            checkpointing=self.checkpointing,
            clip_mode=self.clip_mode,
        )
        gpu = torch.cuda.get_device_properties(place.device) if place.device.type == "cuda" else None
        tokens = self.tokens or (TINY_TOKENS if name == TINY else TOKENS)
        plan = predict(
            config,
            torch.bfloat16,
            settings,
            tokens,
            device_name=gpu.name if gpu else None,
            samples=RUN_STEPS,
            limit=gpu.total_memory if gpu else None,
        )
        plain = ProxSparse(recipe="paper", weight_bits=16, moments="bfloat16", checkpointing=plan.settings.checkpointing)
        return Case(name, tokens, plan, predict(config, torch.bfloat16, plain, tokens))


@dataclass(frozen=True)
class Case:
    """One model, the tokens of a step, and how it is learned."""

    name: str
    tokens: int
    plan: MemoryPlan
    plain: MemoryPlan  # of the rival: all parameters learn from cross-entropy, bf16 moments, neither W0 nor residuals

    @property
    def precision(self) -> str:
        settings = self.plan.settings
        stored = f"recipe {settings.recipe}, loss {settings.objective.loss}, {settings.weight_bits}-bit weights, {settings.moments} moments"
        return f"{stored}, lambda2 {settings.lambda2:g}, checkpointing {'on' if settings.checkpointing else 'off'}"

    def predicted(self, loop: str) -> int:
        """Peak bytes."""
        return self.plan.peak if loop == OURS else self.plain.peak


@dataclass(frozen=True)
class Turn:
    """Seconds of each step and of its optimiser's part, and the peak (on a GPU), of one loop from fresh state to its end."""

    steps: Sequence[float]
    optimizer: Sequence[float]
    peak: int | None


class _Marks:
    """Moments before and after every optimiser step."""

    def __init__(self, place: Machine) -> None:
        self._clock = place.clock
        self.before: list[Any] = []
        self.after: list[Any] = []

    def start(self, *_: object) -> None:
        self.before.append(self._clock.mark())

    def end(self, *_: object) -> None:
        self.after.append(self._clock.mark())

    def turn(self, place: Machine) -> Turn:
        """From the end of one optimiser step to the end of the next is one step; the first ones are left out."""
        self._clock.finish()
        counted = range(min(SKIPPED, len(self.after) - 1), len(self.after))
        steps = [self._clock.seconds(self.after[i - 1], self.after[i]) for i in counted if i]
        optimizer = [self._clock.seconds(self.before[i], self.after[i]) for i in counted if i]
        return Turn(steps, optimizer, peak_memory("cuda") if place.device.type == "cuda" else None)


def _turn(loop: str, model: nn.Module, windows: Sequence[Tensor], case: Case, place: Machine) -> Turn | None:
    """One loop from fresh state; None when memory runs out."""
    marks = _Marks(place)
    reset_peak_memory(place.device.type)
    try:
        (learn_ours if loop == OURS else learn_plain)(model, windows, case, marks)
        return marks.turn(place)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    finally:
        model.zero_grad(set_to_none=True)
        gc.collect()
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
    return None


def learn_ours(model: nn.Module, windows: Sequence[Tensor], case: Case, marks: _Marks) -> None:
    """The loop of `pst prune`, without its notes on the mask."""
    settings = case.plan.settings
    linears = {f"{name}.weight": cast(nn.Linear, model.get_submodule(name)) for name in plan_layers(model).selected()}
    device = next(model.parameters()).device
    scaled = settings.recipe == "auto"  # their values change no time
    scales = {name: torch.ones(linear.in_features, device=device) for name, linear in linears.items()} if scaled else {}
    with settings.objective.of(model, linears, windows[0].to(device), scales) as prepared:
        optimizer = settings.optimizer(model, linears, len(windows), scales)
        optimizer.register_step_pre_hook(marks.start)
        optimizer.register_step_post_hook(marks.end)
        config = replace(settings.loop_config(len(windows), checkpointing=bool(settings.checkpointing)), epochs=1)
        learn(model, windows, optimizer, config, prepared.loss)


def learn_plain(model: nn.Module, windows: Sequence[Tensor], case: Case, marks: _Marks) -> None:
    """The same loss and checkpointing, clipping by torch, torch's fused AdamW, and no figures fetched. Clipping counts as optimiser."""
    device = next(model.parameters()).device
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    loss_of = NextTokenLoss(model, windows[0].to(device))
    model.train()
    with checkpointing(model, bool(case.plan.settings.checkpointing)):
        for window in windows:
            loss_of(Batch(window[None], None).to(device)).backward()
            marks.start()
            nn.utils.clip_grad_norm_(parameters, case.plan.settings.clip)
            optimizer.step()
            marks.end()
            optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Figures:
    step: Timing
    optimizer: Timing
    peak: int | None
    tokens_per_second: float
    mfu: float
    matmul_rate: float


def _figures(turns: Sequence[Turn], tokens: int, flops: int, rate: float) -> Figures | None:
    if not turns:
        return None
    step = summary([seconds for turn in turns for seconds in turn.steps])
    optimizer = summary([seconds for turn in turns for seconds in turn.optimizer])
    peaks = [turn.peak for turn in turns if turn.peak is not None]
    return Figures(step, optimizer, max(peaks, default=None), tokens / step.median, flops / step.median / rate, rate)


def _row(loop: str, case: Case, steps: int, figures: Mapping[str, Figures | None]) -> Row:
    mine, plain, settings = figures[loop], figures.get(PLAIN), case.plan.settings
    ours = loop == OURS
    row: Row = {
        "bench": "learn",
        "what": loop,
        "model": case.name,
        "tokens": case.tokens,
        "steps": steps,
        "recipe": settings.recipe if ours else None,
        "loss": settings.objective.loss if ours else "ce",
        "lambda2": settings.lambda2 if ours else None,
        "weight_bits": settings.weight_bits if ours else 16,
        "moments": settings.moments if ours else "bfloat16",
        "checkpointing": "on" if settings.checkpointing else "off",
        "clip": settings.clip_mode if ours else "loss",
        "predicted_bytes": case.predicted(loop),
    }
    if mine is None:
        return row | {"note": "out of memory"}
    return row | {
        "peak_bytes": mine.peak,
        "ms": 1e3 * mine.step.median,
        "ms_20": 1e3 * mine.step.low,
        "ms_80": 1e3 * mine.step.high,
        "predicted_ms": 1e3 * case.plan.seconds / case.plan.steps if ours and case.plan.seconds else None,
        "tokens_per_s": mine.tokens_per_second,
        "mfu": mine.mfu,
        "matmul_tflops": mine.matmul_rate / 1e12,
        "optimizer_ms": 1e3 * mine.optimizer.median,
        "optimizer_share": mine.optimizer.median / mine.step.median,
        "minutes_400_steps": RUN_STEPS * mine.step.median / 60,
        "to_plain": None if plain is None else mine.step.median / plain.step.median,
        "samples": mine.step.samples,
    }
