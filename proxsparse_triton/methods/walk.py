"""What the layer-by-layer methods share: statistics of layers' inputs, decoder block after decoder block, in the model as pruned so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

from torch import Tensor, nn

from ..errors import ModelError
from ..models.layerwise import BlockWalker
from ..models.selection import decoder_blocks
from ..models.statistics import Statistic, observe
from .base import PruneTask

UNREACHED = "no token of the calibration text reached it in its decoder block"
ZERO = "every input that reached it in the calibration text was zero"
UNCALLED = "the model reads its weight without calling the layer, so that its inputs are not known"
BY_MAGNITUDE = "It is pruned by magnitude."

S = TypeVar("S", bound=Statistic)


def walk(
    task: PruneTask, function: str, work: str, statistic: Callable[[nn.Linear], S], *, otherwise: str
) -> Iterator[tuple[dict[str, nn.Linear], dict[str, S]]]:
    """For each decoder block its selected layers and the statistic of their inputs, on the outputs of the blocks before as they are then.

    The caller changes the layers of the block before it goes on. A weight that several layers share counts with all its uses inside the
    block in which it stands first: that is where it is pruned, and what later blocks will then be given is not known yet.
    A layer whose inputs say nothing has no statistic, and a note says why.

    Args: function: who asks. work: what the progress bar says. otherwise: what becomes of a layer without a statistic.
    Raises: ModelError: inputs that are not finite; a decoder block that a forward pass does not run.
    """
    _, blocks = decoder_blocks(task.model)
    walker = BlockWalker(task.model, blocks, task.windows, memory=task.memory)
    if not walker.replays:
        task.progress.note(
            f"{function}: blocks of {type(task.model).__name__} are given more than what the block before hands on, so that the blocks "
            f"before each one run again. This takes about {max(1, len(blocks) // 4)} times as long."
        )
    with task.progress.task(f"{work}: decoder blocks", total=len(blocks)) as bar:
        for index, block in walker:
            linears = task.linears_of(index)
            statistics = {name: statistic(linear) for name, linear in linears.items()}
            if linears:
                with observe(linears, statistics, within=block):
                    walker.forward(index)
                _drop_unknown(task, walker, index, linears, statistics, function, otherwise)
            yield linears, statistics
            bar.advance()


def taken(statistics: dict[str, S], name: str) -> Tensor | None:
    """The value of a layer's statistic, which is dropped: a Hessian is large. None where its inputs say nothing."""
    one = statistics.pop(name, None)
    return None if one is None else one.value()


def _drop_unknown(
    task: PruneTask,
    walker: BlockWalker,
    index: int,
    linears: dict[str, nn.Linear],
    statistics: dict[str, S],
    function: str,
    otherwise: str,
) -> None:
    """Takes out the statistics of layers whose inputs say nothing, and notes why."""
    totals = {name: float(one.squares().sum()) for name, one in statistics.items()}
    for name, total in totals.items():
        if not math.isfinite(total):
            raise ModelError(
                f"{function}: expected finite inputs of {name}, got NaN or inf in the calibration text. "
                "Check the weights, and use --dtype float32 if the model overflows in another."
            )
    uncalled = {name: cast(nn.Parameter, linears[name].weight) for name, one in statistics.items() if not one.calls}
    read = walker.reads(index, uncalled) if uncalled else set()
    for name, total in totals.items():
        if not total:
            tokens = statistics.pop(name).tokens
            task.unseen(name, UNCALLED if name in read else ZERO if tokens else UNREACHED, otherwise)
