"""transformers without its bars and warnings: what matters of them is said in one line of ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and warnings of transformers; both are as they were afterwards."""
    from transformers.utils import logging as hf_logging

    logger = hf_logging.get_logger("transformers")
    level, bars = logger.level, hf_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    hf_logging._tqdm_active = False  # the public switch would also turn off huggingface_hub's bars
    try:
        yield
    finally:
        logger.setLevel(level)
        hf_logging._tqdm_active = bars
