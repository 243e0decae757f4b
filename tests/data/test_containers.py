"""Kinds of files: found, cut into parts, read through, read at one place; damage is told and never makes them
shorter."""

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st

from unigen.config import UserError
from unigen.data import containers, json_text, reader, tables, unpack
from unigen.data.containers import BadData, ByteSpan, Raw, crc_of, feed, parts, read_part
from unigen.data.dataset import UnifiedGenerationDataset
from unigen.data.finding import find_files
from unigen.data.reader import Reader
from unigen.sequence.types import BadRecord

FIXTURES = Path(__file__).parent / "fixtures"
LINES = b"".join(
    json.dumps({"a": i, "t": "é" * (i % 50)}).encode() + b"\n" + b" \r\n" * (i % 7 == 0) for i in range(300)
)
TABLE = pa.table(
    {
        "image": [b"\x00\xff" * i for i in range(200)],
        "captions": [None if i % 9 == 0 else f"c{i}é" for i in range(200)],
    }
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is ever unpacked into the folder of the user who runs the tests."""
    monkeypatch.setenv("UNIGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "unpacked"


def zst(*frames: bytes) -> bytes:
    return b"".join(_frame(data) for data in frames)


def _frame(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


def arrow(path: Path, new=pa.ipc.new_stream, rows: int = 30, **options) -> Path:
    with pa.OSFile(str(path), "wb") as sink, new(sink, TABLE.schema, **options) as writer:
        writer.write_table(TABLE, max_chunksize=rows)
    return path


def make(folder: Path) -> list[Path]:
    """A file of every kind: the first ones hold LINES, the last ones TABLE."""
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    for name, data in {
        "a.jsonl": LINES,
        "b.jsonl.gz": gzip.compress(LINES[:half]) + gzip.compress(LINES[half:]),
        "c.jsonl.zst": zst(LINES[:half], LINES[half:]),
        "d.json": b"[" + b",\n".join(LINES.split(b"\n")[:1] * 9) + b"]",
        "e.json.gz": gzip.compress(b"[1,\n 2]"),
    }.items():
        (folder / name).write_bytes(data)
    pq.write_table(TABLE, folder / "f.parquet", row_group_size=30)
    arrow(folder / "g.arrow")
    arrow(folder / "h.arrow", pa.ipc.new_file, options=pa.ipc.IpcWriteOptions(compression="zstd"))
    return [path for path, _ in find_files([folder])]


def read(
    path: Path, size: int = 1 << 20, source: Path | None = None, digest=None
) -> list[tuple[ByteSpan, Raw]]:
    return [entry for part in parts(path, 3, size, source) for entry in read_part(part, digest)]


def broken(path: Path) -> BadRecord:
    with pytest.raises(BadRecord) as caught:
        read(path)
    error = caught.value
    assert error.field == "(file)" and error.origin.file == path and str(path) in str(error)
    return error


# ---- every kind, one contract


def test_parts_of_any_size_hold_every_record_once_and_random_access_finds_each(tmp_path: Path) -> None:
    files = make(tmp_path)
    assert [path.name for path in files] == [
        "a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.json", "e.json.gz", "f.parquet", "g.arrow", "h.arrow",
    ]  # fmt: skip
    access = Reader(files)
    for number, path in enumerate(files):
        whole = read(path)
        assert [span.index for span, _ in whole] == list(range(len(whole))), path
        assert len(whole) == {"d.json": 9, "e.json.gz": 2}.get(path.name, 300 if number < 3 else 200)
        for size in (1, 100, 5000):
            assert read(path, size, access.source(number)) == whole, (path, size)
        for span, raw in random.Random(0).sample(whole, min(60, len(whole))):
            assert access.read(span._replace(file=number)) == raw and crc_of(raw) == span.crc
        if number > 4:
            assert [raw for _, raw in whole] == TABLE.to_pylist()
            assert len(list(parts(path, 0))) == 7
    assert len(list(parts(files[0], 0, 1000))) > 5 and len(list(parts(files[1], 0, 1000))) == 1
    assert len(list(parts(files[1], 0, 1000, access.source(1)))) > 5


def test_parts_travel_and_are_read_in_any_order(tmp_path: Path) -> None:
    path = make(tmp_path)[0]
    found = [pickle.loads(pickle.dumps(part)) for part in parts(path, 3, 500)]
    assert sorted(entry for part in reversed(found) for entry in read_part(part)) == read(path)
    assert sum(part.size for part in found) == path.stat().st_size


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst"])
def test_the_digest_is_that_of_the_contents(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    for size in (100, 1 << 20):
        digest = hashlib.sha256()
        read(tmp_path / name, size, digest=digest)
        assert digest.digest() == hashlib.sha256(LINES).digest()


def test_the_digest_of_a_table_follows_every_value(tmp_path: Path) -> None:
    def digest(table: pa.Table) -> str:
        pq.write_table(table, tmp_path / "x.parquet")
        found = hashlib.sha256()
        read(tmp_path / "x.parquet", digest=found)
        return found.hexdigest()

    rows = TABLE.to_pylist()
    rows[150]["captions"] += "."
    assert digest(TABLE) == digest(TABLE) != digest(pa.Table.from_pylist(rows, schema=TABLE.schema))


LINE_PIECES = [
    b"{}",
    b"x",
    b" ",
    b"\t",
    b"\r",
    b"\n",
    b"\n",
    b"\r\n",
    b"\n\n",
    b"\xef\xbb\xbf",
    b"\xff",
    "é\u2028".encode(),
    b"\0",
    b'{"a": 1}',
]


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(LINE_PIECES), max_size=30).map(b"".join), st.integers(1, 12))
def test_lines_are_numbered_alike_however_a_file_is_cut(tmp_path: Path, data: bytes, size: int) -> None:
    try:
        json_text.check_lines(data)
    except BadRecord:
        reject()
    assume(data[:1] != b"\0")
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    expected = []
    for number, text in enumerate(data.split(b"\n"), 1):
        content = text.removeprefix(b"\xef\xbb\xbf").rstrip(b" \t\r")
        if content:
            expected.append((number, len(expected), content))
    for found in (read(path), read(path, size)):
        assert [(span.line, span.index, content) for span, content in found] == expected
        assert all(data[span.offset :][: span.length] == content for span, content in found)


def test_a_line_without_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "MAX_LINE", 100)
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n' + b"x" * 101)
    assert "line 2 is longer than 100 bytes" in broken(tmp_path / "x.jsonl").found


def test_a_file_that_shrank_between_cutting_and_reading_is_told(tmp_path: Path) -> None:
    path = make(tmp_path)[0]
    found = list(parts(path, 0, 500))
    os.truncate(path, 700)
    with pytest.raises(BadRecord, match="changed while it was read"):
        [list(read_part(part)) for part in found]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.binary(max_size=4),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=2), v, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=2), VALUES, max_size=3),
    st.dictionaries(st.text(max_size=2), VALUES, max_size=3),
)
def test_different_rows_feed_different_bytes(one: dict, two: dict) -> None:
    def fed(row: dict) -> bytes:
        found = []
        feed(row, found.append)
        return b"".join(found)

    assert (fed(one) == fed(two)) == (repr(one) == repr(two))
    values = (b"x", "x", ["x"], [b"x"], {"0": "x"}, {0: "x"}, 1, "1", True, 1.0, None, "", b"", [], {})
    assert len({fed({"a": value}) for value in values}) == len(values)


# ---- compressed files


@pytest.mark.slow
@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.jsonl.zst"])
def test_a_truncated_compressed_file_is_an_error_at_every_length(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    data = (tmp_path / name).read_bytes()
    whole = [raw for _, raw in read(tmp_path / name)]
    path = tmp_path / ("cut." + name.partition(".")[2])
    ends = 0
    for length in range(0, len(data), 1 if len(data) < 2500 else 3):
        path.write_bytes(data[:length])
        try:
            found = [raw for _, raw in read(path)]
            assert found == whole[: len(found)] and 0 < len(found) < len(whole)
            ends += 1  # the end of the first of two members: a whole file by every rule of the format
        except BadRecord as error:
            assert error.code == "broken_file" and "whole file" in error.expected
    assert ends <= 1
    with pytest.raises(BadData, match="broken_file"):
        Reader([path])
    assert not list((tmp_path / "cache" / "unpacked").glob("*.jsonl"))


@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.jsonl.zst"])
@pytest.mark.parametrize("tail", [b"garbage", b"\x1f\x8b", b"\x28\xb5\x2f\xfd"])
def test_what_follows_the_compressed_data_is_an_error(tmp_path: Path, name: str, tail: bytes) -> None:
    make(tmp_path)
    with (tmp_path / name).open("ab") as file:
        file.write(tail)
    assert broken(tmp_path / name).code == "broken_file"


def test_flipped_bits_of_gzip_never_pass(tmp_path: Path) -> None:
    data, rng = gzip.compress(LINES), random.Random(1)
    for _ in range(60):
        spoilt = bytearray(data)
        spoilt[rng.randrange(10, len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "x.jsonl.gz").write_bytes(spoilt)
        assert broken(tmp_path / "x.jsonl.gz").code == "broken_file"


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_an_empty_file_was_not_compressed(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x.jsonl.{suffix}").write_bytes(b"")
    assert "empty" in broken(tmp_path / f"x.jsonl.{suffix}").found


def test_unpacked_once_and_named_by_content(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make(tmp_path)
    copy = Reader(files[1:2]).source(0)
    assert copy.parent == cache and copy.read_bytes() == LINES
    assert copy.name == hashlib.sha256(files[1].read_bytes()).hexdigest() + ".jsonl"
    monkeypatch.setattr(unpack, "open_packed", lambda path: pytest.fail("unpacked again"))
    files[1].rename(tmp_path / "moved.jsonl.gz")
    assert Reader([tmp_path / "moved.jsonl.gz"]).source(0) == copy
    assert sorted(path.name for path in cache.iterdir()) == [".lock", copy.name]


def test_the_remains_of_a_killed_process_are_cleared(tmp_path: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / ".unpacking-abc").write_bytes(b"half")
    Reader(make(tmp_path)[1:2])
    assert not (cache / ".unpacking-abc").exists()


def _unpack(path: Path, queue) -> None:
    done = unpack._unpack
    unpack._unpack = lambda source, target: (queue.put("unpacked"), done(source, target))
    queue.put(Reader([path]).source(0).read_bytes() == LINES)


def test_processes_that_want_the_same_copy_make_it_once(tmp_path: Path) -> None:
    path = make(tmp_path)[2]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_unpack, args=(path, queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    assert sorted(map(str, (queue.get(timeout=60) for _ in range(5)))) == ["True"] * 4 + ["unpacked"]
    for worker in workers:
        worker.join()


@pytest.mark.parametrize("free", [0, unpack.RESERVE + 100])
def test_no_room_is_told_before_or_while_unpacking(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    path = make(tmp_path)[1]
    monkeypatch.setattr(unpack, "_least_size", lambda path: 10)
    monkeypatch.setattr(unpack, "free_bytes", lambda folder: free)
    with pytest.raises(UserError, match="no room to unpack") as caught:
        Reader([path])
    assert "UNIGEN_CACHE" in str(caught.value) and str(path) in str(caught.value)
    assert [p.name for p in cache.iterdir()] == [".lock"]


def test_the_room_that_is_asked_for_first_is_what_gzip_says(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b"x" * 12345678))
    assert unpack._least_size(path) == 12345678


def test_a_cache_that_cannot_be_written_to_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNIGEN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written"):
        Reader(make(tmp_path)[1:2])


def test_a_copy_that_was_deleted_while_in_use_is_told(tmp_path: Path) -> None:
    path = make(tmp_path)[1]
    access, (span, raw) = Reader([path]), read(path)[5]
    span = span._replace(file=0)
    assert access.read(span) == raw
    access.source(0).unlink()
    with pytest.raises(BadData, match=r"b\.jsonl\.gz:\d+: it cannot be read any more"):
        access.read(span)


# ---- tables


@pytest.mark.slow
@pytest.mark.parametrize("name", ["f.parquet", "g.arrow", "h.arrow"])
def test_a_truncated_table_is_an_error_at_every_length(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    data = (tmp_path / name).read_bytes()
    path = tmp_path / ("cut" + Path(name).suffix)
    for length in {*range(0, len(data), 97), *range(len(data) - 40, len(data))}:
        path.write_bytes(data[:length])
        assert broken(path).code == "broken_file", length


def test_an_arrow_stream_cut_between_two_batches_is_not_taken_for_a_short_one(tmp_path: Path) -> None:
    path = arrow(tmp_path / "x.arrow")
    ends = [group.key for group in tables.arrow_groups(path)][1:]
    assert len(ends) == 6
    for end in ends:
        os.truncate(arrow(path), end)
        assert "end mark" in broken(path).found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["f.parquet", "g.arrow", "h.arrow"])
def test_damaged_tables_are_refused_or_have_all_their_rows(tmp_path: Path, name: str) -> None:
    """Arrow and Parquet (by default) keep no checksums, so a changed value may pass; a missing row and a
    crash may not."""
    make(tmp_path)
    data, rng, refusals = (tmp_path / name).read_bytes(), random.Random(2), 0
    path = tmp_path / ("spoilt" + Path(name).suffix)
    for _ in range(150):
        spoilt = bytearray(data)
        spoilt[rng.choice([rng.randrange(len(data)), len(data) - 1 - rng.randrange(800)])] = rng.randrange(
            256
        )
        path.write_bytes(spoilt)
        try:
            assert len(read(path)) == len(TABLE)
        except BadRecord as error:
            assert error.code in ("broken_file", "unreadable_file")
            refusals += 1
    assert refusals > 5


@pytest.mark.slow
def test_a_damaged_parquet_footer_neither_loses_rows_nor_ends_the_process(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"a": range(20)}),
        tmp_path / "x.parquet",
        row_group_size=10,
        store_schema=False,
        write_statistics=False,
    )
    data = (tmp_path / "x.parquet").read_bytes()
    footer = int.from_bytes(data[-8:-4], "little")
    for at in range(len(data) - 8 - footer, len(data) - 8):
        for bits in (1, 2, 12):  # 2 and 12 make a count, in its zigzag form, one or ten more or less
            spoilt = bytearray(data)
            spoilt[at] ^= bits
            (tmp_path / "x.parquet").write_bytes(spoilt)
            try:
                assert len(read(tmp_path / "x.parquet")) == 20, at
            except BadRecord as error:
                assert error.code == "broken_file"


def test_groups_are_kept_up_to_a_size_and_read_again_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path)
    path = tmp_path / "f.parquet"
    spans = [span._replace(file=0) for span, _ in read(path)]
    loads = []

    def load(path: Path, key: int):
        loads.append(key)
        return tables.parquet_group(path, key)

    monkeypatch.setitem(
        containers.CONTAINERS, ".parquet", containers.CONTAINERS[".parquet"]._replace(group=load)
    )
    access = Reader([path])
    for i in (0, 1, 31, 2, 29, 60, 0, 31):
        assert access.read(spans[i])["image"] == b"\x00\xff" * i
    assert loads == [0, 1, 2]
    monkeypatch.setattr(reader, "GROUPS", 1)
    monkeypatch.setattr(reader, "LEAST", 2)
    access, loads[:] = Reader([path]), []
    for i in (0, 31, 0, 60, 0, 31):  # two stay: 2 takes the place of 1, then 1 that of 2
        access.read(spans[i])
    assert loads == [0, 1, 2, 1]


def _rows(access: Reader, spans: list[ByteSpan], queue) -> None:
    queue.put([access.read(span)["image"] for span in spans])


def test_a_table_is_read_in_threads_and_forks_at_once(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "f.parquet"
    found = read(path)
    spans, expected = [span._replace(file=0) for span, _ in found], [raw["image"] for _, raw in found]
    access = Reader([path])
    with ThreadPoolExecutor(8) as pool:
        assert [row["image"] for row in pool.map(access.read, spans * 3)] == expected * 3
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        access._kept._lock.acquire()  # held by some thread at the fork: no process may wait for it
        workers = [context.Process(target=_rows, args=(access, spans, queue)) for _ in range(2)]
        for worker in workers:
            worker.start()
        assert [queue.get(timeout=60) for _ in workers] == [expected] * 2
        access._kept._lock.release()
        for worker in workers:
            worker.join()
    assert pickle.loads(pickle.dumps(access)).read(spans[7])["image"] == expected[7]


@pytest.mark.parametrize("name", ["f.parquet", "g.arrow"])
def test_a_table_changed_while_in_use_is_noticed(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    path = tmp_path / name
    span = read(path)[3][0]._replace(file=0)
    access = Reader([path])
    access.read(span)
    with pytest.raises(BadData, match="changed while it was in use"):
        access.read(span._replace(crc=span.crc ^ 1))
    os.truncate(path, 100)  # a mapped page of it would be lost
    with pytest.raises(BadData, match="changed while it was in use"):
        access.read(span)


def test_a_text_that_is_not_utf8_spoils_its_row_alone(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"captions": texts, "n": [1, 2, 3]}), tmp_path / "x.parquet")
    rows = [raw for _, raw in read(tmp_path / "x.parquet")]
    assert [row["n"] for row in rows] == [1, 2, 3] and [rows[0]["captions"], rows[2]["captions"]] == [
        "a",
        "c",
    ]
    assert isinstance(rows[1]["captions"], bytes)


def test_two_columns_of_one_name_are_told(tmp_path: Path) -> None:
    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "x.parquet")
    assert "two columns are called 'a'" in broken(tmp_path / "x.parquet").found


def test_an_arrow_stream_with_dictionaries_is_told(tmp_path: Path) -> None:
    table = pa.table({"a": pa.array(["x", "y"]).dictionary_encode()})
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert "save it as Parquet" in broken(tmp_path / "x.arrow").found


# ---- folders


def captions(paths: list) -> list[str]:
    return [json.loads(raw["captions"])["short"] for path, _ in find_files(paths) for _, raw in read(path)]


def test_folders_saved_by_datasets_are_read_in_their_order() -> None:
    assert captions([FIXTURES / "saved"]) == ["c4", "c0", "c2"]
    assert captions([FIXTURES / "saved_dict"]) == ["c1"]
    assert captions([FIXTURES]) == ["c3", "c1", "c4", "c0", "c2", "c1"]
    names = [name for _, name in find_files([FIXTURES / "saved"])]
    assert names == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    row = read(FIXTURES / "saved" / names[0])[0][1]
    assert row["image"]["path"] == "4.png" and row["image"]["bytes"].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_indices_files": [{"filename": "indices.arrow"}]}, "Save it again with datasets 2"),
        ({"_data_files": [{"filename": "none.arrow"}]}, "none.arrow is missing"),
        (
            {"_data_files": [{"filename": "../saved/data-00000-of-00002.arrow"}]},
            "no Arrow file of this folder",
        ),
        ({"_data_files": "x"}, "not a list"),
        (None, "cannot be read"),
    ],
)
def test_a_saved_folder_that_is_not_whole_is_told(tmp_path: Path, change: dict | None, words: str) -> None:
    folder = Path(shutil.copytree(FIXTURES / "saved", tmp_path / "saved"))
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text("{" if change is None else json.dumps(state | change))
    with pytest.raises(BadData, match=words):
        find_files([tmp_path])


def test_the_description_beside_cached_arrow_files_is_no_record(tmp_path: Path) -> None:
    arrow(tmp_path / "x-train.arrow")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert [name for _, name in find_files([tmp_path])] == ["x-train.arrow"]


def test_kinds_are_known_by_their_names(tmp_path: Path) -> None:
    names = ["a.JSON", "b.Jsonl.GZ", "c.json.zst", "d.parquet", "e.arrow"]
    others = ["f.txt", "g.gz", "h.parquet.gz", "i.jsonl.bz2", "j.tar.gz", ".k.jsonl"]
    for name in names + others:
        (tmp_path / name).write_bytes(b"x")
    assert [name for _, name in find_files([tmp_path])] == names
    for name in others[:5]:
        with pytest.raises(BadData, match="its name ends in none of"):
            find_files([tmp_path / name])


def test_a_file_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path)[0]

    def refuse(self: Path, *args, **kwargs) -> io.BytesIO:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    error = broken(path)
    assert (
        error.code == "unreadable_file" and "Permission denied" in error.found and "permissions" in error.fix
    )


def test_a_json_file_with_a_syntax_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b'[{"a": 1}\n {"a": 2}]'))
    assert broken(tmp_path / "x.json.gz").code == "bad_json"
    assert zlib.crc32(b"x") == crc_of(b"x")


# ---- links in folders


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder of data with a link to another one, which has links back, to itself and to the first again."""
    for name in ("data/real/deep", "other/inner"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("data/a.jsonl", "data/real/deep/b.jsonl", "other/c.jsonl", "other/inner/d.jsonl"):
        (tmp_path / name).write_bytes(b"{}\n")
    for link, target in (("data/aa", "other"), ("data/zz", "other"), ("data/again", "data/real")):
        (tmp_path / link).symlink_to(tmp_path / target)
    (tmp_path / "other/loop").symlink_to(tmp_path / "other")
    (tmp_path / "other/inner/back").symlink_to(tmp_path / "data")
    return tmp_path


def test_linked_folders_are_searched_once_each(linked: Path) -> None:
    names = [name for _, name in find_files([linked / "data"])]
    assert names == ["a.jsonl", "aa/c.jsonl", "aa/inner/d.jsonl", "real/deep/b.jsonl"]
    assert [name for _, name in find_files([linked / "data"], linked)] == names


def test_a_linked_folder_outside_the_root_or_above_is_named(linked: Path) -> None:
    with pytest.raises(BadData, match=r"data/aa: .*outside data_root.*Fix: "):
        find_files([linked / "data"], linked / "data")
    with pytest.raises(BadData, match=r"data/aa: .*outside data_root.*Fix: "):
        UnifiedGenerationDataset(linked / "data", data_root=linked / "data")
    (linked / "data/up").symlink_to("/")
    with pytest.raises(BadData, match=r"data/up: .*holds .*Fix: "):
        find_files([linked / "data"])


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_looks_like_data_and_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n")
    if kind == "link":
        (tmp_path / "b.jsonl").symlink_to(tmp_path / "none")
    else:
        os.mkfifo(tmp_path / "b.jsonl")
    with pytest.raises(BadData, match=r"b\.jsonl: .*Fix: "):
        find_files([tmp_path])


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_description_that_is_no_small_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    os.mkfifo(tmp_path / name)
    with pytest.raises(BadData, match=rf"{name}: .*regular file"):
        find_files([tmp_path])


# ---- bounds in bytes


def test_a_long_line_is_a_bad_record_and_those_around_it_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (containers, json_text):
        monkeypatch.setattr(module, "MAX_RECORD", 100)
    good = [b'{"a": %d}' % i for i in range(40)]
    lines = [b'"' + b"x" * (98 + i % 4) + b'"' if i % 10 == 5 else line for i, line in enumerate(good)]
    path = tmp_path / "x.jsonl"
    for end in (b"\n", b""):
        path.write_bytes(b"\n \n".join(lines) + end)
        whole = read(path)
        for size in (1 << 20, 300, 50):
            assert read(path, size) == whole, "cut anywhere"
        assert [span.index for span, _ in whole] == list(range(40))
        assert [span.line for span, _ in whole] == list(range(1, 80, 2))
        refused = []
        for span, raw in whole:
            try:
                assert json_text.parse_json(raw) is not None
            except BadRecord as error:
                refused.append((span.index, error.code))
        assert refused == [(i, "huge_record") for i in range(40) if i % 10 == 5 and i % 4]


@pytest.mark.slow
def test_one_line_of_200_mb_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.write(b'{"caption": "a", "image_path": "none.png"}\n{"caption": "')
        for _ in range(200):
            file.write(b"y" * 1_000_000)
        file.write(b'", "image_path": "a.png"}\n{"caption": "a", "image_path": "none.png"}\n')
    tracemalloc.start()
    found = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [span.line for span, _ in found] == [1, 2, 3] and peak < 100 << 20


@pytest.mark.parametrize("name", ["x.json.gz", "x.jsonl.gz", "x.json.zst", "x.jsonl.zst"])
def test_what_unpacks_to_far_more_than_records_do_is_told(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack, "RATIO_FREE", 1 << 20)
    data = b'{"caption": "' + b"a" * (8 << 20) + b'"}'
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else zst(data))
    with pytest.raises(BadRecord) as error:
        read(path)
    assert (error.value.code, error.value.field, error.value.origin.file) == ("huge_file", "(file)", path)
    with pytest.raises(BadData, match="huge_file"):
        Reader([path])
    assert not [left for left in (tmp_path / "cache").rglob("*") if left.is_file() and left.stat().st_size]


def test_a_json_file_that_is_too_large_to_read_whole_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "MAX_JSON", 100)
    (tmp_path / "x.json").write_bytes(b"[" + b" " * 98 + b"]")
    assert read(tmp_path / "x.json") == []
    (tmp_path / "x.json").write_bytes(b"[" + b" " * 99 + b"]")
    with pytest.raises(BadRecord, match=r"huge_file .*Fix: save it as \.jsonl"):
        read(tmp_path / "x.json")


