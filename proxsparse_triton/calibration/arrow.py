"""How many bytes the record batches of an Arrow file unpack to, told by their headers: pyarrow unpacks a whole batch at a time.

An encapsulated message is a FlatBuffer beside a body; a compressed buffer of the body begins with its unpacked length.
Source: Arrow columnar format, "Serialization and Interprocess Communication"; FlatBuffers internals.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

HEADER, DICTIONARY, RECORDS = 2, 2, 3  # field of Message; kinds of header
DATA = 1  # field of DictionaryBatch: the RecordBatch in it
BUFFERS, COMPRESSION = 2, 3  # fields of RecordBatch
MAGIC = 8  # bytes before the first message of the file format


def unpacked_sizes(raw: Any, *, is_file: bool) -> Iterator[int]:
    """Bytes that each compressed batch unpacks to, 0 for those that are stored as they are.

    Args: raw: a pyarrow file at its beginning. Raises: ArrowException, ValueError: not an Arrow file.
    """
    import pyarrow as pa

    raw.seek(MAGIC if is_file else 0)
    try:
        for message in pa.ipc.MessageReader.open_stream(raw):
            yield _unpacked(message)
    except struct.error as error:
        raise ValueError(f"a message that does not parse: {error}") from error


def _unpacked(message: Any) -> int:
    kind = {"dictionary": DICTIONARY, "record batch": RECORDS}.get(message.type)
    if kind is None:
        return 0
    data = message.metadata.to_pybytes()
    batch = _table(data, _field(data, _table(data, 0), HEADER))
    if kind == DICTIONARY:
        batch = _table(data, _field(data, batch, DATA))
    buffers = _field(data, batch, BUFFERS)
    if not buffers or not _field(data, batch, COMPRESSION):
        return 0
    start = _table(data, buffers)
    (count,) = struct.unpack_from("<I", data, start)
    total, body = 0, message.body
    for index in range(count):
        offset, length = struct.unpack_from("<qq", data, start + 4 + 16 * index)
        if length >= 8:
            (unpacked,) = struct.unpack("<q", body[offset : offset + 8].to_pybytes())
            total += length if unpacked < 0 else unpacked  # -1: stored as it is
    return total


def _table(data: bytes, at: int) -> int:
    """Where the table or vector begins that the offset at `at` points to."""
    return at + int(struct.unpack_from("<I", data, at)[0])


def _field(data: bytes, table: int, index: int) -> int:
    """Where a field of a table is; 0 where it was left out."""
    vtable = table - int(struct.unpack_from("<i", data, table)[0])
    (size,) = struct.unpack_from("<H", data, vtable)
    slot = 4 + 2 * index
    offset = int(struct.unpack_from("<H", data, vtable + slot)[0]) if slot < size else 0
    return table + offset if offset else 0
