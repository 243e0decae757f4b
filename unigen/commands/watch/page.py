"""The page of ``unigen watch``: one HTML file with curves, samples and everything else that the run's folder
tells."""

from __future__ import annotations

import base64
import io
import json
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unigen.commands.watch.health import State, judge, speed, worries
from unigen.commands.watch.options import WatchOptions
from unigen.commands.watch.panels import chart, curves_of, panels_of
from unigen.runs.reader import Answer, Run
from unigen.show.figures import figure, size
from unigen.show.language import TAGS, Words
from unigen.show.pages import escape, part, table, write_sections
from unigen.show.terminal import harmless

HARD_PIXELS = 64  # pictures up to this side are magnified with hard pixels
SHOWN_STEPS = 7  # of the samples: the first, the last, and some between
SHOWN_PROMPTS = 24
PICTURE_BYTES = 120_000  # a larger file is scaled down
PICTURE_SIDE = 384
PAGE_BYTES = 16_000_000  # of pictures; the rest is named only
TEXT_LENGTH = 600  # characters of a sample's text
VALUE_LENGTH = 400  # of an option

MARKS = {
    "running": ("●", "good"), "hung": ("■", "bad"), "dead": ("✕", "bad"), "stopped": ("■", "warn"), "finished": ("✓", "good"),
    "new": ("○", "note"),
}  # fmt: skip


def write(path: Path, runs: Sequence[Run], options: WatchOptions) -> Path:
    """Writes the page of one run, or of several that are compared. ``path``'s folder is made where it is
    missing."""
    words = Words(options.language, "watch")
    parts = _one(runs[0], options, words) if len(runs) == 1 else _many(runs, options, words)
    title = words("title", name=runs[0].name) if len(runs) == 1 else words("title_many", n=len(runs))
    return write_sections(
        path, title, parts, language=TAGS[words.language], styles=["charts", "watch"], script="charts"
    )


def _one(run: Run, options: WatchOptions, words: Words) -> list[tuple[str, str]]:
    state = judge(run)
    parts = [("", _head(run, state, words)), (words("curves"), _charts([run], options, words))]
    pictures = Pictures(words)
    if samples := _samples(run, pictures, words):
        parts.append((words("samples"), samples))
    if run.checkpoints or run.writing:
        parts.append((words("checkpoints"), _checkpoints(run, words)))
    if len(run.ranks) > 1:
        parts.append((words("processes"), _ranks(run, words)))
    if run.bad_steps.count or run.bad_records.count:
        parts.append((words("problems"), _bad(run, words)))
    if options_shown := _options(run, words):
        parts.append(("", options_shown))
    return parts


# ---- head


def _mark(state: State) -> str:
    sign, style = MARKS[state.name]
    return f'<span class="mark {style}">{sign}</span>'


def _head(run: Run, state: State, words: Words) -> str:
    total = run.total_steps
    place = words("of_steps", step=run.step, total=total) if total else words("step_alone", step=run.step)
    lines = [
        f'<p class="verdict">{_mark(state)}<span>{escape(words(state.name))}</span><span class="soft">{escape(place)}</span></p>'
    ]
    if total:
        share = min(1.0, run.step / total)
        style = MARKS[state.name][1]
        lines.append(
            f'<div class="progress" title="{share:.1%}"><i class="{style}" style="width:{share:.2%}"></i></div>'
        )
    why = "; ".join(words(told.key, **told.values) for told in state.why)
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    lines.append(
        f'<p class="soft">{escape(why)}<br>{escape(words("seen", when=when, folder=str(run.folder.resolve())))}</p>'
    )
    if run.earlier:
        lines.append(f'<p class="soft">{escape(words("earlier", names=", ".join(run.earlier)))}</p>')
    told = [(w.level, words(w.key, **w.values)) for w in worries(run, state)]
    items = "".join(
        f'<li><span class="mark {level}">!</span><span>{escape(text)}</span></li>' for level, text in told
    )
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(words(key))}</span>{f"<small>{escape(note)}</small>" if note else ""}</div>'
        for key, value, note in _tiles(run, state, words)
    )
    return f'{"".join(lines)}<div class="tiles">{tiles}</div>' + (
        f'<ul class="worries">{items}</ul>' if items else ""
    )


