"""`pst bench step`: one fused optimiser step (penalty, AdamW, prox, rounding) against torch's fused AdamW and against a copy."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BackendError, ConfigError
from ..ops import gradient_square, prox_adamw_
from ..ops.dispatch import choose_backend
from ..optim.state import Precision, fresh, local_state
from ..progress import SILENT, Progress
from ..step import MOMENT_GROUP, AdamState, StepSettings
from .prox import SHAPES, SIGMA, check_shapes
from .table import Row
from .timer import Machine, Rival, Roof, Timing, measure

LAM_SCALE = 0.005  # lambda1 * rms: the paper's Llama-2-7B
LAMBDA2, FROZEN_EPS = 0.25, 0.5  # the published Llama-2-13B
CPU_SHAPE = (512, 1024)
CHECKED_ROWS = 256
ADAMW = "torch AdamW(fused=True)"
STEP, STEP_LAMBDA2, NORM = "fused step", "fused step, lambda2", "norm pass, lambda2"
# Values agree within this share of themselves and a hundredth of the mean: one unit in the last place of bf16. A few may fall on the other
# side of a rounding or of the prox's decision.
CLOSE, CLOSE_SHARE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-7}, 0.9995


@dataclass(frozen=True)
class Storage:
    """How weights and moments are kept between steps."""

    dtype: torch.dtype
    moments: str
    weight_bits: int

    @property
    def name(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}, moments {self.moments}, {self.weight_bits} bits"

    @property
    def precision(self) -> Precision:
        return Precision(self.weight_bits if self.dtype == torch.bfloat16 else None, self.moments)

    @property
    def like_torch(self) -> bool:
        """Whether torch's AdamW keeps the same: its moments have the dtype of the weight, so bf16 with fp32 moments is not possible."""
        return self.weight_bits == 8 * self.dtype.itemsize and self.moments == str(self.dtype).removeprefix("torch.")


STORAGES = (
    Storage(torch.float32, "float32", 32),
    Storage(torch.bfloat16, "float32", 16),
    Storage(torch.bfloat16, "bfloat16", 16),
    Storage(torch.bfloat16, "bfloat16", 24),
    Storage(torch.bfloat16, "int8", 16),
)


