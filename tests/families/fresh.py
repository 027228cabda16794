"""Run by the tests in a process of its own, without the package: does transformers alone load each run, and is it the original under
its masks?

Reads a JSON object {family: [original folder, run folder]} on stdin, prints {family: problem, "" where there is none}.
"""

from __future__ import annotations

import json
import math
import sys
import warnings

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM


def masks_of(path: str) -> dict[str, np.ndarray]:
    """The reader that the format's description gives."""
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    table = np.array([[i in pair for i in range(4)] for pair in pairs])
    masks = {}
    with safe_open(path, framework="numpy") as file:
        for name, shape in json.loads(file.metadata()["shapes"]).items():
            byte = file.get_tensor(name)
            patterns = np.stack([byte % 6, byte // 6 % 6, byte // 36], axis=1)
            masks[name] = table[patterns].reshape(-1)[: math.prod(shape)].reshape(shape)
    return masks


def load(folder: str) -> tuple[torch.nn.Module, list[str]]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), [f"{len(info[kind])} {kind}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]]


def problem(original: str, run: str) -> str:
    dense, _ = load(original)
    pruned, found = load(run)
    parameters = dict(dense.named_parameters(remove_duplicate=False))
    for name, mask in masks_of(f"{run}/masks.safetensors").items():
        parameters[name].data.masked_fill_(torch.from_numpy(~mask), 0.0)
    tokens = torch.arange(2, 26)[None]
    with torch.no_grad():
        a, b = (model(input_ids=tokens, use_cache=False).logits for model in (dense, pruned))
    if not (torch.isfinite(a).all() and torch.equal(a, b)):
        found.append(f"logits off by {float((a - b).abs().max()):.2g}")
    return "; ".join(found)


def main() -> None:
    sys.modules["proxsparse_triton"] = None  # type: ignore[assignment] # an import of it fails
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    answers = {}
    for family, (original, run) in json.load(sys.stdin).items():
        try:
            answers[family] = problem(original, run)
        except Exception as error:
            answers[family] = f"{type(error).__name__}: {error}"
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
