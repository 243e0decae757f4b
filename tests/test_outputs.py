"""What commands write for their user: only into a free place, or over an earlier output of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny import text, write_jsonl

from unigen import cli
from unigen.config import UserError
from unigen.outputs import RECEIPT, claim, output_file, output_folder, read_receipt, written_by
from unigen.show.language import Words
from unigen.show.pages import write_answer, write_page

CHECK = "unigen check"


def bytes_of(folder: Path) -> dict[str, bytes | None]:
    """Contents by name of all that is in a folder; None for what is no file."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def page(path: Path, by: str = CHECK) -> Path:
    return write_page(path, "page.html", {}, title="t", by=by)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an input, ``a.jsonl``, and things of other people."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [text("q", "a")])
    (tmp_path / "link.html").symlink_to("a.jsonl")
    (tmp_path / "dangling.html").symlink_to("b.jsonl")
    os.link(tmp_path / "a.jsonl", tmp_path / "hard.html")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.jsonl").write_text("{}\n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "mine.html").write_text("<!doctype html>\n<p>unigen check")
    (tmp_path / "notes").write_text("precious")
    (tmp_path / "claims.html").write_text('<meta name="generator" content="unigen check">')
    page(tmp_path / "preview.html", "unigen preview")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        *((name, "which this command reads") for name in ("a.jsonl", "./a.jsonl", "folder/../a.jsonl")),
        *((name, "which this command reads") for name in ("link.html", "hard.html")),
        *((name, "file is no place for") for name in ("new.jsonl", "X.PARQUET", "w.safetensors", "p.png")),
        ("x.json.gz", "a .gz file"),
        ("dangling.html", "a .jsonl file"),
        ("folder", "which is a folder"),
        *((name, "which is no regular file") for name in ("pipe", "/dev/full", "/dev/null")),
        *((name, "which someone else wrote") for name in ("mine.html", "notes", "claims.html")),
        ("preview.html", "which unigen preview wrote, not unigen check"),
        ("notes/page.html", "which cannot be written"),
        ("/proc/unigen/page.html", "which cannot be written"),
        ("n" * 250, "which cannot be written"),
        ("nul\0", "which cannot be written"),
    ],
)
def test_a_file_takes_no_place_of_something_else(place: Path, name: str, problem: str):
    before = bytes_of(place)
    with pytest.raises(UserError) as error:
        output_file("output", name, CHECK, ["a.jsonl", "folder"])
    assert problem in str(error.value) and "Fix: " in str(error.value) and "\n" not in str(error.value)
    assert bytes_of(place) == before


def test_problems_inside_of_the_data_would_be_data_the_next_time(place: Path):
    with pytest.raises(UserError, match="would be read as data of folder"):
        output_file("problems", "folder/problems.jsonl", CHECK, ["folder"], ".jsonl")
    assert output_file("problems", "problems.jsonl", CHECK, ["folder"], ".jsonl").name == "problems.jsonl"
    assert output_file("output", "folder/report.html", CHECK, ["folder"]).name == "report.html"


def test_a_free_place_and_an_earlier_output_are_taken_and_trying_leaves_no_trace(place: Path):
    page(place / "mine too.html")
    (place / "empty").touch()
    (place / "elsewhere.html").symlink_to("folder/page.html")
    before = bytes_of(place)
    for name in ("new.html", "new", "deep/er/page.html", "mine too.html", "empty", "elsewhere.html"):
        found = output_file("output", name, CHECK, ["a.jsonl"])
        assert found == Path(os.path.realpath(name))
    assert bytes_of(place) == before
    page(place / "elsewhere.html")
    assert (place / "elsewhere.html").is_symlink() and written_by(place / "folder" / "page.html") == CHECK


def test_a_page_is_kept_where_its_successor_cannot_be_written_or_is_of_another_command(tmp_path: Path):
    path = page(tmp_path / "p.html")
    before = path.read_bytes()
    with pytest.raises(UserError, match="which unigen check wrote, not unigen watch"):
        page(path, "unigen watch")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["p.html"]


@pytest.mark.parametrize(
    "name", ["notes", "notes/out", "/proc/unigen", "a.jsonl", "new.safetensors", "folder"]
)
def test_a_folder_that_cannot_be_one_is_refused(place: Path, name: str):
    before = bytes_of(place)
    with pytest.raises(UserError, match="Fix: name another folder"):
        output_folder("output_dir", name, ["folder"])
    assert bytes_of(place) == before


def test_a_folder_is_claimed_once_and_by_one_command(tmp_path: Path):
    claim("output_dir", tmp_path / "out", "unigen demo", ["run"])
    (tmp_path / "out" / "run").mkdir()
    claim("output_dir", tmp_path / "out", "unigen demo", ["run"])
    assert read_receipt(tmp_path / "out", "unigen fetch") == {}
    with pytest.raises(UserError, match=f"holds {RECEIPT}, which unigen fetch did not write"):
        claim("output_dir", tmp_path / "out", "unigen fetch", [])
    (tmp_path / "other" / "run").mkdir(parents=True)
    with pytest.raises(UserError, match="holds run, which unigen demo did not write"):
        claim("output_dir", tmp_path / "other", "unigen demo", ["run"])
    assert bytes_of(tmp_path / "other") == {"run": None}


# ---- answers


def test_an_earlier_answer_gives_way_and_everything_else_stays(tmp_path: Path):
    write_answer(tmp_path, ["q"], ["one", "two", "three"])
    (tmp_path / "04_text.txt").write_text("somebody's")
    (tmp_path / "03_text.txt").write_text("changed by hand")
    write_answer(tmp_path, ["q"], ["other"])
    assert {p.name: p.read_text() for p in tmp_path.glob("*.txt")} == {
        "01_text.txt": "other", "03_text.txt": "changed by hand", "04_text.txt": "somebody's"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["index.html", "02_text.txt"])
