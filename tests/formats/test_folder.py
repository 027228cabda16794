import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proxsparse_triton.errors import OutputError
from proxsparse_triton.formats.folder import atomic_file, check_output, check_space, is_run, output_folder
from proxsparse_triton.formats.owned import MARKER, mark


def earlier_run(path: Path, mark: str = "old") -> Path:
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps({"tool": "proxsparse-triton", "files": {"mark": {}}}))
    (path / "mark").write_text(mark)
    return path


def write(path: Path, body: Callable[[Path], object], **options: Any) -> None:
    """One run into `path`: `body` writes to the partial folder."""
    with output_folder(path, **options) as partial:
        body(partial)


def contents(path: Path) -> set[str]:
    return {str(found.relative_to(path)) for found in path.rglob("*")}


class TestCheckOutput:
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_new_and_empty_folders_pass_and_leave_nothing_behind(self, tmp_path: Path, overwrite: bool) -> None:
        (tmp_path / "empty").mkdir()
        check_output(tmp_path / "new", overwrite=overwrite)
        check_output(tmp_path / "not" / "yet" / "there", overwrite=overwrite)
        check_output(tmp_path / "empty", overwrite=overwrite)
        assert contents(tmp_path) == {"empty"}

    def test_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("mine")
        with pytest.raises(OutputError, match=r"got the file .*run\. Choose another name with -o"):
            check_output(tmp_path / "run", overwrite=True)
        assert (tmp_path / "run").read_text() == "mine"

    def test_a_file_under_the_partial_name_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "run.partial").write_text("mine")
        with pytest.raises(OutputError, match=r"run\.partial\. Move it away"):
            check_output(tmp_path / "run", overwrite=False)

    def test_a_folder_with_other_files_is_kept_whatever_the_flags(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.tex").write_text("x")
        with pytest.raises(OutputError, match="other files, which is kept"):
            check_output(tmp_path / "run", overwrite=False)
        with pytest.raises(OutputError, match=r"--overwrite only replaces a folder whose manifest\.json"):
            check_output(tmp_path / "run", overwrite=True)

    @pytest.mark.parametrize("manifest", ['{"tool": "other"}', "{", "[]", "\xff", "[" * 100_000])
    def test_a_foreign_manifest_is_not_an_earlier_run(self, tmp_path: Path, manifest: str) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "manifest.json").write_bytes(manifest.encode("latin-1"))
        assert not is_run(tmp_path / "run")
        with pytest.raises(OutputError):
            check_output(tmp_path / "run", overwrite=True)

    def test_an_earlier_run_needs_overwrite(self, tmp_path: Path) -> None:
        run = earlier_run(tmp_path / "run")
        with pytest.raises(OutputError, match=r"an earlier run, which is kept.*--overwrite"):
            check_output(run, overwrite=False)
        check_output(run, overwrite=True)

    def test_what_no_run_wrote_is_not_overwritten(self, tmp_path: Path) -> None:
        """A run whose manifest lists its files; pages of pst and their pictures are its own too."""
        run = earlier_run(tmp_path / "run")
        (run / "manifest.json").write_text(json.dumps({"tool": "proxsparse-triton", "files": {"model.safetensors": {}, "mark": {}}}))
        (run / "model.safetensors").touch()
        (run / "report.html").touch()
        (run / "report").mkdir()
        (run / "report" / "curves.png").touch()
        check_output(run, overwrite=True)
        (run / "notes").mkdir()
        (run / "notes" / "mine.txt").write_text("mine")
        (run / "todo").write_text("mine")
        with pytest.raises(OutputError, match=r"got notes/mine\.txt and 1 more, which --overwrite would delete\. Move it away"):
            check_output(run, overwrite=True)
        assert (run / "todo").read_text() == "mine"

    def test_what_no_run_of_a_comparison_wrote_is_not_overwritten(self, tmp_path: Path) -> None:
        table = tmp_path / "table"
        one = earlier_run(table / "wanda")
        (one / "manifest.json").write_text(json.dumps({"tool": "proxsparse-triton", "files": {"mark": {}}}))
        (table / "manifest.json").write_text(json.dumps({"tool": "proxsparse-triton", "comparison": [{"folder": "wanda"}]}))
        check_output(table, overwrite=True)
        (one / "mine.txt").write_text("mine")
        with pytest.raises(OutputError, match=r"got wanda/mine\.txt, which --overwrite would delete"):
            check_output(table, overwrite=True)

    def test_below_a_file_is_one_clear_line(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(OutputError, match=r"expected a place to write, got .* at .*file") as caught:
            check_output(tmp_path / "file" / "run", overwrite=False)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(("code", "text"), [(errno.EACCES, "permission denied"), (errno.EROFS, "read-only file system")])
    def test_a_parent_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, text: str) -> None:
        def refuse(path: object, *args: object) -> None:
            raise OSError(code, os.strerror(code), str(path))

        monkeypatch.setattr(os, "mkdir", refuse)  # the tests may run as root, whom permissions do not stop
        with pytest.raises(OutputError, match=f"got {text} at .*run"):
            check_output(tmp_path / "run", overwrite=False)

    def test_an_unwritable_parent_of_an_earlier_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda *args: False)
        with pytest.raises(OutputError, match="permission denied"):
            check_output(tmp_path / "run", overwrite=False)

    def test_a_mount_point_cannot_be_renamed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "mounted").mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: True)
        with pytest.raises(OutputError, match="Choose a folder below it"):
            check_output(tmp_path / "mounted", overwrite=False)

    def test_the_current_folder_is_not_a_special_case(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        check_output(Path("."), overwrite=False)


class TestCheckSpace:
    def test_names_needed_and_free(self, tmp_path: Path) -> None:
        check_space(tmp_path / "new" / "run", 10)
        with pytest.raises(OutputError, match=r"expected about 9999999\.00 GB free on .*, got \d+\.\d\d GB"):
            check_space(tmp_path / "new" / "run", 9_999_999_000_000_000)


class TestOutputFolder:
    def test_appears_at_the_end_only(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "run"
        with output_folder(path) as partial:
            assert partial.name == "run.partial"
            assert partial.parent == path.parent
            (partial / "sub").mkdir()
            (partial / "sub" / "a").write_text("a")
            assert not path.exists()
        assert contents(tmp_path) == {"deep", "deep/run", "deep/run/sub", "deep/run/sub/a"}

    def test_an_empty_folder_is_filled(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        with output_folder(tmp_path / "run") as partial:
            (partial / "a").touch()
        assert contents(tmp_path) == {"run", "run/a"}

    def test_a_link_to_a_folder_stays_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "run").symlink_to(tmp_path / "disk")
        with output_folder(tmp_path / "run") as partial:
            (partial / "a").touch()
        assert (tmp_path / "run").is_symlink()
        assert (tmp_path / "disk" / "a").exists()

    def test_leftovers_of_an_interrupted_run_are_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "run.partial" / "junk").mkdir(parents=True)
        (tmp_path / "run.partial" / "metrics.jsonl").write_text("{}\n")
        mark(tmp_path / "run.partial", None)
        with output_folder(tmp_path / "run") as partial:
            assert contents(partial) == {MARKER}
        assert contents(tmp_path) == {"run"}

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_an_exception_leaves_only_what_is_worth_keeping(self, tmp_path: Path, error: type[BaseException]) -> None:
        def body(partial: Path) -> None:
            (partial / "model.safetensors").write_bytes(b"half")
            (partial / "sub").mkdir()
            (partial / "sub" / "metrics.jsonl").write_text("not this one")
            (partial / "metrics.jsonl").write_text("{}\n")
            (partial / "log").touch()  # empty: not worth keeping
            raise error

        with pytest.raises(error) as raised:
            write(tmp_path / "run", body, keep_on_error=["metrics.jsonl", "log", "absent"])
        assert contents(tmp_path) == {"run.partial", "run.partial/metrics.jsonl", f"run.partial/{MARKER}"}
        assert raised.value.__notes__ == [f"Kept in {tmp_path / 'run'}.partial until the next run of that name: metrics.jsonl."]

    def test_an_exception_with_nothing_to_keep_leaves_nothing(self, tmp_path: Path) -> None:
        def body(partial: Path) -> None:
            (partial / "x").touch()
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            write(tmp_path / "new" / "run", body, keep_on_error=["metrics.jsonl"])
        assert contents(tmp_path) == set()

    def test_overwrite_replaces_an_earlier_run(self, tmp_path: Path) -> None:
        run = earlier_run(tmp_path / "run")
        with output_folder(run, overwrite=True) as partial:
            (partial / "new").touch()
            assert (run / "mark").read_text() == "old"  # there until the new one is finished
        assert contents(tmp_path) == {"run", "run/new"}

    def test_two_runs_into_one_folder_do_not_delete_each_other(self, tmp_path: Path) -> None:
        with output_folder(tmp_path / "run") as first:
            (first / "precious").touch()
            with pytest.raises(OutputError, match="another process is writing"):
                check_output(tmp_path / "run", overwrite=True)
            with pytest.raises(OutputError, match="another process is writing"), output_folder(tmp_path / "run"):
                pass
            assert (first / "precious").exists()
        assert contents(tmp_path) == {"run", "run/precious"}

    @pytest.mark.parametrize(
        ("needed", "size"), [(13_500_000_000, "needs about 13.5 GB"), (None, "needs more than the 2.0 kB written so far")]
    )
    def test_a_full_disk_is_one_line(self, tmp_path: Path, needed: int | None, size: str) -> None:
        def body(partial: Path) -> None:
            (partial / "model").write_bytes(bytes(2000))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.raises(OutputError, match="no space left on") as caught:
            write(tmp_path / "run", body, needed=needed)
        assert size in str(caught.value)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value.__cause__, OSError)
        assert contents(tmp_path) == set()

    def test_permission_errors_inside_are_explained_and_others_left_alone(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="read-only"), output_folder(tmp_path / "run") as partial:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(partial / "x"))
        with pytest.raises(PermissionError), output_folder(tmp_path / "run"):
            raise PermissionError(errno.EACCES, "denied", "/data/input.txt")
        with pytest.raises(FileNotFoundError), output_folder(tmp_path / "run"):
            Path("/data/input.txt").read_text()
        assert contents(tmp_path) == set()


class TestAtomicFile:
    def test_replaces_at_the_end_and_not_on_error(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("old")

        def interrupted() -> None:
            with atomic_file(tmp_path / "a") as file:
                file.write_text("half")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert (tmp_path / "a").read_text() == "old"
        with atomic_file(tmp_path / "a") as file:
            file.write_text("new")
        assert (tmp_path / "a").read_text() == "new"
        assert contents(tmp_path) == {"a"}

    def test_a_missing_folder_is_explained(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="no such file"), atomic_file(tmp_path / "absent" / "a") as file:
            file.write_text("x")
