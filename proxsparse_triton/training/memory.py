"""The model of memory: what a learning step needs, counted before any weight exists.

The whole step, forward and backward, runs on the meta device, where tensors have shapes and lifetimes but no storage; the highest point
of the bytes alive is the peak of the real step. What stays between steps (weights, moments, W0, residuals) is added up by formula.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import ConfigError, ModelError, ProxSparseError
from ..models.checkpoint import one_line
from ..step import MOMENT_GROUP
from .batches import Batch
from .objective import Objective

ATTENTION = "proxsparse_plan"  # name of `_attention` in transformers' registry
GRANULE = 512  # the CUDA caching allocator rounds up to this
WORKSPACE = 32 * 2**20  # of cuBLAS on Hopper and newer, held by the same allocator; earlier GPUs take a quarter of it
RESERVE = 0.05  # of the GPU, for the CUDA context, the kernels' code and fragmentation
MOMENT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0 + 4.0 / MOMENT_GROUP}  # of each of the two
NOT_COUNTED = "Leave out --plan, and choose --checkpointing or --no-checkpointing yourself."
RESIDUAL_BYTES = {16: 0, 24: 1, 32: 2}  # of a bf16 weight kept with so many bits


@dataclass(frozen=True)
class Storage:
    """How the optimiser keeps the weights that are pruned."""

    weight_bits: int
    moments: str
    pretrained: torch.dtype | None  # of W0; None: not kept
    teacher: bool = False  # the other parameters that learn are kept as they were, too


@dataclass(frozen=True)
class StepTrace:
    """The highest point of a step, in bytes beside what stays between steps, and the step's arithmetic."""

    gradients: int
    activations: int
    logits: int
    flops: int

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.logits


@dataclass(frozen=True)
class StepMemory:
    """What stays between steps, and what a step adds to it at its highest point."""

    kept: dict[str, int]
    step: StepTrace

    @property
    def items(self) -> dict[str, int]:
        step = {"gradients": self.step.gradients, "activations": self.step.activations, "logits": self.step.logits}
        return {**self.kept, **step, "workspace": WORKSPACE}

    @property
    def peak(self) -> int:
        return sum(self.items.values())


def fits(peak: int, memory: int) -> bool:
    """True if `peak` bytes leave room on a GPU of `memory` bytes for what is not a tensor."""
    return peak <= (1 - RESERVE) * memory


