"""Signals and failing streams, in processes of their own: every ending is said, with the exit code that belongs to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from zygote import Zygote

from proxsparse_triton.formats.owned import MARKER

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
SMALL = ("--samples", "4", "--seqlen", "64", "--eval-windows", "2", "--device", "cpu")
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def python(code: str, *arguments: str, **options: object) -> subprocess.Popen[str]:
    """Python in a process of its own, in which SIGINT is not ignored, as it may be in the jobs of a shell."""
    first = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, "-c", first + code, *arguments], env=ENVIRONMENT, text=True, **streams)  # type: ignore[call-overload,no-any-return]


def pst(*arguments: str, before: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    process = python(f"{before}\nfrom proxsparse_triton.__main__ import main; main()", *arguments, **options)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


# A command that needs nothing: it raises what a test wants.
FAIL = """
import click, errno, os
from proxsparse_triton import cli
@click.command()
@click.argument("code")
def fail(code):
    exec(code)
cli._Group.get_command = lambda self, ctx, name: fail
"""


def fail(code: str, *flags: str, **options: object) -> subprocess.CompletedProcess[str]:
    return pst(*flags, "fail", code, before=FAIL, **options)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("1 / 0", "expected no error here, got ZeroDivisionError: division by zero at "),
        ("{}['a']", "got KeyError: 'a' at "),
        ("raise MemoryError", "expected enough memory, got none left. Lower --seqlen"),
        ("f = lambda: f(); globals().update(f=f); f()", "expected input nested less deeply, got Python's limit at "),
        ("'\\udcff'.encode()", "expected names and text in UTF-8, got 'utf-8' codec can't encode character"),
        ("open('/proc/none')", "expected files and devices that can be used, got no such file or directory at /proc/none."),
        ("raise OSError(errno.EIO, 'Input/output error')", "got input/output error at "),
        ("raise OSError", "expected files and devices that can be used, got oserror at "),
        ("raise RuntimeError('a\\n\\nb')", "got RuntimeError: a b at "),
    ],
)
def test_every_error_is_one_line(code: str, words: str) -> None:
    done = fail(code)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("pst: fail: expected")
    assert words in done.stderr


def test_a_fault_of_ours_asks_for_a_report_and_debug_shows_it() -> None:
    assert "This is a fault of pst: please report it with what `pst --debug ...` shows." in fail("1 / 0").stderr
    done = fail("1 / 0", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_is_said(name: str) -> None:
    number = signal.Signals[name]
    done = fail(f"os.kill(os.getpid(), {int(number)})")
    assert done.returncode == 128 + number
    word = "interrupted" if name == "SIGINT" else f"interrupted by {name}"
    assert done.stderr == f"pst: {word}; nothing half-written was left under the output's name\n"


@pytest.mark.parametrize(
    "swallowed",
    [
        "class A:\n def __del__(self): os.kill(os.getpid(), 15); time.sleep(0.01)\nA()",  # Python only prints it there
        "try:\n os.kill(os.getpid(), 15); time.sleep(0.01)\nexcept BaseException: pass",
        "try:\n os.kill(os.getpid(), 15); time.sleep(0.01)\nexcept BaseException: raise ImportError('numpy')",
    ],
    ids=["in a destructor", "by a library", "as another error"],
)
def test_a_signal_that_is_swallowed_is_raised_again(swallowed: str) -> None:
    done = fail(f"import time\n{swallowed}\ntime.sleep(20)\nprint('went on')")
    assert (done.returncode, done.stdout) == (143, "")
    assert done.stderr == "pst: interrupted by SIGTERM; nothing half-written was left under the output's name\n"


def test_a_second_signal_ends_at_once() -> None:
    """Even where tidying up takes its time."""
    code = (
        "import time\nfrom proxsparse_triton import interrupts\ntry:\n os.kill(os.getpid(), 2)\n"
        "finally:\n interrupts.answer(); time.sleep(0.7); os.kill(os.getpid(), 2); time.sleep(60)"
    )
    done = fail(code)
    assert done.returncode == 130
    assert done.stderr.startswith("pst: interrupted again; ended at once.")


def test_a_signal_that_a_wrapper_repeats_is_one() -> None:
    done = fail(
        "import time\ntry:\n os.kill(os.getpid(), 2)\nfinally:\n os.kill(os.getpid(), 2); os.kill(os.getpid(), 15); time.sleep(0.2)"
    )
    assert done.returncode == 130
    assert done.stderr.startswith("pst: interrupted; nothing")


def test_signals_that_are_ignored_stay_ignored() -> None:
    """nohup."""
    code = "print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN); os.kill(os.getpid(), signal.SIGHUP); print('goes on')"
    done = pst("fail", f"import signal\n{code}", before=f"signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{FAIL}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\ngoes on\n", "")


def test_children_do_not_inherit_what_is_said() -> None:
    code = (
        "import time\nread, write = os.pipe()\nchild = os.fork()\n"
        "if child == 0:\n os.write(write, b'.'); time.sleep(30); os._exit(7)\n"
        "os.read(read, 1); os.kill(child, 15); print(os.waitpid(child, 0)[1])"
    )
    done = fail(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "15\n", "")


class TestStreams:
    """What stdout or stderr do not take never ends the work."""

    PRINT = "from pathlib import Path; import sys\nprint('result'); print('note', file=sys.stderr); Path({0!r}).touch(); print('more')"

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux")
    def test_full(self, tmp_path: Path) -> None:
        with open("/dev/full", "w") as full:
            done = fail(self.PRINT.format(str(tmp_path / "a")), stdout=full)
            assert done.returncode == 1
            assert done.stderr.splitlines()[0] == "note"
            assert done.stderr.splitlines()[1].startswith("pst: stdout: expected a place for the results, got no space left on device.")
            assert (tmp_path / "a").exists()
            done = fail(self.PRINT.format(str(tmp_path / "b")), stderr=full)
            assert (done.returncode, done.stdout) == (0, "result\nmore\n")
            assert (tmp_path / "b").exists()
            assert fail("1 / 0", stdout=full, stderr=full).returncode == 1

    def test_closed(self, tmp_path: Path) -> None:
        command = [sys.executable, "-c", f"{FAIL}\nfrom proxsparse_triton.__main__ import main; main()", "fail"]
        code = self.PRINT.format(str(tmp_path / "a"))
        done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command, code], env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "got bad file descriptor" in done.stderr
        assert (tmp_path / "a").exists()
        done = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *command, code], env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "result\nmore\n", "")

    def test_a_reader_that_has_seen_enough(self) -> None:
        """As of any tool in a shell's pipe: not a word, and not success."""
        read, write = os.pipe()
        os.close(read)
        done = fail("print('x' * 100_000)", stdout=write)
        os.close(write)
        assert (done.returncode, done.stderr) == (141, "")

    def test_an_encoding_without_the_letters(self) -> None:
        process = subprocess.run(
            [sys.executable, "-c", f"{FAIL}\nfrom proxsparse_triton.__main__ import main; main()", "fail", "print('caf\\u00e9 \\udcff')"],
            env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (process.returncode, process.stdout, process.stderr) == (0, "caf\\xe9 \\udcff\n", "")


@pytest.mark.parametrize("module", ["proxsparse_triton", "proxsparse_triton.cli"])
def test_python_m(module: str) -> None:
    run = [sys.executable, "-m", module]
    done = subprocess.run([*run, "--version"], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "version" in done.stdout
    done = subprocess.run([*run, "verify", "nowhere"], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


def test_several_ranks_are_refused() -> None:
    """torchrun: they would all do the same work into the same folder."""
    code = "os.environ.update(RANK='1', WORLD_SIZE='2')\n"
    done = pst("info", before=f"import os\n{code}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("pst: start: expected to be the only process, got rank 1 of 2 (torchrun's RANK and WORLD_SIZE).")
    assert pst("--version", before=f"import os\n{code}").returncode == 0


@pytest.mark.slow
class TestMoments:
    """Signals at moments all over a run: told every time, whatever runs just then."""

    @pytest.fixture(scope="class")
    def zygote(self) -> Iterator[Zygote]:
        with Zygote() as process:
            yield process

    @pytest.mark.parametrize("collect", [False, True], ids=["", "in collections"])
    @pytest.mark.parametrize("name", SIGNALS)
    def test_while_it_works(self, zygote: Zygote, text: str, tmp_path: Path, name: str, collect: bool) -> None:
        number = signal.Signals[name]
        for index in range(8 if collect else 20):
            run = tmp_path / f"run-{index}"
            arguments = ("prune", "demo", "-o", run, "--calibration", text, *SMALL, "--epochs", 2000)
            ending = zygote.run(*arguments, number=int(number), after=0.1 + 0.15 * index, collect=collect)
            assert ending.status == 128 + number, (index, ending)
            assert "interrupted" in ending.said, (index, ending)
            assert "Traceback" not in ending.said, (index, ending)
            assert "Exception ignored" not in ending.said, (index, ending)
            partial = tmp_path / f"run-{index}.partial"
            if partial.exists():
                assert {path.name for path in partial.iterdir()} == {"metrics.jsonl", MARKER}
                assert f"Kept in {partial} until the next run of that name: metrics.jsonl" in ending.said
            assert not run.exists()

    @pytest.mark.parametrize("name", SIGNALS)
    def test_while_it_starts(self, text: str, tmp_path: Path, name: str) -> None:
        """The imports of torch and transformers, in real processes."""
        number = signal.Signals[name]
        for index in range(7):
            process = python(
                "from proxsparse_triton.__main__ import main; print('on', flush=True); main()",
                "prune",
                "demo",
                "-o",
                str(tmp_path / "run"),
                "--calibration",
                text,
                *SMALL,
            )
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.02 + 0.3 * index)
            process.send_signal(number)
            _, err = process.communicate(timeout=120)
            assert process.returncode == 128 + number, (index, err)
            assert err.splitlines()[-1].startswith("pst: interrupted"), (index, err)
            assert "Traceback" not in err, (index, err)
