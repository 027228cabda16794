"""What ProxAdamW keeps for a parameter, in which precision, and whether a loaded state fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError
from ..ops.sharded import all_sum, check_columns, is_dtensor, local, zeros_like
from ..sparsity import BLOCK
from ..step import MOMENT_GROUP, AdamState
from .parameters import OPTIMIZER, Parameter, is_vector

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
RESIDUALS = {16: None, 24: torch.int8, 32: torch.int16}
MOMENTS = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "int8": (torch.int8, torch.uint8),
}
_WORD = (1 << 64) - 1
SETTING_OF = {"residual": "weight_bits", "exp_avg_scale": "moments", "exp_avg_sq_scale": "moments"}


@dataclass(frozen=True)
class Precision:
    """How many bits of a weight are kept, and how its moments are stored."""

    weight_bits: int | None  # None: the weight's own dtype
    moments: str

    def __post_init__(self) -> None:
        if self.weight_bits not in (None, *RESIDUALS):
            raise ConfigError(f"{OPTIMIZER}: expected weight_bits 16, 24, 32 or None, got {self.weight_bits!r}. Choose another value.")
        if self.moments not in MOMENTS:
            raise ConfigError(f"{OPTIMIZER}: expected moments {', '.join(MOMENTS)} or None, got {self.moments!r}. Choose another value.")

    def residual(self, p: Tensor) -> torch.dtype | None:
        return None if p.dtype != torch.bfloat16 or self.weight_bits is None else RESIDUALS[self.weight_bits]

    def moment_dtypes(self, p: Tensor) -> tuple[torch.dtype, torch.dtype]:
        return (torch.float64, torch.float64) if p.dtype == torch.float64 else MOMENTS[self.moments]

    def rounds(self, p: Tensor) -> bool:
        """Whether anything is stored in fewer bits than it is computed in: then random bits are drawn."""
        low_weight = p.dtype == torch.bfloat16 and self.residual(p) != torch.int16
        return low_weight or self.moment_dtypes(p)[0] in (torch.bfloat16, torch.int8)


def check_parameter(name: str, p: Tensor, precision: Precision) -> None:
    """Raises unless `p` can take the prox with this precision."""
    if p.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{OPTIMIZER}: expected float32 or bfloat16 weights, got {p.dtype} in {name}. Convert the model or use prox=False.")
    if p.dim() == 0 or p.shape[-1] % BLOCK:
        raise ShapeError(
            f"{OPTIMIZER}: expected the last dimension divisible by {BLOCK}, got shape {tuple(p.shape)} in {name}. "
            "Put it in a group with prox=False."
        )
    if is_vector(p):
        raise ShapeError(
            f"{OPTIMIZER}: expected weights [..., in_features] for the prox, got shape {tuple(p.shape)} in {name}. "
            "Put it in a group with prox=False; prunable_parameters(model) finds the weights to prune."
        )
    if p.dtype != torch.bfloat16 and precision.weight_bits not in (None, 32):
        raise ConfigError(
            f"{OPTIMIZER}: expected bfloat16 weights for weight_bits={precision.weight_bits}, got {p.dtype} in {name}. "
            "Leave weight_bits out or convert the model."
        )
    if p.dtype == torch.float64 and precision.moments != "float32":
        raise ConfigError(
            f"{OPTIMIZER}: expected moments='float32' for float64 weights, got {precision.moments!r} for {name}. Leave it out."
        )
    check_columns(OPTIMIZER, name, p)
    if is_dtensor(p) and precision.moments == "int8" and p.numel() // max(p.shape[0], 1) % MOMENT_GROUP:
        raise ShapeError(
            f"{OPTIMIZER}: expected rows of a multiple of {MOMENT_GROUP} weights for 8-bit moments of a sharded parameter, "
            f"got shape {tuple(p.shape)} in {name}. Use moments='bfloat16'."
        )


def layout(p: Tensor, precision: Precision) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every tensor that the first step makes for a prox parameter."""
    shape = tuple(p.shape)
    first, second = precision.moment_dtypes(p)
    entries = {"exp_avg": (first, shape), "exp_avg_sq": (second, shape)}
    if first == torch.int8:
        # A shard's groups are a shard of the groups only where a group does not go over the end of a row.
        groups = (shape[0], p.numel() // shape[0] // MOMENT_GROUP) if is_dtensor(p) else (-(-p.numel() // MOMENT_GROUP),)
        entries |= {"exp_avg_scale": (torch.float32, groups), "exp_avg_sq_scale": (torch.float32, groups)}
    residual = precision.residual(p)
    return entries if residual is None else {**entries, "residual": (residual, shape)}


def fresh(p: Tensor, precision: Precision) -> dict[str, Any]:
    """The state before the first step."""
    state: dict[str, Any] = {"step": 0}
    for key, (dtype, shape) in layout(p, precision).items():
        state[key] = zeros_like(p, dtype) if shape == tuple(p.shape) else _zeros(shape, dtype, p)
    return state


def make_state(item: Parameter, state: dict[str, Any], precision: Precision) -> None:
    """Fills a parameter's state before its first step, W0 included. Raises: ConfigError: prox or lambda2 changed since."""
    p, prox = item.p, item.group["prox"]
    if "step" in state and isinstance(state["step"], Tensor) == prox:
        raise ConfigError(
            f"{OPTIMIZER}: expected prox={not prox} of {item.name} as in its first step, got prox={prox}. "
            "Set lambda1 and lambda2 to 0 to leave out the prox for a while."
        )
    if not prox:
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p.detach()), torch.zeros_like(p.detach())
        return
    if "exp_avg" not in state:
        # Again: a parameter may have been replaced by a sharded one since it was added.
        check_parameter(item.name, p, precision)
        state.update(fresh(p, precision))
    if item.group["lambda2"] > 0 and "pretrained" not in state:
        if state["step"]:
            raise ConfigError(
                f"{OPTIMIZER}: expected lambda2 > 0 from the first step of {item.name}, got it at step {state['step'] + 1}, "
                "when its pretrained value is gone. Give it with share_pretrained."
            )
        state["pretrained"] = _snapshot(p)