@contextmanager
def checkpointing(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Inside the block the model keeps only the inputs of its decoder blocks and runs each block again in the backward pass.

    Raises: ConfigError: the model cannot do that.
    """
    if not enabled:
        yield
        return
    enable_checkpointing(model)
    try:
        yield
    finally:
        transformer = cast(Any, model)
        getattr(transformer, "activation_checkpointing_disable", transformer.gradient_checkpointing_disable)()


def supports_checkpointing(model: nn.Module) -> bool:
    return bool(getattr(model, "supports_gradient_checkpointing", False))


def enable_checkpointing(model: nn.Module) -> None:
    """Switches activation checkpointing on. ConfigError if the model has none."""
    if not supports_checkpointing(model):
        raise ConfigError(
            f"learning: expected a model with activation checkpointing, got {type(model).__name__}. "
            "Use --no-checkpointing, or lower --seqlen."
        )
    transformer = cast(Any, model)
    arguments = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name from transformers 5.2x on; the other one warns there
        transformer.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


def meta_model(config: Any, dtype: torch.dtype, *, kind: type[nn.Module] | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The model that `config` describes, without weights, with an attention whose memory is that of the GPU's kernels.

    Args:
        kind: its class where it is known; else transformers looks it up.
    Raises: ModelError: transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
    config = copy.deepcopy(config)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": ATTENTION}
    try:
        with torch.device("meta"):
            if kind is not None:
                model: nn.Module = cast(Any, kind)._from_config(config, **options)
            else:
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # code that comes with a model raises anything
        if ATTENTION in str(error):  # a family from before transformers' registry of attentions
            raise ModelError(
                f"plan: expected a model whose attention can be exchanged, got a {config.model_type}. {NOT_COUNTED}"
            ) from error
        raise ModelError(f"plan: expected a model that transformers can build, got {one_line(error)}. Check config.json.") from error
    return model.train()


def resident(model: nn.Module, pruned: Collection[str], storage: Storage) -> dict[str, int]:
    """Bytes that stay between steps.

    Args:
        model: real or on the meta device. pruned: parameter names of the weights that are pruned.
    """
    pruned = frozenset(pruned)
    parameters = dict(model.named_parameters())
    inside = [p for name, p in parameters.items() if name in pruned and p.requires_grad]
    outside = [p for name, p in parameters.items() if name not in pruned and p.requires_grad]
    weights = sum(p.numel() for p in inside)
    residual = sum(RESIDUAL_BYTES[storage.weight_bits] * p.numel() for p in inside if p.dtype == torch.bfloat16)
    return {
        "weights": sum(tensor.nbytes for tensor in (*parameters.values(), *model.buffers())),
        "moments": round(2 * MOMENT_BYTES[storage.moments] * weights) + 2 * sum(p.nbytes for p in outside),
        "pretrained": (0 if storage.pretrained is None else storage.pretrained.itemsize * weights)
        + (sum(p.nbytes for p in outside) if storage.teacher else 0),
        "residual": residual,
    }


def trace_step(
    model: nn.Module,
    batch_size: int,
    seqlen: int,
    *,
    checkpoint: bool,
    release: bool,
    pruned: Mapping[str, nn.Linear] | None = None,
    objective: Objective | None = None,
) -> StepTrace:
    """Runs one step of `meta_model`'s model on batch_size windows of seqlen tokens.

    Args:
        pruned, objective: the layers to prune and what is learned from; None: cross-entropy, and all parameters learn.
        checkpoint: activation checkpointing. release: each gradient is freed as soon as it is complete.
    Raises: ConfigError: no activation checkpointing. ModelError: a forward pass that depends on the values of tensors.
    """
    objective = objective or Objective("ce", "learned", "all")
    tokens = torch.zeros(batch_size, seqlen, dtype=torch.int64, device="meta")
    handles: list[Any] = []
    try:
        with checkpointing(model, checkpoint), objective.of(model, pruned or {}, tokens[0]) as prepared:
            kept = () if prepared.pretrained is None else prepared.pretrained.tensors.values()
            ledger = _Ledger(model, kept)
            learning = [p for p in model.parameters() if p.requires_grad]
            handles += [p.register_post_accumulate_grad_hook(lambda p: ledger.gradient(p, release)) for p in learning]
            with ledger:
                prepared.loss(Batch(tokens, None)).backward()
    except ProxSparseError:
        raise
    except Exception as error:  # whatever a model's code raises where tensors have no values
        raise ModelError(
            f"plan: expected a model whose steps can be counted without its weights, got {one_line(error)}. {NOT_COUNTED}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return ledger.peak()


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of one operation, by torch's registry; in-place forms are counted as the others."""
    from torch.utils.flop_counter import flop_registry

    name = func._overloadpacket.__name__.rstrip("_")
    if "attention" in name:
        # The registry does not know that a causal attention leaves half of the scores out, nor (torch 2.11) fewer key than query heads.
        backward = "backward" in name
        query, key = args[1:3] if backward else args[:2]
        return int((10 if backward else 4) * query.numel() * key.shape[-2] // 2)
    count = flop_registry.get(getattr(torch.ops.aten, name, None))
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


class _Ledger(TorchDispatchMode):
    """Every storage that operations allocate, with the moments of its birth and death, and the FLOPs of matrix products."""

    def __init__(self, model: nn.Module, kept: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._vocabulary = _vocabulary(model)
        # By address: None for what was there before and does not count.
        self._live: dict[int, int | None] = {t.untyped_storage()._cdata: None for t in (*model.parameters(), *model.buffers(), *kept)}
        self._sizes: list[int] = []
        self._kinds: list[str] = []
        self._events: list[int] = []  # birth of storage k: k; death: ~k
        self._flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._born(tensor)
        self._flops += _flops(func, args, kwargs or {}, out)
        return out

    def _born(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._live:
            return
        index = self._live[address] = len(self._sizes)
        self._sizes.append(-(-storage.nbytes() // GRANULE) * GRANULE)
        self._kinds.append("logits" if tensor.dim() and tensor.shape[-1] == self._vocabulary else "activations")
        self._events.append(index)
        weakref.finalize(storage, self._died, address, index)

    def _died(self, address: int, index: int) -> None:
        self._events.append(~index)
        self._live.pop(address, None)

    def gradient(self, parameter: Tensor, release: bool) -> None:
        """`parameter.grad` is complete."""
        if parameter.grad is not None:
            index = self._live[parameter.grad.untyped_storage()._cdata]
            if index is not None:
                self._kinds[index] = "gradients"
        if release:
            parameter.grad = None

    def peak(self) -> StepTrace:
        alive, highest = {"gradients": 0, "activations": 0, "logits": 0}, {"gradients": 0, "activations": 0, "logits": 0}
        for event in self._events:
            index = event if event >= 0 else ~event
            alive[self._kinds[index]] += self._sizes[index] if event >= 0 else -self._sizes[index]
            if sum(alive.values()) > sum(highest.values()):
                highest = dict(alive)
        return StepTrace(**highest, flops=self._flops)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention on the meta device by the operator that `scaled_dot_product_attention` would choose on a GPU.

    Shapes as in transformers: q [B, heads, T, D], k and v with their own number of heads; out [B, T, heads, D].
    """
    same_heads, same_width = query.shape[1] == key.shape[1], query.shape[-1] == value.shape[-1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half and same_width and query.shape[-1] <= 256 and not more.get("softcap"):
        out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout, True, scale=scaling)[0]
    elif same_heads and not more.get("softcap"):
        out = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True, dropout, True, scale=scaling)[0]
    else:  # the scores of all pairs of tokens
        out = F.scaled_dot_product_attention(query, key, value, None, dropout, True, scale=scaling, enable_gqa=not same_heads)
    return out.transpose(1, 2).contiguous(), None


def _vocabulary(model: nn.Module) -> int:
    config = cast(Any, model).config
    return int(config.get_text_config().vocab_size)
