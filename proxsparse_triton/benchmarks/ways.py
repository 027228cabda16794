"""The ways to multiply with a 2:4 weight that `pst bench linear` compares: each checked before it is timed, none takes others down."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BackendError
from ..evaluation.memory import is_out_of_memory
from ..inference.choice import has_kernel
from ..inference.library import CUSPARSELT, Algorithm, find_library, multiply, search_algorithm, takes
from ..inference.linear import SparseLinear
from ..inference.multiply import NO_ALGORITHM, by_kernel
from ..models.checkpoint import one_line
from ..ops import mask_24, pack_24
from ..ops.sparse_linear import on_hopper
from ..ops.sparse_linear import takes as kernel_takes
from .prox import SIGMA
from .timer import Clock, Machine, Rival, Roof, Timing, measure

DTYPE = torch.bfloat16
DENSE, KERNEL, LIBRARY, DEFAULT, UNPACKED, OURS = "dense", "kernel", "library", "library, default algorithm", "unpacked", "SparseLinear"
KERNEL_MOST = 512  # tokens, where the kernel is not the one for Hopper: it reads the weight again for every tile of them
MOST_COPIES = 64  # small weights would need thousands to exceed the L2 cache, and each is a launch
UNPACKED_LEAST = 64  # tokens: unpacking alone takes longer than the dense product of fewer

CHECKED_TOKENS = 256
# Rounding to bf16 moves an answer by 2^-9 of itself or less on average; rounding the sums of parts of a row, as some libraries do, by as
# much of the answers' rms. How far all answers together may be from the exact ones, as a share of their norm, and each one, as a share of
# itself and the rms.
TOLERANCE, EACH = 2.0**-7, 2.0**-4

Shape = tuple[int, int]
Failures = dict[str, str]  # name of a way -> why it has no figures


@dataclass(frozen=True)
class Layer:
    """One 2:4 weight, dense with zeros and packed, in copies that exceed the L2 cache together."""

    dense: Sequence[Tensor]
    packed: Sequence[SparseLinear]

    @classmethod
    def random(cls, shape: Shape, place: Machine, tokens: int) -> Layer:
        """tokens: the fewest that will be multiplied; more need fewer copies."""
        generator = torch.Generator(place.device).manual_seed(0)
        w = (SIGMA * torch.randn(shape, generator=generator, device=place.device)).to(DTYPE)
        mask = mask_24(w.abs())
        w.masked_fill_(~mask, 0)  # +0.0, which a product with the mask would not give
        values, metadata = pack_24(w, mask)
        copies = range(min(place.copies(traffic(shape, tokens)), MOST_COPIES))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the library refuses the shape: its row says so
            return cls([w.clone() for _ in copies], [SparseLinear.from_packed(values, metadata) for _ in copies])

    @property
    def shape(self) -> Shape:
        out_features, in_features = self.dense[0].shape
        return out_features, in_features


def traffic(shape: Shape, tokens: int, *, packed: bool = False) -> int:
    """Bytes that must move in bf16: x read and y written once, 2 bytes each, and the weight read once.

    2 bytes a weight if dense; packed 9/8: half of the weights, and a nibble for four.
    """
    out_features, in_features = shape
    return 2 * tokens * (in_features + out_features) + out_features * in_features * (9 if packed else 16) // 8


@dataclass(frozen=True)
class Way:
    """One way to multiply x with copy `index` of the weight."""

    name: str
    call: Callable[[int], Tensor]
    algorithm: Algorithm | None = None


def reason(error: Exception) -> str:
    """Why something failed, on one line. Memory that an attempt has left behind is given back."""
    if is_out_of_memory(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return "out of memory"
    return str(error) if isinstance(error, BackendError) else one_line(error)


def all_ways(layer: Layer, x: Tensor) -> tuple[list[Way], Failures]:
    """The ways that give the right answer, dense first, and why others do not.

    Raises: BackendError: not even the dense product is right.
    """
    ways, failures = [dense_way(layer, x)], Failures()
    for name, make in ((KERNEL, _kernel_ways), (LIBRARY, _library_ways), (UNPACKED, _unpacked_ways)):
        try:
            ways += make(layer, x)
        except Exception as error:  # kernels, compilers and libraries raise anything
            failures[name] = reason(error)
    right, wrong = checked(ways, layer.dense[0], x)
    if not right or right[0].name != DENSE:
        raise BackendError(f"no dense product to compare with: {wrong[DENSE]}")
    return right, failures | wrong


def dense_way(layer: Layer, x: Tensor) -> Way:
    return Way(DENSE, lambda index: F.linear(x, layer.dense[index]))


def our_way(layer: Layer, x: Tensor) -> Way:
    return Way(OURS, lambda index: layer.packed[index](x))


def _kernel_ways(layer: Layer, x: Tensor) -> list[Way]:
    order = layer.packed[0].layout.order
    if len(x) > KERNEL_MOST and not on_hopper(x.device, order, layer.shape[1]):
        return []
    if x.is_cuda and not (has_kernel(x.device) and kernel_takes(*layer.shape, DTYPE, order)):
        raise BackendError("the kernel does not take this shape, or this card")

    def call(index: int) -> Tensor:
        packed = layer.packed[index]
        y = by_kernel(x, packed.packed, None, packed.layout, 0, packed.out_features, (len(x), packed.out_features))
        if y is None:
            raise BackendError("the kernel does not take this shape")
        return y

    return [Way(KERNEL, call)]


def _library_ways(layer: Layer, x: Tensor) -> list[Way]:
    """With the algorithm that the library finds fastest for x, and at powers of 4 tokens with its default one."""
    library = find_library(x.device)
    if library.name is None:
        raise BackendError(library.reason)
    name = library.name
    if not takes(library, DTYPE, *layer.shape):
        raise BackendError(f"{name} does not take {layer.shape[0]}x{layer.shape[1]}")

    def call(algorithm: Algorithm, index: int) -> Tensor:
        blob, layout = layer.packed[index].packed, layer.packed[index].layout
        return multiply(name, blob.view(DTYPE), layout.values(blob), layout.metadata(blob), x, None, algorithm)

    if name != CUSPARSELT:
        return [Way(LIBRARY, partial(call, NO_ALGORITHM))]
    algorithm = search_algorithm(layer.packed[0].packed.view(DTYPE), x)
    if algorithm is None:
        raise BackendError("cuSPARSELt has no algorithm for this shape")
    ways = [Way(LIBRARY, partial(call, algorithm), algorithm)]
    if math.log2(len(x)) % 2 == 0:
        ways.append(Way(DEFAULT, partial(call, NO_ALGORITHM), NO_ALGORITHM))
    return ways


def _unpacked_ways(layer: Layer, x: Tensor) -> list[Way]:
    return [Way(UNPACKED, lambda index: F.linear(x, layer.packed[index].weight))] if len(x) >= UNPACKED_LEAST else []


def checked(ways: Sequence[Way], w: Tensor, x: Tensor) -> tuple[list[Way], Failures]:
    """The ways whose answer for some tokens, the first and the last among them, is the fp32 product's, and what the others did."""
    picked = torch.linspace(0, len(x) - 1, min(len(x), CHECKED_TOKENS), device=x.device).long()
    expected = F.linear(x[picked].float(), w.float())
    size = expected.square().mean().sqrt()
    right, wrong = [], Failures()
    for way in ways:
        try:
            gap = (way.call(0)[picked].float() - expected).abs()
            error, far = float(gap.square().mean().sqrt() / size), float((gap > EACH * (expected.abs() + size)).float().mean())
        except Exception as problem:  # as above
            wrong[way.name] = reason(problem)
            continue
        if error <= TOLERANCE and far == 0:  # never of NaN
            right.append(way)
        else:
            wrong[way.name] = f"wrong: {error:.2%} from the fp32 product's answers, {far:.2%} of them far"
    return right, wrong


