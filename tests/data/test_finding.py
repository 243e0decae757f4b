"""Kinds of files that others have: tables of texts, tars, folders of pictures with texts; what of a folder is
meant; and that a record read at its place is the one that was read in order."""

import csv
import io
import json
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image as Pillow

from unigen.cache.store import MARKER
from unigen.cli import main
from unigen.commands.generate.many import STATE
from unigen.data.containers import BadData, parts, read_part
from unigen.data.dataset import UnifiedGenerationDataset
from unigen.data.finding import expand, find_files
from unigen.data.mapping import ReadOptions
from unigen.data.reader import Reader
from unigen.data.splits import LeftOut
from unigen.evaluation.answers import ABOUT, BATCHES
from unigen.model.run_options import RUN_OPTIONS
from unigen.outputs import OUTPUTS, RECEIPT
from unigen.runs import layout
from unigen.sequence.types import BadRecord, Image, Text


def png(shade: int = 9) -> bytes:
    buffer = io.BytesIO()
    Pillow.new("RGB", (32, 32), (shade, 8, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def archive(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def read(*paths: Path, **options) -> list[tuple[str, list[str]]]:
    """The records of files: their format, and texts or names of pictures with ``*`` behind targets. Each is read
    in order, and at its place."""
    dataset = UnifiedGenerationDataset(list(paths), read=ReadOptions(**options))
    reader, spans = Reader(dataset.files), []
    for number, path in enumerate(dataset.files):
        for part in parts(path, number, size=2000):
            for span, raw in read_part(part):
                assert reader.read(span) == raw
                spans.append(span)
    assert len(spans) == len(dataset)
    shown = []
    for record in dataset:
        sample = [
            s.text
            if isinstance(s, Text)
            else f"[{s.source.name if isinstance(s.source, Path) else len(s.source)}]"
            for s in record.sample
        ]
        shown.append((record.format, [a + "*" * s.target for a, s in zip(sample, record.sample)]))
    return shown


def refused(*paths: Path, **options) -> BadData:
    with pytest.raises(BadData) as caught:
        UnifiedGenerationDataset(list(paths), **options)
    return caught.value


# ---- CSV and TSV


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'image,caption\na.png,"A disc, ""red"""\n\na.png,"two\nlines"\n'),
        ("a.csv", '\ufeffimage;caption;n\r\na.png;"A disc, ""red""";\r\na.png;"two\nlines";3\r\n'),
        ("a.tsv", 'image\tcaption\na.png\t"A disc, ""red"""\na.png\t"two\nlines"'),
        ("a.csv", ',image,caption\n0,a.png,"A disc, ""red"""\n1,a.png,"two\nlines"\n'),
        ("a.csv", 'image| caption\na.png| "A disc, ""red"""\na.png| "two\nlines"\n'),
        ("metadata.csv", 'file_name,text\na.png,"A disc, ""red"""\na.png,"two\nlines"\n'),
    ],
)
def test_tables_of_texts(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path / "a.png", png())
    path = write(tmp_path / name, text)
    found = read(path)
    assert [record[1] for record in found] == [['A disc, "red"', "[a.png]*"], ["two\nlines", "[a.png]*"]]
    assert {record[0] for record in found} == {"image_and_text"}
    assert [p.name for p, _ in find_files([tmp_path])] == [name]
    second = UnifiedGenerationDataset(path).origin(1)
    assert str(second).startswith(f"{path}:") and second.index == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.png,A disc, red\na.png,A disc,blue\n", "a record in the first line"),
        ("image,\na.png,x\n", "a name for each column"),
        ("image,image\na.png,x\n", "a name for each column"),
        ("image,text\na.png,A disc, red\n", "a.csv:2: bad_csv"),
        ('image,text\na.png,"A disc\n', "the record at line 2 that nothing closes"),
        ("image,text\na.png,\xff\n".encode("latin-1"), "a.csv:2: bad_utf8"),
        ("image,text\ra.png,A disc\r", "line ends of LF"),
        pytest.param("image,text\na.png,A disc\n".encode("utf-16-be"), "iconv -f UTF-16BE", id="be"),
        pytest.param("image,text\na.png,\u7ea2\u8272\n".encode("utf-16-le"), "iconv -f UTF-16LE", id="le"),
        pytest.param("image," + "t" * 200_000 + ",image\n", "a name for each column", id="long"),
    ],
)
def test_a_table_that_is_none_is_told_with_the_line(tmp_path: Path, text, words: str) -> None:
    csv.field_size_limit(131_072)  # that of a new process
    write(tmp_path / "a.png", png())
    error = refused(write(tmp_path / "a.csv", text))
    assert words in str(error)


