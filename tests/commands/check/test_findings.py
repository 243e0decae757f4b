"""The check: every problem with its place, numbers that agree with the planner, findings that no number of
processes changes."""

import gzip
import json
import multiprocessing
import os
import random
import signal
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checking import check
from PIL import Image

from unigen.cli import main
from unigen.commands.check import findings as module
from unigen.commands.check.advice import advise
from unigen.commands.check.findings import Findings, Problems
from unigen.config import ConfigError, DataOptions
from unigen.data.containers import read_part
from unigen.data.dataset import BadData, UnifiedGenerationDataset
from unigen.data.mapping import ReadOptions
from unigen.model.weights import load_planner
from unigen.sequence.draw import RandomKey
from unigen.sequence.pack import pack_blocks
from unigen.sequence.plan import Planner
from unigen.sequence.types import BadRecord

EXAMPLE = Path(__file__).parents[3] / "examples" / "sample_data_format.json"
WORDS = [f"word{i}" for i in range(50)]


@pytest.fixture(scope="module")
def planner() -> Planner:
    return load_planner(None, DataOptions())


def text(r: random.Random, n: int) -> str:
    return " ".join(r.choices(WORDS, k=n))


def talk(question: str, answer: str) -> dict:
    return {
        "conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    }


def picture(path: Path, size: tuple[int, int] = (64, 48), seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).resize(size).save(path)
    return path


def write(path: Path, *values: dict | str) -> Path:
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def mixed(folder: Path, records: int = 120) -> Path:
    """Records of all tasks with pictures of several sizes."""
    r = random.Random(0)
    names = [
        picture(folder / "p" / f"{i}.png", (r.randint(30, 900), r.randint(30, 900)), i)
        .relative_to(folder)
        .as_posix()
        for i in range(6)
    ]
    values: list[dict] = []
    for _ in range(records):
        kind = r.randrange(5)
        name = r.choice(names)
        if kind == 0:
            values.append(talk(text(r, r.randint(1, 40)), text(r, r.randint(1, 300))))
        elif kind == 1:
            values.append({"text_prompt": text(r, r.randint(3, 30)), "image_path": name})
        elif kind == 2:
            values.append({"image_path": name, "caption": text(r, r.randint(3, 200))})
        elif kind == 3:
            values.append(
                {
                    "input_image": name,
                    "editing_steps": [{"instruction": text(r, 5), "result_image": r.choice(names)}] * 2,
                }
            )
        else:
            pieces = [
                {"type": "text", "content": text(r, 20)},
                {"type": "image", "image_path": name},
                {"type": "text", "content": text(r, 90)},
            ]
            values.append({"sequence": pieces})
    return write(folder / "mixed.jsonl", *values)


def problems(found: Findings) -> list[tuple[str, str, int | None, str]]:
    return [(p["code"], Path(p["file"]).name, p["line"], p["field"]) for p in found.problems]


# ---- problems


def test_every_problem_has_its_code_place_and_cure(tmp_path, planner):
    """One of each kind, among good records, at known lines; found in this order and no other."""
    good = talk("q", "a")
    picture(tmp_path / "p" / "good.png")
    whole = picture(tmp_path / "p" / "whole.jpg").read_bytes()
    (tmp_path / "p" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "p" / "page.png").write_bytes(b"<html>")
    (tmp_path / "p" / "folder.png").mkdir()
    os.mkfifo(tmp_path / "p" / "pipe.png")
    twelve = {
        "input_image": "p/good.png",
        "editing_steps": [{"instruction": "x", "result_image": "p/good.png"}] * 12,
    }
    cases = [
        ('{"caption": "half', "bad_json", "(record)"),
        ('{"conversations": NaN}', "bad_json", "(record)"),
        ('{"a": 1, "a": 2}', "duplicate_key", "(record)"),
        ("[1]", "not_an_object", "(record)"),
        ({"promt": "x"}, "no_format", "(record)"),
        ({"image_path": "p/good.png", "caption": "c", "text_prompt": "t"}, "ambiguous_format", "(record)"),
        ({"conversations": [{"role": "usr", "content": "x"}]}, "unknown_role", "conversations[0].role"),
        ({"conversations": [{"role": "user", "content": "x"}]}, "no_target", "conversations"),
        ({"conversations": 3}, "wrong_type", "conversations"),
        ({"image_path": "p/good.png", "caption": ""}, "empty_text", "caption"),
        ({"image_path": "p/none.png", "caption": "c"}, "missing_picture", "image_path"),
        ({"image_path": "p/folder.png", "caption": "c"}, "not_a_file", "image_path"),
        ({"image_path": "p/pipe.png", "caption": "c"}, "not_a_file", "image_path"),
        ({"image_path": "p/page.png", "caption": "c"}, "not_a_picture", "image_path"),
        (
            {"sequence": [{"type": "image", "image_path": "p/cut.jpg"}, {"content": "c"}]},
            "broken_picture",
            "sequence[0].image_path",
        ),
        (
            {"messages": [{"role": "user", "content": "<image>"}], "images": []},
            "unequal_image_count",
            "images",
        ),
        (twelve, "too_long", "sample"),
    ]
    lines: list = []
    expected = []
    for value, code, where in cases:
        lines += [good, value]
        expected.append((code, "bad.jsonl", len(lines), where))
    path = write(tmp_path / "bad.jsonl", *lines)
    small = load_planner(None, DataOptions(max_sequence_length=20_000))
    found = check(path, small, deep=True, num_workers=0)
    assert problems(found) == expected
    assert all(p["found"] and p["expected"] and p["cure"] for p in found.problems)
    assert found.summary()["good_records"] == len(cases) and len(found.tally.records) == 2 * len(cases)
    headers = check(path, small, num_workers=0)
    assert set(problems(found)) - set(problems(headers)) == {
        ("broken_picture", "bad.jsonl", 30, "sequence[0].image_path")
    }


def test_the_check_refuses_what_the_data_set_refuses(tmp_path, planner):
    path = write(
        tmp_path / "a.jsonl",
        talk("q", "a"),
        "{",
        {"image_path": "x.png", "caption": "c"},
        '{"caption": 1}',
        talk("q", ""),
    )
    with pytest.raises(BadData) as refused:
        UnifiedGenerationDataset(path, token_lengths=planner.token_lengths)
    assert [error.to_dict() for error in refused.value.records] == list(
        check(path, planner, num_workers=0).problems
    )


def test_files_that_cannot_be_read_are_problems_too(tmp_path, planner):
    """A broken list, a truncated archive: the rest is read all the same."""
    (tmp_path / "b.json").write_text('[{"caption": "c"')
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps(talk("q", "a")).encode() * 50)[:-20])
    write(tmp_path / "d.jsonl", talk("q", "a"))
    found = check(tmp_path, planner, num_workers=0)
    assert [entry[:2] for entry in problems(found)] == [("bad_json", "b.json"), ("broken_file", "c.jsonl.gz")]
    assert [p["field"] for p in found.problems] == ["(file)", "(file)"] and found.summary()[
        "good_records"
    ] == 1


