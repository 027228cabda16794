"""Tokenizers that put a BOS before a text, as Llama's and Gemma's do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def with_bos(folder: Path, token: str = "<|endoftext|>", index: int = 0) -> Path:
    """Make the tokenizer of a model folder put `token` in front of every text."""
    from tokenizers import Tokenizer, processors

    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, index)])
    tokenizer.save(str(path))
    return folder


def with_template(folder: Path, template: str) -> Path:
    """Give the tokenizer of a model folder a chat template."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return folder


def loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