@pytest.mark.parametrize(
    ("name", "text", "good", "bad"),
    [
        ("a.tsv", 'a.png\t"Hello\na.png\tworld"\na.png\t"Hi" she\n', ['"Hello', 'world"', '"Hi" she'], []),
        ("a.tsv", 'a.png\t"Hello\na.png\tx\ty\n', ['"Hello'], [3]),
        ("a.csv", 'a.png,"Hi" she\na.png,x,y\na.png,ok\n', ["ok"], [2, 3]),
        ("a.csv", b"a.png,\xc4\xe3\na.png,ok\n", ["ok"], [2]),
    ],
)
def test_a_row_that_cannot_be_read_is_one_bad_record(tmp_path: Path, name, text, good, bad) -> None:
    write(tmp_path / "a.png", png())
    first = b"image\ttext\n" if name.endswith("tsv") else b"image,text\n"
    path = write(tmp_path / name, first + (text if isinstance(text, bytes) else text.encode()))
    dataset = UnifiedGenerationDataset(path, on_bad_record="skip", max_bad_share=0.9)
    assert [record.sample[0].text for record in dataset] == good
    assert [error.origin.line for error in dataset.bad] == bad
    assert path.read_bytes().count(b"\n") == len(good) + len(bad) + 1


def test_blanks_behind_the_separators_are_no_part_of_names_and_texts(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png())
    path = write(tmp_path / "a.csv", 'image, text\na.png, "one, two"\na.png, three\n')
    assert [sample[0] for _, sample in read(path)] == ["one, two", "three"]


def test_a_text_that_is_no_utf8_spoils_its_own_picture_and_is_named(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"{i}.png", png(i))
        write(tmp_path / f"{i}.txt", "\u7ea2".encode("gbk" if i == 1 else "utf-8"))
    dataset = UnifiedGenerationDataset(tmp_path, on_bad_record="skip", max_bad_share=0.5)
    (error,) = dataset.bad
    assert len(dataset) == 2 and error.code == "bad_utf8" and "1.txt" in error.found


def test_json_beside_a_picture_with_its_text_describes_it(tmp_path: Path) -> None:
    for end, data in (("png", png()), ("txt", "red"), ("json", '{"url": "http://a/b", "caption": "red"}')):
        write(tmp_path / f"0/1.{end}", data)
    left_out: list[LeftOut] = []
    assert [name for _, name in find_files([tmp_path], left_out=left_out)] == ["0/1.png"]
    assert [path.name for path, _ in left_out] == ["1.json"]
    with pytest.raises(BadData, match="name its folder, "):
        find_files([tmp_path / "0/*.png"])


def test_pictures_with_texts_in_folders_are_what_their_table_describes(tmp_path: Path) -> None:
    """As img2dataset writes them; its tables alone are data."""
    for shard in ("00000", "00001"):
        write(tmp_path / f"{shard}.parquet", b"")
        write(tmp_path / f"{shard}_stats.json", "{}")
        (tmp_path / shard).mkdir()
    assert [name for _, name in find_files([tmp_path])] == ["00000.parquet", "00001.parquet"]
    for end, data in (("jpg", png()), ("txt", "red"), ("json", '{"caption": "red"}')):
        write(tmp_path / f"00001/1.{end}", data)
    left_out: list[LeftOut] = []
    assert [name for _, name in find_files([tmp_path], left_out=left_out)] == ["00001/1.jpg"]
    assert {"00000.parquet", "00001_stats.json", "1.json"} <= {path.name for path, _ in left_out}
    write(tmp_path / "2023.parquet", b"")  # a year, and a table elsewhere, are data
    write(tmp_path / "other/00007.parquet", b"")
    write(tmp_path / "2024/1.png", png())
    write(tmp_path / "2024/1.txt", "red")
    write(tmp_path / "2024.parquet", b"")
    assert [name for _, name in find_files([tmp_path])] == ["2023.parquet", "other/00007.parquet"]


def test_repeats_of_kohya_and_packed_pictures_are_told(tmp_path: Path, caplog) -> None:
    for name in ("10_sks dog", "1_dog"):
        write(tmp_path / f"in/{name}/1.png", png())
        write(tmp_path / f"in/{name}/1.txt", "a dog")
    assert len(find_files([tmp_path / "in"])) == 2 and "10_sks dog, 1_dog are no repeats" in caplog.text
    data = write(tmp_path / "data/a.jsonl", '{"image": "coco/1.png", "text": "red"}')
    write(tmp_path / "data/images.zip", b"PK")
    assert "unpack images.zip, and give its folder as --image_root" in str(refused(data))


