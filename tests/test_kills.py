"""SIGKILL at placed moments of every command that writes: a whole run stays under its name, and the next command needs no cleaning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from zygote import Zygote

from proxsparse_triton.formats.owned import is_whole, manifest_of, strangers
from proxsparse_triton.formats.records import sha256

pytestmark = pytest.mark.slow

OPTIONS = ("--seqlen", 32, "--samples", 4, "--eval-windows", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as process:
        yield process


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Path:
    """A folder with a model in two shards, a text, and finished outputs of it: run (magnitude), masks, packed and table."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model", max_shard_size="60KB")
    vocabulary = {"<s>": 0, "<pad>": 1} | {c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>").save_pretrained(folder / "model")
    (folder / "model" / "additional_chat_templates").mkdir()
    (folder / "model" / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} words and {n * n} more of them; " * 12}) + "\n" for n in range(80))
    )
    for arguments in (
        prune(folder, folder / "run", "magnitude"),
        ("export", folder / "run", "--format", "masks", "-o", folder / "masks"),
        ("export", folder / "run", "--format", "packed", "-o", folder / "packed"),
        compare(folder, folder / "table"),
    ):
        ending = zygote.run(*arguments)
        assert ending.status == 0, ending.said
    return folder


def prune(inputs: Path, output: Path, method: str, *more: object) -> tuple[object, ...]:
    return ("prune", inputs / "model", "-o", output, "--method", method, "--calibration", inputs / "text.jsonl", *OPTIONS, *more)


def compare(inputs: Path, output: Path, *more: object) -> tuple[object, ...]:
    text = ("--calibration", inputs / "text.jsonl")
    return ("compare", inputs / "model", "-o", output, "--methods", "magnitude,wanda", *text, *OPTIONS, *more)


def moments(events: int, count: int) -> list[int]:
    """`count` of the moments before an event, spread; the last ones, where names change, all."""
    last = min(count // 2, events)
    first = count - last
    return sorted({*range(events - last, events), *(index * (events - last) // first for index in range(first))})


def check_whole(folder: Path) -> None:
    """Every file of the folder is in its record and as it was written."""
    assert is_whole(folder), sorted(folder.rglob("*"))
    assert strangers(folder) == []
    manifest = manifest_of(folder)
    for name, record in manifest.get("files", {}).items():
        assert sha256(folder / name) == record["sha256"], name
    for entry in manifest.get("comparison", ()):
        check_whole(folder / entry["folder"])


def method_of(folder: Path) -> str:
    name = manifest_of(folder)["method"]
    return str(name["name"] if isinstance(name, dict) else name)


def killed_everywhere(
    zygote: Zygote, place: Path, arguments: tuple[object, ...], count: int, earlier: Path | None, two_steps: bool = False
) -> None:
    """Kill `arguments`, which write `place`/run, at `count` moments; `earlier`: what lies there before."""
    output = place / "run"

    def start_anew() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if earlier is not None:
            shutil.copytree(earlier, output)

    start_anew()
    ending = zygote.run(*arguments, below=str(place), two_steps=two_steps)
    assert ending.status == 0, ending.said
    points = moments(ending.events, count)
    assert len(points) == count, f"{ending.events} events"
    for number, point in enumerate(points):
        start_anew()
        ending = zygote.run(*arguments, below=str(place), kill=point, torn=number % 2 == 1, two_steps=two_steps)
        assert ending.status == -9, (point, ending)
        if output.exists():
            check_whole(output)
        else:
            assert earlier is None or two_steps, point
        ending = zygote.run(*arguments, two_steps=two_steps)
        again = earlier is None and "an earlier run, which is kept" in ending.said  # killed after it was complete
        assert ending.status == 0 or again, (point, ending)
        check_whole(output)
        assert [path.name for path in place.iterdir()] == ["run"], point


def test_prune(zygote: Zygote, inputs: Path, tmp_path: Path) -> None:
    place = tmp_path / "here"
    killed_everywhere(zygote, place, prune(inputs, place / "run", "magnitude"), 16, None)


@pytest.mark.parametrize("two_steps", [False, True], ids=["one step", "two steps"])
def test_prune_over_an_earlier_run(zygote: Zygote, inputs: Path, tmp_path: Path, two_steps: bool) -> None:
    place = tmp_path / "here"
    arguments = prune(inputs, place / "run", "wanda", "--overwrite")
    killed_everywhere(zygote, place, arguments, 20 if two_steps else 40, inputs / "run", two_steps)
    assert method_of(place / "run") == "wanda"


@pytest.mark.parametrize(("format", "count"), [("packed", 35), ("masks", 12)])
def test_export_over_an_earlier_one(zygote: Zygote, inputs: Path, tmp_path: Path, format: str, count: int) -> None:
    place = tmp_path / "here"
    arguments = ("export", inputs / "run", "--format", format, "-o", place / "run", "--overwrite")
    killed_everywhere(zygote, place, arguments, count, inputs / format)


def test_compare_over_an_earlier_one(zygote: Zygote, inputs: Path, tmp_path: Path) -> None:
    place = tmp_path / "here"
    killed_everywhere(zygote, place, compare(inputs, place / "run", "--overwrite"), 24, inputs / "table")


def test_report(zygote: Zygote, inputs: Path, tmp_path: Path) -> None:
    """Also the next `prune --overwrite` takes what is left for pst's own."""
    run = tmp_path / "run"
    shutil.copytree(inputs / "run", run)
    ending = zygote.run("report", run, below=str(run))
    assert ending.status == 0, ending.said
    for point in range(ending.events):
        for torn in (False, True):
            shutil.rmtree(run)
            shutil.copytree(inputs / "run", run)
            assert zygote.run("report", run, below=str(run), kill=point, torn=torn).status == -9
            check_whole(run)
            left = tmp_path / "left"
            shutil.copytree(run, left)
            assert zygote.run("report", run).status == 0
            assert zygote.run(*prune(inputs, left, "magnitude", "--overwrite")).status == 0
            shutil.rmtree(left)
