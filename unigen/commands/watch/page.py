"""The page of ``unigen watch``: one HTML file with curves, samples and what else the run's folder tells; and
the curves as PNG files."""

from __future__ import annotations

import io
import logging
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unigen.commands.watch import report
from unigen.commands.watch.health import diagnose
from unigen.commands.watch.options import WatchOptions
from unigen.commands.watch.panels import chart, curves_of, panels_of
from unigen.figures import figure
from unigen.files import atomic
from unigen.foreign import kind_of_start
from unigen.outputs import claim
from unigen.runs.reader import RunFolder, SampleAnswer
from unigen.show.charts import Chart
from unigen.show.language import TAGS, Words
from unigen.show.pages import Embedded, data_uri

log = logging.getLogger(__name__)
KINDS = {"png": "png", "jpg": "jpeg", "webp": "webp"}  # of pictures that every browser shows, and their names
HARD_PIXELS = 64  # pictures up to this side are magnified with hard pixels
SHOWN_STEPS = 7  # of the samples: the first, the last, and some between
SHOWN_PROMPTS = 24
PICTURE_BYTES = 120_000  # a larger file is scaled down
PICTURE_SIDE = 384
PAGE_BYTES = 16_000_000  # of pictures; the rest is named only
TEXT_LENGTH = 600  # characters of a sample's text
ROWS = 12, 256, 5  # of tables

Answers = Mapping[tuple[str, int | None], SampleAnswer]  # by prompt and seed


def page(runs: Sequence[RunFolder], options: WatchOptions) -> dict[str, Any]:
    """The page of one run, or of several that are compared: the arguments of :func:`unigen.show.pages.render`
    and, beside the path, of :func:`unigen.show.pages.write_page`."""
    words = Words(options.language, "watch")
    one = len(runs) == 1
    title = words("title", name=runs[0].name) if one else words("title_many", n=len(runs))
    values = _one(runs[0], words) if one else _many(runs, words)
    return {
        "template": "watch.html",
        "values": values | {"words": words, "charts": charts_of(runs, options.smooth, words)},
        "by": "unigen watch",
        "title": title,
        "language": TAGS[words.language],
        "styles": ["charts", "watch"],
        "script": "charts",
    }


def _one(run: RunFolder, words: Words) -> dict[str, Any]:
    state = diagnose(run)
    columns = [("", _answers(run, step)) for step in _picked(run.sampled)]
    newest = next((list(found) for _, found in reversed(columns) if found), [])
    return {
        "head": {
            "mark": report.MARKS[state.name],
            "state": words(state.name),
            "place": report.progress_of(run, words),
            "share": report.share_done(run),
            "why": report.why(state, words),
            "seen": words("seen", when=time.strftime("%Y-%m-%d %H:%M:%S"), folder=str(run.folder.resolve())),
            "earlier": words("earlier", names=words.listed(run.earlier)) if run.earlier else "",
            "tiles": [*_results(run, words), *report.facts(run, state, words)],
        },
        "overview": None,
        "warnings": report.warning_rows(run, state, words),
        "samples": _samples(words("samples_note"), newest, columns, words),
        "tables": report.tables(run, words, ROWS),
        "options": _options(run),
    }


def _many(runs: Sequence[RunFolder], words: Words) -> dict[str, Any]:
    table, _, wrong = report.overview(runs, words)
    columns = [
        (words("named", name=run.name, value=""), _answers(run, run.sampled[-1]))
        for run in runs
        if run.sampled
    ]
    keys = list(dict.fromkeys(key for _, found in columns for key in found))
    samples = _samples(words("samples_of_runs"), keys, columns, words)
    shared = {"overview": table, "warnings": wrong, "samples": samples}
    return {"head": None, "tables": report.differing(runs, words), "options": [], **shared}


def _results(run: RunFolder, words: Words) -> list[tuple[str, str, str]]:
    """``(name, value, note)`` of the share done and of the losses."""
    share, log, found = report.share_done(run), run.metrics.log, []
    if share is not None:
        found.append((words("done"), f"{share:.1%}", ""))
    if log.points("loss"):
        found.append((words("loss"), figure(log.latest.get("loss")), ""))
    if log.points("val_loss"):
        note = ""
        if best := log.best():
            note = words.listed([f"{words('best')} {figure(best[1])}", words("step_alone", step=best[0])])
        found.append((words("validation"), figure(log.latest.get("val_loss")), note))
    return found


def charts_of(runs: Sequence[RunFolder], smoothing: float, words: Words) -> list[Chart]:
    """A chart for each panel."""
    names, drawn = [run.name for run in runs], []
    for panel in panels_of(runs):
        skipped = list(runs[0].metrics.log.skipped) if len(runs) == 1 and panel.name == "grad_norm" else []
        drawn.append(chart(panel, curves_of(runs, panel, smoothing), names, words, skipped))
    return drawn


