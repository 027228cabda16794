"""One public function per operation: checks, choice of backend, registration with torch.library."""

from .frozen_penalty import accumulate_frozen_penalty, frozen_penalty, gradient_square, gradient_square_rows
from .mask import mask_24
from .masked import masked_weight_24
from .pack import pack_24, unpack_24
from .partial import partial_sums
from .prox import prox_24
from .prox_adamw import prox_adamw_, prox_adamw_rows
from .sparse_linear import sparse_linear_24

__all__ = [
    "accumulate_frozen_penalty",
    "frozen_penalty",
    "gradient_square",
    "gradient_square_rows",
    "mask_24",
    "masked_weight_24",
    "pack_24",
    "partial_sums",
    "prox_24",
    "prox_adamw_",
    "prox_adamw_rows",
    "sparse_linear_24",
    "unpack_24",
]
