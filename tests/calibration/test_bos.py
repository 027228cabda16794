"""What stands in front of a window, and that the text itself is what it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bos import loaded, with_bos
from hypothesis import given, settings
from hypothesis import strategies as st

from proxsparse_triton.calibration.sources import TextSource
from proxsparse_triton.calibration.tokens import window_prefix
from proxsparse_triton.calibration.windows import PAPERS, PAPERS_BUT_BOS, calibration_windows, evaluation_windows
from proxsparse_triton.errors import ConfigError

ASSET = Path(__file__).parents[2] / "proxsparse_triton" / "assets" / "pylm-2m"
BOS = 0


@pytest.fixture(scope="module")
def plain() -> Any:
    return loaded(ASSET)


@pytest.fixture(scope="module")
def adding(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The built-in model's tokenizer, but with a BOS in front of every text."""
    folder = tmp_path_factory.mktemp("bos")
    for path in ASSET.glob("tokenizer*"):
        shutil.copy(path, folder)
    return loaded(with_bos(folder))


def source_of(texts: list[str], joiner: str | None = None) -> TextSource:
    return TextSource("given", lambda: iter(texts), joiner)


def without_bos(windows: Any) -> list[int]:
    """The text's tokens, from windows that each begin with a BOS: separators between documents are BOS too, so all go."""
    return [i for window in windows.tokens for i in window.tolist() if i != BOS]


def test_auto_is_what_the_tokenizer_puts_before_a_text(plain: Any, adding: Any) -> None:
    assert window_prefix(plain, "auto") == ()
    assert window_prefix(adding, "auto") == window_prefix(adding, "always") == window_prefix(plain, "always") == (BOS,)
    assert window_prefix(adding, "never") == ()


def test_always_without_a_bos_is_refused() -> None:
    class NoBos:
        bos_token_id = None

        def __call__(self, text: str, **options: Any) -> Any:
            return {"input_ids": [5]}

    with pytest.raises(ConfigError, match=r"expected a tokenizer with a BOS token for --bos always, got a NoBos without one\. Use --bos"):
        window_prefix(NoBos(), "always")  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), seqlen=st.integers(2, 40), limit=st.none() | st.integers(1, 10))
def test_every_window_begins_with_one_bos_and_no_token_is_lost(adding: Any, lengths: list[int], seqlen: int, limit: int | None) -> None:
    texts = ["x = 1\n" * length for length in lengths]
    whole = [i for text in texts for i in adding(text, add_special_tokens=False)["input_ids"]]
    try:
        windows, _ = evaluation_windows(source_of(texts), adding, windows=limit, seqlen=seqlen)
    except ValueError:
        assert len(whole) < (seqlen - 1) * (limit or 1)
        return
    assert all(len(window) == seqlen and window[0] == BOS for window in windows.tokens)
    assert not any(seqlen > 2 and window[1] == BOS and window[0] == BOS for window in windows.tokens)
    found = without_bos(windows)
    assert found == whole[: len(found)]
    if limit is None:
        assert len(whole) - len(found) < seqlen
    assert windows.bos == (BOS,)


@pytest.mark.parametrize("mode", ["packed", "documents"])
@pytest.mark.parametrize(("bos", "first"), [("auto", True), ("always", True), ("never", False)])
def test_calibration_too(adding: Any, mode: Any, bos: Any, first: bool) -> None:
    texts = [f"def name_{i}(x):\n    return x + {i}\n" * 20 for i in range(40)]
    windows = calibration_windows(source_of(texts), adding, samples=20, seqlen=32, mode=mode, bos=bos)
    starts = [int(window[0]) == BOS for window in windows.tokens]
    assert all(starts) if first else not all(starts)
    assert {len(window) for window in windows.tokens} == {32}
    assert windows.bos == ((BOS,) if first else ())
    assert ("each behind a BOS" in windows.described()) == first


def test_always_adds_one_in_documents_mode_too(plain: Any) -> None:
    windows = calibration_windows(source_of(["a = 1\n" * 9] * 3), plain, samples=2, seqlen=8, mode="documents", bos="always")
    alone = plain("a = 1\n" * 9)["input_ids"][:7]
    assert [window.tolist() for window in windows.tokens] == [[BOS, *alone]] * 2


def test_a_tokenizer_without_bos_in_front_gives_the_windows_it_gave(plain: Any) -> None:
    texts = [f"name_{i} = {i}\n" * 30 for i in range(20)]
    auto, never = (evaluation_windows(source_of(texts), plain, windows=9, seqlen=32, bos=bos)[0] for bos in ("auto", "never"))
    assert auto.fingerprint == never.fingerprint
    assert auto.bos == ()


def test_joined_text_says_how_far_it_is_the_papers(adding: Any) -> None:
    rows = ["", " = Title = \n", "", " First words .\n"] * 20
    papers, every = (evaluation_windows(source_of(rows, "\n\n"), adding, windows=5, seqlen=16, bos=bos)[0] for bos in ("never", "auto"))
    whole = adding("\n\n".join(rows))["input_ids"]
    assert whole[0] == BOS
    assert torch.cat(papers.tokens).tolist() == whole[:80]
    assert papers.protocol == PAPERS
    assert [window.tolist() for window in every.tokens] == [[BOS, *whole[1 + 15 * i : 16 + 15 * i]] for i in range(5)]
    assert every.protocol == PAPERS_BUT_BOS


@pytest.mark.parametrize(("options", "said"), [({"bos": "yes"}, "bos to be auto, always or never, got 'yes'")])
def test_other_words_are_refused(plain: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        evaluation_windows(source_of(["a = 1\n" * 20]), plain, windows=1, seqlen=8, **options)