def test_pictures_outside_the_root_are_problems(tmp_path, planner):
    picture(tmp_path / "x.png")
    (tmp_path / "in").mkdir()
    picture(tmp_path / "in" / "y.png")
    path = write(
        tmp_path / "in" / "a.jsonl",
        {"image_path": "../x.png", "caption": "cap"},
        {"image_path": "y.png", "caption": "cap"},
    )
    found = check(path, planner, read=ReadOptions(tmp_path / "in"), num_workers=0)
    assert problems(found) == [("outside_root", "a.jsonl", 1, "image_path")]
    assert len(check(path, planner, num_workers=0).problems) == 0


def test_what_the_options_make_unusable_is_a_problem_of_its_field(tmp_path):
    picture(tmp_path / "p" / "x.png")
    path = write(
        tmp_path / "a.jsonl",
        {"text_prompt": "draw", "image_path": "p/x.png"},
        {"image_path": "p/x.png", "caption": "cap"},
    )
    planner = load_planner(None, DataOptions(visual_gen=False))
    assert problems(check(path, planner, num_workers=0)) == [
        ("image_target_without_visual_gen", "a.jsonl", 1, "image_path")
    ]


def test_problems_are_all_kept_in_their_file_and_few_in_memory(tmp_path):
    kept = Problems(tmp_path / "new" / "problems.jsonl")
    for n in range(Problems.KEPT + 50):
        kept.add(BadRecord("a" if n % 2 else "b", "f", "x", "y", "z").to_dict() | {"line": n})
    assert len(kept) == Problems.KEPT + 50 and kept.counts == {"a": 125, "b": 125}
    kept.add({"code": "a", "field": "f", "line": -1})
    assert [p["line"] for p in kept] == [*range(250), -1] == [p["line"] for p in kept], "read twice alike"
    for _ in range(200):
        kept.add({"code": "a", "field": "f", "line": 0})
    assert len(kept.first["a"]) == Problems.KEPT
    kept.save()
    kept.close()
    assert len((tmp_path / "new" / "problems.jsonl").read_text().splitlines()) == 451


