"""`pst bench masked`: W0 under the mask of the learned weights, formed twice a step, against torch and a sum of the same tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import BackendError
from ..ops import masked_weight_24
from ..ops.dispatch import choose_backend
from ..progress import SILENT, Progress
from ..reference import masked as reference
from ..sparsity import BLOCK, KEPT
from .prox import CPU_SHAPE, SHAPES, SIGMA, check_shapes
from .table import Row
from .timer import Machine, Rival, Roof, Timing, measure, scratch_bytes

SCATTER, COMPILED, SUM = "topk and scatter, eager", "reference, torch.compile", "sum of the same tensors"


@dataclass(frozen=True)
class MaskedBench:
    """The learned weights in `dtypes`, W0 in bf16, with a column scale."""

    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    shapes: tuple[tuple[int, int], ...] | None = None
    rival: bool = True

    def __post_init__(self) -> None:
        check_shapes("bench masked", self.shapes or ())

    def run(self, place: Machine, progress: Progress = SILENT) -> Iterator[Row]:
        """One row per way to do the work, dtype and shape.

        Raises: BackendError: an answer that is not the reference's, bit for bit; nothing is timed then.
        """
        roof = Roof(place)
        shapes = self.shapes or ((CPU_SHAPE,) if place.device.type == "cpu" else SHAPES)
        cases = [(getattr(torch, name), shape) for name in self.dtypes for shape in shapes]
        with progress.task("masked", total=len(cases)) as bar:
            for dtype, shape in cases:
                yield from self._measured(dtype, shape, place, roof)
                bar.advance(case=f"{dtype} {shape[0]}x{shape[1]}")

    def _measured(self, dtype: torch.dtype, shape: tuple[int, int], place: Machine, roof: Roof) -> list[Row]:
        generator = torch.Generator(place.device).manual_seed(0)
        scale = 0.5 + torch.rand(shape[1], generator=generator, device=place.device)

        def draw(kind: torch.dtype) -> Tensor:
            return (SIGMA * torch.randn(shape, generator=generator, device=place.device)).to(kind)

        traffic = bytes_per_weight(dtype) * math.prod(shape)
        inputs = [
            (draw(dtype), draw(torch.bfloat16), torch.empty(shape, dtype=dtype, device=place.device)) for _ in range(place.copies(traffic))
        ]
        ours = f"masked_weight_24 ({choose_backend('bench masked', inputs[0][0], None)})"
        ways = _ways(ours, scale, place, rival=self.rival)
        w, w0, out = inputs[0]
        expected = reference.masked_weight_24(w, w0, column_scale=scale)
        scratch = {}
        for name, way in ways.items():
            way(w, w0, out)
            if name != SUM and not torch.equal(out, expected):
                raise BackendError(
                    f"bench masked: expected {name} to give the reference's answer, got another ({dtype}, {shape[0]}x{shape[1]}). "
                    "Nothing is timed that is wrong: please report it."
                )
            scratch[name] = scratch_bytes(partial(way, w, w0, out), place.device)

        def over_all(way: Callable[[Tensor, Tensor, Tensor], object]) -> Callable[[], None]:
            def work() -> None:
                for one in inputs:
                    way(*one)

            return work

        rivals = [Rival(name, over_all(way), len(inputs)) for name, way in ways.items()]
        timings = measure([*rivals, roof.rival], place.clock, place.rounds)
        return [_row(dtype, shape, name, timings, roof, ours) | {"scratch_bytes": scratch[name]} for name in ways]


def _ways(ours: str, scale: Tensor, place: Machine, *, rival: bool) -> Mapping[str, Callable[[Tensor, Tensor, Tensor], object]]:
    """Each writes its answer to its third argument. The sum is no rival: it moves the same bytes and does next to nothing with them."""
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
        ours: lambda w, w0, out: masked_weight_24(w, w0, column_scale=scale, out=out),
        SUM: lambda w, w0, out: torch.add(w, w0, out=out),
    }
    if rival:
        ways[SCATTER] = lambda w, w0, out: out.copy_(_scattered(w, w0, scale))
        if place.device.type != "cpu":
            ways[COMPILED] = torch.compile(lambda w, w0, out: out.copy_(reference.masked_weight_24(w, w0, column_scale=scale)))
    return ways


def _scattered(w: Tensor, w0: Tensor, scale: Tensor) -> Tensor:
    """As one writes it in a line of torch; ties are whatever topk makes of them."""
    scores = (w.float().abs() * scale).unflatten(-1, (-1, BLOCK))
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(KEPT, -1).indices, True)
    return torch.where(mask.flatten(-2), w0.to(w.dtype), 0.0)


def bytes_per_weight(dtype: torch.dtype) -> int:
    """w and a bf16 W0 are read once and the answer written once: 6 bytes in bf16, 10 in fp32."""
    return 2 * dtype.itemsize + torch.bfloat16.itemsize


def _row(dtype: torch.dtype, shape: tuple[int, int], name: str, timings: Mapping[str, Timing], roof: Roof, ours: str) -> Row:
    return {
        "bench": "masked",
        "what": name,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": f"{shape[0]}x{shape[1]}",
        **roof.figures(timings, name, bytes_per_weight(dtype) * math.prod(shape)),
        "times_ours": timings[name].us / timings[ours].us,
    }
