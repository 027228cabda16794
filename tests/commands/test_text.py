"""Text on the command line: BOS, fields, splits, chat rows and ids that the model has not, in prune and in eval."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bos import loaded, with_bos, with_template
from click.testing import CliRunner

from proxsparse_triton.calibration.sources import open_source
from proxsparse_triton.calibration.windows import evaluation_windows
from proxsparse_triton.cli import main

ASSET = Path(__file__).parents[2] / "proxsparse_triton" / "assets" / "pylm-2m"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The built-in model as a folder of one's own."""
    return Path(shutil.copytree(ASSET, tmp_path / "model"))


def rows(path: Path, field: str, count: int = 60) -> str:
    texts = [f"def function_{i}(value):\n    return value + {i}\n" * 12 for i in range(count)]
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return str(path)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def prune(model: Path, out: Path, text: str, *more: object) -> Any:
    size = ("--samples", 4, "--seqlen", 32, "--eval-windows", 2, "--device", "cpu", "--json")
    return invoke("prune", model, "-o", out, "--method", "wanda", "--calibration", text, *size, *more)


def evaluate(model: Path, text: str, *more: object) -> Any:
    size = ("--seqlen", 32, "--windows", 4, "--device", "cpu", "--json")
    return invoke("eval", model, "--perplexity", text, *size, *more)