def test_an_archive_is_named_where_it_holds_the_picture(tmp_path: Path) -> None:
    def told(name: str, *members: str) -> str:
        folder = tmp_path / name.replace(".", "_")
        data = write(folder / "a.jsonl", '{"image": "coco/1.png", "text": "red"}')
        if name.endswith(".zip"):
            with zipfile.ZipFile(folder / name, "w") as packed:
                for member in members:
                    packed.writestr(member, png())
        elif members:
            archive(folder / name, [(member, png()) for member in members])
        else:
            write(folder / name, b"?")
        return str(refused(data))

    for name, members in (("old.zip", ["x/1.png"]), ("old.tar", ["0.txt", "x/1.png"]), ("coco.7z", [])):
        assert f"unpack {name}, and give its folder as --image_root" in told(name, *members)
    for name, members in (("images.zip", ["x/2.png"]), ("images.tar", ["11.png"]), ("backup.7z", [])):
        assert "unpack" not in told(name, *members)


def test_json_that_describes_the_picture_beside_it_is_told_how_to_be_packed(tmp_path: Path) -> None:
    for end, data in (("png", png()), ("json", '{"prompt": "red"}')):
        write(tmp_path / f"in/1.{end}", data)
    with pytest.raises(BadData, match=r"no_format.*describes 1.png beside it: pack them with tar "):
        UnifiedGenerationDataset(tmp_path / "in")
    packed = archive(
        tmp_path / "data.tar", [(path.name, path.read_bytes()) for path in (tmp_path / "in").iterdir()]
    )
    assert read(packed) == [("image_and_text", ["red", f"[{len(png())}]*"])]


def test_a_pattern_knows_what_describes_the_data(tmp_path: Path) -> None:
    for name in ("dataset_dict.json", "state.json", "a.jsonl"):
        write(tmp_path / name, "{}\n")
    assert [name for _, name in find_files([str(tmp_path / "*")])] == ["a.jsonl"]


def test_paths_as_addresses_of_files_and_beside_addresses(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "{}\n")
    assert [file for file, _ in find_files([path.as_uri()])] == [path]
    assert expand(f"memory://b/val.jsonl,{path}") == ["memory://b/val.jsonl", str(path)]
    assert expand("MEMORY://b/val.jsonl") == ["memory://b/val.jsonl"]


def test_a_split_that_no_file_names_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "{}\n")
    with pytest.raises(BadData, match=r"no file names one.* Fix: leave the split out"):
        find_files([tmp_path], asked="x")


def test_a_split_of_files_that_are_named_is_refused(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", "{}\n") for name in "ab"]
    with pytest.raises(BadData, match="split is 'test'"):
        find_files(files, asked="test")


def test_cells_say_what_is_learnt_as_json_does(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png())
    lines = "image,text,weight,loss\na.png,0.5,0.5,True\na.png,true,1,\n"
    dataset = UnifiedGenerationDataset(write(tmp_path / "a.csv", lines))
    assert [[s.text for s in r.sample if isinstance(s, Text)] for r in dataset] == [["0.5"], ["true"]]
    assert [r.sample[1].weight for r in dataset] == [0.5, 1]
    path = write(tmp_path / "d.csv", lines.replace("weight", "quality"))
    mapped = UnifiedGenerationDataset(path, read=ReadOptions(fields={"weight": "quality"}))
    assert [r.sample[1].weight for r in mapped] == [0.5, 1]
    for column, cell, code in (
        ("weight", "70 kg", "wrong_type"), ("loss", "nan", "wrong_type"), ("label", "FALSE", "unsupported_key"),
    ):  # fmt: skip
        error = refused(write(tmp_path / "b.csv", f"image,text,{column}\na.png,A,{cell}\n"))
        assert (error.records[0].code, error.records[0].field) == (code, column)
    assert read(write(tmp_path / "c.csv", "image,text,label\na.png,A,1\n"))


def test_a_table_that_changed_since_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png())
    path = write(tmp_path / "a.csv", "image,text\na.png,one\na.png,two\n")
    dataset = UnifiedGenerationDataset(path)
    write(path, "image,text\na.png,One\na.png,two\n")
    with pytest.raises(BadData, match="changed"):
        dataset[0]
    assert dataset[1].sample[0].text == "two"


# ---- WebDataset


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_are_read_in_place(tmp_path: Path, form: int) -> None:
    long = "é" * 120  # a header of its own
    members = [
        ("d/0.png", png(1)), ("d/0.txt", b"zero\n"), ("d/0.json", b'{"caption": "x", "url": "http://a/b"}'),
        (f"d/{long}.json", json.dumps({"text": "one"}).encode()), (f"d/{long}.png", png(2)),
        ("e/2.input.png", png(3)), ("e/2.output.png", png(4)), ("e/2.txt", "zwei ü".encode()),
    ]  # fmt: skip
    if form == tarfile.USTAR_FORMAT:
        members = [(name.replace(long, "1"), data) for name, data in members]

    dataset = UnifiedGenerationDataset(archive(tmp_path / "b.tar", members[:5], form))
    assert [r.sample[0].text for r in dataset] == ["zero", "one"]
    assert dataset[0].metadata["url"] == "http://a/b" and dataset[0].metadata["key"] == "d/0"
    assert dataset[0].sample[1].source == png(1) and dataset[1].sample[1].source == png(2)
    edits = archive(tmp_path / "c.tar", members[5:], form)
    found = read(edits, fields={"input_image": "input", "output_image": "output"})
    assert found == [("single_edit", [f"[{len(png(3))}]", "zwei ü", f"[{len(png(4))}]*"])]
    assert len(read(archive(tmp_path / "d.tar", members[:3] * 9, form))) == 9


