"""The prompts of a public benchmark, as its authors distribute them, for one of the layouts of its scorer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from unigen.config import UserError
from unigen.data.containers import CONTAINERS, kind_of, parts, read_part
from unigen.data.embedded import Address
from unigen.data.fields import as_picture
from unigen.data.formats import record_value
from unigen.evaluation.benchmarks import BenchmarkError, Json, Layout, check_record
from unigen.sequence.images import image_size
from unigen.sequence.types import BadRecord, Origin

READABLE = f"a file ({', '.join(sorted(CONTAINERS))}), or a folder of .txt or .parquet files"


class Asked(NamedTuple):
    """One record of a benchmark.

    Args:
        record: as the file has it; where: its place, for people.
        text: what is asked for; pictures: to edit, paths or bytes.
        places: the file of each of its pictures, from the folder of all, with ``/``.
    """

    record: Json
    where: str
    text: str
    pictures: tuple[Any, ...]
    places: tuple[str, ...]


def read_asked(
    path: Path, layout: Layout, pictures: int, images: Path | None = None, limit: int | None = None
) -> list[Asked]:
    """The records of a prompts file, each with all that the layout needs.

    Args:
        path: of the file; of a folder, its ``.txt`` files are the prompts and their names the ``item_id``, or
            its Parquet files hold the records.
        pictures: of each record.
        images: where relative paths of pictures start; default: where the file is.
        limit: only the first so many.

    Raises:
        BenchmarkError: a record lacks a field (says file, line and field), two would be one file, or the file
            holds none or is of no known kind.
        BadRecord: a line cannot be read.
        PictureError: a picture to edit cannot be.
    """
    images = images or (path if path.is_dir() else path.parent)
    found: list[Asked] = []
    taken: dict[str, str] = {}
    for number, (where, record) in enumerate(_records(path, layout)):
        if len(found) == limit:
            break
        check_record(layout, record, where)
        if layout.grid and any(one.record["item_id"] == record["item_id"] for one in found[-1:]):
            continue  # dpg_bench.csv: a line for each question about one prompt
        places = tuple(layout.place(record, number, k) for k in range(1 if layout.grid else pictures))
        names = [*places, *([f"{layout.one_of} {record[layout.one_of]}"] if layout.one_of else [])]
        for name in names:
            if name in taken:
                raise BenchmarkError(f"{where}: is {name} again, as {taken[name]} is. Fix: keep one")
            taken[name] = where
        found.append(
            Asked(record, where, record[layout.text], _pictures(record, layout, where, images), places)
        )
    if not found:
        raise BenchmarkError(f"{path} holds no prompt. Fix: give the prompts file of the benchmark")
    return found


def _records(path: Path, layout: Layout) -> Iterator[tuple[str, Any]]:
    """(place, record) of all records of a file or folder."""
    texts = sorted(path.glob("*.txt")) if path.is_dir() else []
    for file in texts:
        try:
            text = file.read_bytes().decode("utf-8-sig").strip()
        except (OSError, ValueError) as error:
            raise BenchmarkError(f"{file} cannot be read ({error}). Fix: a text in UTF-8") from None
        yield str(file), {"item_id": file.stem, "text": text}
    if texts:
        return
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    for file in files:
        if not file.is_file() or kind_of(file) is None:
            there = "of no kind that is read" if file.is_file() else "not there"
            raise BenchmarkError(f"prompts_file is {path}, which is {there}. Fix: {READABLE}")
        yield from _of_file(file, layout)


def _of_file(path: Path, layout: Layout) -> Iterator[tuple[str, Any]]:
    origin = Origin(path)
    try:
        for part in parts(path, 0):
            for span, raw in read_part(part):
                origin = Origin(path, span.line or None, span.index)
                value = record_value(raw, span.line)
                if layout.keyed and isinstance(value, dict) and layout.text not in value:
                    for key, held in value.items():
                        yield f"{path}, key {key}", {**held, "key": key} if isinstance(held, dict) else held
                else:
                    yield str(origin), value
    except BadRecord as error:
        error.origin = error.origin or origin
        raise


def _pictures(record: Json, layout: Layout, where: str, images: Path) -> tuple[Any, ...]:
    """The pictures to edit of a record, their headers looked at."""
    given = record.get(layout.picture) if layout.picture else None
    if given is None:
        return ()
    folder = images / str(record[layout.folder]) if layout.folder else images
    found = []
    try:
        for one in given if isinstance(given, list) else [given]:
            picture = as_picture(one, layout.picture, folder)
            image_size(picture.url if isinstance(picture, Address) else picture)
            found.append(picture)
    except UserError as error:
        told = "--image_root" in str(error) or "://" in str(error)
        fix = "" if told else "; --image_root FOLDER says where pictures lie"
        raise BenchmarkError(f"{where}: field {layout.picture}: {error}{fix}") from None
    return tuple(found)
