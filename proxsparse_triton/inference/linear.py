"""`SparseLinear`: an `nn.Linear` whose 2:4 weight is kept packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, ShapeError
from ..ops.pack import pack_24
from ..reference.metadata import join_nibbles, row_words
from ..sparsity import BLOCK, KEPT, check_width
from .blob import Layout
from .multiply import sparse_linear

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VALUES, METADATA = "values", "metadata"
AUTOCAST = ("cuda", "cpu")  # device types


class SparseLinear(nn.Module):
    """y = x W^T + b with W 2:4 and packed: 9/16 of the bytes of a 16-bit weight. For inference: W has no gradient, x has.

    The way to multiply is chosen call by call (`inference.choice`). The state dict holds `values` and `metadata` as `pack_24` returns
    them, and `bias`, whatever the device: it loads anywhere.
    """

    packed: Tensor
    bias: nn.Parameter | None
    layout: Layout

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A layer of zeros, to load a state dict into.

        Raises: TypeError: not fp32, fp16 or bf16. ShapeError: in_features not divisible by 4.
        """
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        _check_dtype("SparseLinear", dtype)
        check_width("SparseLinear", (out_features, in_features))
        values = torch.zeros((out_features, in_features // BLOCK * KEPT), dtype=dtype, device=device)
        nibbles = torch.zeros((out_features, in_features // BLOCK), dtype=torch.int16, device=device)
        self._fill(values, join_nibbles(nibbles | KEPT << 1), torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_packed(cls, values: Tensor, metadata: Tensor, bias: Tensor | None = None, *, device: torch.device | str | None = None) -> Self:
        """A layer of packed weights, and their bias, on `device` (None: where values are).

        Raises: TypeError: values not fp32, fp16 or bf16, metadata not int16, bias of another dtype. ShapeError: shapes that do not fit.
        """
        check_packed("SparseLinear.from_packed", values, metadata, bias)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        place = values.device if device is None else torch.device(device)
        layer._fill(values.detach().to(place), metadata.to(place), None if bias is None else bias.detach().to(place))
        return layer

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Self:
        """A layer of a dense 2:4 weight [out, in_features], on its device; mask as in `pack_24`.

        Raises: as `pack_24` (ShapeError names the first block that is not 2:4) and `from_packed`.
        """
        return cls.from_packed(*pack_24(weight, mask), bias)

    def _fill(self, values: Tensor, metadata: Tensor, bias: Tensor | None) -> None:
        out_features, kept = values.shape
        self.layout = Layout(out_features, kept // KEPT * BLOCK, values.dtype, "linear").on(values.device, values.dtype)
        self.register_buffer("packed", self.layout.join(values, metadata), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.contiguous(), requires_grad=False)

    @property
    def in_features(self) -> int:
        return self.layout.in_features

    @property
    def out_features(self) -> int:
        return self.layout.out_features

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked at every look: for tools and tests."""
        return self.layout.dense(self.packed, 0, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out_features] of x [..., in_features].

        Raises: TypeError: x of another dtype than the weight, without autocast. ShapeError: another width. ConfigError: another device.
        """
        return self.rows(x, 0, self.out_features, self.bias)

    def rows(self, x: Tensor, first: int, count: int, bias: Tensor | None) -> Tensor:
        """`forward` of some rows of the weight, and their bias."""
        if autocast_on(x):
            cast = _autocast(x)
            if cast.dtype != self.layout.dtype:
                return F.linear(x, self.layout.dense(self.packed, first, count), bias)
            x = cast
        check_input(x, self.layout, self.packed.device)
        return sparse_linear(x, self.packed, bias, self.layout, first, count)

    def extra_repr(self) -> str:
        layout = self.layout
        return (
            f"in_features={layout.in_features}, out_features={layout.out_features}, bias={self.bias is not None}, "
            f"dtype={str(layout.dtype).removeprefix('torch.')}, order={layout.order}"
        )

    # Moving, casting, saving and loading: the blob is bytes in a device's order, and all of them are about the weight.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        blob = self.packed
        self.layout, converted = _convert(self.layout, blob, fn)
        super()._apply(lambda tensor: converted if tensor is blob else fn(tensor), recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + VALUES] = self.layout.values(self.packed)
        destination[prefix + METADATA] = self.layout.linear_metadata(self.packed).clone()  # two dtypes on one storage cannot be saved

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = (prefix + VALUES, prefix + METADATA)
        others = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing = [key for key in own if key not in state_dict]
        if missing:
            missing_keys.extend(missing if strict else [])
            return
        values, metadata = (state_dict[key] for key in own)
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        problem = load_problem(self.layout, self.packed, self.out_features, values, metadata, assign)
        if not problem and assign and self.bias is not None and self.bias.dtype != values.dtype:
            problem = f"expected a bias of {values.dtype} as the values, got {self.bias.dtype}. Convert it first."
        if problem:
            error_msgs.append(f"{prefix.removesuffix('.') or 'SparseLinear'}: {problem}")
        elif assign:
            self.layout = self.layout.on(values.device, values.dtype)
            self.packed = self.layout.join(values.detach(), metadata.to(values.device))
        else:
            self.layout.write(self.packed, 0, values.detach(), metadata)


def _convert(layout: Layout, blob: Tensor, fn: Callable[[Tensor], Tensor]) -> tuple[Layout, Tensor]:
    """What `nn.Module._apply(fn)` makes of a blob: fn as it is for the bytes if it moves them, its dtype for the weight."""
    dtype = fn(torch.empty(0, dtype=layout.dtype, device=blob.device)).dtype
    _check_dtype("SparseLinear", dtype)
    moved = fn(blob)
    return layout.convert(moved if moved.dtype == blob.dtype else blob.to(moved.device), dtype)


def autocast_on(x: Tensor) -> bool:
    return x.device.type in AUTOCAST and torch.is_autocast_enabled(x.device.type)  # which raises where there is none, as on meta


def _autocast(x: Tensor) -> Tensor:
    """x as autocast gives it to a linear layer: in its dtype, fp64 left alone."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if x.is_floating_point() and x.dtype != torch.float64 else x


def check_input(x: Tensor, layout: Layout, device: torch.device) -> None:
    """Raise unless x can be multiplied with the weight."""
    if x.dtype != layout.dtype:
        raise TypeError(
            f"SparseLinear: expected {layout.dtype} as the weight has, got {x.dtype}. Convert the input, or the model with .to()."
        )
    if x.dim() == 0 or x.shape[-1] != layout.in_features:
        raise ShapeError(f"SparseLinear: expected [..., {layout.in_features}], got {tuple(x.shape)}. Pass inputs of the layer's width.")
    if x.device != device:
        raise ConfigError(f"SparseLinear: expected an input on {device}, got {x.device}. Move it with .to({str(device)!r}).")


def check_packed(function: str, values: Tensor, metadata: Tensor, bias: Tensor | None) -> None:
    """Raise unless these are the packed weight, and the bias, of one layer."""
    _check_dtype(function, values.dtype)
    problem = _packed_problem(values, metadata)
    if problem:
        raise ShapeError(f"{function}: {problem} Pass them as pack_24 returns them.")
    if metadata.dtype != torch.int16:
        raise TypeError(f"{function}: expected int16 metadata, got {metadata.dtype}. Pass it as pack_24 returns it.")
    if bias is not None and tuple(bias.shape) != (values.shape[0],):
        raise ShapeError(f"{function}: expected a bias of shape ({values.shape[0]},), got {tuple(bias.shape)}. Pass matching tensors.")
    if bias is not None and bias.dtype != values.dtype:
        raise TypeError(f"{function}: expected a bias of {values.dtype} as the values, got {bias.dtype}. Convert it first.")


def load_problem(layout: Layout, blob: Tensor, rows: int, values: Tensor, metadata: Tensor, assign: bool) -> str:
    """Why these entries of a state dict cannot become `rows` rows of the weight; "" if they can. The dtype may change with assign only."""
    kept, words = layout.in_features // BLOCK * KEPT, row_words(layout.in_features)
    for name, tensor, shape in ((VALUES, values, (rows, kept)), (METADATA, metadata, (rows, words))):
        if tuple(tensor.shape) != shape:
            return f"expected {name} of shape {shape}, got {tuple(tensor.shape)}. Load the weights of this layer."
    if metadata.dtype != torch.int16:
        return f"expected int16 metadata, got {metadata.dtype}. Load what a SparseLinear saved."
    if values.dtype != layout.dtype and not (assign and values.dtype in DTYPES):
        return f"expected {layout.dtype} values, got {values.dtype}. Convert the layer with .to({values.dtype}) first."
    if blob.is_meta and not values.is_meta and not assign:
        return "expected a layer with memory, got one on meta. Move it with .to_empty(), or load with assign=True."
    return ""


def _packed_problem(values: Tensor, metadata: Tensor) -> str:
    if values.dim() != 2 or values.shape[1] % KEPT:
        return f"expected values [out, in_features / 2] of two a block, got {tuple(values.shape)}."
    shape = (values.shape[0], row_words(values.shape[1] // KEPT * BLOCK))
    if tuple(metadata.shape) != shape:
        return f"expected metadata of shape {shape} for values of {tuple(values.shape)}, got {tuple(metadata.shape)}."
    return ""


def _check_dtype(function: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"{function}: expected float32, float16 or bfloat16 weights, got {dtype}. Convert the model to one of these.")