class _Ready:
    """A clock whose rivals have warmed up before: one that fails at it, or in a graph's capture, takes no other with it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._passes: dict[str, Callable[[], object]] = {}
        self.mark, self.finish, self.seconds = clock.mark, clock.finish, clock.seconds

    def add(self, rival: Rival) -> None:
        self._passes[rival.name] = self._clock.prepare(rival)

    def prepare(self, rival: Rival) -> Callable[[], object]:
        return self._passes[rival.name]


def timed(ways: Sequence[Way], count: int, place: Machine, roof: Roof, *, capture: bool) -> tuple[dict[str, Timing], Failures]:
    """One interleaved run over `count` copies, the roof with them: timings by name, and why a way has none."""

    def work(way: Way) -> None:
        for index in range(count):
            way.call(index)

    clock, ready, failed = _Ready(place.clock), [], Failures()
    for rival in (roof.rival, *(Rival(way.name, partial(work, way), count, capture) for way in ways)):
        try:
            clock.add(rival)
            ready.append(rival)
        except Exception as error:  # as above
            failed[rival.name] = reason(error)
    try:
        if failed.keys() & {roof.NAME, DENSE}:
            raise BackendError(f"nothing to compare with: {failed}")
        return measure(ready, clock, place.rounds), failed
    except Exception as error:  # as above
        return {}, {rival.name: reason(error) for rival in ready if rival is not roof.rival} | failed