def _tiles(run: Run, state: State, words: Words) -> list[tuple[str, str, str]]:
    """(name, value, note) of each."""
    pace, log, total = speed(run), run.metrics.log, run.total_steps
    tiles = []
    if total:
        tiles.append(("done", f"{min(1.0, run.step / total):.1%}", ""))
    if state.name == "running":
        tiles.append(("eta", "–" if pace.eta is None else words.duration(pace.eta), ""))
    for name in ("loss", "val_loss"):
        points = log.points(name)
        if points:
            best = min(points, key=lambda p: p.low)
            note = (
                f"{words('best')} {figure(best.low)}, {words('step_alone', step=round(best.step))}"
                if name == "val_loss"
                else ""
            )
            tiles.append(("validation" if name == "val_loss" else "loss", figure(log.latest.get(name)), note))
    tiles.append(("tokens_per_second", figure(pace.tokens_per_second), ""))
    tiles.append(
        (
            "steps_per_minute",
            figure(None if pace.seconds_per_step is None else 60 / pace.seconds_per_step),
            "",
        )
    )
    tiles.append(("data_wait_share", "–" if pace.data_wait is None else f"{pace.data_wait:.1%}", ""))
    if (last := run.last_checkpoint) is not None:
        tiles.append(("last_checkpoint", words("ago", t=words.duration(time.time() - last.time)), last.name))
    tiles.append(("disk_left", "–" if run.disk_free is None else size(run.disk_free), ""))
    return tiles


def _charts(runs: Sequence[Run], options: WatchOptions, words: Words) -> str:
    panels, names = panels_of(runs), [harmless(run.name) for run in runs]
    if not panels:
        return f'<p class="soft">{escape(words("no_metrics"))}</p>'
    drawn = []
    for panel in panels:
        skipped = list(runs[0].metrics.log.skipped) if len(runs) == 1 and panel.name == "grad_norm" else []
        drawn.append(
            part("chart", chart(panel, curves_of(runs, panel, options.smooth), names, words, skipped))
        )
    return f'<div class="charts">{"".join(drawn)}</div>'


# ---- samples


class Pictures:
    """Files as ``<img>``, scaled down where they are large, until the page holds enough."""

    def __init__(self, words: Words):
        self.words, self.left = words, PAGE_BYTES

    def show(self, path: Path, caption: str) -> str:
        try:
            data = path.read_bytes()
            kind = _kind(data)
            if kind is None or len(data) > PICTURE_BYTES:
                data, kind = _scaled(data), "jpeg"
        except (OSError, ValueError):  # PictureError is a ValueError of ours
            return self._missing(path, "unreadable_picture")
        if len(data) > self.left:
            return self._missing(path, "too_large")
        self.left -= len(data)
        small = (
            " class=small"
            if kind == "png" and max(struct.unpack(">II", data[16:24].ljust(8, b"\0"))) <= HARD_PIXELS
            else ""
        )
        return f'<img{small} alt="{escape(caption)}" src="data:image/{kind};base64,{base64.b64encode(data).decode("ascii")}">'

    def _missing(self, path: Path, why: str) -> str:
        return (
            f'<p class="soft">{escape(path.name)}: {escape(self.words("not_shown", why=self.words(why)))}</p>'
        )


