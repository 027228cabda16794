"""Does config.json describe the model that the weight files hold? Compared by headers, before anything is allocated.

transformers builds what the configuration says and fills at random what the files do not have: a size with a few zeros too many
takes all memory, a number of layers with as many too many all time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ModelError
from .checkpoint import listed, one_line, weight_shapes
from .quiet import quiet
from .source import CONFIG, ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]

# Fields that lists are made of, by the words of their names: num_hidden_layers, first_k_dense_replace.
COUNTED = frozenset({"layer", "label", "expert", "block", "depth", "head", "stage", "replace"})
MEASURES = ("_size", "_dim", "_length", "_len", "_id")  # of one such thing, not how many: block_size may be a context length
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
MOST_COUNTED = 100_000
# Of what a model is made of: modules, parameters, buffers. A Llama registers 3 a tensor; experts may be one tensor in the files.
REGISTERED, REGISTERED_A_TENSOR = 20_000, 50
SPARE = 1 << 24  # weights that a model may have beyond its files': what it derives, what it may do without
TABLES = 1 << 28  # bytes of positions, masks and the like, which no file holds
ADVICE = f"The weights belong to another configuration: restore {CONFIG}."


def check_counts(source: ModelSource, raw: Mapping[str, Any]) -> None:
    """Raise ModelError for a number in config.json that no model has of its layers, experts, heads or labels.

    Before transformers reads it, which makes lists of that length. Args: raw: the JSON object.
    """
    for name, value in _whole_numbers(raw):
        if value > MOST_COUNTED and _is_count(name):
            raise ModelError(
                f"{source.spec}: expected at most {MOST_COUNTED:,} for {name} in {CONFIG}, got {_number(value)}. "
                f"Correct {name} in {CONFIG}."
            )
    tensors = len(weight_shapes(source.weight_files)) if source.weight_files else None
    layers = max((value for name, value in _whole_numbers(raw) if name in LAYERS), default=0)
    if tensors is not None and layers > tensors:
        raise ModelError(
            f"{source.spec}: expected the layers that {CONFIG} describes in the weight files, "
            f"got {_number(layers)} layers and {tensors:,} tensors. {ADVICE}"
        )


def skeleton(
    source: ModelSource, config: Any, *, held: Shapes | None = None, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model that `config` describes, on the meta device.

    Args:
        held: shapes in the weight files by their keys, None: read from them. A source without weight files is compared with nothing.
    Raises: ModelError: transformers cannot build it, or it is larger than what the files hold.
    """
    from transformers import AutoModelForCausalLM

    held = weight_shapes(source.weight_files) if held is None else held
    most = REGISTERED + REGISTERED_A_TENSOR * len(held) if held else None
    try:
        with quiet(), torch.device("meta"), _counted(source, most):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except Exception as error:  # code that comes with a model raises anything
        raise ModelError(
            f"{source.spec}: expected a model that transformers can build, got {one_line(error)}. Check config.json and the weights."
        ) from error
    if held:
        _check_sizes(source, model, held)
    return model


def _check_sizes(source: ModelSource, model: nn.Module, held: Shapes) -> None:
    """Raise ModelError where the model would take more memory than its weight files explain."""
    weights, stored_weights = (sum(map(math.prod, shapes)) for shapes in ([p.shape for p in model.parameters()], held.values()))
    if weights > stored_weights + max(SPARE, stored_weights // 10):
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        larger = [
            f"{name} {tuple(parameter.shape)} for {stored}"
            for name, parameter in model.named_parameters()
            if (stored := held.get(name, held.get(name.removeprefix(prefix), held.get(prefix + name)))) is not None
            and parameter.numel() > math.prod(stored)
        ]
        raise ModelError(
            f"{source.spec}: expected the sizes that {CONFIG} describes in the weight files, got {weights / 1e6:,.1f} M weights for "
            f"{stored_weights / 1e6:,.1f} M{f': {listed(larger)}' if larger else ''}. {ADVICE}"
        )
    tables = sum(buffer.nbytes for buffer in model.buffers())
    if tables > TABLES + 4 * stored_weights:
        name, largest = max(model.named_buffers(), key=lambda item: item[1].nbytes)
        raise ModelError(
            f"{source.spec}: expected tables that suit the weights, got {name} of {tuple(largest.shape)} from {CONFIG}. {ADVICE}"
        )


@contextmanager
def _counted(source: ModelSource, most: int | None) -> Iterator[None]:
    """Stop what is built inside after `most` modules, parameters and buffers."""
    from torch.nn.modules import module as registration

    count = 0

    def add(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if most is not None and count > most:
            raise ModelError(
                f"{source.spec}: expected a model of as many parts as the weight files have tensors for, got more than {most:,} from "
                f"{CONFIG}. {ADVICE}"
            )

    handles = [
        register(add)
        for register in (
            registration.register_module_module_registration_hook,
            registration.register_module_parameter_registration_hook,
            registration.register_module_buffer_registration_hook,
        )
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_count(name: str) -> bool:
    return not name.lower().endswith(MEASURES) and any(word.lower().removesuffix("s") in COUNTED for word in WORD.findall(name))


def _whole_numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number in a JSON value, with the name it goes by."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _whole_numbers(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _whole_numbers(item, name)
    elif isinstance(value, int | float) and not isinstance(value, bool) and (isinstance(value, int) or math.isfinite(value)):
        yield name, int(value)


def _number(value: int) -> str:
    return f"{value:,}" if value < 10**15 else "a number of more than 15 digits"
