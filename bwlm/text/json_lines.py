"""Lines of JSON in .jsonl files, plain or compressed, on any file system."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from typing import Any

import fsspec
import pyarrow as pa

from bwlm.errors import Unusable, UserError, first_line

_CODECS = {".gz": "gzip", ".zst": "zstd"}


def read_json_lines(uri: str, mend: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of each line that is not blank; the place is `file: line 3`.

    Raises `UserError` for a line that is not JSON, and with the advice `mend` for a file that cannot be read.
    """
    for place, line in read_lines(uri, mend):
        yield place, parse_line(line, place)


def read_lines(uri: str, mend: str) -> Iterator[tuple[str, bytes]]:
    """Yield (place, line) of each line that is not blank, not parsed. Raises `UserError` as `read_json_lines` does."""
    number = 0
    try:
        with _open(uri) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{uri}: line {number}", line
    except Exception as error:  # every file system has its own errors, without a common base class
        raise UserError(f"{uri}: cannot be read after line {number} ({first_line(error)}): {mend}") from None


@contextlib.contextmanager
def _open(uri: str) -> Iterator[io.BufferedReader]:
    """Open a file for reading, decompressed as its ending says; pyarrow holds all codecs."""
    codec = next((codec for ending, codec in _CODECS.items() if uri.endswith(ending)), None)
    with fsspec.open(uri, "rb") as file:
        stream = pa.PythonFile(file, mode="r")
        yield io.BufferedReader(pa.CompressedInputStream(stream, codec) if codec else stream)


def parse_line(line: bytes, place: str) -> Any:
    """Return the value of a line. Raises `Unusable` if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        told = f"{place}: not valid JSON ({first_line(error)}): correct the line or remove it"
        raise Unusable(told, "not valid JSON") from None
