"""Hub datasets, without a network: the calls that are made, and what is said when they fail."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from proxsparse_triton.calibration.files import ACCEPTED_FILES
from proxsparse_triton.calibration.hub import HubText, hub_documents
from proxsparse_triton.calibration.rows import RowText
from proxsparse_triton.errors import BackendError, DataError

datasets = pytest.importorskip("datasets")
SIGNATURE = inspect.signature(datasets.load_dataset)


class Hub:
    """Stands for `load_dataset`: checks each call against the real signature and gives real `datasets` objects."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = dict(SIGNATURE.bind(*args, **kwargs).arguments)
        self.calls.append(call)
        whole = datasets.Dataset.from_list(self.rows)
        return whole.to_iterable_dataset() if call.get("streaming") else whole


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub([{"text": "one", "n": 1}, {"text": "", "n": 2}, {"text": "two", "n": 3}])
    monkeypatch.setattr(datasets, "load_dataset", fake)
    return fake


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> str:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError) as caught:
        list(hub_documents(HubText("some/texts", "some/texts", "train"), RowText("text")))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error
    return str(caught.value)


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_in_order(hub: Hub, streaming: bool) -> None:
    text = HubText("a/b:c", "a/b", "train", config="c", revision="v1", streaming=streaming)
    assert list(hub_documents(text, RowText("text"))) == ["one", "", "two"]
    assert hub.calls == [{"path": "a/b", "name": "c", "split": "train", "streaming": streaming, "revision": "v1"}]


def test_one_file_of_a_repository(hub: Hub) -> None:
    list(hub_documents(HubText("c4", "allenai/c4", "validation", data_file="en/x.json.gz"), RowText("text")))
    assert hub.calls[0]["data_files"] == {"validation": "en/x.json.gz"}


def test_nothing_is_fetched_before_the_first_row_is_asked_for(hub: Hub) -> None:
    hub_documents(HubText("a/b", "a/b", "train"), RowText("text"))
    assert hub.calls == []


def test_a_missing_field_names_row_and_fields(hub: Hub) -> None:
    expected = r"a/b, train row 1: expected a field 'body', got the fields 'text', 'n'\. Name the one with the text with --text-field\."
    with pytest.raises(DataError, match=expected):
        list(hub_documents(HubText("a/b", "a/b", "train"), RowText("body")))
    with pytest.raises(DataError, match="a/b, train row 1: expected a string or messages in the field 'n', got a int"):
        list(hub_documents(HubText("a/b", "a/b", "train"), RowText("n")))


def test_the_real_library_offline_says_what_works_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fake here: the suite runs with HF_HUB_OFFLINE, and `datasets` itself refuses."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        list(hub_documents(HubText("no/such-dataset", "no/such-dataset", "train"), RowText("text")))
    said = str(caught.value)
    assert said.startswith("no/such-dataset: expected an answer of the Hub, got none: it could not be reached (")
    assert said.endswith(f"local text (a {ACCEPTED_FILES} file, a folder, or stdlib) works offline.")
    assert "\n" not in said


def test_a_connection_lost_underneath_is_still_a_connection_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("cannot send a request")
    error.__cause__ = TimeoutError("timed out")
    assert "could not be reached (cannot send a request)" in failing(monkeypatch, error)


def test_a_connection_lost_between_two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows())
    documents = hub_documents(HubText("a/b", "a/b", "train"), RowText("text"))
    assert next(documents) == "one"
    with pytest.raises(DataError, match=r"could not be reached \(gone\)"):
        next(documents)


def test_a_name_that_is_nowhere_says_both_things_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    error = datasets.exceptions.DatasetNotFoundError("Dataset 'some/texts' doesn't exist on the Hub or cannot be accessed.")
    said = failing(monkeypatch, error)
    assert "no path here and no open dataset on the Hub (Dataset 'some/texts' doesn't exist on the Hub or cannot be accessed)" in said
    assert "Accepted are c4, wikitext2, stdlib, a Hub dataset id" in said


def test_other_failures_are_one_line_with_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    said = failing(monkeypatch, ValueError("Config name is missing.\nPlease pick one among the available configs: ['a']"))
    assert said.startswith("some/texts: expected a readable dataset on the Hub, got ValueError: Config name is missing. Check the id, ")
    assert "got KeyError: KeyError. Check" in failing(monkeypatch, KeyError())


def test_running_out_of_memory_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(MemoryError):
        list(hub_documents(HubText("a/b", "a/b", "train"), RowText("text")))


def test_the_hub_client_is_quiet_while_loading_and_restored_after(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(logger, "level", logging.INFO)
    during = []

    def load(*args: Any, **kwargs: Any) -> Any:
        during.append(logger.getEffectiveLevel())
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError):
        list(hub_documents(HubText("a/b", "a/b", "train"), RowText("text")))
    assert (during, logger.level) == ([logging.ERROR], logging.INFO)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BackendError, match=r"a/b: expected the library datasets, got .*pip install 'proxsparse-triton\[data\]'"):
        list(hub_documents(HubText("a/b", "a/b", "train"), RowText("text")))
