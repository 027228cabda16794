"""`pst bench prox`: the proximal operator alone, against the published algorithm and against a copy of the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import BackendError, ConfigError
from ..ops import prox_24
from ..ops.dispatch import choose_backend
from ..progress import SILENT, Progress
from ..reference import prox as reference
from ..reference.block import objective
from ..sparsity import BLOCK
from .published import compiled_sweeper, published_prox, sweep
from .table import Row
from .timer import Machine, Rival, Roof, Timing, measure, scratch_bytes

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # every linear layer of Llama-2-7B, out x in
LAMBDAS = (0.001, 0.005, 0.02, 0.1, 0.5)  # lam * scale: the paper's Llama-2-7B has 0.25 * 0.02
SIGMA = 0.02  # rms of the weights of a language model
NEAR_TIES = "near-ties"
# The published algorithm takes hundreds of milliseconds: unless asked for everywhere it runs on one shape and two strengths.
RIVAL_SHAPE, RIVAL_LAMBDAS = SHAPES[2], (0.005, 0.5)
RIVAL_EVERY = 10  # rounds
CPU_SHAPE, CPU_LAMBDAS = (512, 1024), (0.005, 0.5)
# A block is solved worse when its objective exceeds the reference's by more than this share of |z|^2 / 2. Two roundings of one solution
# to bf16 lie 2^-8 apart at most, and the objective, flat at a minimum, moves by 2^-16 times the sum of its second derivatives.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-14}
CHECKED_WEIGHTS = 1 << 22  # at a time: the reference and fp64 objectives need some 100 bytes a weight
COPY = "copy of the same tensor"


@dataclass(frozen=True)
class Case:
    """One input: normal weights of rms SIGMA, or blocks of four magnitudes that differ by 1e-3 to 1e-1, where candidates compete."""

    dtype: torch.dtype
    shape: tuple[int, int]
    lam_scale: float
    near_ties: bool = False

    @property
    def lam(self) -> float:
        return self.lam_scale / SIGMA

    @property
    def name(self) -> str:
        kind = f", {NEAR_TIES}" if self.near_ties else ""
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape[0]}x{self.shape[1]}, lam*scale {self.lam_scale:g}{kind}"

    def weights(self, device: torch.device, seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        rows, columns = self.shape
        draw = partial(torch.randn, generator=generator, device=device)
        uniform = partial(torch.rand, generator=generator, device=device)
        if not self.near_ties:
            return (SIGMA * draw(rows, columns)).to(self.dtype)
        blocks = columns // BLOCK
        spread = 10 ** (-3 + 2 * uniform(rows, blocks, 1))
        z = SIGMA * (0.5 + uniform(rows, blocks, 1)) * (1 + spread * draw(rows, blocks, BLOCK))
        return torch.where(uniform(rows, blocks, BLOCK) < 0.5, -z, z).flatten(1).to(self.dtype)


@dataclass(frozen=True)
class ProxBench:
    """lambdas: lam * scale. rival: the published algorithm in all cases, in none, or (None) in RIVAL_SHAPE with RIVAL_LAMBDAS."""

    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    shapes: tuple[tuple[int, int], ...] | None = None
    lambdas: tuple[float, ...] | None = None
    rival: bool | None = None

    def __post_init__(self) -> None:
        for lam in self.lambdas or ():
            if not (math.isfinite(lam) and lam > 0):
                raise ConfigError(f"bench prox: expected a finite --lambda > 0, got {lam}. Choose another value.")
        check_shapes("bench prox", self.shapes or ())

    def run(self, place: Machine, progress: Progress = SILENT) -> Iterator[Row]:
        """One row per way to do the work and case.

        Raises: BackendError: an answer worse than the reference's; nothing is timed then.
        """
        roof = Roof(place)
        cases = self._cases(place)
        with progress.task("prox", total=len(cases)) as bar:
            for case in cases:
                yield from _measured(case, place, roof, self._with_rivals(case, place))
                bar.advance(case=case.name)

    def _cases(self, place: Machine) -> list[Case]:
        on_cpu = place.device.type == "cpu"
        shapes = self.shapes or ((CPU_SHAPE,) if on_cpu else SHAPES)
        lambdas = self.lambdas or (CPU_LAMBDAS if on_cpu else LAMBDAS)
        cases = []
        for dtype in (getattr(torch, name) for name in self.dtypes):
            for shape in shapes:
                cases += [Case(dtype, shape, lam) for lam in lambdas]
                # The hard regime, at lam * scale about 1; left out where strengths are asked for.
                cases += [] if self.lambdas else [Case(dtype, shape, 1.0, near_ties=True)]
        return cases

    def _with_rivals(self, case: Case, place: Machine) -> bool:
        if self.rival is not None:
            return self.rival
        return place.device.type != "cpu" and case.shape == RIVAL_SHAPE and case.lam_scale in RIVAL_LAMBDAS


def check_shapes(function: str, shapes: Sequence[tuple[int, int]]) -> None:
    """ConfigError unless every shape is a weight matrix of whole blocks."""
    for rows, columns in shapes:
        if rows < 1 or columns < BLOCK or columns % BLOCK:
            raise ConfigError(f"{function}: expected --shape OUTxIN with IN divisible by {BLOCK}, got {rows}x{columns}. Choose another.")


def _measured(case: Case, place: Machine, roof: Roof, rivals: bool) -> list[Row]:
    first = case.weights(place.device, 0)
    inputs = [first, *(case.weights(place.device, seed) for seed in range(1, place.copies(2 * first.nbytes)))]
    outputs = [torch.empty_like(z) for z in inputs]
    ours = f"prox_24 ({choose_backend('bench prox', first, None)})"

    def solve() -> None:
        for z, out in zip(inputs, outputs, strict=True):
            prox_24(z, case.lam, out=out)

    def copy() -> None:
        for z, out in zip(inputs, outputs, strict=True):
            out.copy_(z)

    prox_24(first, case.lam, out=outputs[0])
    worse = {ours: worse_blocks(case, first, outputs[0])}
    if worse[ours]:
        raise BackendError(
            f"bench prox: expected answers as good as the reference's, got {worse[ours]:.2%} of the blocks solved worse ({case.name}). "
            "Nothing is timed that is wrong: please report it."
        )
    scratch = {ours: scratch_bytes(lambda: prox_24(first, case.lam, out=outputs[0]), place.device)}
    contestants = [Rival(ours, solve, len(inputs)), Rival(COPY, copy, len(inputs))]
    for name, work in _published(case, first, place).items() if rivals else ():
        worse[name] = worse_blocks(case, first, work())
        scratch[name] = scratch_bytes(work, place.device, first.nbytes)
        contestants.append(Rival(name, work, capture=False, every=min(RIVAL_EVERY, place.rounds)))
    timings = measure([*contestants, roof.rival], place.clock, place.rounds)
    return [
        _row(case, rival.name, timings, roof, ours) | {"scratch_bytes": scratch.get(rival.name), "worse_blocks": worse.get(rival.name)}
        for rival in contestants
    ]


def _published(case: Case, z: Tensor, place: Machine) -> Mapping[str, Callable[[], Tensor]]:
    """The published algorithm, eager and (on a GPU) compiled."""
    found: dict[str, Callable[[], Tensor]] = {"published, eager": lambda: published_prox(z, case.lam, sweep)}
    if place.device.type != "cpu":
        found["published, torch.compile"] = lambda: published_prox(z, case.lam, compiled_sweeper())
    return found


def worse_blocks(case: Case, z: Tensor, actual: Tensor) -> float:
    """Share of blocks that an answer solves worse than the reference by more than the tolerance; NaNs count as worse."""
    rows = max(1, CHECKED_WEIGHTS // z.shape[1])
    parts = zip(z.split(rows), actual.split(rows), strict=True)
    counts = [_gaps(a, reference.prox_24(part, case.lam), part, case.lam) for part, a in parts]
    wrong = sum(int((~(gaps <= TOLERANCE[case.dtype])).sum()) for gaps in counts)
    return wrong / (z.numel() // BLOCK)


def _gaps(actual: Tensor, expected: Tensor, z: Tensor, lam: float) -> Tensor:
    """objective(actual) - objective(expected) of each block in units of |z|^2 / 2, in fp64."""
    a, e, u = (x.double().unflatten(-1, (-1, BLOCK)) for x in (actual, expected, z))
    size: Tensor = (0.5 * u.square().sum(-1)).clamp_min(torch.finfo(torch.float64).tiny)
    return (objective(a, u, lam) - objective(e, u, lam)).div(size)


def bytes_per_weight(dtype: torch.dtype) -> int:
    """z is read once and w written once: 4 bytes in bf16, 8 in fp32."""
    return 2 * dtype.itemsize


def _row(case: Case, name: str, timings: Mapping[str, Timing], roof: Roof, ours: str) -> Row:
    return {
        "bench": "prox",
        "what": name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": f"{case.shape[0]}x{case.shape[1]}",
        "blocks": NEAR_TIES if case.near_ties else "normal",
        "lam_scale": case.lam_scale,
        **roof.figures(timings, name, bytes_per_weight(case.dtype) * math.prod(case.shape)),
        "times_ours": timings[name].us / timings[ours].us,
    }