# ---- numbers


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 250])
def test_lengths_and_targets_are_those_of_the_packs(tmp_path, golden, limit):
    """With a checkpoint: every token of the rows that training would build, by kind and by loss, counted from
    the packs."""
    path = mixed(tmp_path, 40)
    options = DataOptions(max_image_tokens=64, max_sequence_length=limit)
    planner = load_planner(golden / "model", options)
    found = check(path, planner, limits=[250], num_workers=0)
    dataset = UnifiedGenerationDataset(
        path, token_lengths=load_planner(golden / "model", DataOptions(max_image_tokens=64)).token_lengths
    )
    whole = load_planner(golden / "model", DataOptions(max_image_tokens=64))
    kinds: Counter[str] = Counter()
    lengths, text_tokens, image_tokens = [], 0, 0
    for i, record in enumerate(dataset):
        draw = RandomKey(0, 0, i, training=False)
        blocks = whole.fill(record.sample, whole.outline(record.sample, dataset.lengths[i], draw), draw)
        pack = pack_blocks([blocks], whole.tokenizer.special, whole.geometry)
        lengths.append(len(pack))
        table = dataset.lengths[
            i
        ].blocks  # copies by chance, of which the closing token has a label, do not count
        text_tokens += pack.n_text_labels - (table["by_chance"].any() and len(blocks) == len(table))
        image_tokens += pack.n_image_targets
        for b in blocks:
            kinds[b.kind.name.lower()] += len(b)
    if limit is None:
        assert len(found.problems) == 0
        assert found.tally.good["length"].tolist() == lengths
        s = found.summary()
        assert s["lengths"]["unit"] == "tokens" and s["lengths"]["total"] == sum(lengths)
        assert s["targets"]["text_tokens"] == text_tokens and s["targets"]["image_tokens"] == image_tokens > 0
        assert s["tokens"]["noised"] == kinds["noised"] and s["tokens"]["text"] == kinds["text"]
    refused = [n for n, record in enumerate(dataset) if not fits(planner, record)]
    assert bool(refused) == (limit is not None) and len(found.problems) == len(refused)
    assert {p["line"] for p in found.problems} == {n + 1 for n in refused}
    if limit is not None:
        assert found.summary()["limits"][0]["refused"] == len(refused) and found.summary()[
            "good_records"
        ] == 40 - len(refused)


def fits(planner: Planner, record) -> bool:
    try:
        planner.token_lengths(record)
    except BadRecord:
        return False
    return True


