#!/bin/sh
# pyarrow 25.0.1: `pq.read_table` reads dictionary-encoded text inside lists, and `ParquetFile` does not.
#
# pyarrow writes a file of chats whose roles are a dictionary, in two row groups. `pq.read_table` and
# `pyarrow.dataset` read it. `ParquetFile.read`, `read_row_groups`, and `iter_batches` as soon as a batch holds rows of
# both groups, raise
#   ArrowNotImplementedError: Nested data conversions not implemented for chunked array outputs
# So a reader that streams a file fails where one that loads it whole succeeds, and the same rows in one row group, the
# same text without the dictionary, and a dictionary outside of lists pass its tests. Row groups one by one are read.
# Exits 0 while that is so, 1 once it changes.
#
# Usage: sh findings/pyarrow_nested_dictionary.sh
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==25.0.1
cat > "$folder/read.py" <<'PYTHON'
import sys
from collections.abc import Callable

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

TEXTS = pa.array(["user", "assistant"] * 4)


def written(name: str, texts: pa.Array, nested: bool = True, rows_in_a_group: int = 2) -> str:
    path = f"{sys.argv[1]}/{name}.parquet"
    column = pa.ListArray.from_arrays([0, 2, 4, 6, 8], texts) if nested else texts[:4]
    pq.write_table(pa.table({"roles": column}), path, row_group_size=rows_in_a_group)
    return path


def streamed(path: str, rows: int = 4) -> str:
    return outcome(lambda: list(pq.ParquetFile(path).iter_batches(rows)))


def outcome(read: Callable[[], object]) -> str:
    try:
        read()
        return "read"
    except pa.ArrowNotImplementedError as error:
        return f"{type(error).__name__}: {error}"


path = written("nested", TEXTS.dictionary_encode())
file = pq.ParquetFile(path)
seen = {
    "pq.read_table": outcome(lambda: pq.read_table(path)),
    "dataset.to_batches": outcome(lambda: list(ds.dataset(path).to_batches())),
    "read_row_group, one by one": outcome(lambda: [file.read_row_group(i) for i in range(file.num_row_groups)]),
    "iter_batches(2)": streamed(path, 2),
    "iter_batches(3)": streamed(path, 3),
    "iter_batches(4)": streamed(path, 4),
    "ParquetFile.read": outcome(lambda: file.read()),
    "read_row_groups([0, 1])": outcome(lambda: file.read_row_groups([0, 1])),
    "iter_batches(4), one row group": streamed(written("one", TEXTS.dictionary_encode(), rows_in_a_group=4)),
    "iter_batches(4), no dictionary": streamed(written("plain", TEXTS)),
    "iter_batches(4), no list": streamed(written("flat", TEXTS.dictionary_encode(), nested=False)),
}
for call, answer in seen.items():
    print(f"{call}: {answer}")
refused = "ArrowNotImplementedError: Nested data conversions not implemented for chunked array outputs"
as_noted = list(seen.values()) == ["read"] * 4 + [refused] * 4 + ["read"] * 3
print(f"pyarrow {pa.__version__}:", "as noted" if as_noted else "CHANGED")
sys.exit(0 if as_noted else 1)
PYTHON
"$folder/venv/bin/python" "$folder/read.py" "$folder"
