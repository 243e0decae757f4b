"""Data in object storage, by the file system of fsspec that lies in memory: it is read like any other."""

import errno
import io
import json
import os
from pathlib import Path

import fsspec
import pytest
from PIL import Image as Pillow

from unigen import remote
from unigen.cli import main
from unigen.config import UserError
from unigen.data.containers import BadData
from unigen.data.dataset import UnifiedGenerationDataset
from unigen.data.mapping import ReadOptions
from unigen.sequence.images import open_image
from unigen.sequence.types import Image

BUCKET = "memory://bucket/data"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two splits with pictures beside them, and a cache of its own."""
    monkeypatch.setenv("UNIGEN_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    buffer = io.BytesIO()
    Pillow.new("RGB", (32, 32)).save(buffer, "PNG")
    for name in ("a", "b"):
        system.pipe(f"/bucket/data/pics/{name}.png", buffer.getvalue())
    put(system, "train.jsonl", "pics/a.png", f"{BUCKET}/pics/b.png")
    put(system, "test.jsonl", "pics/b.png")
    system.pipe("/bucket/data/odd.dat", b"?")
    yield system
    system.rm("/bucket", recursive=True)


def put(system, name: str, *pictures: str) -> None:
    records = [{"image_path": picture, "caption": f"picture {i}"} for i, picture in enumerate(pictures)]
    system.pipe(f"/bucket/data/{name}", "".join(map(json.dumps, records)).replace("}{", "}\n{").encode())


def pictures(dataset: UnifiedGenerationDataset) -> list[str]:
    found = [segment for record in dataset for segment in record.sample if isinstance(segment, Image)]
    assert all(open_image(segment.source).size == (32, 32) for segment in found)
    return [Path(str(segment.source)).name for segment in found]


def test_a_folder_is_copied_once_and_its_pictures_when_they_are_met(bucket, tmp_path: Path) -> None:
    dataset = UnifiedGenerationDataset(BUCKET)
    copies = tmp_path / "cache" / "remote" / "memory" / "bucket" / "data"
    assert pictures(dataset) == ["a.png", "b.png"] and dataset.files == [copies / "train.jsonl"]
    assert [(path.name, split) for path, split in dataset.left_out] == [
        ("test.jsonl", "test"),
        ("odd.dat", ""),
    ]
    assert not (copies / "test.jsonl").exists()  # of another split nothing is copied
    before = (copies / "train.jsonl").stat().st_mtime_ns
    fingerprint = UnifiedGenerationDataset(f"{BUCKET}/train.jsonl").fingerprint
    assert fingerprint == dataset.fingerprint and (copies / "train.jsonl").stat().st_mtime_ns == before
    put(bucket, "train.jsonl", "pics/b.png")  # what changed there is copied again, what is gone is forgotten
    bucket.rm("/bucket/data/test.jsonl")
    assert pictures(UnifiedGenerationDataset(BUCKET)) == ["b.png"]
    bucket.mv("/bucket/data/train.jsonl", "/bucket/data/other.jsonl")
    assert [path.name for path in UnifiedGenerationDataset(BUCKET).files] == ["other.jsonl"]


def test_pictures_with_texts_are_what_their_tables_describe_there_too(bucket) -> None:
    """As img2dataset writes them."""
    picture = bucket.cat("/bucket/data/pics/a.png")
    for name, data in (
        ("00000/1.jpg", picture),
        ("00000/1.txt", b"red"),
        ("00000/1.json", b'{"caption": "x"}'),
    ):
        bucket.pipe(f"/bucket/img/{name}", data)
    bucket.pipe("/bucket/img/00000.parquet", b"PAR1")
    dataset = UnifiedGenerationDataset("memory://bucket/img")
    assert [record.sample[0].text for record in dataset] == ["red"] and pictures(dataset) == ["1.jpg"]
    assert {path.name for path, _ in dataset.left_out} == {"00000.parquet", "1.json"}


def test_patterns_and_lists_name_files_there(bucket) -> None:
    def names(text: str) -> list[str]:
        return [path.name for path in UnifiedGenerationDataset(text).files]

    assert names(f"{BUCKET}/t*.jsonl") == ["test.jsonl", "train.jsonl"]
    assert names(f"{BUCKET}/train.jsonl, {BUCKET}/tes?.jsonl") == ["train.jsonl", "test.jsonl"]
    with pytest.raises(BadData, match="matches this pattern"):
        names(f"{BUCKET}/*.parquet")


def test_what_is_not_there_is_told_with_its_address(bucket, tmp_path: Path) -> None:
    put(bucket, "train.jsonl", "pics/a.png", "pics/gone.png")
    with pytest.raises(BadData, match=r"missing_picture.*memory://bucket/data/pics/gone.png"):
        UnifiedGenerationDataset(BUCKET)
    for place, words in (
        ("memory://bucket/nothing", "no such file or folder"),
        ("memory://a/../b", r"without \.\."),
    ):
        with pytest.raises(BadData, match=f"{place}.*{words}"):
            UnifiedGenerationDataset(place)
    with pytest.raises(BadData, match="no split dpo; it has test, train"):
        UnifiedGenerationDataset(BUCKET, named_split="dpo")


def test_what_a_killed_copy_left_goes_away(bucket, tmp_path: Path, monkeypatch) -> None:
    target = remote.local(f"{BUCKET}/train.jsonl")
    target.parent.mkdir(parents=True)
    dead, alive = (target.parent / f".copying-{name}" for name in ("dead", "alive"))
    for draft in (dead, alive):
        draft.write_bytes(b"half")
    os.utime(dead, (0, 0))
    made: list[str] = []
    real = remote.atomic
    monkeypatch.setattr(remote, "atomic", lambda path, draft: made.append(draft.name) or real(path, draft))
    remote.refresh(f"{BUCKET}/train.jsonl", target)
    assert made == [".train.jsonl.copying"]  # the next one takes the place of one that was killed
    assert target.is_file() and alive.is_file() and not dead.exists()


def test_a_disk_that_is_full_at_the_end_of_a_copy_is_told_as_that(bucket, monkeypatch) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    target = remote.local(f"{BUCKET}/train.jsonl")
    with pytest.raises(UserError, match=r"No space left.* Fix: make room") as found:
        remote.refresh(f"{BUCKET}/train.jsonl", target)
    assert not isinstance(found.value, remote.RemoteError) and not target.exists()


def test_records_on_a_disk_may_name_pictures_there(bucket, tmp_path: Path) -> None:
    path = tmp_path / "disk" / "a.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"image_path": "a.png", "caption": "c"}))

    class Options:
        image_root = f"{BUCKET}/pics"

    assert pictures(UnifiedGenerationDataset(path, read=ReadOptions.of(Options))) == ["a.png"]
    Options.image_root = Options.image_root.replace("memory", "MEMORY")
    assert pictures(UnifiedGenerationDataset(path, read=ReadOptions.of(Options))) == ["a.png"]
    for image_root in (f"FILE://{tmp_path}/a%20b", f"file:{tmp_path}/a%20b"):
        Options.image_root = image_root
        assert ReadOptions.of(Options).image_root == tmp_path / "a b"
    Options.image_root = "file://other/data"
    with pytest.raises(UserError, match="of another machine"):
        ReadOptions.of(Options)
    path.write_text(json.dumps({"image_path": f"{BUCKET}/pics/a.png", "caption": "c"}))
    with pytest.raises(BadData, match="outside_root"):  # and not where data is confined
        UnifiedGenerationDataset(path, data_root=path.parent)


def test_check_and_preview_read_it_too(bucket, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", BUCKET, "--split", "test", "--num_workers", "0"]) == 0
    assert "Records: 1" in capsys.readouterr().out
    assert main(["preview", f"{BUCKET}/train.jsonl", "--output", "none"]) == 0
    assert "image_to_text" in capsys.readouterr().out


def test_without_its_package_the_tool_is_named(tmp_path: Path) -> None:
    if remote.problem_with("oss") is None:
        pytest.skip("ossfs is installed")
    with pytest.raises(
        BadData, match=r"pip install ossfs, or copy the files once .ossutil cp -r oss://bucket"
    ):
        UnifiedGenerationDataset("oss://bucket/data")