@pytest.mark.slow
def test_a_limit_cuts_what_the_planner_cuts(tmp_path, golden):
    """Records cut, target tokens lost and records refused, against planners with those limits."""
    path = mixed(tmp_path, 60)
    whole = load_planner(golden / "model", DataOptions(max_image_tokens=64))
    questions = [
        record.sample[0].text for record in UnifiedGenerationDataset(path) if record.format == "conversation"
    ]
    # with one token of the answer
    least = min(len(whole.tokenizer.encode(question)) for question in questions) + 2 + 3
    limits = tuple(sorted({20, least - 1, least, 60, 150, 300, 600, 100_000}))
    rows = check(path, whole, limits=limits, num_workers=0).summary()["limits"]
    dataset = UnifiedGenerationDataset(path, token_lengths=whole.token_lengths)
    for row, limit in zip(rows, limits, strict=True):
        planner = load_planner(golden / "model", DataOptions(max_image_tokens=64))
        planner.max_length = limit
        cut = lost = refused = 0
        for i, record in enumerate(dataset):
            if not fits(planner, record):
                refused += 1
                continue
            full, short = (
                sum(
                    len(b)
                    for b in p.outline(record.sample, dataset.lengths[i], RandomKey(0, 0, i, training=False))
                )
                for p in (whole, planner)
            )
            cut, lost = cut + (short < full), lost + full - short
        assert row == {
            "max_sequence_length": limit,
            "cut": cut,
            "tokens_lost": lost,
            "share_lost": row["share_lost"],
            "refused": refused,
        }
    assert [row["refused"] for row in rows] == sorted((row["refused"] for row in rows), reverse=True)
    assert any(row["cut"] for row in rows) and rows[-1]["cut"] == rows[-1]["refused"] == 0


