"""Rows: which field is the text, messages through the chat template, rows without text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from proxsparse_triton.calibration.chat import chat_of
from proxsparse_triton.calibration.rows import RowRefusedError, RowText
from proxsparse_triton.calibration.sources import Column, open_source
from proxsparse_triton.errors import ConfigError, DataError

USER, ANSWER = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
SAID = "user: Hello|assistant: Hi|"


def chat(messages: Any) -> str:
    return "".join(f"{message['role']}: {message['content']}|" for message in messages)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "a", "messages": [USER]}, "a"),
        ({"messages": [USER, ANSWER]}, SAID),
        ({"id": 1, "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}, SAID),
        ({"prompt": "What? ", "completion": "That."}, "What? That."),
        ({"prompt": [USER], "completion": [ANSWER]}, SAID),
        ({"text": None, "messages": [USER, ANSWER]}, SAID),
        ({"text": None, "messages": None, "conversations": [USER, ANSWER]}, SAID),
        ({"text": None, "prompt": "What? ", "completion": "That."}, "What? That."),
    ],
)
def test_the_field_is_found_without_being_named(row: dict[str, Any], text: str) -> None:
    assert RowText(chat=chat).of(row, "here") == text


def test_a_named_field_wins_and_may_hold_messages() -> None:
    row = {"text": "a", "body": "b", "talk": [USER, ANSWER]}
    assert RowText("body", chat=chat).of(row, "here") == "b"
    assert RowText("talk", chat=chat).of(row, "here") == SAID


@pytest.mark.parametrize(
    "row",
    [
        {"text": None},
        {"text": ""},
        {"text": " \n"},
        {"messages": []},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": None},
        {"text": None, "messages": None},
        {"text": None, "messages": []},
    ],
)
def test_rows_without_text_are_counted(row: dict[str, Any]) -> None:
    rows = RowText(chat=chat)
    rows.of({"text": "good"}, "line 1")
    assert not rows.of(row, "line 2").strip()
    assert rows.tally.note() == "Skipped 1 row without text (null or empty) of the 2 rows read; the first: line 2."


def test_messages_of_another_form_are_named() -> None:
    with pytest.raises(DataError, match="here: expected messages with `role` and `content`, got the fields 'speaker'"):
        RowText(chat=chat).of({"messages": [{"speaker": "x"}]}, "here")
    with pytest.raises(DataError, match="here: expected a string or messages in the field 'messages', got a list"):
        RowText(chat=chat).of({"messages": ["Hello"]}, "here")


def test_an_option_of_its_own_is_named_in_messages() -> None:
    with pytest.raises(DataError, match="Name the one with the text with --eval-text-field"):
        RowText(None, "--eval-text-field").of({"content": "x"}, "here")


class Templated:
    chat_template = "x"

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def apply_chat_template(self, messages: Any, tokenize: bool) -> str:
        assert tokenize is False
        if self.error:
            raise self.error
        return chat(messages)


def test_the_tokenizers_template_and_what_it_refuses() -> None:
    assert chat_of(Templated())([USER, ANSWER]) == SAID  # type: ignore[arg-type]
    rows = RowText(chat=chat_of(Templated(ValueError("System role\nnot supported"))))  # type: ignore[arg-type]
    assert rows.of({"messages": [USER]}, "line 1") == ""
    assert rows.tally.note() == (
        "Skipped 1 row that the chat template refuses of the 1 row read; the first: line 1 (System role not supported)."
    )
    with pytest.raises(RowRefusedError):
        chat_of(Templated(KeyError()))([USER])  # type: ignore[arg-type]


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a tokenizer with a chat template for rows of messages, got one without"):
        chat_of(object())([USER])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.parquet", "a.arrow"])
def test_messages_in_every_kind_of_file_that_can_hold_them(tmp_path: Path, name: str) -> None:
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, {"role": "assistant", "content": "Yes"}]}]
    write(tmp_path / name, rows)
    assert list(open_source(str(tmp_path / name), chat=chat).documents()) == [SAID, "user: Hello|assistant: Yes|"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.parquet", "a.arrow"])
def test_messages_stand_in_for_a_null_text(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, [{"text": "a", "messages": None}, {"text": None, "messages": [USER, ANSWER]}, {"text": "b", "messages": [USER]}])
    assert list(open_source(str(tmp_path / name), chat=chat).documents()) == ["a", SAID, "b"]
    named = open_source(str(tmp_path / name), column=Column("text"), chat=chat)
    assert list(named.documents()) == ["a", "b"], "a field that was asked for is the only one"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    name = path.name
    if name.endswith("parquet"):
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith("arrow"):
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)


def test_the_tally_starts_anew_with_each_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n{"body": null}\n')
    source = open_source(str(path), column=Column("body"))
    for _ in range(2):
        assert list(source.documents()) == ["x"]
        assert source.tally is not None
        assert (source.tally.rows, source.tally.empty, source.tally.first) == (2, 1, f"{path}, line 2")
