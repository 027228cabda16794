"""The text of one row of a table, of JSON lines or of a Hub dataset: a field, or messages through the tokenizer's chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import DataError
from .documents import DOCUMENT_BYTES

TEXT = "text"
# What a row may hold instead of a text, in the order in which it is looked for.
MESSAGES = ("messages", "conversations")
PAIR = ("prompt", "completion")
FORMS = ((TEXT,), *((name,) for name in MESSAGES), PAIR)
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's words

Messages = Sequence[Mapping[str, object]]
Chat = Callable[[Messages], str]
TOO_LONG = f"expected documents of at most {DOCUMENT_BYTES >> 20} MiB, got a longer one. Cut it into several, or store it as a .txt file."


class RowRefusedError(Exception):
    """The chat template does not take the messages of one row, which is left out and counted."""


@dataclass
class Tally:
    """What was left out in one reading of a text."""

    rows: int = 0
    empty: int = 0
    refused: int = 0
    first: str = ""  # where the first of them stands, and why

    def clear(self) -> None:
        self.rows = self.empty = self.refused = 0
        self.first = ""

    def note(self) -> str:
        """One line for the user; empty where nothing was left out."""
        read = "1 row" if self.rows == 1 else f"{self.rows} rows"
        kinds = ((self.empty, "without text (null or empty)"), (self.refused, "that the chat template refuses"))
        left_out = " and ".join(f"{count} {'row' if count == 1 else 'rows'} {kind}" for count, kind in kinds if count)
        return f"Skipped {left_out} of the {read} read; the first: {self.first}." if left_out else ""


@dataclass(frozen=True)
class RowText:
    """How the rows of one source become text.

    field: the field that holds it, as the user named it; None: the first that is there and not null of `text`,
        `messages`, `conversations`, `prompt` and `completion`.
    option: what the user names the field with. chat: a tokenizer's chat template; None: rows of messages are refused.
    """

    field: str | None = None
    option: str = "--text-field"
    chat: Chat | None = None
    tally: Tally = dataclasses.field(default_factory=Tally)

    def of(self, row: object, where: str) -> str:
        """The text of one row; empty, and counted, where it has none. `where` opens the message of an error.

        Raises: DataError: not an object, no field with text, another kind of value, a string that has no UTF-8 form or is too long.
        """
        self.tally.rows += 1
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: expected an object with a field {self.field or TEXT!r}, got {_kind(row)}. Write one object a row.")
        names = self.fields(row, where)
        values = [row[name] for name in names]
        if self.field is None and None in values:  # tables that mix rows of two forms have both fields, and null in one of them
            names = next((form for form in FORMS if all(row.get(name) is not None for name in form)), names)
            values = [row[name] for name in names]
        try:
            text = "" if any(value is None or value == [] for value in values) else self._join(values, where, names)
        except RowRefusedError as error:
            self.tally.refused += 1
            self.tally.first = self.tally.first or f"{where} ({error})"
            return ""
        if not text or text.isspace():
            self.tally.empty += 1
            self.tally.first = self.tally.first or where
        self._check(text, where)
        return text

    def fields(self, names: Iterable[object], where: str) -> tuple[str, ...]:
        """Which of the fields `names` hold the text: one, or a prompt and its completion. DataError: none, or one of them twice."""
        names = list(names)
        forms = FORMS if self.field is None else ((self.field,),)
        found = next((form for form in forms if set(form) <= set(names)), forms[0])
        for name in found:
            count = names.count(name)
            if count != 1:
                listed = ", ".join(map(repr, names)) or "none"
                got = f"the fields {listed}" if count == 0 else f"{count} of this name"
                advice = f"Name the one with the text with {self.option}" if count == 0 else "Rename one of them"
                raise DataError(f"{where}: expected a field {self.field or TEXT!r}, got {got}. {advice}.")
        return found

    def columns(self, names: Iterable[object], where: str) -> tuple[str, ...]:
        """Which columns of a table `of` may ask for: `fields`, and those that stand in where these are null. DataError: as `fields`."""
        names = list(names)
        found = self.fields(names, where)
        others = FORMS if self.field is None else ()
        return tuple(dict.fromkeys((*found, *(name for form in others if all(names.count(n) == 1 for n in form) for name in form))))

    def _join(self, values: Sequence[object], where: str, names: Sequence[str]) -> str:
        """A string, two strings one after the other, or messages through the chat template."""
        if all(isinstance(value, str) for value in values):
            return "".join(map(str, values))
        messages: list[Mapping[str, object]] = []
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(item, Mapping) for item in value):
                raise DataError(
                    f"{where}: expected a string or messages in the field {name!r}, got {_kind(value)}. "
                    f"Mend or remove it, or name another field with {self.option}."
                )
            messages += [_message(item, where) for item in value]
        if any(message["content"] is None for message in messages):
            return ""
        if self.chat is None:
            raise DataError(f"{where}: expected a text, got messages and no tokenizer for them. Name a field with {self.option}.")
        return self.chat(messages)

    def _check(self, text: str, where: str) -> None:
        try:
            length = len(text.encode())
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: expected valid Unicode, got a lone surrogate at character {error.start}. Mend or remove it."
            ) from error
        if length > DOCUMENT_BYTES:
            raise DataError(f"{where}: {TOO_LONG}")


def _message(item: Mapping[str, object], where: str) -> Mapping[str, object]:
    """A message with `role` and `content`, written so or in ShareGPT's form, `from` and `value`."""
    if "role" in item and "content" in item:
        return item
    if "from" in item and "value" in item:
        role = str(item["from"])
        return {"role": _ROLES.get(role, role), "content": item["value"]}
    fields = ", ".join(map(repr, item)) or "none"
    raise DataError(f"{where}: expected messages with `role` and `content`, got the fields {fields}. Mend or remove the row.")


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
