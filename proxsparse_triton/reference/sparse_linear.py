"""sparse_linear_24 by its definition: unpack, then a dense product."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import metadata as orders
from . import pack


def sparse_linear_24(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, order: str) -> Tensor:
    """x @ w.T + bias for x [tokens, in]; in fp32 on the CPU, whose 16-bit products are slower and no more exact."""
    shape = (values.shape[0], x.shape[-1])
    words = metadata if order == "linear" else orders.restore(metadata, order, shape)
    w = pack.unpack_24(values, words)
    if x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16):
        return linear(x, w, bias)
    return linear(x.float(), w.float(), None if bias is None else bias.float()).to(x.dtype)
