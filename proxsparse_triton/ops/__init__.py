"""One public function per operation: checks, choice of backend, registration with torch.library."""

from .frozen_penalty import accumulate_frozen_penalty, frozen_penalty, gradient_square
from .mask import mask_24
from .prox import prox_24
from .prox_adamw import prox_adamw_

__all__ = ["accumulate_frozen_penalty", "frozen_penalty", "gradient_square", "mask_24", "prox_24", "prox_adamw_"]