def _kind(data: bytes) -> str | None:
    """What a browser calls the picture; None for one that it might not show."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return (
        "jpeg"
        if data.startswith(b"\xff\xd8\xff")
        else "webp"
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP"
        else None
    )


def _scaled(data: bytes) -> bytes:
    """A JPEG of at most ``PICTURE_SIDE``. Raises ValueError where the bytes are no picture."""
    # late: it brings PyTorch, which nothing else here needs
    from unigen.sequence.images import PictureError, open_image

    try:
        image = open_image(data)
    except PictureError as error:
        raise ValueError(str(error)) from error
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _picked(steps: Sequence[int]) -> list[int]:
    """The first, the last and some between, evenly."""
    if len(steps) <= SHOWN_STEPS:
        return list(steps)
    return [steps[round(k * (len(steps) - 1) / (SHOWN_STEPS - 1))] for k in range(SHOWN_STEPS)]


def _samples(run: Run, pictures: Pictures, words: Words) -> str:
    """For each prompt of the newest samples what became of it over the steps."""
    columns = [{(a.prompt, a.seed): a for a in run.answers(step)} for step in _picked(run.sampled)]
    newest = next((found for found in reversed(columns) if found), {})
    body = [f'<p class="soft">{escape(words("samples_note"))}</p>'] if newest else []
    for key in list(newest)[:SHOWN_PROMPTS]:
        there = [found[key] for found in columns if key in found]
        figures = [_answer(words("step_alone", step=a.step), a, pictures) for a in there]
        body.append(_prompt(newest[key], figures, len(there), pictures))
    return "".join([*body, _more(len(newest) - SHOWN_PROMPTS, words)])


def _prompt(answer: Answer, figures: Sequence[str], count: int, pictures: Pictures) -> str:
    seed = f"<small>seed {answer.seed}</small>" if answer.seed is not None else ""
    wide = " wide" if count <= 4 else ""
    given = "".join(pictures.show(path, answer.prompt[:200]) for path in answer.given)
    shown = f'<p class="prompt">{given}{escape(_cut(answer.prompt))}{seed}</p>'
    return f'{shown}<div class="answers{wide}">{"".join(figures)}</div>'


def _answer(caption: str, answer: Answer, pictures: Pictures) -> str:
    parts = [
        f"<p>{escape(_cut(p['text']))}</p>" if "text" in p else pictures.show(p["image"], answer.prompt[:200])
        for p in answer.pieces
    ]
    if answer.error:
        parts.append(f'<p class="soft">{escape(_cut(answer.error))}</p>')
    return f"<figure><figcaption>{escape(caption)}</figcaption>{''.join(parts)}</figure>"


def _cut(text: str) -> str:
    """Text of a sample, line breaks kept, without characters that would turn the order of the page's own."""
    kept = "\n".join(harmless(line) for line in text[: TEXT_LENGTH + 1].split("\n"))
    return kept if len(text) <= TEXT_LENGTH else kept[:TEXT_LENGTH] + " …"


def _more(n: int, words: Words) -> str:
    return f'<p class="soft">{escape(words("more", n=n))}</p>' if n > 0 else ""


# ---- tables


def _checkpoints(run: Run, words: Words) -> str:
    rows = [
        [
            c.name,
            f"{c.step:,}",
            words("ago", t=words.duration(time.time() - c.time)),
            size(c.size),
            f"{c.world}",
        ]
        for c in reversed(run.checkpoints[-12:])
    ]
    rows = [[name, "", words("being_written"), "", ""] for name in run.writing] + rows
    shown = table(rows, [words(key) for key in ("name", "step", "age", "size", "world")])
    return shown + _more(len(run.checkpoints) - 12, words)


def _ranks(run: Run, words: Words) -> str:
    rows = []
    for r in run.ranks[:256]:
        times = [words.duration(r.busy), words("ago", t=words.duration(r.age))]
        rows.append([r.rank, harmless(r.host), str(r.pid), f"{r.step:,}", harmless(r.phase) or "–", *times])
    header = [words(key) for key in ("rank", "host", "pid", "step", "phase", "phase_for", "last_sign")]
    return table(rows, header) + _more(len(run.ranks) - 256, words)


