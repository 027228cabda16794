"""Token windows: the packing token by token, the draw, exclusion, and the protocol's own figure."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxsparse_triton.calibration.documents import document_digest
from proxsparse_triton.calibration.sources import TextSource, open_source
from proxsparse_triton.calibration.windows import PAPERS, Windows, calibration_windows, evaluation_windows
from proxsparse_triton.errors import ConfigError, DataError
from proxsparse_triton.progress import Progress, Task

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "proxsparse_triton" / "assets" / "pylm-2m"
CALIBRATION = str(ROOT / "tests" / "data" / "calibration.jsonl.gz")
HELDOUT = str(ROOT / "tests" / "data" / "heldout.jsonl.gz")
BOS = 0


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(open_source(HELDOUT).documents())


def source_of(texts: list[str], joiner: str | None = None) -> TextSource:
    return TextSource("given", lambda: iter(texts), joiner)


def flat(windows: Windows) -> list[int]:
    return torch.cat(windows.tokens).tolist() if windows.tokens else []


def packed(tokenizer: Any, texts: list[str]) -> list[int]:
    """The packing written down again: every document after one BOS token."""
    return [token for text in texts for token in [BOS, *tokenizer(text, add_special_tokens=False)["input_ids"]]]


class Recorder(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.totals: list[int | None] = []
        self.advanced = 0

    def note(self, message: str) -> None:
        self.notes.append(message)

    def task(self, description: str, total: int | None = None) -> Task:
        self.totals.append(total)
        recorder = self

        class Counting(Task):
            def advance(self, amount: int = 1, **fields: object) -> None:
                recorder.advanced += amount

        return Counting()


class Special:
    """The real tokenizer with other special tokens, for what depends on them alone."""

    def __init__(self, tokenizer: Any, bos: int | None, eos: int | None) -> None:
        self.tokenizer, self.bos_token_id, self.eos_token_id = tokenizer, bos, eos
        self.calls: list[dict[str, Any]] = []

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        self.calls.append({"documents": 1 if isinstance(text, str) else len(text), **options})
        special = options.get("add_special_tokens", True) and self.bos_token_id is not None
        longest = options.pop("max_length", None)
        out = self.tokenizer(text, **{**options, "truncation": False})["input_ids"]

        def finish(ids: list[int]) -> list[int]:
            return ([self.bos_token_id, *ids] if special else ids)[:longest]

        return {"input_ids": finish(out) if isinstance(text, str) else [finish(ids) for ids in out]}


# ---- the protocol


def test_the_protocols_perplexity_of_the_built_in_model(tokenizer: Any) -> None:
    """Dense pylm-2m, fp32, the first 128 held-out windows of 512: 5.870, the figure every other one is compared with."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    windows, used = evaluation_windows(open_source(HELDOUT), tokenizer, windows=128, seqlen=512)
    losses = []
    with torch.inference_mode():
        for batch in torch.stack(windows.tokens).split(16):
            logits = model(batch).logits[:, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
    assert math.exp(torch.cat(losses).double().mean().item()) == pytest.approx(5.870, abs=0.005)
    assert windows.documents == len(used) == 15


def test_evaluation_is_the_text_from_its_start(tokenizer: Any, texts: list[str]) -> None:
    windows, used = evaluation_windows(source_of(texts), tokenizer, windows=20, seqlen=512)
    assert [tuple(window.shape) for window in windows.tokens] == [(512,)] * 20
    assert all(window.dtype == torch.int64 and window.device.type == "cpu" for window in windows.tokens)
    assert flat(windows) == packed(tokenizer, texts[:10])[: 20 * 512]
    lengths = np.cumsum([len(packed(tokenizer, [text])) for text in texts[:10]])
    reached = int(np.searchsorted(lengths, 20 * 512)) + 1
    assert used == {document_digest(text) for text in texts[:reached]}
    assert (windows.documents, windows.mode, windows.seed, windows.seqlen, windows.source) == (reached, "packed", 0, 512, "given")


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=200),
    seqlen=st.integers(2, 40),
    limit=st.none() | st.integers(1, 20),
)
def test_packing_loses_and_invents_nothing(tokenizer: Any, texts: list[str], seqlen: int, limit: int | None) -> None:
    expected = packed(tokenizer, [text for text in texts if text.strip()])
    count = len(expected) // seqlen if limit is None else limit
    if count == 0 or count * seqlen > len(expected):
        with pytest.raises(DataError):
            evaluation_windows(source_of(texts), tokenizer, windows=limit, seqlen=seqlen)
        return
    windows, used = evaluation_windows(source_of(texts), tokenizer, windows=limit, seqlen=seqlen)
    assert flat(windows) == expected[: count * seqlen]
    assert len(windows.tokens) == count
    ends = np.cumsum([len(packed(tokenizer, [text])) for text in texts if text.strip()])
    assert windows.documents == int(np.searchsorted(ends, count * seqlen)) + 1
    assert len(used) <= windows.documents