def test_an_answer_replaces_no_file_of_others(tmp_path: Path, name: str):
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match="Fix: name another"):
        write_answer(tmp_path, ["q"], ["one", "two"])
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {name: "precious"}


@pytest.mark.parametrize("listed", ['{"../../keep.txt": ["x"]}', "[]", "{", '{"01_text.txt": 3}', '"a"'])
def test_a_list_of_files_in_a_strangers_page_removes_nothing(tmp_path: Path, listed: str):
    (tmp_path / "keep.txt").write_text("precious")
    out = tmp_path / "a" / "b"
    shown = {"prompt": [], "answer": [], "made": None, "words": Words("en", "generate"), "files": listed}
    write_page(out / "index.html", "generate.html", shown, title="", by="unigen generate")
    write_answer(out, ["q"], ["one"])
    assert (tmp_path / "keep.txt").read_text() == "precious" and (out / "01_text.txt").exists()


# ---- the commands


GIVEN = ["evaluate", "--predictions", "given.jsonl", "--data_path", "a.jsonl"]
PROMPTS = ["generate", "--model_path", "MODEL", "--prompts_file", "asked.jsonl", "--layout", "lmms-eval"]
IN_THE_WAY = (
    "pieces/01_text.txt", "answers/predictions.jsonl", "answers/metrics.json", "compared/2-given.jsonl/metrics.json",
    "listed/t.json", "thoughts/t_0.txt",
)  # fmt: skip
FOREIGN = {
    "check": ["check", "a.jsonl", "--output", "kept/index.html"],
    "check problems": ["check", "a.jsonl", "--problems", "kept/log.jsonl"],
    "preview": ["preview", "a.jsonl", "--output", "kept/index.html"],
    "watch": ["watch", "run", "--html", "kept/index.html"],
    "generate": ["generate", "--model_path", "MODEL", "--prompt", "hi", "--output_dir", "kept"],
    "generate piece": ["generate", "--model_path", "MODEL", "--prompt", "hi", "--output_dir", "pieces"],
    "demo": ["demo", "--quick", "--output_dir", "kept"],
    "fetch": ["fetch", "a.jsonl", "--output_dir", "kept"],
    "train": ["train", "--model_path", "MODEL", "--train_data_path", "a.jsonl", "--output_dir", "kept"],
    "evaluate": [*GIVEN, "--output_dir", "answers"],
    "evaluate several": [*GIVEN, "--compare", "given.jsonl", "--output_dir", "compared"],
    "generate list": [*PROMPTS, "--output_dir", "listed"],
    "generate thought": [*PROMPTS, "--think", "--output_dir", "thoughts"],
    "cache": ["cache", "a.jsonl", "--model_path", "MODEL", "--cache_dir", "kept"],
}


@pytest.mark.parametrize("argv", FOREIGN.values(), ids=FOREIGN)
def test_no_command_touches_what_it_did_not_write(
    argv: list[str], golden: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [text("q", "a")])
    for name in (
        "index.html",
        "log.jsonl",
        "a.jsonl",
        "config.json",
        "metrics.jsonl",
        "fetched.log",
        "report.html",
    ):
        (tmp_path / "kept").mkdir(exist_ok=True)
        (tmp_path / "kept" / name).write_text("precious\n")
    write_jsonl(tmp_path / "given.jsonl", [{"index": 0, "text": "a"}])
    write_jsonl(tmp_path / "asked.jsonl", [{"task": "t", "doc_id": 0, "prompt": "a cat"}])
    for name in IN_THE_WAY:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("precious\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    before = bytes_of(tmp_path)
    assert cli.main([str(golden / "model") if word == "MODEL" else word for word in argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("unigen: error: ") and "Fix: " in said.splitlines()[-1]
    assert bytes_of(tmp_path) == before


def test_the_same_command_with_the_same_output_goes_on_working(
    golden: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [text("q", "a"), {"x": 1}])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    for _ in range(2):
        assert cli.main(["check", "a.jsonl", "--output", "c.html", "--problems", "p.jsonl"]) == 1
        assert cli.main(["preview", "a.jsonl", "--output", "v.html"]) == 1
        assert cli.main(["watch", "run", "--html", "w.html"]) == 0
        assert cli.main(["fetch", "a.jsonl", "--output_dir", "out"]) in (0, 1)
    assert json.loads((tmp_path / "p.jsonl").read_text())["generator"] == CHECK
    assert cli.main(["check", "p.jsonl", "--problems", "p.jsonl"]) == 2, "an output of ours, and an input"
    assert "c.html" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_after_all_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As where the disk fills up meanwhile: here somebody makes a folder of that name while it is read."""
    data = write_jsonl(tmp_path / "a.jsonl", [text("q", "a")])
    from unigen.commands.check import findings

    read = findings.parts

    def parts(*given):
        (tmp_path / "c.html").mkdir(exist_ok=True)
        (tmp_path / "p.jsonl").mkdir(exist_ok=True)
        return read(*given)

    monkeypatch.setattr(findings, "parts", parts)
    argv = [
        "--output",
        str(tmp_path / "c.html"),
        "--problems",
        str(tmp_path / "p.jsonl"),
        "--num_workers",
        "0",
    ]
    assert cli.main(["check", str(data), *argv]) == 2
    shown = capsys.readouterr()
    assert "No problem found" in shown.out and "p.jsonl" in shown.err and shown.err.count("\n") == 1
