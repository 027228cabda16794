"""What compressed Arrow files unpack to, before they do."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from proxsparse_triton.calibration.arrow import unpacked_sizes
from proxsparse_triton.calibration.sources import open_source
from proxsparse_triton.errors import DataError


def write(path: Path, table: pa.Table, *, is_file: bool, compression: str | None) -> Path:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    make: Any = pa.ipc.new_file if is_file else pa.ipc.new_stream
    with make(str(path), table.schema, options=options) as sink:
        for batch in table.to_batches(max_chunksize=100):
            sink.write_batch(batch)
    return path


def sizes(path: Path, *, is_file: bool) -> list[int]:
    with pa.memory_map(str(path)) as raw:
        return list(unpacked_sizes(raw, is_file=is_file))


@pytest.mark.parametrize("is_file", [True, False])
@pytest.mark.parametrize("compression", ["zstd", "lz4", None])
def test_sizes_are_those_of_the_batches(is_file: bool, compression: str | None, tmp_path: Path) -> None:
    words = [f"text number {i} " * 40 if i % 7 else None for i in range(300)]
    table = pa.table({"text": words, "kind": pa.array(["a", "b", "c"] * 100).dictionary_encode(), "length": list(range(300))})
    path = write(tmp_path / "a.arrow", table, is_file=is_file, compression=compression)
    found = sizes(path, is_file=is_file)
    if compression is None:
        assert not any(found)
    else:  # a schema, a dictionary, three batches, whose buffers are padded
        assert sum(found) == pytest.approx(table.nbytes, rel=0.05)
    assert len(list(open_source(str(path)).documents())) == len([word for word in words if word])


@pytest.mark.parametrize("is_file", [True, False])
def test_a_bomb_is_refused_before_it_unpacks(is_file: bool, tmp_path: Path) -> None:
    table = pa.table({"text": ["a" * 2**20] * 100})
    path = write(tmp_path / "bomb.arrow", table, is_file=is_file, compression="zstd")
    assert path.stat().st_size < 2**17
    before = pa.total_allocated_bytes()
    with pytest.raises(DataError, match="unpacks to less than 200 times its size, got 105 MB") as raised:
        list(open_source(str(path)).documents())
    assert "\n" not in str(raised.value)
    assert pa.total_allocated_bytes() < before + 2**20


def test_damage_is_one_line(tmp_path: Path) -> None:
    table = pa.table({"text": [f"text number {i}" for i in range(50)]})
    whole = write(tmp_path / "a.arrow", table, is_file=True, compression="zstd").read_bytes()
    choose = random.Random(0)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(choose.choice((1, 4))):
            data[choose.randrange(len(data))] = choose.randrange(256)
        path = tmp_path / "damaged.arrow"
        path.write_bytes(data[: choose.choice((len(data), choose.randrange(len(data))))])
        try:
            list(open_source(str(path)).documents())
        except DataError as error:
            assert "\n" not in str(error)  # noqa: PT017