def test_blank_documents_are_skipped(tokenizer: Any) -> None:
    windows, used = evaluation_windows(source_of(["", "a = 1\n", " \n\t", "b = 2\n"] * 9), tokenizer, windows=None, seqlen=5)
    expected = packed(tokenizer, ["a = 1\n", "b = 2\n"] * 9)
    assert flat(windows) == expected[: len(expected) // 5 * 5]
    assert used == {document_digest("a = 1\n"), document_digest("b = 2\n")}


@pytest.mark.parametrize(("bos", "eos", "lead"), [(7, 9, [7]), (None, 9, [9]), (None, None, []), (0, 9, [0])])
def test_the_separator_is_bos_else_eos_else_nothing(tokenizer: Any, bos: int | None, eos: int | None, lead: list[int]) -> None:
    windows, _ = evaluation_windows(source_of(["a = 1\n"] * 20), Special(tokenizer, bos, eos), windows=2, seqlen=8, bos="never")
    document = lead + tokenizer("a = 1\n", add_special_tokens=False)["input_ids"]
    assert flat(windows) == (document * 20)[:16]


def test_no_special_tokens_inside_packed_documents(tokenizer: Any) -> None:
    special = Special(tokenizer, 7, None)
    evaluation_windows(source_of(["a = 1\n"] * 100), special, windows=None, seqlen=8)
    calls = [call for call in special.calls if call["documents"] > 1]  # the others ask for the special tokens of one letter
    assert [call["documents"] for call in calls] == [64, 36]
    assert all(call["add_special_tokens"] is False and call["verbose"] is False for call in calls)


def test_joined_text_has_the_special_tokens_at_its_start_alone(tokenizer: Any) -> None:
    rows = ["", " = Title = \n", "", " First words .\n", "Second words .\n", ""] * 20
    windows, used = evaluation_windows(source_of(rows, "\n\n"), Special(tokenizer, 7, None), windows=None, seqlen=16, bos="never")
    expected = [7, *tokenizer("\n\n".join(rows), add_special_tokens=False)["input_ids"]]
    assert flat(windows) == expected[: len(expected) // 16 * 16]
    assert used == {document_digest(text) for text in rows if text}
    assert windows.documents == 60
    assert windows.protocol == PAPERS


def test_text_longer_than_the_models_context_is_no_warning(tokenizer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer.deprecation_warnings.clear()
    long = "value = [1, 2, 3]\n" * 2000
    assert len(tokenizer(long, verbose=False)["input_ids"]) > tokenizer.model_max_length
    for joiner in (None, "\n\n"):
        calibration_windows(source_of([long], joiner), tokenizer, samples=2, seqlen=64)
    assert "longer than" not in "".join(capfd.readouterr())


def test_tokenising_the_whole_calibration_file_takes_seconds(tokenizer: Any) -> None:
    start = time.perf_counter()
    windows, _ = evaluation_windows(open_source(CALIBRATION), tokenizer, windows=None, seqlen=512)
    assert len(windows.tokens) == 4943
    assert time.perf_counter() - start < 30, "about 4 s on one core: a wide margin for a busy machine"


# ---- the draw


def test_the_draw_is_a_permutation_of_the_first_windows(tokenizer: Any, texts: list[str]) -> None:
    drawn = calibration_windows(source_of(texts), tokenizer, samples=12, seqlen=128, seed=5)
    pool, _ = evaluation_windows(source_of(texts), tokenizer, windows=60, seqlen=128)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(5))[:12]
    assert all(torch.equal(window, pool.tokens[at]) for window, at in zip(drawn.tokens, order, strict=True))
    assert (len(drawn.tokens), drawn.seed, drawn.mode, drawn.seqlen, drawn.source) == (12, 5, "packed", 128, "given")


def test_short_text_gives_a_smaller_pool(tokenizer: Any) -> None:
    source = source_of(["a = 1\n" * 60])
    every, _ = evaluation_windows(source, tokenizer, windows=None, seqlen=32)
    drawn = calibration_windows(source, tokenizer, samples=len(every.tokens), seqlen=32, seed=2**63 - 1)
    assert sorted(map(tuple, (window.tolist() for window in drawn.tokens))) == sorted(map(tuple, (w.tolist() for w in every.tokens)))


@pytest.mark.parametrize("mode", ["packed", "documents"])
def test_same_seed_same_windows_other_seed_others(tokenizer: Any, mode: Any) -> None:
    first, again, other = (
        calibration_windows(open_source(CALIBRATION), tokenizer, samples=8, seqlen=64, seed=seed, mode=mode) for seed in (1, 1, 2)
    )
    assert first.fingerprint == again.fingerprint
    assert flat(first) == flat(again)
    assert first == again != other
    assert first.fingerprint != other.fingerprint


def test_the_fingerprint_is_over_ids_and_window_ends(tokenizer: Any, texts: list[str]) -> None:
    windows, _ = evaluation_windows(source_of(texts), tokenizer, windows=4, seqlen=64)
    closed = np.concatenate([np.append(window.numpy(), -1) for window in windows.tokens]).astype("<i8")
    assert windows.fingerprint == hashlib.sha256(closed.tobytes()).hexdigest()
    same_ids, _ = evaluation_windows(source_of(texts), tokenizer, windows=2, seqlen=128)
    assert flat(same_ids) == flat(windows)
    assert same_ids.fingerprint != windows.fingerprint


def test_drawn_windows_own_their_memory(tokenizer: Any, texts: list[str]) -> None:
    windows = calibration_windows(source_of(texts), tokenizer, samples=4, seqlen=64)
    assert all(window.untyped_storage().nbytes() == 64 * 8 for window in windows.tokens)


def test_documents_counts_those_that_reach_the_drawn_windows(tokenizer: Any) -> None:
    texts = [f"name_{i % 10} = {i % 10}\n" for i in range(40)]
    length = len(packed(tokenizer, texts[:1]))
    for reach, seqlen in ((1, length), (2, 2 * length)):
        windows = calibration_windows(source_of(texts), tokenizer, samples=3, seqlen=seqlen, seed=3)
        assert windows.documents == 3 * reach, "every window holds whole documents"
    whole = calibration_windows(source_of(["x = 1\n" * 500]), tokenizer, samples=3, seqlen=16)
    assert whole.documents == 1


def test_reading_stops_when_the_pool_is_full(tokenizer: Any) -> None:
    read = 0

    def long() -> Iterator[str]:
        nonlocal read
        while read < 1000:
            read += 1
            yield f"line {read}\n" * 50

    source = TextSource("long", long)
    calibration_windows(source, tokenizer, samples=4, seqlen=64)
    calibration_windows(source, tokenizer, samples=4, seqlen=64, mode="documents")
    evaluation_windows(source, tokenizer, windows=4, seqlen=64)
    assert read <= 3 * 65


# ---- documents mode


def test_documents_mode_is_one_truncated_document_a_window(tokenizer: Any, texts: list[str]) -> None:
    short = ["", "a", *(f"x{i} = {i}\n" for i in range(8)), *texts[:20]]
    special = Special(tokenizer, 7, None)
    windows = calibration_windows(source_of(short), special, samples=20, seqlen=32, mode="documents")
    expected = [[7, *tokenizer(text, add_special_tokens=False)["input_ids"]][:32] for text in short if text]
    assert len(expected) == 29
    order = torch.randperm(29, generator=torch.Generator().manual_seed(42))[:20].tolist()
    assert [window.tolist() for window in windows.tokens] == [expected[at] for at in order]
    calls = [call for call in special.calls if call["documents"] > 1]
    assert all(call["truncation"] is True and call["max_length"] == 32 and "add_special_tokens" not in call for call in calls)
    assert (windows.documents, windows.mode) == (20, "documents")


def test_documents_of_one_token_are_left_out(tokenizer: Any) -> None:
    assert len(tokenizer("a")["input_ids"]) == 1
    windows = calibration_windows(source_of(["a", "a b c", "a", "d e f"]), tokenizer, samples=2, seqlen=8, mode="documents")
    assert sorted(len(window) for window in windows.tokens) == [3, 3]
    with pytest.raises(
        DataError, match=r"expected 3 documents of two tokens or more from given, got 2\. Lower --samples, or give more text\."
    ):
        calibration_windows(source_of(["a", "a b c", "a", "d e f"]), tokenizer, samples=3, seqlen=8, mode="documents")


def test_documents_mode_ignores_the_joiner(tokenizer: Any) -> None:
    windows = calibration_windows(source_of(["", "a b c", " ", "d e f"], "\n\n"), tokenizer, samples=2, seqlen=8, mode="documents")
    assert sorted(map(tokenizer.decode, windows.tokens)) == ["a b c", "d e f"]


# ---- exclusion


@pytest.mark.parametrize("mode", ["packed", "documents"])
def test_evaluated_documents_are_left_out_and_counted(tokenizer: Any, texts: list[str], mode: Any) -> None:
    _, used = evaluation_windows(source_of(texts), tokenizer, windows=30, seqlen=128)
    progress = Recorder()
    windows = calibration_windows(source_of(texts), tokenizer, samples=8, seqlen=128, exclude=used, mode=mode, progress=progress)
    remaining = [text for text in texts if document_digest(text) not in used]
    alone = calibration_windows(source_of(remaining), tokenizer, samples=8, seqlen=128, mode=mode)
    assert windows.fingerprint == alone.fingerprint
    left_out = "1 document" if len(used) == 1 else f"{len(used)} documents"
    assert progress.notes == [f"Left {left_out} of given out of calibration: {'it is' if len(used) == 1 else 'they are'} evaluated on."]


def test_exclusion_from_joined_text_keeps_the_blank_rows(tokenizer: Any) -> None:
    rows = ["", " = Same = \n", "", " evaluated words\n", " calibration words\n"] * 30
    exclude = {document_digest(" evaluated words\n"), document_digest("")}
    windows = calibration_windows(source_of(rows, "\n\n"), tokenizer, samples=1, seqlen=300, exclude=exclude)
    assert tokenizer.decode(windows.tokens[0]).startswith("\n\n = Same = \n\n\n\n\n calibration words\n\n\n\n\n = Same =")
    assert windows.documents == 60
    assert windows.protocol == PAPERS


def test_no_note_without_anything_left_out(tokenizer: Any, texts: list[str]) -> None:
    progress = Recorder()
    calibration_windows(source_of(texts), tokenizer, samples=4, seqlen=64, exclude={"0" * 64}, progress=progress)
    assert progress.notes == []
    assert progress.totals == [20]
    assert progress.advanced == 20


def test_excluding_everything_says_so(tokenizer: Any) -> None:
    texts = [f"x = {i}\n" * 50 for i in range(5)]
    _, used = evaluation_windows(source_of(texts), tokenizer, windows=None, seqlen=8)
    with pytest.raises(DataError, match=r"got 0 \(5 documents left out because they are evaluated on\)\. Lower --samples or --seqlen"):
        calibration_windows(source_of(texts), tokenizer, samples=1, seqlen=8, exclude=used)


def test_one_document_is_not_called_documents(tokenizer: Any) -> None:
    texts = [f"x = {i}\n" * 50 for i in range(5)]
    _, used = evaluation_windows(source_of(texts[:1]), tokenizer, windows=None, seqlen=8)
    progress = Recorder()
    with pytest.raises(DataError, match=r"\(1 document left out because it is evaluated on\)"):
        calibration_windows(source_of(texts), tokenizer, samples=1000, seqlen=8, exclude=used, progress=progress)
    assert progress.notes == ["Left 1 document of given out of calibration: it is evaluated on."]


def test_the_two_sides_of_a_file_share_no_window(tokenizer: Any, tmp_path: Path) -> None:
    rows = [f"def function_{i}(x):\n    return x + {i}\n" for i in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    evaluated, used = evaluation_windows(open_source(str(tmp_path / "a.jsonl"), split="heldout"), tokenizer, windows=None, seqlen=16)
    progress = Recorder()
    source = open_source(str(tmp_path / "a.jsonl"), split="calibration")
    calibration_windows(source, tokenizer, samples=50, seqlen=16, exclude=used, progress=progress)
    assert progress.notes == []
    assert len(evaluated.tokens) >= 20


# ---- refusals


def calibrate(tokenizer: Any, **options: Any) -> Windows:
    return calibration_windows(source_of(["a = 1\n" * 20]), tokenizer, **{"samples": 1, "seqlen": 8, **options})


def evaluate(tokenizer: Any, **options: Any) -> Windows:
    return evaluation_windows(source_of(["a = 1\n" * 20]), tokenizer, **{"windows": 1, "seqlen": 8, **options})[0]


@pytest.mark.parametrize(
    ("call", "options", "said"),
    [
        (calibrate, {"samples": 0}, "calibration_windows: expected samples of at least 1, got 0. Raise --samples."),
        (calibrate, {"samples": -3}, "calibration_windows: expected samples of at least 1, got -3. Raise --samples."),
        (calibrate, {"seqlen": 1}, "calibration_windows: expected seqlen of at least 2, got 1. Raise --seqlen."),
        (calibrate, {"seed": -1}, "calibration_windows: expected seed of at least 0, got -1. Raise --seed."),
        (calibrate, {"seed": 2**63}, f"calibration_windows: expected seed below 2^63, got {2**63}. Choose a smaller one."),
        (calibrate, {"mode": "rows"}, "calibration_windows: expected mode to be packed or documents, got 'rows'. Choose one of them."),
        (evaluate, {"windows": 0}, "evaluation_windows: expected windows of at least 1, got 0. Raise --windows."),
        (evaluate, {"seqlen": 0}, "evaluation_windows: expected seqlen of at least 2, got 0. Raise --seqlen."),
    ],
)
def test_settings_out_of_range(tokenizer: Any, call: Callable[..., Windows], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call(tokenizer, **options)
    assert str(caught.value) == said


@pytest.mark.parametrize("samples", [1.5, "4", True, None])
def test_settings_of_the_wrong_kind(tokenizer: Any, samples: Any) -> None:
    with pytest.raises(TypeError, match="calibration_windows: expected samples to be an integer, got"):
        calibrate(tokenizer, samples=samples)


def test_too_little_text_says_how_much_there_is(tokenizer: Any) -> None:
    tokens = len(packed(tokenizer, ["a = 1\n" * 20]))
    count = tokens // 8
    with pytest.raises(DataError) as caught:
        calibrate(tokenizer, samples=count + 1)
    expected = f"calibration_windows: expected {count + 1} windows of 8 tokens from given, got {count}."
    assert str(caught.value) == f"{expected} Lower --samples or --seqlen, or give more text."
    with pytest.raises(DataError) as caught:
        evaluate(tokenizer, windows=count + 1)
    expected = f"evaluation_windows: expected {count + 1} windows of 8 tokens from given, got {count} from {tokens} tokens."
    assert str(caught.value) == f"{expected} Lower --windows or --seqlen, or give more text."
    with pytest.raises(DataError) as caught:
        evaluate(tokenizer, windows=None, seqlen=1000)
    expected = f"evaluation_windows: expected at least one window of 1000 tokens from given, got 0 from {tokens} tokens."
    assert str(caught.value) == f"{expected} Lower --seqlen, or give more text."


@pytest.mark.parametrize("joiner", [None, "\n\n"])
def test_a_source_without_documents(tokenizer: Any, joiner: str | None) -> None:
    with pytest.raises(DataError, match="expected 1 windows of 8 tokens from given, got 0"):
        calibration_windows(source_of([], joiner), tokenizer, samples=1, seqlen=8)