def test_a_tar_is_cut_into_parts_that_hold_every_record_once(tmp_path: Path) -> None:
    members = [
        (f"{i:03}.{end}", data) for i in range(40) for end, data in (("png", png(i)), ("txt", b"%d" % i))
    ]
    path = archive(tmp_path / "a.tar", members)
    cut = list(parts(path, 0, size=4096))
    spans = [span for part in cut for span, _ in read_part(part)]
    assert len(cut) > 5 and [span.index for span in spans] == list(range(40))
    assert abs(sum(part.size for part in cut) - path.stat().st_size) < 20_000
    assert [raw["txt"] for part in cut for _, raw in read_part(part)] == [b"%d" % i for i in range(40)]


def test_damaged_and_odd_tars_are_told(tmp_path: Path) -> None:
    whole = archive(tmp_path / "a.tar", [("0.png", png()), ("0.txt", b"zero")]).read_bytes()
    for number, data in enumerate((b"", b"x" * 2000, whole[:600], b"\xff" + whole[1:])):
        error = refused(write(tmp_path / f"bad{number}.tar", data))
        assert error.records[0].code in ("broken_file", "no_record", "broken_picture", "not_a_picture"), (
            number
        )
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        member = tarfile.TarInfo("0.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    assert "no plain file" in str(refused(tmp_path / "link.tar"))
    assert (
        refused(archive(tmp_path / "c.tar", [("0.png", png()), ("0.json", b"[]")])).records[0].code
        == "wrong_type"
    )
    assert (
        refused(archive(tmp_path / "e.tar", [("0.png", png()), ("0.txt", b"\xff")])).records[0].code
        == "bad_utf8"
    )
    assert "unpack it to a .tar" in str(refused(write(tmp_path / "d.tar.gz", b"x")))


def test_two_json_members_of_one_key_never_hide_one_another(tmp_path: Path) -> None:
    def packed(first: dict, second: dict) -> Path:
        said = [("0.json", json.dumps(first).encode()), ("0.meta.json", json.dumps(second).encode())]
        return archive(tmp_path / "a.tar", [("0.png", png()), *said])

    assert read(packed({"text": "red", "id": 1}, {"id": 1, "source": "x"}))[0][1][0] == "red"
    (error,) = refused(packed({"text": "red"}, {"text": "blue"})).records
    assert (error.code, error.field, error.found) == ("ambiguous_piece", "text", "json, meta.json")


def test_a_picture_of_a_kind_that_cannot_be_read_is_told_as_that(tmp_path: Path) -> None:
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    (error,) = refused(archive(tmp_path / "a.tar", [("0.heic", heic), ("0.txt", b"red")])).records
    assert (error.code, error.field) == ("not_a_picture", "image") and "HEIC" in error.found
    both = [("0.heic", heic), ("0.jpg", png()), ("0.txt", b"red")]
    assert read(archive(tmp_path / "b.tar", both)) == [("image_and_text", ["red", f"[{len(png())}]*"])]


def changed(data: bytes, place: int, byte: int) -> bytes:
    return data[:place] + bytes([byte]) + data[place + 1 :]


def sized(data: bytes, place: int, size: bytes) -> bytes:
    """A tar with the size in the header at a place, and the sum of that."""
    header = bytearray(data[place : place + 512])
    header[124:136], header[148:156] = size, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:place] + bytes(header) + data[place + 512 :]


def test_a_tar_is_whole_or_an_error(tmp_path: Path) -> None:
    """Wherever a header is damaged, and wherever it ends."""
    one = archive(
        tmp_path / "a.tar", [(f"{i}.{e}", png()) for i in range(3) for e in ("png", "x")]
    ).read_bytes()
    assert len(png()) < 512
    heads = range(0, 6 * 1024, 1024)
    damaged = [changed(one, place + byte, 0xFF) for place in heads for byte in (0, 130, 150)]
    cut = [one[:end] for place in heads for end in (place, place + 100, place + 512, place + 560)][1:]
    for data in (*damaged, *cut, one[: 6 * 1024], one + one, one + b"x"):
        path = write(tmp_path / "b.tar", data)
        with pytest.raises(BadRecord) as caught:
            list(parts(path, 0, size=2048))
        assert (caught.value.code, caught.value.origin.file) == ("broken_file", path)
    for data in (one, one + bytes(3000), one[: 6 * 1024 + 512]):
        assert len(list(parts(write(tmp_path / "b.tar", data), 0, size=1))) == 3


