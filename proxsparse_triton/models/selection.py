"""Which weights are pruned, and why the others are not."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ..sparsity import BLOCK
from .share import OTHER_TOWERS, Share, share_of

FUSED = "fused experts (3-D parameter): not an nn.Linear"
STACKED = "3-D parameter: not an nn.Linear"
OTHER_FORWARD = "computes something else than nn.Linear with its weight"
TRANSPOSED = "Conv1D stores the weight transposed (GPT-2): not supported"
HEAD = "output head"
OUTSIDE = "not inside the decoder blocks"
ROUTER = "router of a mixture of experts: few weights that steer all others (select it with --include)"
UNMATCHED = "matched no --include"
NO_LAYER = "not a linear layer"
LEFT_OUT = "left dense by the method"
UNREAD = "no forward pass over the text reads its weight"

ROUTER_NAME = re.compile(r"router|gating")
GATE_NAME = re.compile(r"gate|\w+_gate")

Kind = Literal["linear", "other", "conv1d", "fused", "stacked"]
OBSTACLES: dict[Kind, str] = {"other": OTHER_FORWARD, "conv1d": TRANSPOSED, "fused": FUSED, "stacked": STACKED}


@dataclass(frozen=True)
class LayerChoice:
    """One matrix that could be pruned, and whether it is.

    name: module name (of fused experts: parameter name). shape: (out_features, in_features); fused experts: all of them stacked.
    reason: why it is not selected, "" if it is. block: index of its decoder block, None outside of them.
    """

    name: str
    shape: tuple[int, int]
    selected: bool
    reason: str
    block: int | None


@dataclass(frozen=True)
class LayerPlan:
    """Every matrix of a model with the decision on it, in model order, a shared one once.

    blocks: name of the list of decoder blocks. weights: of each 2-D and 3-D parameter inside them, by its name.
    """

    choices: tuple[LayerChoice, ...]
    blocks: str
    weights: Mapping[str, int] = field(default_factory=dict)

    def selected(self) -> list[str]:
        """Module names of the layers to prune, in model order; their parameters are `{name}.weight`."""
        return [choice.name for choice in self.choices if choice.selected]

    def without(self, names: Collection[str], reason: str) -> LayerPlan:
        """The plan with these layers left dense. ModelError: then nothing is left to prune."""
        choices = tuple(replace(choice, selected=False, reason=reason) if choice.name in names else choice for choice in self.choices)
        plan = replace(self, choices=choices)
        if not plan.selected():
            raise ModelError(f"plan_layers: expected at least one layer to prune, got none: {reason}. Choose other layers with --include.")
        return plan

    def share(self, pruned: Collection[str] | None = None) -> Share:
        """How much of the decoder is 2:4. pruned: parameter names; None: those of all selected layers."""
        names = [f"{name}.weight" for name in self.selected()] if pruned is None else pruned
        # Of experts the choice bears the parameter's own name.
        reasons = {name: choice.reason or LEFT_OUT for choice in self.choices for name in (choice.name, f"{choice.name}.weight")}
        return share_of(self.weights, names, reasons, NO_LAYER)


@dataclass(frozen=True)
class _Matrix:
    """names: of all modules that hold the weight, the first one's is the matrix's."""

    names: tuple[str, ...]
    kind: Kind
    weight: Tensor
    block: int | None

    @property
    def name(self) -> str:
        return self.names[0]


def plan_layers(model: nn.Module, *, include: Sequence[str] = (), skip: Sequence[str] = ()) -> LayerPlan:
    """Decide on every nn.Linear, Conv1D and 3-D parameter (fused experts) of the model.

    By default each nn.Linear inside the decoder blocks is selected, except the routers of a mixture of experts. A weight that
    several modules share is handled once, under the first one's name, and not at all if one of them is an embedding or lies outside
    the blocks.

    Args:
        include: regular expressions (re.search on the module names): only layers that match one, wherever they are.
        skip: regular expressions of layers to leave dense, under any of their names; they win over `include`.
    Raises: ConfigError: an expression that does not compile or matches no layer. ModelError: no decoder blocks, nothing left to prune.
    """
    blocks, _ = decoder_blocks(model)
    matrices = list(_matrices(model, blocks))
    names = [name for matrix in matrices for name in matrix.names]
    included, skipped = _compiled("--include", include, names), _compiled("--skip", skip, names)
    owners = _owners(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {name for name, module in model.named_modules(remove_duplicate=False) if module is head}
    choices = []
    for matrix in matrices:
        name, inside = matrix.name, matrix.block is not None
        router_at = _router_at(model, name, blocks) if inside else None
        reason = _matched_skip(matrix.names, skipped)
        if not reason and not inside and not any(_named(included, each, each.rfind(".") + 1) for each in matrix.names):
            reason = HEAD if name in heads else OUTSIDE
        if not reason and included and not any(_named(included, each) for each in matrix.names):
            reason = UNMATCHED
        if not reason and router_at is not None and not _named(included, name, router_at):
            reason = ROUTER
        reason = reason or _obstacle(matrix, owners, blocks)
        choices.append(LayerChoice(name, _shape(matrix.weight), not reason, reason, matrix.block))
    plan = LayerPlan(tuple(choices), blocks, _weights_inside(model, blocks))
    if not plan.selected():
        reasons = "; ".join(dict.fromkeys(choice.reason for choice in choices))
        raise ModelError(
            f"plan_layers: expected at least one layer to prune in {type(model).__name__}, got none of {len(choices)}: {reasons}. "
            "Choose other layers with --include and --skip, or another model."
        )
    return plan


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Dotted name of the list of decoder blocks, and the list.

    It is the nn.ModuleList as long as the text configuration's num_hidden_layers whose items hold matrices; the shallowest such, as
    blocks may hold lists themselves (experts), and not that of a vision or audio tower. Without such a length: the longest.

    Raises: ModelError: the model has no such list.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(text, "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(True for _ in _own_matrices(module))
    ]
    if not lists:
        raise ModelError(
            f"decoder_blocks: expected a list of decoder blocks with nn.Linear layers, got none in {type(model).__name__}. "
            "Choose a transformer language model."
        )
    pool = [item for item in lists if len(item[1]) == depth] or lists
    return min(pool, key=lambda item: (bool(OTHER_TOWERS.search(item[0])), item[0].count("."), -len(item[1])))


def computes_linear(module: nn.Module) -> bool:
    """True if the module's class computes x W^T + b, from its weight and bias and nothing else, as nn.Linear does.

    So do nn.Linear, subclasses that keep its `forward`, and those whose own one only repeats it (FalconLinear); only of such a layer do
    masks, input norms and packed weights mean what they say. Not judged: hooks, or a `forward` set on the instance.
    """
    if not isinstance(module, nn.Linear):
        return False
    kind: Any = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))  # where its forward comes from
    return kind is nn.Linear or _repeats_linear(kind)


@cache
def _repeats_linear(kind: type[nn.Linear]) -> bool:
    """Whether `kind.forward` is nn.Linear's, up to rounding.

    It is called on an object that has a weight and a bias but none of the class's other attributes: a forward that reads one fails. What
    is left can depend on the inputs alone, and is compared on random ones of several ranks and sizes, in fp64.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    twin = object.__new__(kind)
    nn.Module.__init__(twin)
    twin.in_features, twin.out_features = 8, 12
    twin.weight = nn.Parameter(random(12, 8))
    with torch.no_grad():
        for bias in (None, nn.Parameter(random(12))):
            twin.register_parameter("bias", bias)
            for training in (False, True):
                twin.training = training
                for shape, size in (((8,), 1.0), ((5, 8), 1e-6), ((2, 4, 8), 1e6), ((1, 2, 3, 8), 1.0)):
                    x = size * random(*shape)
                    try:
                        found = kind.forward(twin, x)
                    except Exception:  # whatever somebody's layer raises: it wants more than a weight and a bias
                        return False
                    right = nn.functional.linear(x, twin.weight, bias)
                    same = isinstance(found, Tensor) and found.dtype == right.dtype and found.shape == right.shape
                    if not same or not torch.allclose(found, right, rtol=1e-12, atol=1e-12 * size):
                        return False
    return True


