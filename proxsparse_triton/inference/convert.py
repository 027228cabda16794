"""`sparsify_model`: a 2:4 model whose layers run packed."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from ..errors import ConfigError, ModelError, ShapeError
from ..models.selection import plan_layers
from ..sparsity import KEPT, kept_per_block
from .group import SIBLINGS, SparseGroup
from .linear import DTYPES, SparseLinear

ADVICE = "Prune the model with `pst prune`, or set its pruned weights to zero with apply_masks."
NOT_24 = "not 2:4"
CROSS_ATTENTION = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)  # whose query reads another input than key and value

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's tensors in memory.

    packed: of the packed weights. dense: of the same weights, unpacked. others: of everything else.
    """

    packed: int
    dense: int
    others: int


@dataclass(frozen=True)
class _Reason:
    """Why a layer stays dense: what it shares with others, and what is its own."""

    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}, {self.detail}" if self.detail else self.kind


def sparsify_model(
    model: Model,
    *,
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    fuse: bool = True,
    on_dense: Literal["skip", "error"] = "skip",
) -> Model:
    """Replace the 2:4 linear layers of `model` by `SparseLinear`, in place and one at a time: never two copies of the model.

    Args:
        include, skip: regular expressions on layer names, as in `plan_layers`; by default every nn.Linear inside the decoder blocks.
        fuse: multiply query, key and value, and gate and up, in one launch each.
        on_dense: what to do about a layer that has to stay dense: "skip" it (one warning says how many, and why), or "error".
    Returns: `model`. Its `save_pretrained` refuses from now on, as transformers would load the packed layers at random.
    Raises: ModelError: no layer is 2:4, or one is not and `on_dense` is "error"; nothing has changed then. ConfigError: another `on_dense`,
        or expressions that match no layer.
    """
    if on_dense not in ("skip", "error"):
        raise ConfigError(f"sparsify_model: expected on_dense 'skip' or 'error', got {on_dense!r}. Choose one of these.")
    names = _chosen(model, include, skip)
    owners = Counter(id(w) for module in _modules(model) for w in module.parameters(recurse=False))
    for name in names if on_dense == "error" else ():
        packed = _packed(model, name, owners)  # and forgotten: nothing may change before all are known to be 2:4
        if isinstance(packed, _Reason):
            raise ModelError(f"sparsify_model: expected 2:4 in every layer, got {name}: {packed}. {ADVICE}")
    done, left = [], {}
    for name in names:
        packed = _packed(model, name, owners)
        if isinstance(packed, _Reason):
            left[name] = packed
        else:
            model.set_submodule(name, packed)
            done.append(name)
    if not done:
        raise ModelError(f"sparsify_model: expected 2:4 layers, got none of {len(names)} ({_first(left)}). {ADVICE}")
    if left:
        warnings.warn(f"sparsify_model: {len(left)} of {len(names)} layers stay dense: {_summary(left)}.", stacklevel=2)
    if fuse:
        fuse_siblings(model, done)
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = refuse_to_save
    return model


def weight_bytes(model: nn.Module) -> WeightBytes:
    """What the tensors of a model take. Shared ones count once."""
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    tensors: dict[int, Tensor] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    packed = sum(layer.packed.nbytes for layer in layers)
    dense = sum(layer.out_features * layer.in_features * layer.layout.dtype.itemsize for layer in layers)
    return WeightBytes(packed, dense, sum(tensor.nbytes for tensor in tensors.values()) - packed)


def _chosen(model: nn.Module, include: Sequence[str], skip: Sequence[str]) -> list[str]:
    try:
        return plan_layers(model, include=include, skip=skip).selected()
    except ModelError as error:
        if not any(isinstance(module, SparseLinear) for module in model.modules()):
            raise
        raise ModelError("sparsify_model: expected dense layers, got a model whose layers are packed already. Use it as it is.") from error


def _modules(model: nn.Module) -> list[nn.Module]:
    """Every module under each of its names."""
    return [module for _, module in model.named_modules(remove_duplicate=False)]


def _packed(model: nn.Module, name: str, owners: Mapping[int, int]) -> SparseLinear | _Reason:
    """The packed layer for the place of `name`, or why it stays dense."""
    linear: Any = model.get_submodule(name)
    if owners[id(linear.weight)] > 1:
        return _Reason("with a shared weight")
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or "forward" in vars(linear):
        return _Reason("with hooks, which would be lost")
    if linear.weight.dtype not in DTYPES:
        return _Reason("of another dtype than fp32, fp16 and bf16", str(linear.weight.dtype))
    try:
        return SparseLinear.from_dense(linear.weight, bias=linear.bias).train(linear.training)
    except ShapeError:
        kept = kept_per_block(linear.weight)
        row, block = (kept > KEPT).nonzero()[0].tolist()
        return _Reason(NOT_24, f"{int(kept[row, block])} non-zeros in block ({row}, {block})")


def _first(left: Mapping[str, _Reason]) -> str:
    name, reason = next(iter(left.items()))
    return f"{name}: {reason}"


def _summary(left: Mapping[str, _Reason]) -> str:
    """`2 not 2:4 (model.layers.0.mlp.up_proj: not 2:4, 3 non-zeros in block (0, 7)); 1 with ...`"""
    kinds: dict[str, dict[str, _Reason]] = {}
    for name, reason in left.items():
        kinds.setdefault(reason.kind, {})[name] = reason
    return "; ".join(f"{len(group)} {kind} ({_first(group)})" for kind, group in kinds.items())


def fuse_siblings(model: nn.Module, names: Sequence[str]) -> None:
    """Make groups of the siblings among the packed layers `names` of a model, each a `SparseLinear`."""
    packed = set(names)
    for parent_name in dict.fromkeys(name.rpartition(".")[0] for name in names):
        parent = model.get_submodule(parent_name)
        if CROSS_ATTENTION.search(f"{parent_name} {type(parent).__name__}"):
            continue
        for siblings in SIBLINGS:
            if all(f"{parent_name}.{leaf}" in packed for leaf in siblings):
                layers: list[Any] = [parent.get_submodule(leaf) for leaf in siblings]
                if len({_signature(layer) for layer in layers}) == 1:
                    group = SparseGroup.of(layers, f"fused_{siblings[0]}").train(layers[0].training)
                    parent.add_module(group.slot, group)
                    for leaf, member in zip(siblings, group.members(), strict=True):
                        parent.set_submodule(leaf, member)


def _signature(layer: SparseLinear) -> tuple[object, ...]:
    return layer.in_features, layer.layout.dtype, layer.packed.device, layer.bias is None


def refuse_to_save(*arguments: Any, **options: Any) -> None:
    """What stands for the `save_pretrained` of a model with packed layers."""
    raise ModelError(
        "save_pretrained: expected a dense model, got one with packed layers, which transformers would load at random. "
        "Write it with `pst export --format packed`, or keep its state_dict()."
    )
