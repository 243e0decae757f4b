"""Parquet and Arrow files: rows in groups. With ``unpack.py`` the only importer of pyarrow, which is loaded
when such a file is met.

A *group* is what is read at once: a row group of Parquet, a record batch of Arrow. Its *key* finds it again:
the number of the row group or batch, or the byte at which a batch of an Arrow stream begins. Every function
raises whatever pyarrow does for a damaged file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

TableRow = dict[str, Any]
# rows of Parquet turned into Python values at once: with pictures in them a whole group may be gigabytes
BATCH = 64
MAX_COLUMNS = 10_000
ROWS_FREE = 100_000  # rows that a file may have whatever its size; more only where each has a byte of it
MAX_GROUP = 4 << 30  # bytes of a group, unpacked


class Group(NamedTuple):
    """One group of a file."""

    key: int
    rows: int
    size: int  # bytes, about


def parquet_groups(path: Path) -> list[Group]:
    with _parquet(path) as file:
        _check_names(file.schema_arrow.names)
        total = file.metadata.num_rows
        rows = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        if sum(rows) != total:
            raise ValueError(f"its row groups do not hold its {total:,} rows")
        _check_rows(path, total)
        # Not from the sizes of its columns: in a damaged file, asking pyarrow for a column's metadata ends
        # the process.
        size = path.stat().st_size
        return [Group(i, count, size * count // max(total, 1)) for i, count in enumerate(rows)]


def parquet_rows(path: Path, key: int) -> Iterator[TableRow]:
    """The rows of a group, with little of it in memory at a time."""
    with _parquet(path) as file:
        count = size = 0
        for batch in file.iter_batches(BATCH, row_groups=[key], use_threads=False):
            yield from _rows(batch)
            count, size = count + batch.num_rows, size + batch.nbytes
            _check_group(size)
        if count != file.metadata.row_group(key).num_rows:
            raise ValueError(
                f"a row group holds {count:,} rows in place of {file.metadata.row_group(key).num_rows:,}"
            )


def parquet_group(path: Path, key: int) -> Any:
    """A whole group, for :func:`table_row` and its ``nbytes``."""
    with _parquet(path) as file:
        return file.read_row_group(key, use_threads=False)


def arrow_groups(path: Path) -> Iterator[Group]:
    """The groups of an Arrow file, in its file or its stream format (which ``datasets`` writes)."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pa.ipc.open_file(source)
            _check_names(file.schema.names)
            rows = 0
            for i in range(file.num_record_batches):
                batch = file.get_batch(i)
                rows += batch.num_rows
                _check_rows(path, rows)
                yield Group(i, batch.num_rows, batch.nbytes)
            return
        source.seek(0)
        stream = pa.ipc.open_stream(source)
        _check_names(stream.schema.names)
        _check_no_dictionary(stream.schema)
        rows = 0
        while True:
            key = source.tell()
            try:
                batch = stream.read_next_batch()
            except StopIteration:
                break
            rows += batch.num_rows
            _check_rows(path, rows)
            yield Group(key, batch.num_rows, source.tell() - key)
        if source.tell() == key:  # cut between two batches it would read well, and be short
            raise ValueError("its end mark is missing")


def arrow_rows(path: Path, key: int) -> Iterator[TableRow]:
    batch = arrow_group(path, key)
    for start in range(0, batch.num_rows, BATCH):
        yield from _rows(batch.slice(start, BATCH))


def arrow_group(path: Path, key: int) -> Any:
    """A whole group, checked: offsets out of range would otherwise be followed. Uncompressed ones stay in the
    file's pages."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            batch = pa.ipc.open_file(source).get_batch(key)
        else:
            source.seek(0)
            schema = pa.ipc.open_stream(source).schema
            source.seek(key)
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)
        batch.validate(full=True)
        _check_group(batch.nbytes)
        return batch


def table_row(group: Any, i: int) -> TableRow:
    """Row ``i`` of what :func:`parquet_group` or :func:`arrow_group` returned."""
    return _rows(group.slice(i, 1))[0]


def _rows(batch: Any) -> list[TableRow]:
    try:
        return batch.to_pylist()
    except ValueError:  # such as a text that is not UTF-8
        names, n = batch.schema.names, batch.num_rows
        return [{name: _value(batch.column(name), i) for name in names} for i in range(n)]


def _value(column: Any, i: int) -> Any:
    """A value that spoils its own record only: what cannot be expressed becomes bytes, which no text field
    takes."""
    try:
        return column[i].as_py()
    except ValueError as error:
        return str(error).encode("utf-8", "replace")


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        yield file


def _check_names(names: list[str]) -> None:
    if len(names) > MAX_COLUMNS:
        raise ValueError(f"it has {len(names):,} columns, more than {MAX_COLUMNS:,}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"two columns are called {min(twice)!r}")


def _check_rows(path: Path, rows: int) -> None:
    """Rows of nothing take no space: a file of a few bytes may claim any number of them."""
    size = path.stat().st_size
    if rows > max(ROWS_FREE, size):
        raise ValueError(f"it claims {rows:,} rows in {size:,} bytes")


def _check_group(size: int) -> None:
    if size > MAX_GROUP:
        raise ValueError(f"a group of rows takes more than {MAX_GROUP:,} bytes; write smaller groups")


def _check_no_dictionary(schema: Any) -> None:
    import pyarrow as pa

    for field in schema:
        if pa.types.is_dictionary(field.type):
            raise ValueError(
                f"column {field.name!r} is dictionary-encoded, which a stream cannot read at one place; save"
                " it as Parquet"
            )
