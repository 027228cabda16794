"""`pst` in forks of one process that has everything imported, killed at a chosen moment: hundreds of runs in minutes.

The moments are those between two changes of the disk: an audit hook counts what the fork opens, makes, renames and removes below a folder.
Run as a script this is the process that forks; `Zygote` talks to it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"})


@dataclass(frozen=True)
class Ending:
    """Of one fork. status: the exit code, or minus the signal that killed it. events: changes of the disk, all of them."""

    status: int
    events: int
    said: str


class Zygote:
    """A context manager: the process that forks."""

    def __enter__(self) -> Self:
        root = Path(__file__).parents[1]
        path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, *arguments: object, **options: Any) -> Ending:
        """`pst ARGUMENTS` in a fork.

        Options: below: folder whose events count. kill: SIGKILL before this event, the first is 0; torn: after it was opened for writing,
        with half of something in it. two_steps: no exchange of names. number, after: a signal, after so many seconds.
        collect: garbage is collected all the time.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"arguments": list(map(str, arguments)), **options}) + "\n")
        self._process.stdin.flush()
        return Ending(**json.loads(self._process.stdout.readline()))


def _serve() -> None:
    import torch
    import transformers

    from proxsparse_triton import cli, comparison, export, pipeline
    from proxsparse_triton.cli import COMMANDS

    torch.set_num_threads(1)
    for command in COMMANDS:
        cli.main.get_command(None, command)  # type: ignore[arg-type]
    assert all((comparison, export, pipeline, transformers.AutoModelForCausalLM, transformers.AutoTokenizer))
    for line in sys.stdin:
        answer = _fork(**json.loads(line))
        print(json.dumps(answer), flush=True)


def _fork(arguments: list[str], number: int | None = None, after: float = 0.0, **options: Any) -> dict[str, object]:
    counted, said = os.memfd_create("events"), os.memfd_create("said")
    child = os.fork()
    if child == 0:
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(1, 0)
        _pst(arguments, counted, **options)
    if number is not None:
        time.sleep(after)
        os.kill(child, number)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    answer = {"status": status, "events": os.fstat(counted).st_size, "said": os.pread(said, 100_000, 0).decode()}
    os.close(counted)
    os.close(said)
    return answer


def _pst(
    arguments: list[str],
    counted: int,
    below: str | None = None,
    kill: int | None = None,
    torn: bool = False,
    two_steps: bool = False,
    collect: bool = False,
) -> None:
    """Never returns."""
    from proxsparse_triton import cli
    from proxsparse_triton.formats import folder

    if two_steps:
        folder.exchange = lambda first, second: False
    if collect:
        _litter()
    if below is not None:
        _watch(below, counted, kill, torn)
    sys.argv = ["pst", *arguments]
    code: object = 1
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _watch(below: str, counted: int, kill: int | None, torn: bool) -> None:
    count = 0
    busy = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count, busy
        if busy or event not in EVENTS or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.fsdecode(arguments[0])
        writes = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if not path.startswith(below) or (event == "open" and not writes and not os.path.isdir(path)):
            return
        busy = True
        if count == kill:
            if torn and writes:
                with open(path, "wb") as file:
                    file.write(b'{"half')
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(counted, b".")
        count += 1
        busy = False

    sys.addaudithook(hook)


def _litter() -> None:
    """Collections at nearly every step, with destructors that take time: there an exception would be swallowed."""
    import gc

    class Slow:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            until = time.perf_counter() + 0.0002
            while time.perf_counter() < until:
                pass

    gc.set_threshold(1000, 5, 5)
    gc.callbacks.append(lambda phase, info: [Slow() for _ in range(2)] if phase == "stop" else None)


if __name__ == "__main__":
    _serve()