def own_perplexity(folder: Path, windows: Any) -> float:
    """By transformers' own loss."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    return math.exp(sum(losses) / len(losses))


def by_hand(folder: Path, text: str, bos: int | None) -> list[torch.Tensor]:
    """Windows of 32 with `bos` in front, cut out of documents behind a BOS each."""
    tokenizer = loaded(folder)
    stream = [
        i
        for line in Path(text).read_text().splitlines()
        for i in [tokenizer.bos_token_id, *tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]]
    ]
    windows, at = [], 0
    while len(windows) < 4:
        lead = [] if bos is None or stream[at] == bos else [bos]
        windows.append(torch.tensor(lead + stream[at : at + 32 - len(lead)]))
        at += 32 - len(lead)
    return windows


@pytest.mark.parametrize(("option", "bos"), [("auto", 0), ("always", 0), ("never", None)])
def test_perplexity_is_transformers_own_with_a_bos_in_front_of_each_window(
    model: Path, tmp_path: Path, option: str, bos: int | None
) -> None:
    with_bos(model)
    text = rows(tmp_path / "t.jsonl", "text")
    (entry,) = json.loads(evaluate(model, text, "--bos", option).stdout)["perplexity"]
    assert entry["perplexity"] == pytest.approx(own_perplexity(model, by_hand(model, text, bos)), rel=1e-5)
    assert entry["bos"] == ([] if bos is None else [bos])


def test_gemma_gets_its_bos(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma3TextConfig(vocab_size=4096, head_dim=16, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma")
    for path in ASSET.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "gemma")
    with_bos(tmp_path / "gemma")
    text = rows(tmp_path / "t.jsonl", "text")
    (entry,) = json.loads(evaluate(tmp_path / "gemma", text).stdout)["perplexity"]
    assert entry["perplexity"] == pytest.approx(own_perplexity(tmp_path / "gemma", by_hand(tmp_path / "gemma", text, 0)), rel=1e-5)


def test_bos_is_recorded_and_told(model: Path, tmp_path: Path) -> None:
    with_bos(model)
    text = rows(tmp_path / "t.jsonl", "text")
    result = invoke(
        "prune", model, "-o", tmp_path / "run", "--method", "wanda", "--calibration", text, *["--samples", "4", "--seqlen", "32"]
    )
    assert result.exit_code == 0, result.output
    assert "windows of 32 tokens of" in result.stdout
    assert "each behind a BOS" in result.stdout
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["config"]["bos"], manifest["calibration"]["bos"], manifest["evaluation"]["bos"]) == ("auto", [0], [0])
    table = invoke("eval", tmp_path / "run", "--no-dense", "--perplexity", text, *["--seqlen", "32", "--windows", "2", "--device", "cpu"])
    assert "each behind a BOS" in table.stdout
    compared = invoke(
        "compare", model, "-o", tmp_path / "c", "--methods", "magnitude", "--calibration", text, *["--samples", "4", "--seqlen", "32"]
    )
    assert "each behind a BOS" in compared.stdout, compared.output


def test_always_needs_a_bos(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "bos_token"}))
    result = evaluate(model, rows(tmp_path / "t.jsonl", "text"), "--bos", "always")
    assert result.exit_code == 1
    assert "expected a tokenizer with a BOS token for --bos always" in result.output


@pytest.mark.parametrize("side", ["calibration", "evaluation", "eval"])
def test_ids_beyond_the_embedding_are_refused_before_the_work(model: Path, tmp_path: Path, side: str) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": 4096, "content": "<|im_start|>", "special": True, **flags})
    (model / "tokenizer.json").write_text(json.dumps(content))
    good, bad = rows(tmp_path / "good.jsonl", "text"), tmp_path / "bad.jsonl"
    bad.write_text(Path(good).read_text().replace("def ", "<|im_start|>"))
    if side == "eval":
        result = evaluate(model, str(bad))
    else:
        texts = (bad, good) if side == "calibration" else (good, bad)
        result = prune(model, tmp_path / "run", str(texts[0]), "--eval", texts[1])
    assert result.exit_code == 1, result.output
    said = f"{bad}: expected token ids below 4096, the rows of the model's embedding, got 4096 ('<|im_start|>') in window"
    assert said in result.output.replace("\n", "")
    assert "Loading" not in result.output


def test_each_text_has_its_own_field(model: Path, tmp_path: Path) -> None:
    own, other = rows(tmp_path / "own.jsonl", "content"), rows(tmp_path / "other.jsonl", "body", 40)
    refused = prune(model, tmp_path / "run", own, "--text-field", "content", "--eval", other)
    assert "expected a field 'text', got the fields 'body'. Name the one with the text with --eval-text-field." in refused.output
    refused = prune(model, tmp_path / "run", own)
    assert "Name the one with the text with --text-field." in refused.output
    done = prune(model, tmp_path / "run", own, "--text-field", "content", "--eval", other, "--eval-text-field", "body")
    assert done.exit_code == 0, done.output
    assert evaluate(model, own, "--text-field", "content").exit_code == 0
    alone = prune(model, tmp_path / "run", own, "--eval-text-field", "body")
    assert "expected --eval-text-field with --eval, got it alone" in alone.output


def test_a_field_without_rows_is_refused_and_belongs_to_the_texts_with_rows(model: Path, tmp_path: Path) -> None:
    own, plain = rows(tmp_path / "own.jsonl", "content"), tmp_path / "plain.txt"
    plain.write_text("def function(value):\n    return value\n" * 200)
    said = "with rows of JSON lines, a table or a Hub dataset, got 'content'. Leave it out."
    assert f"{plain}: expected --text-field {said}" in prune(model, tmp_path / "run", str(plain), "--text-field", "content").output
    assert f"stdlib: expected --text-field {said}" in evaluate(model, "stdlib", "--text-field", "content").output
    refused = prune(model, tmp_path / "run", own, "--text-field", "content", "--eval", plain, "--eval-text-field", "content")
    assert f"{plain}: expected --eval-text-field {said}" in refused.output
    done = evaluate(model, own, "--perplexity", plain, "--text-field", "content")
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["perplexity"]) == 2


def test_the_help_tells_how_much_of_a_split_is_measured_on() -> None:
    for command in ("prune", "compare", "eval"):
        assert "one document in ten of it is measured on" in " ".join(invoke(command, "--help").output.split()), command


def test_a_null_row_is_skipped_with_a_note(model: Path, tmp_path: Path) -> None:
    text = rows(tmp_path / "t.jsonl", "text")
    content = Path(text).read_text()
    Path(text).write_text('{"text": null}\n' + content)
    result = prune(model, tmp_path / "run", text)
    assert result.exit_code == 0, result.output
    assert f"Skipped 1 row without text (null or empty) of the 61 rows read; the first: {text}, line 1." in result.output


def test_chat_rows_go_through_the_template(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    said = [[{"role": "user", "content": f"Question {i}? " * 20}, {"role": "assistant", "content": "Yes. " * 20}] for i in range(60)]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in said))
    refused = prune(model, tmp_path / "run", str(path))
    assert refused.exit_code == 1
    assert "expected a tokenizer with a chat template for rows of messages, got one without" in refused.output
    with_template(model, TEMPLATE)
    assert prune(model, tmp_path / "run", str(path)).exit_code == 0
    (entry,) = json.loads(evaluate(model, str(path)).stdout)["perplexity"]
    plain = tmp_path / "plain.jsonl"
    texts = ["".join(f"{m['role']}: {m['content']}\n" for m in messages) for messages in said]
    plain.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    windows, _ = evaluation_windows(open_source(str(plain)), loaded(model), windows=4, seqlen=32)
    assert entry["fingerprint"] == windows.fingerprint


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Data sets of the Hub with the splits train_sft and test_sft (wikitext: train and test); gives the splits asked for."""
    library = pytest.importorskip("datasets")
    asked: list[str] = []

    def load(path: str, name: str | None = None, *, split: str | None = None, streaming: bool = False, **options: Any) -> Any:
        names = ("train", "test") if "wikitext" in path else ("train_sft", "test_sft")
        texts = [{"text": f"{path} row {i} of the text\n" * 9} for i in range(80)]
        sets = {key: library.Dataset.from_list([{"text": key + row["text"]} for row in texts]).to_iterable_dataset() for key in names}
        if split is None:
            return library.IterableDatasetDict(sets)
        asked.append(split)
        if split not in sets:
            raise ValueError(f"Bad split: {split}. Available splits: {list(sets)}")
        return sets[split]

    monkeypatch.setattr(library, "load_dataset", load)
    return asked