def _bad(run: Run, words: Words) -> str:
    parts = []
    if run.bad_steps.count:
        rows = [
            [_short(e.get("step", "")), _short(e.get("why", "")), _short(_records(e.get("records")))]
            for e in reversed(run.bad_steps.last)
        ]
        parts.append(f"<h3>{escape(words('bad_steps'))}: {run.bad_steps.count:,}</h3>")
        parts.append(
            table(rows, [words(key) for key in ("step", "why", "records")])
            + _more(run.bad_steps.count - len(rows), words)
        )
    if run.bad_records.count:
        rows = [
            [_short(f"{e.get('file')}:{e.get('line')}"), _short(e.get("code")), _short(e.get("found"))]
            for e in run.bad_records.last
        ]
        parts.append(f"<h3>{escape(words('bad_records'))}: {run.bad_records.count:,}</h3>")
        parts.append(
            table(rows, [words(key) for key in ("file", "code", "found")])
            + _more(run.bad_records.count - len(rows), words)
        )
    return "".join(parts)


def _records(value: Any) -> str:
    if not isinstance(value, list):
        return ""
    shown = [":".join(map(str, entry)) if isinstance(entry, list) else str(entry) for entry in value[:3]]
    return ", ".join(shown) + (f" … ({len(value):,})" if len(value) > 3 else "")


def _short(value: Any) -> str:
    text = harmless(value)
    return text if len(text) <= VALUE_LENGTH else text[:VALUE_LENGTH] + " …"


def _options(run: Run, words: Words) -> str:
    """The options of the run that are not the defaults of this version."""
    from unigen.config import Config

    defaults = Config().to_dict()
    rows = [
        [_short(name), _short(json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value)]
        for name, value in run.config.items()
        if name not in defaults or defaults[name] != value
    ]
    if not rows:
        return ""
    body = (
        f'<p class="soft">{escape(words("options_note"))}</p>{table(rows, [words("option"), words("value")])}'
    )
    return f"<details><summary>{escape(words('options'))}</summary>{body}</details>"


# ---- several runs


def _many(runs: Sequence[Run], options: WatchOptions, words: Words) -> list[tuple[str, str]]:
    rows, told = [], []
    for run in runs:
        state, pace, latest = judge(run), speed(run), run.metrics.log.latest
        steps = f"{run.step:,}" + (f" / {run.total_steps:,}" if run.total_steps else "")
        best = min((p.low for p in run.metrics.log.points("val_loss")), default=None)
        left = words.duration(pace.eta) if pace.eta is not None and state.name == "running" else "–"
        figures = [
            figure(latest.get("loss")),
            figure(latest.get("val_loss")),
            figure(best),
            figure(pace.tokens_per_second),
        ]
        rows.append(
            [harmless(run.name), f"{MARKS[state.name][0]} {words(state.name)}", steps, *figures, left]
        )
        told += [
            (w.level, f"{harmless(run.name)}: {words(w.key, **w.values)}")
            for w in worries(run, state)
            if w.level == "bad"
        ]
    header = [
        words(key)
        for key in ("run", "state", "step", "loss", "validation", "best", "tokens_per_second", "eta")
    ]
    items = "".join(
        f'<li><span class="mark {level}">!</span><span>{escape(text)}</span></li>' for level, text in told
    )
    head = table(rows, header) + (f'<ul class="worries">{items}</ul>' if items else "")
    parts = [("", head), (words("curves"), _charts(runs, options, words))]
    if samples := _compared_samples(runs, words):
        parts.append((words("samples"), samples))
    return parts


def _compared_samples(runs: Sequence[Run], words: Words) -> str:
    pictures = Pictures(words)
    newest = [
        (run, {(a.prompt, a.seed): a for a in run.answers(run.sampled[-1])} if run.sampled else {})
        for run in runs
    ]
    keys = list(dict.fromkeys(key for _, found in newest for key in found))
    body = [f'<p class="soft">{escape(words("samples_of_runs"))}</p>'] if keys else []
    for key in keys[:SHOWN_PROMPTS]:
        there = [(run, found[key]) for run, found in newest if key in found]
        figures = [
            _answer(f"{harmless(run.name)}, {words('step_alone', step=a.step)}", a, pictures)
            for run, a in there
        ]
        body.append(_prompt(there[0][1], figures, len(there), pictures))
    return "".join([*body, _more(len(keys) - SHOWN_PROMPTS, words)])
