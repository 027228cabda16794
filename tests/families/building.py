"""Tiny random models of any family, one token a byte, and text for them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from families.configurations import Family
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

SYLLABLES = ("ka", "lo", "mi", "re", "su", "ta"), ("bo", "den", "fil", "gra", "nox", "pir")


def build(family: Family, folder: Path) -> None:
    """A model of the family in `folder`, fp32."""
    kind = AutoModelForImageTextToText if family.vision else AutoModelForCausalLM
    model = kind.from_config(config_of(family)).float().eval()
    randomise(model)
    model.save_pretrained(folder)


def config_of(family: Family) -> Any:
    return CONFIG_MAPPING[family.kind](**family.settings)


def randomise(model: nn.Module) -> None:
    """Matrices of a size that keeps activations near one, so that every layer matters; what starts at zero would hide what follows it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
            elif "correct_output_scale" in name:
                p.fill_(1.0)
            elif not p.any():
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))


def write_tokenizer(folder: Path) -> None:
    """Two special tokens, then one token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "<pad>": 1} | {letter: at + 2 for at, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<pad>").save_pretrained(folder)


def write_text(path: Path, documents: int = 40, words: int = 40) -> None:
    choose = random.Random(0)
    rows = [" ".join(choose.choice(SYLLABLES[0]) + choose.choice(SYLLABLES[1]) for _ in range(words)) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """[tokens, vocabulary] of one window; the same random numbers every time, for models in train mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens[None], use_cache=False).logits[0]
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||; infinite for NaN."""
    off = float((a - b).double().norm() / b.double().norm())
    return off if off == off else float("inf")
