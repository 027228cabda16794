"""The last step of a run: its folder gets its name, in one step or two, and nothing finished is lost when that fails."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proxsparse_triton.errors import OutputError
from proxsparse_triton.formats import folder as folder_module
from proxsparse_triton.formats.exchange import exchange
from proxsparse_triton.formats.folder import check_apart, check_output, output_folder
from proxsparse_triton.formats.owned import MARKER, mark


def run_folder(path: Path, words: str) -> Path:
    path.mkdir(parents=True)
    fill(path, words)
    return path


def fill(path: Path, words: str) -> None:
    (path / "mark").write_text(words)
    (path / "manifest.json").write_text(json.dumps({"tool": "proxsparse-triton", "files": {"mark": {}}}))


def write(path: Path, body: Callable[[Path], object] = lambda partial: fill(partial, "new"), **options: Any) -> None:
    with output_folder(path, **options) as partial:
        body(partial)


def contents(path: Path) -> set[str]:
    return {str(found.relative_to(path)) for found in path.rglob("*")}


WHOLE = {"run", "run/manifest.json", "run/mark"}
KEPT = {"run.partial", "run.partial/manifest.json", "run.partial/mark"}


@pytest.fixture(params=[True, False], ids=["one step", "two steps"])
def in_one_step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(folder_module, "exchange", lambda first, second: False)
    return bool(request.param)


def test_exchange(tmp_path: Path) -> None:
    run_folder(tmp_path / "a", "a")
    run_folder(tmp_path / "b", "b")
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert [(tmp_path / name / "mark").read_text() for name in "ab"] == ["b", "a"]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "absent")


def test_an_earlier_run_is_replaced(tmp_path: Path, in_one_step: bool) -> None:
    run = run_folder(tmp_path / "run", "old")
    write(run, overwrite=True)
    assert contents(tmp_path) == WHOLE
    assert (run / "mark").read_text() == "new"


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EIO, errno.EACCES])
def test_a_failing_rename_keeps_both_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_one_step: bool, code: int) -> None:
    run = run_folder(tmp_path / "run", "old")
    rename = os.rename

    def fail(source: Path, target: Path) -> bool:
        raise OSError(code, os.strerror(code), str(source), None, str(target))

    if in_one_step:
        monkeypatch.setattr(folder_module, "exchange", fail)
    else:
        monkeypatch.setattr(os, "rename", lambda a, b: fail(a, b) if str(a).endswith(".partial") else rename(a, b))
    with pytest.raises(OutputError, match=rf"got {os.strerror(code).lower()} at .*run\. ") as raised:
        write(run, overwrite=True)
    assert raised.value.__notes__ == [f"The finished run is whole in {run}.partial: give it another name."]
    assert contents(tmp_path) == WHOLE | KEPT
    assert [(tmp_path / name / "mark").read_text() for name in ("run", "run.partial")] == ["old", "new"]
    monkeypatch.undo()
    with pytest.raises(OutputError, match=r"got .*run\.partial, which is a finished run\. Give it another name"):
        write(run, lambda partial: fill(partial, "third"), overwrite=True)
    assert contents(tmp_path) == WHOLE | KEPT
    os.rename(f"{run}.partial", tmp_path / "saved")
    write(run, lambda partial: fill(partial, "third"), overwrite=True)
    assert (run / "mark").read_text() == "third"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_filled_up_meanwhile_is_kept_and_the_run_too(tmp_path: Path, overwrite: bool) -> None:
    def body(partial: Path) -> None:
        fill(partial, "new")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "theirs").touch()

    with pytest.raises(OutputError, match=r"got directory not empty at .*run\. "):
        write(tmp_path / "run", body, overwrite=overwrite)
    assert contents(tmp_path) == {"run", "run/theirs"} | KEPT


def test_what_was_added_to_the_earlier_run_meanwhile_is_kept(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", "old")

    def body(partial: Path) -> None:
        fill(partial, "new")
        (run / "notes.txt").write_text("mine")

    with pytest.raises(OutputError, match=r"got notes\.txt, which --overwrite would delete"):
        write(run, body, overwrite=True)
    assert contents(tmp_path) == WHOLE | {"run/notes.txt"} | KEPT


def test_an_old_run_that_cannot_be_deleted_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_one_step: bool) -> None:
    run = run_folder(tmp_path / "run", "old")
    delete = folder_module.delete

    def refuse(path: Path, **options: Any) -> None:
        if (path / "mark").exists():
            raise PermissionError(errno.EACCES, "denied")
        delete(path, **options)

    monkeypatch.setattr(folder_module, "delete", refuse)
    with pytest.warns(UserWarning, match=r"could not be deleted and stays in .*run\.(partial|replaced-\d+)"):
        write(run, overwrite=True)
    assert (run / "mark").read_text() == "new"
    monkeypatch.undo()
    write(run, overwrite=True)
    assert contents(tmp_path) == WHOLE


def test_an_interrupt_while_the_old_run_is_deleted_says_that_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_one_step: bool
) -> None:
    run = run_folder(tmp_path / "run", "old")
    delete = folder_module.delete

    def interrupted(path: Path, **options: Any) -> None:
        if (path / "mark").exists():
            os.unlink(path / "mark")
            raise KeyboardInterrupt
        delete(path, **options)

    monkeypatch.setattr(folder_module, "delete", interrupted)
    with pytest.raises(KeyboardInterrupt) as raised:
        write(run, overwrite=True)
    assert raised.value.__notes__ == [
        f"The run is complete in {run}; what is left of the one that it replaces goes with the next run of that name."
    ]
    assert (run / "mark").read_text() == "new"
    monkeypatch.undo()
    check_output(tmp_path / "run", overwrite=True)
    write(run, overwrite=True)
    assert contents(tmp_path) == WHOLE


@pytest.mark.parametrize("new", ["whole", "half", "none"])
def test_a_kill_between_two_renames_is_recovered_from(tmp_path: Path, new: str) -> None:
    mark(run_folder(tmp_path / "run.replaced-17", "old"), None)
    if new == "whole":
        mark(run_folder(tmp_path / "run.partial", "new"), None)
    elif new == "half":
        (tmp_path / "run.partial").mkdir()
        (tmp_path / "run.partial" / "metrics.jsonl").touch()
        mark(tmp_path / "run.partial", None)
    with pytest.raises(OutputError, match="an earlier run, which is kept"):
        check_output(tmp_path / "run", overwrite=False)
    assert (tmp_path / "run" / "mark").read_text() == ("new" if new == "whole" else "old")
    assert contents(tmp_path) - {"run.partial", "run.partial/metrics.jsonl", f"run.partial/{MARKER}"} == WHOLE


def test_remains_of_a_replaced_run_go_and_those_of_others_stay(tmp_path: Path) -> None:
    run_folder(tmp_path / "run", "new")
    for pid, work in ((17, "unlink"), (18, "touch")):  # one that is half deleted, and one that is not yet
        mark(run_folder(tmp_path / f"run.replaced-{pid}", "old"), None)
        getattr(tmp_path / f"run.replaced-{pid}" / "mark", work)()
    mark(run_folder(tmp_path / "run.replaced-19", "old"), None)
    (tmp_path / "run.replaced-19" / "mine.txt").touch()
    (tmp_path / "run.replaced-21").mkdir()
    (tmp_path / "run.replaced-20").symlink_to(tmp_path)
    run_folder(tmp_path / "run.replaced-mine", "mine")
    check_output(tmp_path / "run", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.replaced-19", "run.replaced-20", "run.replaced-mine"]
    assert (tmp_path / "run.replaced-19" / "mine.txt").exists()


def test_a_failing_run_leaves_the_partial_folder_of_another_alone(tmp_path: Path) -> None:
    """Its own was removed by hand, and another run has the name now."""

    def body(partial: Path) -> None:
        partial.rename(tmp_path / "moved")
        partial.mkdir()
        (partial / "precious").touch()
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        write(tmp_path / "run", body)
    assert (tmp_path / "run.partial" / "precious").exists()


class TestNames:
    def refused(self, path: Path, words: str) -> None:
        """Before the work, in one line, and nothing is left."""
        with pytest.raises(OutputError, match=words) as raised:
            check_output(path, overwrite=False)
        assert "\n" not in str(raised.value)

    def test_not_utf_8(self, tmp_path: Path) -> None:
        self.refused(Path(os.fsdecode(os.fsencode(tmp_path) + b"/x\xff")), r"expected a name in UTF-8, got '.*x\\udcff'")
        self.refused(Path(os.fsdecode(os.fsencode(tmp_path) + b"/x\xff/run")), "expected a name in UTF-8")
        assert contents(tmp_path) == set()

    @pytest.mark.parametrize("length", [245, 250, 300, 5000])
    def test_too_long(self, tmp_path: Path, length: int) -> None:
        """Also where only .partial or .replaced-PID is too much."""
        self.refused(tmp_path / ("x" * length), "got file name too long at")
        assert contents(tmp_path) == set()

    def test_a_path_with_no_room_for_files(self, tmp_path: Path) -> None:
        deep = tmp_path
        while len(str(deep)) < 3900:
            deep = deep / ("d" * 50)
        deep = deep / ("e" * (4090 - len(str(deep))))
        self.refused(deep, "got file name too long at")
        assert contents(tmp_path) == set()

    def test_nul(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "a\0b", "expected a name without NUL")

    def test_a_link_to_itself(self, tmp_path: Path) -> None:
        (tmp_path / "run").symlink_to("run")
        self.refused(tmp_path / "run", "a link that leads to itself")
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        self.refused(tmp_path / "a", "a link that leads to itself")

    def test_a_broken_link_is_a_new_folder(self, tmp_path: Path) -> None:
        (tmp_path / "run").symlink_to(tmp_path / "disk" / "there")
        write(tmp_path / "run")
        assert (tmp_path / "disk" / "there" / "mark").exists()


class TestApart:
    """The model that is read is not what gets replaced."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return run_folder(tmp_path / "table" / "model", "weights")

    def refused(self, output: Path, model: Path) -> None:
        with pytest.raises(OutputError, match="expected an output folder of its own"):
            check_apart(output, model)

    def test_the_same_and_around(self, model: Path) -> None:
        for output in (model, model.parent, model.parent / "." / "x" / ".." / "model"):
            self.refused(output, model)
        check_apart(model / "packed", model)
        run_folder(model / "packed", "old")  # an earlier one, to be replaced
        check_apart(model / "packed", model)
        check_apart(model.parent / "other", model)
        check_apart(model.parent / "model2", model)

    def test_the_name_of_its_unfinished_run(self, model: Path) -> None:
        partial = model.rename(model.with_name("run.partial"))
        self.refused(model.with_name("run"), partial)

    def test_through_links(self, tmp_path: Path, model: Path) -> None:
        (tmp_path / "link").symlink_to(model)
        self.refused(tmp_path / "link", model)
        self.refused(model, tmp_path / "link")
        check_apart(tmp_path / "link" / "run", model)

    def test_a_file_of_it_that_is_a_link_into_the_output(self, tmp_path: Path, model: Path) -> None:
        """As the snapshots of the Hub's cache are made of links."""
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir()
        (snapshot / "model.safetensors").symlink_to(model / "mark")
        self.refused(model, snapshot)
        check_apart(tmp_path / "run", snapshot)