@pytest.mark.slow
def test_pictures_are_counted_with_their_sizes_and_tokens(tmp_path, planner):
    picture(tmp_path / "p" / "small.png", (700, 300))
    picture(tmp_path / "p" / "large.png", (1600, 1200))
    values = [{"text_prompt": "a b c", "image_path": "p/small.png"}] * 3 + [
        {"text_prompt": "a b c", "image_path": "p/large.png"}
    ]
    path = write(tmp_path / "a.jsonl", *values, {"image_path": "p/small.png", "caption": "a small one"})
    p = check(path, planner, num_workers=0).summary()["pictures"]
    small, large = (planner.transforms.vae.size(*size) for size in ((700, 300), (1600, 1200)))
    tokens = [w // 16 * (h // 16) for w, h in (small, small, small, large)]
    assert p["pieces"] == 5 and p["sizes"] == [[700, 300, 4], [1600, 1200, 1]] and p["distinct_sizes"] == 2
    assert p["latent_tokens"]["total"] == sum(tokens) and p["latent_tokens"]["max"] == tokens[-1]
    assert p["upscaled"] == 3, "the one to look at is not encoded by the VAE"
    # a target that nothing follows is shown to the ViT in a share of the visits alone; sizes are known all
    # the same
    drawn, seen = planner.transforms.vit_edit, planner.transforms.vit
    shown = [drawn.size(700, 300)] * 3 + [drawn.size(1600, 1200), seen.size(700, 300)]
    assert (
        p["vit_tokens"]["total"] == sum(w // 14 * (h // 14) for w, h in shown)
        and p["vit_tokens"]["count"] == 5
    )


def test_repetitions_are_found_across_parts(tmp_path, planner, monkeypatch):
    """Same records, same answers, same picture contents under two names, with the places of the first
    ones."""
    monkeypatch.setattr(module, "PART", 512)
    monkeypatch.setattr(module, "DEEP_PART", 512)
    r = random.Random(1)
    values = [talk(text(r, 20), text(r, 10)) for _ in range(30)]
    values[25] = {**values[3], "metadata": {"other": 1}}
    values[28] = values[3]
    values[20] = talk("another question", values[7]["conversations"][1]["content"])
    picture(tmp_path / "p" / "a.png")
    (tmp_path / "p" / "b.png").write_bytes((tmp_path / "p" / "a.png").read_bytes())
    picture(tmp_path / "p" / "c.png", seed=1)
    values += [{"image_path": f"p/{name}.png", "caption": f"caption {i}"} for i, name in enumerate("abca")]
    # not the same
    values += [
        {"sequence": [{"content": "one", "target": first}, {"content": "two"}]} for first in (True, False)
    ]
    path = write(tmp_path / "a.jsonl", *values)
    found = check(path, planner, deep=True, num_workers=0)
    assert len(found.parts) > 5
    of = found.summary()["repeats"]
    at = [f"{path}:{n + 1}" for n in range(len(values))]
    assert of["records"]["surplus"] == 2 and of["records"]["most"][0]["where"] == [at[3], at[25], at[28]]
    assert of["texts"]["surplus"] == 3 and [m["where"] for m in of["texts"]["most"]] == [
        [at[3], at[25], at[28]],
        [at[7], at[20]],
    ]
    assert of["texts"]["most"][1]["what"] == values[7]["conversations"][1]["content"]
    assert of["pictures"]["distinct"] == 3 and of["pictures"]["most"][0]["count"] == 2
    assert of["copies"]["surplus"] == 1 and of["copies"]["most"][0]["what"] == [
        str(tmp_path / "p" / f"{n}.png") for n in "ab"
    ]
    assert "copies" not in check(path, planner, num_workers=0).summary()["repeats"]


def test_tables_with_pictures_inside(tmp_path, planner):
    """Rows of Parquet: pictures are known by their bytes, places by the number of the row; a damaged file is
    a problem of its own."""
    one, two = (picture(tmp_path / f"{n}.png", (64, 48), n).read_bytes() for n in range(2))
    rows = [
        {"image": image, "captions": json.dumps({"a": f"caption {i}"})}
        for i, image in enumerate([one, two, one, b"<html>", one[:200]])
    ]
    (tmp_path / "t").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t" / "a.parquet", row_group_size=2)
    (tmp_path / "t" / "b.parquet").write_bytes((tmp_path / "t" / "a.parquet").read_bytes()[:-50])
    found = check(tmp_path / "t", planner, deep=True, num_workers=0)
    assert [(p["code"], Path(p["file"]).name, p["index"]) for p in found.problems] == [
        ("not_a_picture", "a.parquet", 3), ("broken_picture", "a.parquet", 4), ("broken_file", "b.parquet", 0)
    ]  # fmt: skip
    s = found.summary()
    assert s["good_records"] == 3 and s["pictures"]["pieces"] == 3 and s["pictures"]["sizes"] == [[64, 48, 3]]
    assert s["repeats"]["pictures"]["distinct"] == 2 and s["repeats"]["copies"]["surplus"] == 0
    path = tmp_path / "t" / "a.parquet"
    assert s["repeats"]["pictures"]["most"] == [
        {"count": 2, "where": [f"{path}[0]", f"{path}[2]"], "what": "(inside the file)"}
    ]


def test_near_empty_descriptions_are_found(tmp_path, planner):
    picture(tmp_path / "p" / "a.png")
    texts = ["...", "ok", "a cat", "猫", "红猫", " - \n", "12 o'clock"]
    values = [{"image_path": "p/a.png", "caption": t} for t in texts] + [
        {"text_prompt": "?", "image_path": "p/a.png"},
        talk("1 + 1 =", "2"),
    ]
    s = check(write(tmp_path / "a.jsonl", *values), planner, num_workers=0).summary()["near_empty"]
    assert [t for _, t in s["first"]] == ["...", "ok", " - \n", "?"] and s["records"] == 4
    assert s["first"][0][0].endswith("a.jsonl:1")


# ---- processes


@pytest.mark.slow
def test_findings_do_not_depend_on_the_processes(tmp_path, golden, monkeypatch):
    """With the tokenizer of a checkpoint, which travels to the processes."""
    planner = load_planner(golden / "model", DataOptions(max_image_tokens=64))
    monkeypatch.setattr(module, "PART", 2048)
    path = mixed(tmp_path, 80)
    with path.open("a") as file:
        file.write('{"bad": 1}\n{"image_path": "p/none.png", "caption": "c"}\n')
    alone, two = (check([path, EXAMPLE], planner, num_workers=n) for n in (0, 2))
    assert (
        alone.summary() == two.summary()
        and list(alone.problems) == list(two.problems)
        and len(alone.problems) == 2
    )
    assert len(alone.parts) > 4 and [part.index for part in alone.parts] == [part.index for part in two.parts]
    assert sum(1 for part in alone.parts for _ in read_part(part)) == len(alone.tally.records) == 82 + 7


def deadly(*arguments):
    """A checker whose process dies of one record."""
    from unigen.commands.check import part as check_part

    original = check_part.examine

    def examine(raw, span, *others, **named):
        if b"poison" in raw:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(raw, span, *others, **named)

    check_part.examine = examine
    return check_part.checker(*arguments)


@pytest.mark.slow
def test_a_record_that_kills_its_process_is_named_and_the_rest_is_checked(tmp_path, planner, monkeypatch):
    monkeypatch.setattr(module, "checker", deadly)
    values = [talk("q", f"answer {i}") for i in range(40)]
    values[17] = talk("poison", "a")
    found = check(write(tmp_path / "a.jsonl", *values), planner, num_workers=1)
    assert problems(found) == [("check_died", "a.jsonl", 18, "(record)")]
    assert "want of memory" in next(iter(found.problems))["found"]
    assert found.summary()["good_records"] == 39
    monkeypatch.setattr(module, "DEATHS", 0)
    found = check(write(tmp_path / "a.jsonl", *values), planner, num_workers=1)
    assert problems(found) == [("check_died", "a.jsonl", None, "(file)")]


# ---- the command


@pytest.mark.slow
def test_the_command_tells_clean_from_bad_from_impossible(tmp_path, capsys):
    """0 clean, 1 problems, 2 cannot run; --json prints one document and nothing else."""
    bad = write(tmp_path / "bad.jsonl", talk("q", "a"), '{"x": 1}', talk("q", "a"))
    assert main(["check", str(EXAMPLE)]) == 0
    assert "No problem found" in capsys.readouterr().out
    assert (
        main(
            ["check", str(bad), "--problems", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "p.html")]
        )
        == 1
    )
    out = capsys.readouterr().out
    assert (
        f"{bad}:2" in out
        and "no_format  (1)" in out
        and json.loads((tmp_path / "p.jsonl").read_text())["line"] == 2
    )
    assert "no_format" in (tmp_path / "p.html").read_text()
    assert main(["check", str(bad), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["problem_count"] == 1 and document["problems"][0]["line"] == 2 and not document["clean"]
    assert (
        document["statistics"]["good_records"] == 2
        and {"code": "duplicates"}.items() <= document["advice"][1].items()
    )
    impossible = [
        "--num_workers -1",
        f"--model_path {tmp_path}",
        f"--data_root {bad}",
        "--max_num_tokens 0",
        f"--output {tmp_path}",
    ]
    for argv in (
        [],
        [str(tmp_path / "none.jsonl")],
        *([str(bad), *options.split()] for options in impossible),
    ):
        assert main(["check", *argv]) == 2, argv
        assert capsys.readouterr().err.startswith("unigen: error: ")


def test_an_interrupt_ends_with_what_was_found_until_then(tmp_path, capsys, monkeypatch):
    """Ctrl-C in the middle: a report that says so, exit code 130, no process left."""
    monkeypatch.setattr(module, "PART", 4096)
    values = [talk(f"question {i}", "answer") for i in range(3000)]
    path = write(tmp_path / "a.jsonl", '{"x": 1}', *values)
    before = set(multiprocessing.active_children())

    def interrupt(done, total, records, problems):
        if records > 500:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("unigen.commands.check.command._bar", lambda: nullcontext(interrupt))
    # a program started in the background ignores it
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["check", str(path), "--json", "--num_workers", "1"]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    document = json.loads(capsys.readouterr().out)
    assert (
        document["interrupted"]
        and 500 < document["statistics"]["records"] < 3000
        and document["problem_count"] == 1
    )
    assert set(multiprocessing.active_children()) <= before


def test_problems_beyond_their_bound_are_counted_and_that_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("unigen.commands.check.findings.MAX_PROBLEMS", 10_000)
    (tmp_path / "a.jsonl").write_text("{}\n" * 200)
    listed = tmp_path / "problems.jsonl"
    problems = Problems(listed)
    found = check([tmp_path / "a.jsonl"], load_planner(None, DataOptions()), num_workers=0, problems=problems)
    assert found.problems.counts["no_format"] == 200 and found.problems.counts["more_problems"] == 1
    problems.save()
    problems.close()
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert lines[-1]["code"] == "more_problems" and 10 < len(lines) < 60


def test_data_without_a_record_is_a_problem_as_training_refuses_it(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("\n")
    assert main(["check", str(tmp_path / "a.jsonl"), "--num_workers", "0"]) == 1
    assert "no_record" in capsys.readouterr().out
    (tmp_path / "b.jsonl").write_text('{"conversations": [{"role": "assistant", "content": "yes"}]}\n')
    assert main(["check", str(tmp_path), "--num_workers", "0"]) == 0, "one of several may be empty"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_control_tokens_are_problems_in_whatever_text_they_stand(tmp_path, golden, workers):
    texts = [
        "<|im_start|>",
        "a <|endoftext|>",
        "x<|vision_start|>",
        "<|vision_end|>",
        "no <|im_end|>",
        "fine",
    ]
    turns = [
        {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]}
        for text in texts
    ]
    path = write(tmp_path / "a.jsonl", *turns)
    for folder in (None, golden / "model"):
        found = check(path, load_planner(folder, DataOptions()), num_workers=workers)
        told = [(p["code"], p["line"], p["field"]) for p in found.problems]
        assert told == [("control_token", n, "conversations[1].content") for n in range(1, 6)]
        allowed = load_planner(folder, DataOptions(allow_control_tokens=True))
        assert not len(check(path, allowed, num_workers=workers).problems)


def test_splits_and_files_about_the_data_are_left_out_and_told(tmp_path):
    record = json.dumps(
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    )
    for name in ("train.jsonl", "val.jsonl"):
        (tmp_path / name).write_text(record + "\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    found = check(tmp_path, load_planner(None, DataOptions()), num_workers=0)
    summary = found.summary()
    assert summary["records"] == 1 and not len(found.problems)
    assert summary["left_out"] == {"splits": "val.jsonl (validation)", "about": "dataset_infos.json"}
    told = {advice.code: advice.level for advice in advise(summary, 0, False)}
    assert told["left_out_splits"] == "warn" and told["left_out_about"] == "note"


def test_the_verdict_is_that_of_a_training(tmp_path):
    """What check advises is what training does: the same files, the same limit."""
    good = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    cases = {
        "few.jsonl": [good] * 99 + ["{"],
        "many.jsonl": [good] * 3 + ["{"],
        "cut.json": ["[" + good, ", " + good],
        "empty.jsonl": [""],
    }
    for name, lines in cases.items():
        (tmp_path / name).write_text("\n".join(lines))
        found = check(tmp_path / name, load_planner(None, DataOptions()), num_workers=0)
        codes = {advice.code for advice in advise(found.summary(), len(found.problems), False)}
        try:
            UnifiedGenerationDataset(tmp_path / name, on_bad_record="skip")
            starts = True
        except BadData:
            starts = False
        assert starts == ("few_problems" in codes) == (name == "few.jsonl"), (name, codes)
        assert codes & {"few_problems", "problems", "lost_file", "no_records"}


def test_a_length_beyond_the_models_positions_is_refused(golden: Path):
    longest = load_planner(golden / "model", DataOptions()).max_length
    assert load_planner(golden / "model", DataOptions(max_sequence_length=longest)).max_length == longest
    with pytest.raises(ConfigError, match=f"max_sequence_length {longest}, "):
        load_planner(golden / "model", DataOptions(max_sequence_length=longest + 1))


@pytest.mark.slow
def test_the_recipe_of_a_training_is_checked_source_by_source(tmp_path, capsys, golden):
    """Its fields, splits and sizes, validation and probe too; a file that two sources read alike counts once."""
    picture(tmp_path / "p.png")
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / "train.jsonl", *[{"image": "../p.png", "said": f"a cat {i}"} for i in range(3)])
    write(tmp_path / "a" / "val.jsonl", {"image": "../p.png", "said": "a dog"})
    write(tmp_path / "talks.jsonl", talk("why", "so"), {"image": "p.png"})
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        f"model_path: {golden / 'model'}\nlearning_rate: 1e-4\nval_data_path: {tmp_path / 'a'}\n"
        "fields: {text: said}\ntrain_sources:\n"
        f"- {{path: {tmp_path / 'a'}, name: pictures, max_image_tokens: 16}}\n"
        f"- {{path: {tmp_path / 'talks.jsonl'}, fields: {{metadata: said}}}}\n"
        f"probe_data_path: {tmp_path / 'a' / 'val.jsonl'}\n"
    )
    assert main(["check", "--config", str(recipe), "--json"]) == 2  # metadata is a place that no talk has
    assert "said, which --fields metadata=said names" in capsys.readouterr().err
    recipe.write_text(recipe.read_text().replace("{metadata: said}", "{query: messages.0.content}"))
    write(tmp_path / "talks.jsonl", {"messages": [{"content": "why"}], "response": "so"}, {"image": "p.png"})
    assert main(["check", "--config", str(recipe), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    found = document["statistics"]
    assert found["sources"] == {
        "pictures": 3, "talks.jsonl": 2, "val_data_path": 1, "probe_data_path": 0,
    }  # fmt: skip
    assert found["records"] == 6 and [p["line"] for p in document["problems"]] == [2]
    assert found["lengths"]["unit"] == "tokens" and found["left_out"]["splits"] == ""
    assert found["learnt_too"] == found["repeats"]["records"]["surplus"] == 0
    # paths take the place of that data, and a training's flags are those of its recipe
    assert main(["check", str(tmp_path / "a"), "--config", str(recipe), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["statistics"]["records"] == 3
    talks = str(tmp_path / "talks.jsonl")
    assert main(["check", "--train_data_path", talks, "--fields", "query=messages.0.content"]) == 1


def test_a_source_without_a_record_is_a_problem_beside_others(tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n")
    good = write(tmp_path / "a.jsonl", talk("why", "so"))
    flags = ["--train_data_path", str(good), "--val_data_path", str(tmp_path / "empty.jsonl")]
    assert main(["check", *flags, "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["code"] == "no_record" and problem["file"].endswith("empty.jsonl")
    # records that are validated on as well are no repetition, which a training would meet twice
    flags[-1] = str(write(tmp_path / "val.jsonl", talk("why", "so"), talk("how", "so")))
    assert main(["check", *flags, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["statistics"]["learnt_too"] == 1
    assert [one["code"] for one in document["advice"] if one["level"] == "warn"] == ["learnt_too"]
    flags[-1] = str(good)
    assert main(["check", *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["statistics"]["learnt_too"] == 1


@pytest.mark.parametrize(
    ("record", "flags"),
    [
        ({"img": "p.png", "caption_text": "a cat"}, "--fields image=img caption=caption_text"),
        ({"image_path": "p.png", "captoin": "a cat"}, "--fields caption=captoin"),
        ({"Image": "p.png", "text": "a cat"}, "--fields image=Image"),
        ({"q": "why", "a": "so"}, "--fields query=q response=a"),
        ({"instructions": "red", "input_img": "p.png", "output_img": "p.png"}, "--fields"),
    ],
)
def test_near_misses_get_the_mapping_that_makes_the_record_work(record, flags, tmp_path, capsys):
    picture(tmp_path / "p.png")
    path = str(write(tmp_path / "a.jsonl", record))
    assert main(["check", path, "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert flags in problem["cure"], problem
    given = problem["cure"].partition("--fields ")[2].split(" where ")[0].split()
    assert main(["check", path, "--fields", *given]) == 0
    # the same pairs the wrong way round
    turned = ["=".join(reversed(pair.split("="))) for pair in given]
    capsys.readouterr()
    assert main(["check", path, "--fields", *turned]) == 2
    assert f"the other way round: --fields {given[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "red", "chosen_image": "p.png", "rejected_image": "p.png"},
        {"instruction": "say", "rejected_output": "no"},
        {"image": "p.png", "negative_text": "blurred"},
        {"query": "why", "response_a": "so", "response_b": "no"},
        {"caption": "a cat", "mask_image": "p.png"},
        {"text": "a cat", "depth_image": "p.png"},
        {"image_1": "p.png", "image_2": "p.png", "caption": "a cat"},
    ],
)
def test_no_mapping_is_offered_that_teaches_what_was_not_meant(record, tmp_path, capsys):
    picture(tmp_path / "p.png")
    assert main(["check", str(write(tmp_path / "a.jsonl", record)), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "Give --fields" not in problem["cure"], problem
