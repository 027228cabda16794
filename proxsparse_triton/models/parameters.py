"""The parameters to prune, for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .selection import plan_layers


def prunable_parameters(model: nn.Module, *, include: Sequence[str] = (), skip: Sequence[str] = ()) -> list[tuple[str, nn.Parameter]]:
    """The weights that `pst prune` would prune, (name, parameter) in model order: for a group of `ProxAdamW`, or for `attach_prox`.

    These are the linear layers inside the decoder blocks. Embeddings, output head, norms, biases and routers are not among them.

    Args: include, skip: regular expressions on layer names, as `--include` and `--skip` of `pst prune`.
    Raises: ConfigError: an expression that does not compile or matches no layer. ModelError: no decoder blocks, nothing left to prune.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = [f"{name}.weight" for name in plan_layers(model, include=include, skip=skip).selected()]
    return [(name, parameters[name]) for name in names]
