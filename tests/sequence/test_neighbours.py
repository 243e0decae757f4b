"""Paths that miss a file by a hair: the file that is there is named, and how to write it."""

import unicodedata
from pathlib import Path

import pytest

from unigen.sequence.files import Confined, PictureError, open_file
from unigen.sequence.neighbours import neighbour


@pytest.mark.parametrize(
    ("there", "written", "said"),
    [
        ("pics/a.png", "pics\\a.png", "write / in place of"),
        ("pics/UP.JPG", "pics/up.jpg", "case-sensitive"),
        ("Pics/UP.JPG", "pics/up.jpg", "case-sensitive"),
        ("pics/a b.png", "pics/a%20b.png", "%20"),
        ("pics/a.png", "pics/a.png ", "blanks"),
        ("pics/a.png", " pics/a.png", "blanks"),
        ("pics/a.png ", "pics/a.png", "blanks"),
        (unicodedata.normalize("NFD", "é.png"), unicodedata.normalize("NFC", "é.png"), "Unicode form"),
        (unicodedata.normalize("NFC", "é.png"), unicodedata.normalize("NFD", "é.png"), "Unicode form"),
        ("Pics/A b.png", "pics\\a%20b.png", "case-sensitive"),
        ("pics/a.webp", "pics\\a.png", "write its ending"),
        ("pics/a.b.JPG", "pics/a.b", "write its ending"),
    ],
)
def test_the_neighbour_is_named(tmp_path: Path, there: str, written: str, said: str) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_bytes(b"x")
    found = neighbour(str(tmp_path / written))
    assert found is not None and found[0] == str(tmp_path / there) and said in found[1]
    with pytest.raises(PictureError) as caught:
        open_file(tmp_path / written)
    assert (
        caught.value.code == "missing_picture" and "on disk" in caught.value.fix and said in caught.value.fix
    )


def test_a_home_folder_is_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"x")
    found = neighbour("/data/set/~/a.png")
    assert found is not None and found[0] == str(tmp_path / "a.png") and "~" in found[1]


def test_nothing_near(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    (tmp_path / "b.png").write_bytes(b"x")
    for written in ("c.png", "A.PNG", "b.gif", "b.png/c.png"):
        assert neighbour(str(tmp_path / written)) is None


def test_no_neighbour_outside_of_the_root_is_told(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    for folder in ("", "root/"):
        (tmp_path / f"{folder}A.png").write_bytes(b"x")
    told = []
    for path in ("a.png", "../a.png"):
        with pytest.raises(PictureError) as caught:
            open_file(Confined(tmp_path / "root" / path, tmp_path / "root"))
        told.append("on disk" in caught.value.fix)
    assert told == [True, False]


def test_a_path_of_windows_is_told_what_to_write(tmp_path: Path) -> None:
    for name in ("C:\\data\\a.png", "D:/data/a.png"):
        with pytest.raises(PictureError, match=r"a path of Windows.*--image_root") as caught:
            open_file(tmp_path / name)
        assert caught.value.code == "missing_picture"