def test_a_table_claims_no_more_rows_than_it_has_bytes(tmp_path: Path) -> None:
    nothing = pa.table({"a": pa.nulls(10_000_000)})
    pq.write_table(nothing, tmp_path / "x.parquet")
    for name, new in (("f.arrow", pa.ipc.new_file), ("s.arrow", pa.ipc.new_stream)):
        with pa.OSFile(str(tmp_path / name), "wb") as sink, new(sink, nothing.schema) as writer:
            writer.write_table(nothing)
    for name in ("x.parquet", "f.arrow", "s.arrow"):
        assert "claims" in broken(tmp_path / name).found


def test_columns_without_number_are_told_at_once(tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(20_000)]
    with (
        pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, pa.schema([(name, pa.int8()) for name in names])),
    ):
        pass
    assert "20,000 columns" in broken(tmp_path / "x.arrow").found


def test_a_group_has_a_limit_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"a": ["x" * 10_000] * 1000}), tmp_path / "x.parquet")  # a dictionary of one text
    assert (tmp_path / "x.parquet").stat().st_size < 50_000
    monkeypatch.setattr(tables, "MAX_GROUP", 1 << 20)
    with pytest.raises(BadRecord, match=r"broken_file.*more than 1,048,576 bytes"):
        read(tmp_path / "x.parquet")


def test_large_groups_are_kept_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "GROUPS", 1)
    kept = reader._Kept()
    for i in range(9):
        kept.get((0, i), lambda: pa.array([0] * 10))
    assert len(kept._groups) == reader.LEAST
    monkeypatch.setattr(reader, "MOST", 100)
    kept.get((0, 99), lambda: pa.array([0] * 10))
    assert len(kept._groups) == 1 and kept.size == 80