def test_sizes_that_lead_back_or_fill_the_memory_are_refused(tmp_path: Path) -> None:
    plain = archive(tmp_path / "a.tar", [("0.png", png()), ("0.txt", b"zero")]).read_bytes()
    long = archive(tmp_path / "b.tar", [("n" * 300 + ".png", png())], tarfile.GNU_FORMAT).read_bytes()
    negative = tarfile.itn(-512, 12, tarfile.GNU_FORMAT)
    huge = b"%011o\0" % (2 << 30)
    pax = tarfile.TarInfo("0.png")
    pax.pax_headers = {"size": "-1024"}
    for data, told in (
        (sized(plain, 0, negative), "negative"), (sized(plain, 1024, negative), "negative"),
        (sized(long, 0, huge), "a header of"), (sized(long, 0, negative), "a header of -512"),
        (pax.tobuf(tarfile.PAX_FORMAT) + plain, "negative"),
    ):  # fmt: skip
        with pytest.raises(BadRecord, match=told):
            list(parts(write(tmp_path / "c.tar", data), 0))


def test_members_of_one_key_that_stand_apart_are_told(tmp_path: Path) -> None:
    pictures = [(f"{i}.png", png()) for i in range(3)]
    error = refused(archive(tmp_path / "a.tar", [*pictures, *((f"{i}.txt", b"text") for i in range(3))]))
    assert [record.code for record in error.records] == ["broken_file"]
    assert "0.txt apart" in str(error) and "--sort=name" in str(error)


@pytest.mark.parametrize("text", [[], [("0.txt", b"zero")]])
def test_the_json_of_a_tar_says_what_is_learnt_with_a_text_and_without(tmp_path: Path, text: list) -> None:
    def told(**said) -> list[tuple[str, bytes]]:
        return [("0.png", png()), *text, ("0.json", json.dumps({"text": "zero", "n": 1, **said}).encode())]

    record = UnifiedGenerationDataset(archive(tmp_path / "a.tar", told(weight=0.5, system="Draw.")))[0]
    assert [s.text for s in record.sample if isinstance(s, Text)] == ["Draw.", "zero"]
    assert record.sample[-1].weight == 0.5 and record.metadata["key"] == "0"
    for name, value, code in (
        ("label", False, "unsupported_key"), ("rejected", "x", "unsupported_key"), ("weight", "70 kg", "wrong_type"),
    ):  # fmt: skip
        error = refused(archive(tmp_path / "b.tar", told(**{name: value})))
        assert (error.records[0].code, error.records[0].field) == (code, name)


def test_two_members_of_one_kind_are_told(tmp_path: Path) -> None:
    text, picture = ("0.txt", b"a disc"), ("0.png", png())
    for members, name in (
        ([("0.jpg", png()), picture, text], "image"),
        ([("0.caption", b"a ring"), picture, text], "text"),
        ([("0.edit.png", png()), ("0.edit.txt", b"make it red"), picture, text], "edit"),
    ):
        (error,) = refused(archive(tmp_path / "a.tar", members)).records
        assert (error.code, error.field) == ("ambiguous_piece", name)


def test_the_json_of_a_tar_is_no_metadata_where_it_says_another_task(tmp_path: Path) -> None:
    def told(said: dict) -> Path:
        members = [("0.png", png()), ("0.txt", b"what is it?"), ("0.json", json.dumps(said).encode())]
        return archive(tmp_path / "a.tar", members)

    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]
    for said in ({"answer": "a cat"}, {"prompt": "a cat"}):
        refused(told(said))
    assert UnifiedGenerationDataset(told({"conversations": turns}))[0].format == "sharegpt"
    record = UnifiedGenerationDataset(told({"caption": " what is  it?", "label": 3, "url": "x"}))[0]
    assert record.metadata["url"] == "x" and record.format == "image_and_text"


# ---- folders


