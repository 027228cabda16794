"""Files as they should not be: JSON and bytes with a few hostile changes, tried in a process of their own whose memory is measured."""

from __future__ import annotations

import copy
import json
import os
import resource
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = 300
MOST_GROWN = 500 << 20  # bytes
MOST_SECONDS = 60.0  # of one example, on a loaded machine

fuzz = settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))

NUMBERS = [0, 1, -1, 2, 3, 5, 2**31, 2**63, 10**9, 10**18, 10**400, 1e308, -1e308, 5e-324, 0.5, float("nan"), float("inf"), -0.0]
TEXTS = [
    "",
    "x",
    "..",
    "../x",
    "/etc/passwd",
    "\0",
    "\ud800",
    "é" * 200,
    "F4",
    "F8_E4M3",
    "BF16",
    "I64",
    "model.safetensors",
    "$x^$",
    "<b>",
]
DEEP = json.loads("[" * 150 + "]" * 150)
hostile = st.one_of(
    st.sampled_from([*NUMBERS, *TEXTS, None, True, False, [], {}, [0, 4], [4, 4], [0] * 70, [[]], {"a": []}, DEEP]),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(-2, 2**40), max_size=4),
).map(copy.deepcopy)  # as they may be changed in their turn


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every item of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths(item, (*path, key))


@st.composite
def changed_json(draw: st.DrawFn, value: Any, most: int = 3) -> Any:
    """`value` with some of its items replaced, removed, renamed or added to."""
    found = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, most))):
        ways = list(paths(found))
        if not ways:
            break
        path = draw(st.sampled_from(ways))
        holder = found
        for key in path[:-1]:
            holder = holder[key]
        what = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "add"]))
        if what == "replace":
            holder[path[-1]] = draw(hostile)
        elif what == "remove":
            del holder[path[-1]]
        elif isinstance(holder, dict):
            new = draw(st.sampled_from(TEXTS) | st.text(max_size=8))
            holder[new] = holder.pop(path[-1]) if what == "rename" else draw(hostile)
        else:
            holder.append(draw(hostile))
    return found


def json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with bytes flipped, cut out, put in or cut off."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(found) - 1)))
        match draw(st.sampled_from(["flip", "put", "cut", "end"])):
            case "flip":
                found[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "put":
                found[at:at] = draw(st.binary(min_size=1, max_size=12) | st.sampled_from([b"[" * 3000, b"1" * 5000, b"\0", b"1e999"]))
            case "cut":
                del found[at : at + draw(st.integers(1, 64))]
            case "end":
                del found[at:]
    return bytes(found)


class Clock:
    """Examples that were tried, how many of them were accepted, and the longest, in seconds."""

    def __init__(self) -> None:
        self.tried = self.accepted = 0
        self.longest = 0.0

    def __call__(self, work: Callable[[], bool]) -> None:
        """work: True where the example was accepted."""
        start = time.perf_counter()
        self.accepted += work()
        self.tried += 1
        self.longest = max(self.longest, time.perf_counter() - start)


def in_child(name: str, work: Callable[[Clock], None]) -> None:
    """Run `work` in a fork: what it raises fails the test, and so does memory that grows beyond MOST_GROWN.

    The peak of a fork's resident memory starts at what it has, so its growth is what the examples took; address space is limited to
    four times as much beyond what is mapped, so that an allocation that is never touched fails too.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        clock, error = Clock(), ""
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            with open("/proc/self/statm", encoding="ascii") as file:
                mapped = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + 4 * MOST_GROWN, resource.RLIM_INFINITY))
            work(clock)
        except BaseException:
            error = traceback.format_exc()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        seconds = time.perf_counter() - start
        report = {"error": error, "grown": grown, "seconds": seconds, **vars(clock)}
        with os.fdopen(writer, "w") as out:
            json.dump(report, out)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        content = answer.read()
    os.waitpid(process, 0)
    assert content, "the process died"
    found = json.loads(content)
    print(
        f"fuzz {name}: {found['tried']} examples, {found['accepted']} accepted, {found['seconds']:.0f} s, "
        f"longest {found['longest']:.2f} s, {found['grown'] / 1e6:.0f} MB grown"
    )
    assert not found["error"], found["error"]
    assert found["tried"] >= EXAMPLES
    assert found["grown"] < MOST_GROWN
    assert found["longest"] < MOST_SECONDS