def step_bytes(storage: Storage, lambda2: bool) -> float:
    """Bytes per weight of one step, each counted once.

    w and its residual, m and v are read and written, the gradient is read; with lambda2 W0 is read, in bf16 as checkpoints are (+ 2).
    fp32: 28; bf16 with fp32 moments 22, with bf16 moments 14, these with 24-bit weights 16, with 8-bit moments 10.125.
    """
    weight = storage.dtype.itemsize
    residual = 2 * (storage.weight_bits // 8 - weight)
    moments = 4 * {"float32": 4, "bfloat16": 2, "int8": 1}[storage.moments]
    scales = 2 * 2 * 4 / MOMENT_GROUP if storage.moments == "int8" else 0
    return 2 * weight + residual + moments + scales + weight + (2 if lambda2 else 0)


def adamw_bytes(storage: Storage) -> int:
    """Bytes per weight of torch's AdamW: w, m, v read and written, the gradient read, all of w's dtype."""
    return 7 * storage.dtype.itemsize


def norm_bytes(storage: Storage) -> int:
    """Bytes per weight of the norm pass: w, W0 in bf16 and the gradient read."""
    return 2 * storage.dtype.itemsize + 2


@dataclass(frozen=True)
class StepBench:
    """lambdas: lambda1 * rms of the weights."""

    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    shapes: tuple[tuple[int, int], ...] | None = None
    lambdas: tuple[float, ...] = (LAM_SCALE,)
    lambda2: float = LAMBDA2
    rival: bool = True

    def __post_init__(self) -> None:
        check_shapes("bench step", self.shapes or ())
        for option, values, rule in (("--lambda", self.lambdas, ">= 0"), ("--lambda2", (self.lambda2,), "> 0")):
            for value in values:
                if not (math.isfinite(value) and value >= 0) or (rule == "> 0" and value == 0):
                    raise ConfigError(f"bench step: expected a finite {option} {rule}, got {value}. Choose another value.")

    def run(self, place: Machine, progress: Progress = SILENT) -> Iterator[Row]:
        """One row per way to do the work, storage and shape.

        Raises: BackendError: a step that differs from the reference's; nothing is timed then.
        """
        roof = Roof(place)
        shapes = self.shapes or ((CPU_SHAPE,) if place.device.type == "cpu" else SHAPES)
        storages = [storage for storage in STORAGES if str(storage.dtype).removeprefix("torch.") in self.dtypes]
        if self.rival and any(not storage.like_torch for storage in storages):
            progress.note("AdamW has no row where its moments cannot be stored alike: torch keeps moments in the dtype of the weights.")
        with progress.task("step", total=len(storages) * len(shapes) * len(self.lambdas)) as bar:
            for storage in storages:
                for lam in self.lambdas:
                    settings = step_settings(storage, lam, self.lambda2)
                    check_against_reference(storage, settings, place)
                    for shape in shapes:
                        yield from _measured(storage, shape, settings, place, roof, self.rival and storage.like_torch)
                        bar.advance(case=f"{storage.name}, {shape[0]}x{shape[1]}")


def step_settings(storage: Storage, lam_scale: float, lambda2: float) -> StepSettings:
    return StepSettings(
        lr=1e-4,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        step=100,
        lambda1=lam_scale / SIGMA,
        lambda2=lambda2,
        frozen_eps=FROZEN_EPS,
        stochastic=storage.dtype == torch.bfloat16,
        seed=1,
    )


@dataclass(frozen=True)
class Parameter:
    """Everything one step touches, and the weights it starts from."""

    w: Tensor
    grad: Tensor
    w0: Tensor
    state: AdamState
    start: Tensor


def parameter(storage: Storage, shape: tuple[int, int], device: torch.device, seed: int) -> Parameter:
    generator = torch.Generator(device).manual_seed(seed)
    w0 = (SIGMA * torch.randn(shape, generator=generator, device=device)).bfloat16()
    w = (w0 + 1e-3 * torch.randn(shape, generator=generator, device=device)).to(storage.dtype)
    grad = (1e-3 * torch.randn(shape, generator=generator, device=device)).to(storage.dtype)
    return Parameter(w, grad, w0, local_state(fresh(w, storage.precision)), w.clone())


def fused_step(p: Parameter, settings: StepSettings, lambda2: bool, backend: str | None = None) -> Tensor:
    return prox_adamw_(p.w, p.grad, p.state, settings, w0=p.w0 if lambda2 else None, backend=backend)


def check_against_reference(storage: Storage, settings: StepSettings, place: Machine) -> None:
    """Two steps with and without lambda2 on a few rows of a real width: the same weights, moments and statistics as the reference's.

    Raises: BackendError.
    """
    for lambda2 in (True, False):
        actual = parameter(storage, (CHECKED_ROWS, SHAPES[0][1]), place.device, 0)
        expected = copy.deepcopy(actual)
        for _ in range(2):
            figures = fused_step(actual, settings, lambda2)
            wanted = fused_step(expected, settings, lambda2, "reference")
        pairs = [
            (actual.w, expected.w),
            (actual.state.exp_avg, expected.state.exp_avg),
            (actual.state.exp_avg_sq, expected.state.exp_avg_sq),
        ]
        alike = min(_share_alike(a, e, CLOSE[storage.dtype]) for a, e in pairs)
        same = bool(torch.allclose(figures[:2], wanted[:2], rtol=1e-4)) and bool(figures[3] == wanted[3])
        if alike < CLOSE_SHARE or not same:
            what = (
                f"{1 - alike:.2%} of the values differ" if alike < CLOSE_SHARE else f"statistics {figures.tolist()}, not {wanted.tolist()}"
            )
            raise BackendError(
                f"bench step: expected the reference's step, got {what} ({storage.name}, lambda2 {'on' if lambda2 else 'off'}). "
                "Nothing is timed that is wrong: please report it."
            )


def _share_alike(actual: Tensor, expected: Tensor, tolerance: float) -> float:
    """Share of values within the tolerance; 8-bit codes within 1."""
    a, e = actual.float(), expected.float()
    allowed = torch.ones_like(e) if not actual.is_floating_point() else tolerance * (e.abs() + 0.01 * e.abs().mean())
    return float(((a - e).abs() <= allowed).float().mean())


def _measured(storage: Storage, shape: tuple[int, int], settings: StepSettings, place: Machine, roof: Roof, rival: bool) -> list[Row]:
    weights = math.prod(shape)
    count = place.copies(math.ceil(weights * step_bytes(storage, False)))
    parameters = [parameter(storage, shape, place.device, seed) for seed in range(count)]

    def work(one: Callable[[Parameter], object]) -> Callable[[], object]:
        return lambda: [one(p) for p in parameters]

    def reset() -> None:
        # Else the prox would meet weights that hundreds of steps have made 2:4.
        torch._foreach_copy_([p.w for p in parameters], [p.start for p in parameters])

    contestants = [
        Rival(STEP_LAMBDA2, work(lambda p: fused_step(p, settings, True)), count, reset=reset),
        Rival(STEP, work(lambda p: fused_step(p, settings, False)), count, reset=reset),
        Rival(NORM, work(lambda p: gradient_square(p.w, p.w0, settings.lambda2, settings.frozen_eps, p.grad)), count),
    ]
    moved = {STEP_LAMBDA2: step_bytes(storage, True), STEP: step_bytes(storage, False), NORM: norm_bytes(storage)}
    if rival:
        contestants.append(Rival(ADAMW, _adamw(parameters, settings), count))
        moved[ADAMW] = adamw_bytes(storage)
    timings = measure([*contestants, roof.rival], place.clock, place.rounds)
    backend = choose_backend("bench step", parameters[0].w, None)
    facts = {
        "dtype": str(storage.dtype).removeprefix("torch."),
        "moments": storage.moments,
        "weight_bits": storage.weight_bits,
        "shape": f"{shape[0]}x{shape[1]}",
        "lam_scale": settings.lambda1 * SIGMA,
        "backend": backend,
    }
    return [_row(name, facts, moved[name], weights, timings, roof) for name in moved]


def _adamw(parameters: Sequence[Parameter], settings: StepSettings) -> Callable[[], object]:
    """The step of one torch optimiser over tensors of its own, as many and as large."""
    own = []
    for p in parameters:
        tensor = p.start.clone().requires_grad_()
        tensor.grad = p.grad.clone()
        own.append(tensor)
    optimizer = torch.optim.AdamW(
        own,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
        capturable=own[0].is_cuda,
    )
    with warnings.catch_warnings():
        # The first step, which makes the state, runs outside of a graph; torch warns of that once.
        warnings.simplefilter("ignore")
        optimizer.step()
    return optimizer.step


def _row(name: str, facts: Row, moved: float, weights: int, timings: Mapping[str, Timing], roof: Roof) -> Row:
    to_adamw = timings[name].us / timings[ADAMW].us if ADAMW in timings and name != NORM else None
    return {
        "bench": "step",
        "what": name,
        **facts,
        "bytes_per_weight": moved,
        **roof.figures(timings, name, moved * weights),
        "to_adamw": to_adamw,
    }