def _own_matrices(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Kind, Tensor]]:
    """Name, kind and weight of each prunable-looking matrix below `module`, shared ones under each of their names."""
    from transformers.pytorch_utils import Conv1D

    for name, child in module.named_modules(prefix=prefix, remove_duplicate=False):
        if isinstance(child, nn.Linear):
            yield name, "linear" if computes_linear(child) else "other", child.weight
        elif isinstance(child, Conv1D):
            yield name, "conv1d", child.weight
        elif not isinstance(child, nn.modules.conv._ConvNd):  # whose weights are 3-D as well
            experts = "expert" in f"{name} {type(child).__name__}".lower()
            for short, parameter in child.named_parameters(recurse=False):
                if parameter.dim() == 3 and min(parameter.shape) > 1:
                    yield f"{name}.{short}", "fused" if experts else "stacked", parameter


def _matrices(model: nn.Module, blocks: str) -> Iterator[_Matrix]:
    """Each parameter once, under the names of all modules that hold it."""
    found: dict[int, tuple[list[str], Kind, Tensor]] = {}
    for name, kind, weight in _own_matrices(model):
        found.setdefault(id(weight), ([], kind, weight))[0].append(name)
    for names, kind, weight in found.values():
        inside = names[0].startswith(f"{blocks}.")
        yield _Matrix(tuple(names), kind, weight, int(names[0][len(blocks) + 1 :].split(".")[0]) if inside else None)


