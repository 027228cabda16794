"""Which pruned layers cost most: perplexity with one layer dense again and all others pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..progress import SILENT, Progress
from .perplexity import perplexity


def restore_test(
    model: nn.Module, original: Mapping[str, Tensor], tokens: Sequence[Tensor], progress: Progress = SILENT
) -> list[dict[str, object]]:
    """Perplexity of `model` on `tokens` with each layer of `original` in its place in turn, the lowest (the costliest layer) first.

    Args:
        model: the pruned model; left as it was. original: parameter name -> dense weight, on any device.
        tokens: as `perplexity` has them.
    Returns: [{"layer": parameter name, "perplexity": ...}, ...].
    """
    found: list[dict[str, object]] = []
    with progress.task("restoring one layer at a time", total=len(original)) as bar, torch.no_grad():
        for name, weight in original.items():
            parameter = model.get_parameter(name)
            pruned = parameter.data
            parameter.data = weight.to(pruned)
            try:
                found.append({"layer": name, "perplexity": perplexity(model, tokens)})
            finally:
                parameter.data = pruned
            bar.advance()
    return sorted(found, key=lambda row: float(str(row["perplexity"])))