def write_plots(folder: Path, runs: Sequence[RunFolder], options: WatchOptions) -> list[str]:
    """Writes a PNG for each chart into ``folder``, which it makes; their names.

    Raises:
        UserError: files of others with these names are there.
        OSError: it cannot be written.
    """
    from unigen.show import raster  # late: PIL, which a page does without

    names = [f"{panel.name.replace('/', '_')}.png" for panel in panels_of(runs)]
    words = Words(options.language, "watch")
    charts = charts_of(runs, options.smooth, words)
    if words.language != "en" and not raster.has_fonts(charts):
        log.warning(
            "No font of this machine has Chinese letters, so plots are in English. Fix: install one, such"
            " as fonts-noto-cjk"
        )
        charts = charts_of(runs, options.smooth, Words("en", "watch"))
    if names:
        claim("plots", folder, "unigen watch", names)
    for name, drawn in zip(names, charts, strict=True):
        with atomic(folder / name, sync=False) as file:
            file.write(raster.png(drawn))
    return names


def _options(run: RunFolder) -> list[tuple[str, str]]:
    """The options of the run that are not the defaults of this version."""
    from unigen.config import Config

    defaults = Config().to_dict()
    return [
        (report.begin_of(name), report.option_value(value))
        for name, value in run.config.items()
        if name not in defaults or defaults[name] != value
    ]


# ---- samples


def _answers(run: RunFolder, step: int) -> Answers:
    return {(answer.prompt, answer.seed): answer for answer in run.answers(step)}


def _picked(steps: Sequence[int]) -> list[int]:
    """The first, the last and some between, evenly."""
    if len(steps) <= SHOWN_STEPS:
        return list(steps)
    return [steps[round(k * (len(steps) - 1) / (SHOWN_STEPS - 1))] for k in range(SHOWN_STEPS)]


def _samples(
    note: str, keys: Sequence[tuple[str, int | None]], columns: Sequence[tuple[str, Answers]], words: Words
) -> dict[str, Any]:
    """For each of the keys its answers side by side, each column with the begin of its caption."""
    pictures, prompts = Pictures(words), []
    for key in keys[:SHOWN_PROMPTS]:
        there = [(begin, found[key]) for begin, found in columns if key in found]
        # of one run; at step 0 both are the same
        raw = [(begin, a.raw or a) for begin, a in there if not begin and any(b.raw for _, b in there)]
        rows = [
            [(begin + words("step_alone", step=a.step), _parts(a, pictures)) for begin, a in some]
            for some in (there, raw)
        ]
        given = [pictures.show(path) for path in there[-1][1].given]
        shown = {"answers": rows[0], "raw": rows[1]}
        prompts.append({"text": _cut(key[0]), "seed": key[1], "given": given, **shown})
    return {"note": note, "prompts": prompts, "more": report.more(len(keys) - SHOWN_PROMPTS, words)}


def _parts(answer: SampleAnswer, pictures: Pictures) -> list[tuple[str, Any]]:
    """``("text", str)``, ``("picture", Embedded)`` or ``("note", str)`` for each segment of an answer."""
    shown = [("text", _cut(p["text"])) if "text" in p else pictures.show(p["image"]) for p in answer.pieces]
    return [*shown, ("note", _cut(answer.error))] if answer.error else shown


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_LENGTH else text[:TEXT_LENGTH] + " …"


class Pictures:
    """The pictures of a page: large files are scaled down, and shown until the page holds enough."""

    def __init__(self, words: Words):
        self.words, self.left = words, PAGE_BYTES

    def show(self, path: Path) -> tuple[str, Embedded | str]:
        """``("picture", Embedded)``, or ``("note", str)`` that says why it is not shown."""
        try:
            data = path.read_bytes()
            kind = KINDS.get(kind_of_start(data) or "")
            if kind is None or len(data) > PICTURE_BYTES:
                data, kind = _scaled(data), "jpeg"
        except (OSError, ValueError):  # PictureError is a ValueError of ours
            return self._missing(path, "unreadable_picture")
        if len(data) > self.left:
            return self._missing(path, "too_large")
        self.left -= len(data)
        sides = struct.unpack(">II", data[16:24].ljust(8, b"\0"))
        return "picture", Embedded(data_uri(data, kind), kind == "png" and max(sides) <= HARD_PIXELS)

    def _missing(self, path: Path, reason: str) -> tuple[str, str]:
        return "note", self.words(
            "named", name=path.name, value=self.words("not_shown", why=self.words(reason))
        )


def _scaled(data: bytes) -> bytes:
    """A JPEG of at most ``PICTURE_SIDE``. Raises ValueError where the bytes are no picture."""
    # late: it brings PyTorch, which nothing else here needs
    from unigen.sequence.images import open_image

    image = open_image(data)
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
