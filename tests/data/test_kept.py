"""The index of the data: the same however many processes read it, and kept for a later start."""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unigen.config import DataOptions
from unigen.data import indexing, kept
from unigen.data.dataset import BadData, UnifiedGenerationDataset
from unigen.model.weights import load_planner

MODEL = Path(__file__).parents[1] / "golden" / "model"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data of three kinds of files, with pictures and a bad record, larger than what is kept."""
    monkeypatch.setenv("UNIGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "LEAST", 0)
    folder = tmp_path / "data"
    (folder / "pictures").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (32, 32 + 16 * i)).save(folder / "pictures" / f"{i}.png")
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"q {i}"},
                {"role": "assistant", "content": "a " * (i % 9)},
            ]
        }
        for i in range(400)
    ]
    drawn = [{"text_prompt": f"p {i}", "image_path": f"pictures/{i % 3}.png", "id": i} for i in range(60)]
    lines = [json.dumps(record) for record in [*drawn, *talks]]
    (folder / "a.jsonl").write_text("\n".join(lines[::-1]) + "\n{broken\n")
    (folder / "b.json").write_text(json.dumps(drawn))
    (folder / "c.jsonl").write_text("\n".join(lines))
    return folder


def built(place: Path, key: str | None = None, **options) -> UnifiedGenerationDataset:
    planner = load_planner(str(MODEL), DataOptions())
    given = {"on_bad_record": "skip", "max_bad_share": 0.5, "lengths_key": key} | options
    return UnifiedGenerationDataset(place, token_lengths=planner.token_lengths, **given)


def seen(dataset: UnifiedGenerationDataset) -> list:
    """Everything that a training asks of a data set."""
    numbers = range(len(dataset))
    return [
        dataset.fingerprint,
        dataset.statistics(),
        [str(dataset.origin(i)) for i in numbers],
        [str(error) for error in dataset.bad],
        [values.tobytes() for values in dataset.lengths.arrays()],
        dataset[7],
    ]


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "ALONE", 0)
    monkeypatch.setattr(indexing, "PART", 2000)
    talks = [{"query": f"question {i}", "response": f"answer {i * i}"} for i in range(300)]
    pq.write_table(pa.Table.from_pylist(talks), place / "d.parquet", row_group_size=20)
    jobs = list(indexing._jobs([place / "d.parquet"], lambda number: place / "d.parquet", {}))
    assert len(jobs) > 1 and sum(len(job.parts) for job in jobs) == 15  # small groups together
    one, two = (seen(built(place, num_workers=n)) for n in (0, 2))
    assert one == two and len(one[3]) == 2 * 45 + 1


def test_a_later_start_reads_nothing_and_finds_the_same(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = seen(built(place, "how"))
    monkeypatch.setattr("unigen.data.dataset.read_all", None)
    assert seen(built(place, "how")) == first


def test_what_is_kept_still_stops_a_training(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(place, "how")
    monkeypatch.setattr("unigen.data.dataset.read_all", None)
    with pytest.raises(BadData, match="91 of 981"):
        built(place, "how", on_bad_record="error")


def change_data(place: Path) -> None:
    with (place / "c.jsonl").open("a") as file:
        file.write("\n")


def touch_data(place: Path) -> None:
    os.utime(place / "a.jsonl")


def add_picture(place: Path) -> None:
    shutil.copy(place / "pictures" / "0.png", place / "pictures" / "new.png")


def remove_picture(place: Path) -> None:
    (place / "pictures" / "0.png").unlink()


def damage_entry(place: Path) -> None:
    (entry,) = (place.parent / "cache" / "index").glob("*.npz")
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 255
    entry.write_bytes(data)


def cut_entry(place: Path) -> None:
    (entry,) = (place.parent / "cache" / "index").glob("*.npz")
    entry.write_bytes(entry.read_bytes()[:1000])


@pytest.mark.slow
def test_an_entry_falls_when_a_picture_of_a_refused_record_changes(place: Path) -> None:
    """Also where no record of that folder could be used."""
    (place / "large").mkdir()
    shutil.copy(place / "pictures" / "0.png", place / "large" / "a.png")
    line = json.dumps({"text_prompt": "p", "image_path": "large/a.png"})
    (place / "d.jsonl").write_text(line + "\n")
    limits = {"max_sequence_length": 320}
    planner = load_planner(str(MODEL), DataOptions(**limits))

    def refused() -> list[str]:
        given = {"on_bad_record": "skip", "max_bad_share": 1, "lengths_key": "short"}
        dataset = UnifiedGenerationDataset(place, token_lengths=planner.token_lengths, **given)
        return [error.code for error in dataset.bad if error.origin.file.name == "d.jsonl"]

    assert refused() == ["too_long"]
    shutil.copy(place / "pictures" / "2.png", place / "large" / "b.png")
    os.replace(place / "large" / "b.png", place / "large" / "a.png")
    assert refused() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [change_data, touch_data, add_picture, remove_picture, damage_entry, cut_entry]
)
def test_after_a_change_everything_is_read_again(place: Path, change) -> None:
    before = built(place, "how")
    change(place)
    after = built(place, "how")
    assert seen(after) == seen(built(place))
    if change is remove_picture:
        assert len(after) == len(before) - 60


@pytest.mark.slow
def test_an_entry_falls_when_a_faulty_picture_is_mended(place: Path) -> None:
    good = (place / "pictures" / "0.png").read_bytes()
    names = ["later/a.png", "header.png", "end.png", "link.png"]
    records = [{"text_prompt": "p", "image_path": name} for name in names]
    (place / "d.jsonl").write_text("\n".join(map(json.dumps, records)))
    (place / "header.png").write_bytes(b"no picture" * 9)
    (place / "end.png").write_bytes(good[:-30])
    (place / "link.png").symlink_to(place.parent / "elsewhere.png")

    def faulty(**options) -> list[str]:
        return [e.code for e in built(place, "how", **options).bad if e.origin.file.name == "d.jsonl"]

    assert faulty() == ["missing_picture", "not_a_picture", "broken_picture", "missing_picture"]
    for left, name in enumerate(names, 1):
        (place / name).parent.mkdir(exist_ok=True)
        with (place / name).open(
            "r+b" if (place / name).exists() else "wb"
        ) as file:  # no entry of the folder
            file.truncate(0)
            file.write(good)
        assert len(faulty()) == len(names) - left


@pytest.mark.slow
def test_another_way_of_counting_is_another_entry(place: Path) -> None:
    planner = load_planner(str(MODEL), DataOptions())
    others = [
        load_planner(str(MODEL), DataOptions(max_image_tokens=16)).identity,
        load_planner(str(MODEL), DataOptions(train_transitions=False)).identity,
        load_planner(None, DataOptions()).identity,
    ]
    assert len({planner.identity, *others}) == 4
    assert planner.identity == load_planner(str(MODEL), DataOptions()).identity
    built(place, "one")
    built(place, "two")
    built(place, "two", check_pictures="headers")
    assert len(list((place.parent / "cache" / "index").iterdir())) == 3


@pytest.mark.slow
def test_entries_that_no_run_used_for_long_are_removed(place: Path) -> None:
    built(place, "old")
    (old,) = (place.parent / "cache" / "index").iterdir()
    os.utime(old, (0, 0))
    built(place, "new")
    assert not old.exists()


def test_a_folder_that_cannot_be_written_is_said_and_harmless(place: Path, caplog) -> None:
    (place.parent / "cache").write_text("a file in its place")
    with caplog.at_level("INFO"):
        built(place, "how")
    assert "is not kept" in caplog.text


def test_columns_of_another_kind_are_refused() -> None:
    rows = indexing.Index().rows()
    with pytest.raises(ValueError, match="another kind"):
        indexing.Index(rows["offset"])
