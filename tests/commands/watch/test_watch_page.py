"""The page holds what the folder says, obeys nothing that stands in it, and works in a real browser."""

from __future__ import annotations

import html
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from browser import FAULTS, dump, framed, in_browser
from pages import Page
from PIL import Image as PILImage
from recorded import PROMPTS, record, write_metrics, write_rank, write_samples

from unigen.commands.watch import page as page_module
from unigen.commands.watch.options import WatchOptions
from unigen.commands.watch.page import page as page_of
from unigen.figures import figure
from unigen.runs.reader import RunFolder
from unigen.show.curves import MAX_POINTS
from unigen.show.language import Words
from unigen.show.pages import write_page


def written(path: Path, *folders: Path, **options) -> str:
    runs = [RunFolder(folder) for folder in folders]
    for run in runs:
        run.update()
    return write_page(path, **page_of(runs, WatchOptions(**options))).read_text("utf-8")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_holds_everything_and_nothing_from_outside(folder, tmp_path, language):
    source = written(tmp_path / "new" / "page.html", folder, language=language)
    page, words = Page(source), Words(language, "watch")
    assert "://" not in source and page.tags.count("script") == 1 and f'lang="{language}' in source
    for key in (
        "curves", "samples", "checkpoints", "processes", "bad_steps", "bad_records", "options", "running",
        "tokens_per_second", "of_weights", "of_val_image_loss_by_time", "of_probe_drift",
    ):  # fmt: skip
        assert words(key) in page.text, key
    for part in (
        "step_1000", "best", "88 GB", "node-2", words.phase("forward/backward"), "data/train.jsonl:88", "broken_picture",
        *PROMPTS,
    ):  # fmt: skip
        assert part in page.text, part
    assert len(page.charts) == 12 and sorted(p.size for p in page.pictures) == [(48, 48)] + [(128, 128)] * 18
    assert len(page.of("img", "small")) == 1, "the picture that the second prompt gives"