def test_pictures_with_texts_beside_them(tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.PNG", "sub/c.png"):
        write(tmp_path / name, png())
    write(tmp_path / "a.txt", "\ufeffa disc\n")
    write(tmp_path / "sub/b.caption", "[trigger] ring")
    write(tmp_path / "sub/readme.txt", "of the pictures")
    error = refused(tmp_path)
    assert [record.code for record in error.records] == ["empty_text"] and "sub/c.png" in str(error)
    assert "--trigger_word" in str(error)
    left_out: list[LeftOut] = []
    assert [name for _, name in find_files([tmp_path], left_out=left_out)] == [
        "a.png",
        "sub/b.PNG",
        "sub/c.png",
    ]
    assert [path.name for path, _ in left_out] == ["readme.txt"]
    assert read(tmp_path, trigger_word="sks") == [
        ("image_and_text", ["sks, a disc", "[a.png]*"]),
        ("image_and_text", ["sks ring", "[b.PNG]*"]),
        ("image_and_text", ["sks", "[c.png]*"]),
    ]
    assert main(["check", str(tmp_path), "--trigger_word", "sks"]) == 0
    assert main(["preview", str(tmp_path), "--trigger_word", "sks", "--output", "none"]) == 0
    assert main(["fetch", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 2


def test_no_text_is_read_from_outside_of_data_root(tmp_path: Path) -> None:
    write(tmp_path / "secret", "of the machine")
    write(tmp_path / "data" / "a.png", png())
    (tmp_path / "data" / "a.txt").symlink_to(tmp_path / "secret")
    assert "a.txt: this link leads out of data_root" in str(
        refused(tmp_path / "data", data_root=tmp_path / "data")
    )
    assert read(tmp_path / "data")[0][1][0] == "of the machine"


def test_texts_with_capital_endings_are_read_and_second_ones_listed(tmp_path: Path) -> None:
    write(tmp_path / "A.PNG", png())
    write(tmp_path / "A.TXT", "a disc")
    write(tmp_path / "A.caption", "a ring")
    left_out: list[LeftOut] = []
    find_files([tmp_path], left_out=left_out)
    assert [path.name for path, _ in left_out] == ["A.caption"]
    assert read(tmp_path) == [("image_and_text", ["a disc", "[A.PNG]*"])]


def test_pictures_of_every_kind_are_read_or_said_to_be_left_out(tmp_path: Path, caplog) -> None:
    Pillow.new("RGB", (32, 32)).save(tmp_path / "a.tga")
    Pillow.new("RGB", (32, 32)).save(write(tmp_path / "b.jfif", ""), "JPEG")
    for name in ("a", "b", "c", "d"):
        write(tmp_path / f"{name}.txt", "a disc")
    for name in ("a.heic", "c.HEIC", "d.heif", "e.heic"):
        write(tmp_path / name, b"\0\0\0\x18ftypheic")
    assert [name for _, (_, name) in read(tmp_path)] == ["[a.tga]*", "[b.jfif]*"]
    (told,) = {record.getMessage() for record in caplog.records}
    assert "2 pictures" in told and "c.HEIC" in told and "pillow-heif" in told


def test_a_picture_whose_name_is_no_utf8_is_told(tmp_path: Path) -> None:
    write(tmp_path / "\udce9.png", png())
    write(tmp_path / "\udce9.txt", "a disc")
    (error,) = refused(tmp_path).records
    assert (error.code, error.field, error.fix) == ("bad_path", "image", "rename the file")


def test_a_picture_that_is_a_link_to_nowhere_is_told(tmp_path: Path) -> None:
    for name, to in (("a.png", "gone.png"), ("b.png", "b.png")):
        folder = write(tmp_path / name[0] / Path(name).with_suffix(".txt"), "a disc").parent
        (folder / name).symlink_to(to)
        assert f"{name}: it is a link that leads nowhere" in str(refused(folder, on_bad_record="skip"))
        assert main(["check", str(folder)]) == 2


def test_pictures_alone_are_answered_with_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png())
    assert "a.txt" in str(refused(tmp_path)) and "metadata.jsonl" in str(refused(tmp_path))


def test_splits_of_pictures_are_folders(tmp_path: Path) -> None:
    for name in ("train/test.png", "train/val 1.png", "test/a.png"):
        write(tmp_path / name, png())
        write(tmp_path / name.replace(".png", ".txt"), "text")
    assert [name for _, name in find_files([tmp_path])] == ["train/test.png", "train/val 1.png"]


def test_of_several_kinds_the_records_are_taken_and_the_others_listed(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png())
    write(tmp_path / "a.txt", "text")
    table = write(tmp_path / "a_about.csv", "image,text\na.png,text\n")
    lines = write(tmp_path / "a.jsonl", json.dumps({"image": "a.png", "text": "A"}))
    tar = archive(tmp_path / "a.tar", [("0.png", png()), ("0.txt", b"zero")])
    for path in (tar, lines, table):
        left_out: list[LeftOut] = []
        assert [found for found, _ in find_files([tmp_path], left_out=left_out)] == [path]
        path.unlink()
    assert [name for _, name in find_files([tmp_path])] == ["a.png"]
    assert isinstance(UnifiedGenerationDataset(tmp_path)[0].sample[1], Image)


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        ("train.csv test.jsonl", "train", "train.csv"),
        ("train.csv test.jsonl val.tar", "validation", "val.tar"),
        ("train/a.tar val.jsonl", "train", "train/a.tar"),
        ("0.tar 0.parquet 0_stats.json 1.tar 1.tsv.parquet", "train", "0.tar 1.tar"),
        ("d.v1-0.tar d.v1-0.json", "train", "d.v1-0.tar"),
        ("train.jsonl about.csv train.csv", "train", "train.jsonl"),
        ("train/a.jsonl train/labels.csv", "train", "train/a.jsonl"),
        ("train.jsonl images.tar", "train", None),
        ("00000.tar 0.jsonl", "train", None),
        ("a/0.tar b/0.parquet", "train", None),
        ("train.csv more.jsonl", "train", None),
        ("train.csv test.jsonl", None, None),
    ],
)
def test_the_split_is_chosen_before_the_kind(tmp_path: Path, names: str, split, expected: str | None) -> None:
    """And what may be the records is not put aside."""
    for name in names.split():
        write(tmp_path / name, "")
    if expected is None:
        with pytest.raises(BadData, match="name the files"):
            find_files([tmp_path], split=split)
    else:
        left_out: list[LeftOut] = []
        assert [name for _, name in find_files([tmp_path], None, split, left_out)] == expected.split()
        assert len(left_out) == len(names.split()) - len(expected.split())