def _snapshot(p: Tensor) -> Tensor:
    """A copy of the weight, in bf16 where that loses nothing (on any rank)."""
    low = p.detach().to(torch.bfloat16)
    if p.dtype == torch.bfloat16:
        return low.clone()
    lost = (local(low).to(p.dtype) != local(p)).sum().view(1)
    return p.detach().clone() if all_sum(lost, [p]).item() else low


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, p: Tensor) -> Tensor:
    if not is_dtensor(p):
        return torch.zeros(shape, dtype=dtype, device=p.device)
    from torch.distributed.tensor import zeros

    return zeros(shape, dtype=dtype, device_mesh=p.device_mesh, placements=p.placements)  # type: ignore[attr-defined]


def local_state(state: Mapping[str, Any]) -> AdamState:
    """The tensors of this rank, as the fused step takes them."""

    def part(key: str) -> Tensor | None:
        return local(state[key]) if key in state else None

    first, second = part("exp_avg_scale"), part("exp_avg_sq_scale")
    return AdamState(
        exp_avg=local(state["exp_avg"]),
        exp_avg_sq=local(state["exp_avg_sq"]),
        exp_avg_scale=None if first is None else first.flatten(),
        exp_avg_sq_scale=None if second is None else second.flatten(),
        residual=part("residual"),
    )


def check_loaded(name: str, p: Tensor, state: Mapping[str, Any], precision: Precision | None) -> None:
    """Raises unless a loaded state fits the parameter; `precision` None: a plain one, whose state is torch's."""
    if precision is None:
        wanted = {key: (p.dtype, tuple(p.shape)) for key in ("exp_avg", "exp_avg_sq")}
    elif set(state) == {"pretrained"}:  # shared before the first step
        wanted = {}
    else:
        wanted = layout(p, precision)
    if "pretrained" in state:
        wanted["pretrained"] = (state["pretrained"].dtype, tuple(p.shape))
    extra = set(state) - set(wanted) - {"step"}
    if extra:
        key = min(extra)
        raise _other_settings(SETTING_OF.get(key, "prox"), f"no {key}", "one", name)
    for key, (dtype, shape) in wanted.items():
        value = state.get(key)
        if not isinstance(value, Tensor):
            raise _other_settings(SETTING_OF.get(key, "prox"), key, "none", name)
        if tuple(value.shape) != shape:
            raise _other_settings("shapes", f"{key} of shape {shape}", str(tuple(value.shape)), name)
        if value.dtype != dtype:
            raise _other_settings(SETTING_OF.get(key, "moments"), f"{key} of {dtype}", str(value.dtype), name)


def _other_settings(setting: str, expected: str, actual: str, name: str) -> ConfigError:
    return ConfigError(
        f"{OPTIMIZER}: expected {expected} for {name}, got {actual}. The state dict was made with other {setting}; "
        "build the optimizer as it was built then."
    )


def random_key(seed: int, step: int, index: int) -> int:
    """Key of a parameter's random bits in one step: splitmix64 over the three numbers, 63 bits.

    Source: Steele et al. 2014, "Fast splittable pseudorandom number generators".
    """
    key = 0
    for value in (seed, step, index):
        key = (key + value + 0x9E3779B97F4A7C15) & _WORD
        key = ((key ^ key >> 30) * 0xBF58476D1CE4E5B9) & _WORD
        key = ((key ^ key >> 27) * 0x94D049BB133111EB) & _WORD
        key ^= key >> 31
    return key >> 1  # the sign bit of a kernel's int64 argument stays clear