def _weights_inside(model: nn.Module, blocks: str) -> dict[str, int]:
    inside = ((name, parameter) for name, parameter in model.named_parameters() if name.startswith(f"{blocks}."))
    return {name: parameter.numel() for name, parameter in inside if parameter.dim() in (2, 3)}


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.numel() // max(1, weight.shape[-1]), weight.shape[-1]


def _owners(model: nn.Module) -> dict[int, list[tuple[str, bool]]]:
    """For each parameter (by identity) the modules that hold it: (name, computes as nn.Linear), in model order."""
    owners: dict[int, list[tuple[str, bool]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((name, computes_linear(module)))
    return owners


def _matched_skip(names: Sequence[str], skipped: Sequence[re.Pattern[str]]) -> str:
    regex = next((regex for regex in skipped if any(regex.search(name) for name in names)), None)
    return f"matched --skip {regex.pattern}" if regex else ""


def _named(included: Sequence[re.Pattern[str]], name: str, start: int = 0) -> bool:
    """True if an expression matches `name` with a match that reaches beyond `start`.

    So `mlp` does not name the router `mlp.gate`, but `gate` and `mlp.*` do.
    """
    return any(found.end() > start or not start for regex in included for found in regex.finditer(name))


def _obstacle(matrix: _Matrix, owners: dict[int, list[tuple[str, bool]]], blocks: str) -> str:
    """Why this matrix cannot be pruned at all; "" if it can."""
    if matrix.kind != "linear":
        return OBSTACLES[matrix.kind]
    for name, is_linear in owners[id(matrix.weight)]:
        if name != matrix.name and (not is_linear or (matrix.block is not None and not name.startswith(f"{blocks}."))):
            return f"shares its weight with {name}"
    in_features = matrix.weight.shape[-1]
    return f"in_features {in_features} not divisible by {BLOCK}" if in_features % BLOCK else ""


def _router_at(model: nn.Module, name: str, blocks: str) -> int | None:
    """Where in `name` a router begins: a part called router, or a gate in a module that also holds experts. None: not a router."""
    parts = name.split(".")
    for at in range(blocks.count(".") + 2, len(parts)):
        before, part = ".".join(parts[:at]), parts[at]
        if ROUTER_NAME.search(part):
            return len(before) + 1
        if GATE_NAME.fullmatch(part):
            siblings = [child for child, _ in model.get_submodule(before).named_children() if child != part]
            if any("expert" in sibling for sibling in siblings):
                return len(before) + 1
    return None


def _compiled(option: str, patterns: Sequence[str], names: Sequence[str]) -> list[re.Pattern[str]]:
    if isinstance(patterns, str):
        raise TypeError(f"plan_layers: expected a list of expressions for {option}, got the string {patterns!r}. Wrap it in a list.")
    compiled = []
    for pattern in patterns:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{option}: expected a regular expression, got {pattern!r} ({error}). Escape special characters.") from error
        if not any(regex.search(name) for name in names):
            examples = ", ".join(dict.fromkeys((names[0], names[len(names) // 2], names[-1])))
            raise ConfigError(
                f"{option}: expected an expression that matches a layer, got {pattern!r}, which matches none of {len(names)}. "
                f"Layers are called {examples}."
            )
        compiled.append(regex)
    return compiled