def test_the_charts_hold_the_numbers_of_the_log(folder, tmp_path):
    """What the pointer shows of training and validation are the log's values; the skipped steps are marked
    once each."""
    source = written(tmp_path / "page.html", folder, steps=None)
    page = Page(source)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    text_loss = page.charts[1]["curves"]
    assert [c["n"] for c in text_loss] == ["training", "validation"]
    wanted = [(r["step"], figure(r["val_text_loss"])) for r in rows if "val_text_loss" in r]
    assert list(zip(text_loss[1]["x"], text_loss[1]["t"], strict=True)) == wanted
    means = [r["text_loss"] for r in rows if "text_loss" in r]
    run = -(-len(means) // MAX_POINTS)
    assert text_loss[0]["t"] == [
        figure(float(np.mean(means[k : k + run]))) for k in range(0, len(means), run)
    ]
    (marks,) = re.findall(r'class="skips" d="([^"]*)"', source)
    assert marks.count("M") == 2


def test_several_runs_are_compared(folder, tmp_path):
    other = record(tmp_path / "other", 400, ranks=1, seed=9, learning_rate=3e-5, model_path="mine")
    page = Page(written(tmp_path / "page.html", folder, other, smooth=0.9))
    assert "Options that differ" in page.text and "3e-05" in page.text and "1e-05" in page.text
    assert "models/BAGEL-7B-MoT" in page.text and "eval_steps" not in page.text
    assert "2 runs" in page.text and "garden: step 1,200" in page.text and "other: step 400" in page.text
    assert {c["n"] for c in page.charts[0]["curves"]} == {
        "garden",
        "garden · validation",
        "other",
        "other · validation",
    }
    assert len(page.pictures) == 5


EVIL = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">' \" &"
    " \u202e\x00\x1b[2J 猫 </style>"
)


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A run in which every text that people or data can choose tries to break out."""
    folder = record(
        tmp_path / EVIL.replace("/", "⁄").replace("\x00", ""),
        50,
        ranks=2,
        **{EVIL: EVIL, "wandb_run_name": EVIL},
    )
    for rank in (0, 1):
        write_rank(folder, rank, phase=EVIL, host=EVIL, step=50)
    write_metrics(
        folder / "bad_steps.jsonl",
        [{"step": EVIL, "why": EVIL, "records": [[EVIL, 1], EVIL]}, {"records": 3}],
    )
    write_metrics(
        folder / "bad_records.jsonl", [{"file": EVIL, "line": EVIL, "code": EVIL, "found": EVIL}, {}]
    )
    write_samples(folder, [60], [EVIL])
    place = folder / "samples" / "step_60"
    entries = [{"prompt": EVIL, "seed": 1, "pieces": [{"text": EVIL}, {"image": "x.svg"}], "error": EVIL}]
    (place / "x.svg").write_text(f"<svg xmlns='http://www.w3.org/2000/svg'><script>{EVIL}</script></svg>")
    (place / "index.json").write_text(json.dumps(entries))
    return folder


def test_hostile_texts_are_shown_not_obeyed(hostile, tmp_path):
    """In one run's page and in a comparison: one script, ours; the texts are there as texts; no control or
    bidi characters."""
    other = record(tmp_path / "other", 30, ranks=1)
    for folders in ((hostile,), (hostile, other)):
        source = written(tmp_path / "page.html", *folders)
        page = Page(source)
        assert page.tags.count("script") == 1 and page.text.count("document.title='owned'") >= 4
        assert not set("\u202e\x00\x1b") & set(source)
        (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', source)
        assert html.unescape(policy).startswith(
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-"
        )


def test_pictures_are_limited_in_size_and_number(tmp_path, monkeypatch):
    """A large one is scaled down, a broken one told, and a page that is full names the rest."""
    folder = record(tmp_path / "run", 30, ranks=1)
    write_samples(folder, [10], ["a"])
    place = folder / "samples" / "step_10"
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8)
    PILImage.fromarray(noise).save(place / "large.png")
    (place / "broken.png").write_bytes((place / "large.png").read_bytes()[:200_000])
    (place / "none.png").write_bytes(b"no picture at all")
    pieces = [{"image": name} for name in ("000.png", "large.png", "broken.png", "none.png")]
    (place / "index.json").write_text(json.dumps([{"prompt": "a", "seed": 1, "pieces": pieces}]))
    page = Page(written(tmp_path / "page.html", folder))
    assert [p.size for p in page.pictures] == [(128, 128), (384, 288)]
    assert (
        "broken.png: picture not shown: it cannot be read" in page.text
        and "none.png: picture not shown" in page.text
    )
    monkeypatch.setattr(page_module, "PAGE_BYTES", 50_000)
    page = Page(written(tmp_path / "page.html", folder))
    assert len(page.pictures) == 1 and "large.png: picture not shown: too large for this page" in page.text


def test_many_steps_of_samples_are_picked_evenly(tmp_path):
    folder = record(tmp_path / "run", 30, ranks=1)
    write_samples(folder, list(range(10, 310, 10)), ["a"])
    page = Page(written(tmp_path / "page.html", folder))
    shown = [int(n) for n in re.findall(r"step (\d+)\s*Here is", page.text)]
    assert (
        shown[0] == 10
        and shown[-1] == 300
        and len(shown) == 7
        and max(np.diff(shown)) - min(np.diff(shown)) <= 10
    )


def test_a_run_without_anything_has_a_page(tmp_path):
    write_metrics(tmp_path / "run" / "metrics.jsonl", [])
    page = Page(written(tmp_path / "page.html", tmp_path / "run"))
    assert "starting" in page.text and "No metrics yet" in page.text and page.charts == []


# ---- in a browser


@in_browser
@pytest.mark.slow
def test_a_browser_obeys_nothing_in_a_hostile_run(hostile, tmp_path):
    """The title stays the page's own, although every text tries to change it; a planted inline script does
    not run either."""
    path = tmp_path / "page.html"
    source = written(path, hostile)
    document = dump(path, tmp_path / "profile")
    assert re.search(r"<title>Run ", document) and "<title>owned" not in document
    path.write_text(source.replace("</body>", "<script>document.title='owned'</script></body>"), "utf-8")
    assert "<title>owned" not in dump(path, tmp_path / "profile"), "the policy lets no other script run"


@in_browser
@pytest.mark.slow
def test_the_pointer_shows_the_values_of_its_step(folder, tmp_path):
    """At the step of the third validation: that step, the training's value there, the validation's value."""
    source = written(tmp_path / "whole.html", folder)
    data = Page(source).charts[1]
    share = (300 - data["first"]) / (data["last"] - data["first"])
    title = framed(
        source,
        "const area = d.querySelectorAll('.area')[1], box = area.getBoundingClientRect();"
        f"area.dispatchEvent(new PointerEvent('pointermove', {{clientX: box.left + {share} * box.width}}));"
        "document.title = [...area.querySelectorAll('.tip div')].map(row => row.textContent).join('|');"
        "area.dispatchEvent(new PointerEvent('pointerleave'));"
        "if (!area.querySelector('.tip').hidden) document.title = 'still there';",
        tmp_path,
    )
    training, val = data["curves"]
    assert title.startswith("step 300|training  ") and title.endswith(
        f"|validation  {val['t'][val['x'].index(300)]}"
    ), title
    nearest = min(range(len(training["x"])), key=lambda i: abs(training["x"][i] - 300))
    assert f"training  {training['t'][nearest]}|" in title


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "zh"])
def test_on_a_phone_nothing_leaves_the_page_and_no_word_is_split(folder, tmp_path, language):
    """One run with all folds open, and several."""
    other = record(tmp_path / "other", 400, ranks=1, seed=9)
    for folders in ([folder], [folder, other]):
        source = written(tmp_path / "page.html", *folders, language=language)
        source = source.replace("<details>", "<details open>")
        faults = json.loads(framed(source, FAULTS, tmp_path))
        assert faults["wide"] == [] and faults["cells"] > 30
        assert [word for word in faults["split"] if len(word) < 30] == [], "only paths"
    source = source.replace(
        "table { width: max-content; }", "td, th { overflow-wrap: anywhere; max-width: 3em; }"
    )
    assert json.loads(framed(source, FAULTS, tmp_path))["split"], "and the test would see it"


def test_the_page_of_a_long_run_is_quick_and_small(tmp_path):
    """20,000 steps: the page holds hundreds of points a curve, not thousands."""
    folder = record(tmp_path / "run", 30, ranks=1)
    line = (folder / "metrics.jsonl").read_text().splitlines()[3]
    (folder / "metrics.jsonl").write_text(
        "".join(line.replace('"step": 4', f'"step": {n}') + "\n" for n in range(1, 20_001))
    )
    began = time.monotonic()
    source = written(tmp_path / "page.html", folder)
    assert len(source) < 800_000 and time.monotonic() - began < 30
    assert all(len(curve["x"]) <= MAX_POINTS for c in Page(source).charts for curve in c["curves"])
