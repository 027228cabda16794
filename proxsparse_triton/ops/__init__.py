"""One public function per operation: checks, choice of backend, registration with torch.library."""

from .frozen_penalty import accumulate_frozen_penalty, frozen_penalty
from .mask import mask_24
from .prox import prox_24

__all__ = ["accumulate_frozen_penalty", "frozen_penalty", "mask_24", "prox_24"]
