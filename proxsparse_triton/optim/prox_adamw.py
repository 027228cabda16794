"""`ProxAdamW`: AdamW whose every step ends in the 2:4 prox."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer, ParamsT

from ..errors import ConfigError, LearningError, ShapeError
from ..ops import gradient_square, gradient_square_rows, partial_sums, prox_adamw_, prox_adamw_rows
from ..ops.dispatch import check_strength
from ..ops.prox_adamw import STATISTICS
from ..ops.sharded import align_gradient, all_sum, is_dtensor, local, part_of
from ..step import StepSettings
from .figures import Figures, NonFinite, Record, broken
from .groups import check_group, check_numbers, check_step
from .initialisation import only_makes_state
from .parameters import OPTIMIZER, Handles, Parameter, Removable, parameter_at, parameters_of
from .state import Precision, local_state, make_state, random_key
from .state_dict import AsSaved, check_and_wrap, unwrap

if TYPE_CHECKING:
    from ..ops.partial import PartialSums

NOT_GIVEN: Any = object()  # tells step() from step(closure=None)


@dataclass(frozen=True)
class Settings:
    max_norm: float | None
    clip: str
    precision: Precision
    seed: int


class ProxAdamW(Optimizer):
    """AdamW with the frozen penalty (lambda2) in the gradient and the 2:4 prox (lambda1) after the update, in one pass over each tensor.

    g = coef (grad + lambda2 gradient of || w / (w0 + frozen_eps sgn(w0)) (w - w0) ||^2)
    w <- prox_lambda1(AdamW(w, g)),  lambda1 not multiplied by the learning rate

    Groups with `prox=False` are plain: torch's fused AdamW with the same clipping coefficient. `prox`, `lambda1`, `lambda2`, `frozen_eps`,
    `column_scale` ([in_features] or None, see `prox_24`) and AdamW's own settings are keys of a group. `params` may be (name, tensor)
    pairs; the names appear in messages and figures. A parameter without a gradient is skipped.

    Args:
        lambda1, lambda2, frozen_eps: strengths of prox and penalty, see `prox_24` and `frozen_penalty`. W0 is copied at a parameter's first
            step (in bf16 where that loses nothing), unless `share_pretrained` has given it.
        prox: whether groups that do not say so take the prox.
        max_norm: clips the global norm of all gradients: coef = min(1, max_norm / (norm + 1e-6)), without a host sync.
        clip: "total": norm and coefficient of the total gradient, penalty included, as the paper does (one more read of weights and
            gradients); "loss": of the loss gradient only.
        weight_bits: bits kept of a bf16 weight, 16, 24 or 32: above 16 the optimizer keeps the low bits in an int8 or int16 beside the
            weight, and the model sees the weight rounded to nearest. None: the weight's own.
        moments: "float32", "bfloat16" or "int8" (groups of 128 weights with a scale). None: "float32".
        seed: of the stochastic rounding of bf16 weights (16 and 24 bits) and of moments below fp32. A weight's random bits are the same
            however the parameters are sharded by rows.
    Raises: TypeError, ShapeError, ConfigError: settings or parameters that cannot work, named. `step` raises LearningError when the step
        before met a non-finite gradient (see `check`): its blocks, or with `max_norm` everything, were left as they were.
    Source: Liu et al. 2025 (arXiv 2502.00258), Algorithm 1; docs/math.md.
    """

    _record: Record | None = None
    _figures: Figures | None = None
    _watch: tuple[NonFinite, list[dict[str, Any]]] | None = None
    _error: LearningError | None = None  # of a step that was settled before anyone asked

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        lambda1: float = 0.0,
        lambda2: float = 0.0,
        frozen_eps: float = 0.1,
        prox: bool = True,
        max_norm: float | None = None,
        clip: Literal["total", "loss"] = "total",
        weight_bits: int | None = None,
        moments: Literal["float32", "bfloat16", "int8"] | None = None,
        seed: int = 0,
    ) -> None:
        if max_norm is not None:
            check_strength(OPTIMIZER, "max_norm", max_norm, positive=True)
        if clip not in ("total", "loss"):
            raise ConfigError(f"{OPTIMIZER}: expected clip 'total' or 'loss', got {clip!r}. Leave it out for the paper's choice.")
        self._settings = Settings(max_norm, clip, Precision(weight_bits, moments or "float32"), seed)
        self._room: dict[str, tuple[object, PartialSums | None]] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "lambda1": lambda1,
            "lambda2": lambda2,
            "frozen_eps": frozen_eps,
            "prox": prox,
            "column_scale": None,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            added = self.param_groups[-1]
            check_group(added, [item for item in self._parameters() if item.group is added], self._settings.precision)
        except (TypeError, ConfigError, ShapeError):
            self.param_groups.pop()
            raise

    def _parameters(self) -> list[Parameter]:
        return list(parameters_of(self.param_groups))

    # --- the step -----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = NOT_GIVEN) -> float | None:  # type: ignore[override]
        """One step with the gradients in `.grad`. Raises LearningError for the step before, see `check`.

        Afterwards `.grad` of a prox parameter is as it was; with `max_norm`, that of a plain one is the clipped gradient.
        """
        loss = None
        if closure is not None and closure is not NOT_GIVEN:
            with torch.enable_grad():
                loss = closure()
        self.check()
        items = [item for item in self._parameters() if item.p.grad is not None]
        if closure is None and only_makes_state(self):
            self._prepare(items)
            return None
        self._apply(items)
        record, self._record = self._record, None
        if record is not None:
            self._figures, flags = record.close()
            self._watch = flags, [self.state[item.p] for item in record.prox]
        return loss

    def _apply(self, items: Sequence[Parameter]) -> None:
        if not items:
            return
        self._prepare(items)
        prox = [item for item in items if item.group["prox"]]
        plain = [item for item in items if not item.group["prox"]]
        planned = [self._planned(item) for item in prox]
        for group in {id(item.group): item.group for item in plain}.values():
            check_numbers(group)
        # Everything that can be refused has been: from here on tensors change.
        record = self._record = self._record or Record()
        max_norm, coef = self._settings.max_norm, None
        squares = [self._squares(some) for some in (plain, prox if max_norm is not None else []) if some]
        square = torch.cat(squares).sum() if squares else None
        if max_norm is not None and square is not None:
            record.square = square
            # Without a finite norm nothing is written.
            coef = torch.where(square.isfinite(), (max_norm / (square.sqrt() + 1e-6)).clamp_max(1), torch.nan)
        coef32 = None if coef is None else coef.float()
        rows = [prox_adamw_rows(local(item.p), self._settings.precision.moments == "int8") for item in prox]
        sums = self._sums("statistics", rows, STATISTICS, items[0].p.device)
        statistics = [
            self._step_prox(item, planned[i], coef32 if item.p.dtype != torch.float64 else coef, None if sums is None else sums.part(i))
            for i, item in enumerate(prox)
        ]
        record.statistics += statistics if sums is None else sums.totals().unbind()
        if plain and square is not None:
            self._step_plain(plain, coef, square)
            record.plain_squares.append(squares[0])
        record.prox += prox
        record.plain += plain

    def _prepare(self, items: Sequence[Parameter]) -> None:
        """Checks and first-step state."""
        for item in items:
            align_gradient(OPTIMIZER, item.name, item.p)
            check_step(item, items[0].p.device)
        for item in items:
            make_state(item, self.state[item.p], self._settings.precision)

    def _pretrained(self, item: Parameter) -> Tensor | None:
        return local(self.state[item.p]["pretrained"]) if item.group["prox"] and item.group["lambda2"] > 0 else None

    def _squares(self, items: Sequence[Parameter]) -> Tensor:
        """Squared gradient norms, fp64 [items]; of the total gradient with clip="total"."""
        squares: dict[int, Tensor] = {}
        if self._settings.clip == "total" and (pulled := [item for item in items if self._pretrained(item) is not None]):
            rows = [gradient_square_rows(local(item.p)) for item in pulled]
            sums = self._sums("squares", rows, 1, pulled[0].p.device)
            totals = []
            for i, item in enumerate(pulled):
                lam, eps, part = item.group["lambda2"], item.group["frozen_eps"], None if sums is None else sums.part(i)
                totals.append(gradient_square(local(item.p), self._pretrained(item), lam, eps, item.gradient, partial=part))
            if sums is not None:
                totals = list(sums.totals()[:, 0].unbind())
            squares = {item.index: total for item, total in zip(pulled, totals, strict=True)}
        rest = [item for item in items if item.index not in squares]
        if rest:
            dtype = torch.float64 if any(item.p.dtype == torch.float64 for item in rest) else torch.float32
            norms = torch._foreach_norm([item.gradient for item in rest], 2, dtype=dtype)
            squares |= {item.index: norm.double().square() for item, norm in zip(rest, norms, strict=True)}
        return all_sum(torch.stack([squares[item.index] for item in items]), [item.p for item in items])

    def _sums(self, name: str, rows: Sequence[int | None], width: int, device: torch.device) -> PartialSums | None:
        """Room for partial sums, kept from step to step while the parameters stay the same."""
        key = (tuple(rows), width, device)
        if name not in self._room or self._room[name][0] != key:
            self._room[name] = key, partial_sums(rows, width, device)
        return self._room[name][1]

    def _planned(self, item: Parameter) -> StepSettings:
        """The scalars of a parameter's next step. Raises: ConfigError."""
        group, step, precision = item.group, self.state[item.p]["step"] + 1, self._settings.precision
        try:
            return StepSettings(
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=step,
                lambda1=group["lambda1"],
                lambda2=group["lambda2"],
                frozen_eps=group["frozen_eps"],
                clip_total=self._settings.clip == "total",
                stochastic=precision.rounds(item.p),
                seed=random_key(self._settings.seed, step, item.index),
                offset=part_of(item.p).offset,
            )
        except (ConfigError, TypeError, ValueError, IndexError):
            check_numbers(group)  # says it in the group's words
            raise

    def _step_prox(self, item: Parameter, settings: StepSettings, coef: Tensor | None, partial: Tensor | None) -> Tensor:
        state, scale = self.state[item.p], item.group["column_scale"]
        state["step"] = settings.step
        return prox_adamw_(
            local(item.p),
            item.gradient,
            local_state(state),
            settings,
            w0=self._pretrained(item),
            column_scale=None if scale is None else scale[part_of(item.p).columns],
            grad_coef=coef,
            partial=partial,
        )

    def _step_plain(self, items: Sequence[Parameter], coef: Tensor | None, square: Tensor) -> None:
        found_inf = (~square.isfinite()).float()
        grad_scale = None if coef is None else (1 / coef).float()
        groups: dict[int, list[Parameter]] = {}
        for item in items:
            groups.setdefault(id(item.group), []).append(item)
        for mine in groups.values():
            group, states = mine[0].group, [self.state[item.p] for item in mine]
            adamw(
                [local(item.p) for item in mine],
                [item.gradient for item in mine],
                [local(state["exp_avg"]) for state in states],
                [local(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                grad_scale=grad_scale,
                found_inf=found_inf,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=float(group["lr"]),
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    # --- what the step tells --------------------------------------------------------------------------------------------------------

    def figures(self) -> Figures:
        """Figures of the last step as tensors on the device, without a host sync. Raises: ConfigError before the first step."""
        if self._figures is None:
            raise ConfigError("figures: expected at least one step, got none. Call step() first.")
        return self._figures

    def check(self) -> None:
        """Waits for the last step. Raises LearningError, once, if it met a non-finite gradient, naming the first parameter."""
        self._settle()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _settle(self) -> None:
        """Waits for the last step and takes its count back if nothing was written, so that the state is true."""
        watch, self._watch = self._watch, None
        if watch is None:
            return
        flags, states = watch
        names, norm = flags.read()
        if norm and self._settings.max_norm is not None:
            for state in states:
                state["step"] -= 1
        if names or norm:
            self._error = broken(names)

    # --- pretrained weights, gradient release, state dict ---------------------------------------------------------------------------

    def pretrained(self, p: Tensor) -> Tensor | None:
        """W0 of a parameter; None before its first step, and without lambda2."""
        value: Tensor | None = self.state.get(p, {}).get("pretrained")
        return value

    def share_pretrained(self, pretrained: Mapping[Tensor, Tensor]) -> None:
        """Takes W0 of these parameters from the caller instead of copying it: tensors like the parameter, the dtype may differ.

        Raises: ConfigError: not a parameter with prox, or sharded otherwise. ShapeError: W0 of another shape.
        """
        items = {item.p: item for item in self._parameters() if item.group["prox"]}
        for p, w0 in pretrained.items():
            if p not in items:
                raise ConfigError(f"share_pretrained: expected parameters of groups with prox, got {tuple(p.shape)}. Leave it out.")
            name = items[p].name
            if p.shape != w0.shape:
                raise ShapeError(
                    f"share_pretrained: expected W0 of shape {tuple(p.shape)} for {name}, got {tuple(w0.shape)}. Check the name."
                )
            if w0.device != p.device or getattr(p, "placements", None) != getattr(w0, "placements", None):
                raise ConfigError(f"share_pretrained: expected W0 of {name} on {p.device} and sharded like it, got {w0.device}. Move it.")
            self.state[p]["pretrained"] = w0.detach()

    def release_gradients(self) -> Handles:
        """From now on each parameter is stepped, and its gradient freed, inside the backward pass: no two gradients live at a time.

        One backward pass is one step then: set the learning rate before it, and call `step()` after it as ever, which closes the step.
        Raises: ConfigError: with max_norm, whose norm needs all gradients at once, or for sharded parameters.
        """
        if self._settings.max_norm is not None:
            raise ConfigError("release_gradients: expected no max_norm, got one: the norm needs all gradients at once. Leave max_norm out.")
        handles: list[Removable] = []
        index = 0
        for number, group in enumerate(self.param_groups):
            for position, p in enumerate(group["params"]):
                if is_dtensor(p):
                    name = parameter_at(self.param_groups, number, position, index).name
                    raise ConfigError(f"release_gradients: expected parameters that are not sharded, got {name}. Step after backward.")
                if p.requires_grad:
                    handles.append(p.register_post_accumulate_grad_hook(partial(self._release, number, position, index)))
                index += 1
        return Handles(handles)

    @torch.no_grad()
    def _release(self, number: int, position: int, index: int, p: Tensor) -> None:
        self.check()
        self._apply([parameter_at(self.param_groups, number, position, index)])
        p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The state after the last step, which it waits for."""
        self._settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state bit for bit. Raises: ConfigError, naming the difference, for one of other settings; nothing changes then."""
        # Registered last, it sees what the caller's own hooks made of the state dict.
        handle = self.register_load_state_dict_pre_hook(check_and_wrap(self._parameters(), self._settings.precision))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._watch = self._error = None  # of a step before it

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {**super().__getstate__(), "_settings": self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for p, saved in state["state"].items():
            if isinstance(saved, AsSaved):
                state["state"][p] = unwrap(saved, p.device)
        super().__setstate__(state)
        self.__dict__.setdefault("_room", {})
