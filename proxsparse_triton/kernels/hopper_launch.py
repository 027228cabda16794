"""Launch configurations of the Hopper kernel: chosen by a model of what limits it, whose constants were fitted to measurements."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import triton

TOKENS = (8, 16, 32, 64, 96, 128)  # of a program that takes all there are
TOKENS_OF_MANY = (96, 128, 176, 192, 256)
STEPS = ((512, 64), (2048, 256), (1 << 62, 1024))  # up to so many tokens, multiples of this share a launch: each is compiled once
SPLITS = (1, 2, 3, 4, 6, 8)
LEAST_STAGES, MOST_STAGES = 3, 12
PROGRAMS = 4  # of a multiprocessor, at most
SHARED = 228 * 1024  # bytes of a multiprocessor

# What an H200 has, as fitted to 1098 measured launches of 16 shapes, 512 x 3584 to 28672 x 8192, at 8 to 1024 tokens, bf16, 2026-11-26.
# The median error is 4 %; the launch that it picks takes 0.7 % longer than the best measured one on average, 11 % at worst. Microseconds,
# and KB in a microsecond.
CLOCK = 1750  # cycles
SHARED_BYTES = 128  # that shared memory passes in a cycle: what the sparse tensor cores wait for
TURN = 0.025  # of a turn, whatever it holds
LATENCY = 1.03  # of a copy
WEIGHTS_IN, X_IN, COPIES_IN = 47.0, 165.0, 200.0  # into a multiprocessor: from memory, from L2, and as much as can be under way
MEMORY = 3650.0
START = 1.9  # of a launch, until the first copies have arrived
CLUSTER, CLUSTER_OF_MORE = 0.95, 0.05  # to meet once; of each program beyond two
REFILL = 0.6  # of programs that follow others, until their first copies have arrived
FINISH = 1.81  # to pass on 100 KB of sums
# Programs that run at a time when clusters must lie within one part of the chip: cuOccupancyMaxActiveClusters.
RESIDENT = {1: 132, 2: 132, 3: 117, 4: 120, 6: 102, 8: 120}


@dataclass(frozen=True)
class Warpgroups:
    """How the kernel of `hopper.py` parts its work.

    groups: of 64 rows, of a program. warpgroups: that share them. tokens: of a program, a multiple of 8. columns: of a turn, 64 or 128.
    stages: of the ring. splits: programs of a cluster, which part the columns.
    """

    groups: int
    warpgroups: int
    tokens: int
    columns: int
    stages: int
    splits: int

    @property
    def cluster(self) -> int:
        return self.splits

    @property
    def warps(self) -> int:
        return 4 * self.warpgroups

    @property
    def rows(self) -> int:
        return 64 * self.groups

    @property
    def stage(self) -> int:
        """Bytes of a stage: a multiple of 1024, where the tensor cores want tiles to begin."""
        return int(triton.cdiv(self.columns * (self.groups * 72 + self.tokens * 2), 1024)) * 1024

    @property
    def bytes(self) -> int:
        """Shared memory: the ring, or the sums in its place; and what it takes to begin at a multiple of 1024."""
        return max(self.stages * self.stage, self.tokens * (self.groups * 256 + 16)) + 1024


def hopper(tokens: int, rows: int, width: int, multiprocessors: int) -> Warpgroups:
    """The launch for so many tokens, out_features and in_features, a multiple of 64."""
    step = next((step for most, step in STEPS if tokens <= most), STEPS[-1][1])
    few = next((most for most in TOKENS if most >= tokens), None)
    return _hopper(few or -(-tokens // step) * step, rows, width, multiprocessors)


@functools.lru_cache(4096)
def _hopper(tokens: int, rows: int, width: int, multiprocessors: int) -> Warpgroups:
    return min(launches(tokens, width), key=lambda launch: microseconds(launch, tokens, rows, width, multiprocessors))


def launches(tokens: int, width: int) -> Iterator[Warpgroups]:
    """All that come into question, each with the deepest ring that lets one, two, ... programs share a multiprocessor."""
    for count in (tokens,) if tokens in TOKENS else TOKENS_OF_MANY:
        if count <= 128:
            shapes = [(1, 1, 128), (2, 2, 128), (4, 4, 128), *([(6, 2, 64)] if tokens > 128 else [])]
        else:
            shapes = [(1, 1, 128), (2, 2, 128), (4, 2, 64)] if count <= 192 else [(2, 2, 64)]
        for groups, warpgroups, most_columns in shapes:
            columns = most_columns if width % most_columns == 0 else 64
            for splits in SPLITS:
                if splits > 1 and width // columns // splits < LEAST_STAGES:
                    break
                deepest = {_stages(groups, warpgroups, count, columns, programs) for programs in range(1, PROGRAMS + 1)}
                yield from (
                    Warpgroups(groups, warpgroups, count, columns, stages, splits) for stages in sorted(deepest) if stages >= LEAST_STAGES
                )


@functools.cache
def _stages(groups: int, warpgroups: int, tokens: int, columns: int, programs: int) -> int:
    """The most with which so many programs fit a multiprocessor; 0: none."""
    for stages in range(MOST_STAGES, 0, -1):
        if _granted(Warpgroups(groups, warpgroups, tokens, columns, stages, 1)) * programs <= SHARED:
            return stages
    return 0


def granted(launch: Warpgroups) -> int:
    """Bytes of shared memory that the compiler gives: 16 KiB at a time."""
    return int(triton.cdiv(launch.bytes, 16384)) * 16384


def _granted(launch: Warpgroups) -> int:
    """And the 1 KiB that the card keeps of each program."""
    return granted(launch) + 1024


def microseconds(launch: Warpgroups, tokens: int, rows: int, width: int, multiprocessors: int) -> float:
    """What a launch takes by the model: the slowest of memory, copies, latency and shared memory, turn by turn, then its end."""
    programs = triton.cdiv(rows, launch.rows) * triton.cdiv(tokens, launch.tokens) * launch.splits
    resident = RESIDENT[launch.splits] * multiprocessors // RESIDENT[1]
    registers = launch.warps * 32 * (launch.groups * launch.tokens // launch.warpgroups // 2 + 70)
    fit = max(1, min(SHARED // _granted(launch), 65536 // registers, 64 // launch.warps))
    together = min(fit, triton.cdiv(programs, resident))  # on one multiprocessor
    turns = width / launch.columns / launch.splits
    # Each product reads 64 bytes of x a token and 2 KB of values, at the pace of its multiplications; copies pass the same way.
    products = launch.groups * launch.columns // 32 * (launch.tokens / 2 + 2048 / SHARED_BYTES)
    weights, x = launch.groups * launch.columns * 0.072, min(launch.tokens, tokens) * launch.columns * 0.002  # KB
    turn = max(
        (products + launch.stage / SHARED_BYTES) / CLOCK * together + TURN,
        (weights / WEIGHTS_IN + x / X_IN) * together,
        LATENCY / max(min(launch.stages - 1, turns), 1) + (weights + x) * together / COPIES_IN,
    )
    sums = launch.tokens * launch.rows * 4e-5 * (1 + 2 * (launch.splits - 1) / launch.splits)
    finish = FINISH * sums * together
    if launch.splits > 1:
        finish += CLUSTER + CLUSTER_OF_MORE * (launch.splits - 2)
    waves = programs / (resident * together)
    waves = math.ceil(waves) if waves <= 4 else waves + 0.5
    busy = waves * (turns * turn + finish) + (waves - 1) * REFILL / together + START
    memory = rows * width * 9 / 8 / 1000 / MEMORY + START
    return float((busy**8 + memory**8) ** (1 / 8))  # near the larger of the two