def test_a_split_is_named_or_those_there_are(model: Path, tmp_path: Path, hub: list[str]) -> None:
    refused = prune(model, tmp_path / "run", "owner/chat")
    expected = "owner/chat: expected the split 'train', got a dataset with the splits 'test_sft', 'train_sft'. Name one with --split."
    assert expected in refused.output
    done = prune(model, tmp_path / "run", "owner/chat", "--split", "train_sft", "--eval", "owner/chat", "--eval-split", "test_sft")
    assert done.exit_code == 0, done.output
    assert hub == ["train", "test_sft", "train_sft"]
    assert evaluate(model, "owner/chat", "--split", "test_sft").exit_code == 0
    local = prune(model, tmp_path / "other", rows(tmp_path / "t.jsonl", "text"), "--split", "train_sft")
    assert "expected --split with a Hub dataset (owner/name), got 'train_sft'" in local.output


def test_wikitext2_has_its_own_field_and_says_which_protocol_it_follows(model: Path, tmp_path: Path, hub: list[str]) -> None:
    own = rows(tmp_path / "own.jsonl", "content")
    done = prune(model, tmp_path / "run", own, "--text-field", "content", "--eval", "wikitext2")
    assert done.exit_code == 0, done.output
    (entry,) = json.loads(evaluate(model, "wikitext2").stdout)["perplexity"]
    assert entry["protocol"] == "joined by blank lines and cut into windows, as in the pruning papers"
    with_bos(model)
    table = invoke("eval", model, "--perplexity", "wikitext2", *["--seqlen", "32", "--windows", "2", "--device", "cpu"]).stdout
    told = " ".join(table.split())
    assert "with a BOS in front of every window" in told
    assert "the papers have at most one, before the first (--bos never)" in told
