"""Suite-wide set-up: the Triton interpreter where there is no GPU, and NaN-poisoned allocations."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator

import torch

# Triton reads this when it is imported; kernels then run on the CPU, slowly but with the same code.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest

ASSET = Path(__file__).parents[1] / "proxsparse_triton" / "assets" / "pylm-2m"
DATA = Path(__file__).parent / "data"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none; `network` only runs when asked for by -m."""
    asked = config.getoption("-m") or ""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if "network" in item.keywords and "network" not in asked:
            item.add_marker(pytest.mark.skip(reason="needs the Hub; run with -m network"))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fresh allocation starts as NaN, so that a lane which nobody wrote fails the comparison."""

    def poison(allocate):  # type: ignore[no-untyped-def]
        def allocated(*args, **kwargs):  # type: ignore[no-untyped-def]
            out = allocate(*args, **kwargs)
            if out.is_floating_point():
                out.fill_(float("nan"))
            return out

        return allocated

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small tensors; and the sums of two runs that are compared must be split alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small local .jsonl of real code, with documents on both sides of the split."""
    path = tmp_path_factory.mktemp("text") / "code.jsonl"
    with gzip.open(DATA / "calibration.jsonl.gz", "rt", encoding="utf-8") as lines:
        documents = [json.loads(next(lines)) for _ in range(80)]
    path.write_text("".join(json.dumps({"text": document["text"][:3000]}) + "\n" for document in documents))
    return str(path)
