"""The text that `pst eval` measures on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..calibration.chat import chat_of
from ..calibration.sources import STREAM_WINDOWS, Column, is_local, open_source
from ..calibration.tokens import Bos
from ..calibration.windows import Windows, evaluation_windows
from ..progress import SILENT, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def windows_to_measure(
    spec: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    windows: int | None,
    seqlen: int,
    bos: Bos = "auto",
    column: Column | None = None,
    progress: Progress = SILENT,
) -> Windows:
    """Windows of one text: of corpora that a run may be calibrated on only the held-out side, of the user's own files all.

    windows: None: STREAM_WINDOWS of c4 and Hub datasets, all of any other text.

    Raises: as `open_source` and `evaluation_windows`.
    """
    local = is_local(spec)
    text = open_source(spec, split="all" if local else "heldout", column=column, chat=chat_of(tokenizer))
    endless = not local and spec not in ("wikitext2", "stdlib")
    count = windows or (STREAM_WINDOWS if endless else None)
    return evaluation_windows(text, tokenizer, windows=count, seqlen=seqlen, bos=bos, progress=progress)[0]