def test_patterns_and_lists_with_commas_name_files_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    line = json.dumps({"text_prompt": "a", "image_path": "p.png"})
    for name in (
        "a.jsonl",
        "b.jsonl",
        "deep/er/c.jsonl",
        "d,e.jsonl",
        "f[1].jsonl",
        "README.txt",
        "deep/p.png",
    ):
        write(tmp_path / name, line)

    def names(*given: str | Path, **more) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path, _ in find_files(given, split=None, **more)]

    assert names("?.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("**/*.jsonl") == ["a.jsonl", "b.jsonl", "d,e.jsonl", "deep/er/c.jsonl", "f[1].jsonl"]
    assert names("a.jsonl,b.jsonl") == names("a.jsonl, b.jsonl,") == names("a.jsonl", "b.jsonl")
    assert names("a.jsonl,?.jsonl", tmp_path / "deep" / "**") == ["a.jsonl", "b.jsonl", "deep/er/c.jsonl"]
    assert names("d,e.jsonl") == ["d,e.jsonl"] and names("f[1].jsonl") == ["f[1].jsonl"], (
        "names that are there"
    )
    assert names("[ab].jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("de*") == ["deep/er/c.jsonl"], "a folder that matches is searched"
    left: list[LeftOut] = []
    assert "a.jsonl" in names("*", left_out=left) and LeftOut(Path("README.txt"), "") in left
    for given, said in (
        ("*.parquet", "a.jsonl, b.jsonl"), ("deep/*.jsonl", "deep holds er/, p.png"), ("no/*.jsonl", ". holds"),
        ("/no/such/*.jsonl", "holds"), ("a.jsonl,z.jsonl", "z.jsonl: there is no such file"),
    ):  # fmt: skip
        with pytest.raises(BadData, match=re.escape(said)):
            names(given)


@pytest.mark.slow
def test_every_command_reads_what_a_pattern_names(
    golden: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level("INFO")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"messages": turns}))
    model = ["--model_path", str(golden / "model"), "--device", "cpu"]
    pattern, several = str(tmp_path / "?.jsonl"), f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}"
    for given in (
        [pattern],
        [several],
        [str(tmp_path / "a.jsonl"), "--train_data_path", str(tmp_path / "b.jsonl")],
    ):
        run = ["--output_dir", str(tmp_path / "run"), "--num_workers", "0", "--dry_run"]
        assert main(["train", *model, "--train_data_path", *given, *run]) == 0
        assert "records   2 from 2 files" in caplog.text
        caplog.clear()
    assert main(["check", pattern, "--num_workers", "0"]) == 0
    assert "Records: 2; files: 2" in capsys.readouterr().out
    assert main(["preview", several, "--output", str(tmp_path / "p.html")]) == 0
    assert capsys.readouterr().out.count(".jsonl:1") == 2
    assert (
        main(["evaluate", *model, "--data_path", several, "--output_dir", str(tmp_path / "e"), "--check"])
        == 0
    )
    assert main(["fetch", pattern, "--output_dir", str(tmp_path / "f")]) == 0
    assert sorted(path.name for path in (tmp_path / "f").glob("*.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert main(["check", str(tmp_path / "*.csv")]) == 2
    assert "no file or folder matches this pattern" in capsys.readouterr().err


def test_what_a_folder_holds_besides_is_listed_and_looks_like_data_is_said(tmp_path: Path, caplog) -> None:
    line = json.dumps({"text_prompt": "A", "image_path": "a.png"}) + "\n"
    unread = ["part2.ndjson", "part3.jsonl.bz2", "part4.csv.gz", "part5.jsonl.txt", "x.tar.gz"]
    for name in ("part1.jsonl", *unread, "sub/notes.txt"):
        write(tmp_path / name, line)
    write(tmp_path / "a.png", png())
    data = UnifiedGenerationDataset(tmp_path)
    assert len(data) == 1
    assert [path.name for path, _ in data.left_out] == [*unread[:4], "notes.txt", "x.tar.gz"]
    said = [record.args[0] for record in caplog.records if record.levelname == "WARNING"]
    assert said == unread


def test_a_run_within_its_data_is_left_out(tmp_path: Path) -> None:
    for name in (
        "config.json",
        "train.log",
        "metrics.jsonl",
        "probe.json",
        "step_1/vocab.json",
        "samples/step_1/0.png",
    ):
        write(tmp_path / "out" / name, "{}")
    write(tmp_path / "a.png", png())
    write(tmp_path / "a.txt", "A")
    left: list[LeftOut] = []
    assert [name for _, name in find_files([tmp_path], left_out=left)] == ["a.png"]  # texts beside pictures
    assert left == [LeftOut(tmp_path / "out", "")]
    write(tmp_path / "d.jsonl", json.dumps({"text_prompt": "A", "image_path": "a.png"}))
    data = UnifiedGenerationDataset(tmp_path)
    assert [path.name for path in data.files] == ["d.jsonl"] and "out/" in data.describe()


def test_what_this_program_wrote_within_the_data_is_left_out(tmp_path: Path) -> None:
    assert {names for names in OUTPUTS if "llm_config.json" not in names} == {
        (layout.CONFIG, layout.LOG),
        (ABOUT, BATCHES),
        (ABOUT, "metrics.json"),
        (f"{STATE}/{ABOUT}",),
        (MARKER,),
        (layout.MANIFEST, RUN_OPTIONS),
    }
    line = json.dumps({"text_prompt": "A", "image_path": "a.png"})
    write(tmp_path / "a.png", png())
    for name in ("d.jsonl", "fetched/d.jsonl", "mine/answers.json"):  # a name alone is no mark
        write(tmp_path / name, line + "\n")
    write(tmp_path / "fetched" / RECEIPT, '{"generator": "unigen fetch"}')
    marks = [*OUTPUTS, (RECEIPT,), ("report.html",)]
    for number, names in enumerate(marks):
        for name in (*names, "val.json"):
            write(tmp_path / f"eval_{number}" / name, "{}")
    write(tmp_path / f"eval_{len(OUTPUTS)}" / RECEIPT, '{"generator": "unigen demo"}')
    page = '<!doctype html><meta name="generator" content="unigen evaluate">'
    write(tmp_path / f"eval_{len(OUTPUTS) + 1}" / "report.html", page)
    left: list[LeftOut] = []
    names = [name for _, name in find_files([tmp_path], left_out=left)]
    assert names == ["d.jsonl", "fetched/d.jsonl", "mine/answers.json"]
    assert {entry.path.name for entry in left} == {f"eval_{number}" for number in range(len(marks))}


def test_what_was_meant_by_a_path_that_is_not_there_is_named(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("own/photos/img_01.png"), png())
    for text in ("own/photos/img_01.txt", "own/notes.txt"):
        write(Path(text), "A")
    for given, fix in (
        ("own/photo", "; did you mean own/photos? Fix: "),
        ("owns/photos", "; did you mean own/photos? Fix: "),
        ("own/note.md", "; did you mean own/notes.txt? Fix: "),
        ("own/z", "file or folder. Fix: "),
        ("nowhere/z", "file or folder. Fix: "),
        ("own/photos/img_01.txt", "own/photos: each picture"),
        ("own/notes.txt", "Fix: name it after what it holds: "),
    ):
        with pytest.raises(BadData, match=re.escape(fix)):
            find_files([given])
    for command, flag in (("train", "--train_data_path"), ("evaluate", "--data_path")):
        # before the model is looked at, which is not there either
        assert main([command, "--model_path", "nowhere", flag, "own/photo", "--output_dir", "out"]) == 2
        assert "did you mean own/photos?" in capsys.readouterr().err and not Path("out").exists()


def test_image_root_moves_no_picture_that_is_a_record_itself(tmp_path: Path) -> None:
    for name, shade in (("a.png", 9), ("10_dog/a.png", 99)):
        write(tmp_path / "cap" / name, png(shade))
    write(tmp_path / "cap" / "10_dog" / "a.txt", "red")
    data = UnifiedGenerationDataset(
        tmp_path / "cap" / "10_dog", read=ReadOptions(image_root=tmp_path / "cap")
    )
    (picture,) = [segment.source for segment in data[0].sample if isinstance(segment, Image)]
    assert picture == tmp_path / "cap" / "10_dog" / "a.png"
