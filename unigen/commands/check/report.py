"""The report of ``unigen check`` as tables and charts, for the terminal and the page alike."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unigen.commands.check.advice import Advice
from unigen.commands.check.findings import INSIDE, Findings
from unigen.data.keys import NOTES
from unigen.messages import in_language
from unigen.show.charts import Chart, bar_chart
from unigen.show.language import Words

NAMES = 20  # fields of one kind that are shown


class Note(NamedTuple):
    """A sentence."""

    text: str


class ReportTable(NamedTuple):
    """Rows of texts and numbers under a header."""

    header: list[str]
    rows: list[list[Any]]
    stacked: bool = False  # on a phone: its cells are long texts


class Charts(NamedTuple):
    """Histograms side by side. Pages alone show them."""

    charts: list[Chart]


class Shares(NamedTuple):
    """Parts of a whole, ``(name, share)`` each. Pages alone show it."""

    title: str
    parts: list[tuple[str, float]]


ReportBlock = Note | ReportTable | Charts | Shares


def verdict(found: Findings, words: Words) -> str:
    n = len(found.problems)
    return words("one_bad") if n == 1 else words("bad", n=n) if n else words("clean")


def covered(found: Findings, summary: dict[str, Any], words: Words) -> str:
    """What was read, and how thoroughly."""
    depth = words("deep" if found.deep else "headers")
    return words(
        "covered", records=summary["records"], files=summary["files"], seconds=found.seconds, depth=depth
    )


def place(problem: dict[str, Any], folder: str = "") -> str:
    """``file:line``, ``file[index]`` where no line tells it, or the file; without the ``folder`` that all
    files are in."""
    file = problem["file"].removeprefix(folder)
    if problem["line"] is not None:
        return f"{file}:{problem['line']}"
    return file if problem["field"] == "(file)" else f"{file}[{problem['index']}]"


def said(problem: dict[str, Any], words: Words) -> list[str]:
    """What was found, what was expected, and the fix."""
    return [in_language(problem[name], words.language) for name in ("found", "expected", "cure")]


def common_folder(files: Sequence[Path]) -> str:
    """The folder that all files are in, with its last slash."""
    return os.path.join(os.path.commonpath([file.parent for file in files]), "")


def more(found: Findings, n: int, words: Words) -> str:
    """That ``n`` problems are not shown, and where all are; empty for none."""
    path = found.problems.path
    return "" if n <= 0 else words("more_in", n=n, path=path) if path else words("more_how", n=n)


def sections(summary: dict[str, Any], words: Words) -> list[tuple[str, list[ReportBlock]]]:
    """``(heading, blocks)`` of everything but problems and advice."""
    made = [
        ("contents", _contents(summary, words)),
        ("balance", _balance(summary, words)),
        ("lengths", _lengths(summary, words)),
        ("cuts", _cuts(summary, words)),
        ("fill", _fill(summary, words)),
        ("pictures", _pictures(summary, words)),
        ("repetitions", _repetitions(summary, words)),
        ("near_empties", _near_empty(summary, words)),
    ]
    found = [(words(key), list(blocks)) for key, blocks in made]
    return [(heading, blocks) for heading, blocks in found if blocks]


def advice_line(advice: Advice, words: Words) -> str:
    return words(f"advice_{advice.code}", **advice.values)


def percent(share: float) -> str:
    """A share that tells nothing from next to nothing: 0.0%, 0.03%, 1.2%, 47.1%."""
    return f"{share:.1%}" if share >= 0.01 or share == 0 else f"{share:.2%}" if share >= 0.0001 else "< 0.01%"


def _contents(s: dict[str, Any], words: Words) -> Iterator[ReportBlock]:
    good = max(s["good_records"], 1)
    if len(s["sources"]) > 1:
        every = max(s["records"], 1)
        rows = [[name, n, percent(n / every)] for name, n in s["sources"].items()]
        yield ReportTable([words("source"), words("records"), words("share")], rows)
    if s["formats"]:
        formats = sorted(s["formats"].items(), key=lambda entry: -entry[1])
        yield ReportTable(
            [words("format"), words("records"), words("share")],
            [[name, n, percent(n / good)] for name, n in formats],
        )
    if s["tasks"]:
        header = [words(key) for key in ("task", "records", "share", "text_tokens", "image_tokens")]
        rows = [
            [
                words(f"task_{name}"),
                of["records"],
                percent(of["records"] / good),
                of["text_tokens"],
                of["image_tokens"],
            ]
            for name, of in s["tasks"].items()
        ]
        yield ReportTable(header, rows)
    for what in NOTES:
        if s[what]:
            whole = s["records"] if what == "unlearnt" else good
            rows = [[name, n, percent(n / whole)] for name, n in s[what].items()]
            yield ReportTable([words(f"field_{what}"), words("records"), words("share")], rows[:NAMES])
            if len(rows) > NAMES:
                yield Note(words("more", n=len(rows) - NAMES))


def _balance(s: dict[str, Any], words: Words) -> Iterator[ReportBlock]:
    t, good = s["targets"], max(s["good_records"], 1)
    if not s["good_records"]:
        return
    loss = max(t["text_tokens"] + t["image_tokens"], 1)
    header = [words(key) for key in ("modality", "records", "share", "segments", "tokens_with_loss", "share")]
    rows = []
    for kind, many in (("text", "texts"), ("image", "images")):
        records, tokens = t[f"records_with_{kind}"], t[f"{kind}_tokens"]
        rows.append([words(many), records, percent(records / good), t[many], tokens, percent(tokens / loss)])
    yield ReportTable(header, rows)
    if t["text_tokens"] + t["image_tokens"]:
        shares = [(words(f"{kind}s"), t[f"{kind}_tokens"] / loss) for kind in ("text", "image")]
        yield Shares(words("tokens_with_loss"), shares)
    every = max(sum(s["tokens"].values()), 1)
    rows = [[words(f"kind_{kind}"), n, percent(n / every)] for kind, n in s["tokens"].items() if n]
    yield ReportTable([words("kind"), words("tokens"), words("share")], rows)
    shares = [(words(f"kind_{kind}"), n / every) for kind, n in s["tokens"].items() if n]
    yield Shares(words("kind"), shares)


QUANTILES = {"0.05": "5%", "0.25": "25%", "0.5": "median", "0.75": "75%", "0.95": "95%", "0.99": "99%"}


def _numbers(measured: dict[str, dict[str, Any]], words: Words) -> ReportTable:
    """Least, greatest, mean, sum and quantiles of what is named."""
    quantiles = [words(name) if name.isalpha() else name for name in QUANTILES.values()]
    rows = [
        [
            name,
            of["min"],
            *(of["quantiles"][q] for q in QUANTILES),
            of["max"],
            f"{of['mean']:,.1f}",
            of["total"],
        ]
        for name, of in measured.items()
    ]
    return ReportTable(
        ["", words("minimum"), *quantiles, words("maximum"), words("mean"), words("sum")], rows
    )


def _histogram(title: str, of: dict[str, Any], x_label: str, y_label: str, words: Words) -> Chart:
    bars = [
        (f"{low:,}", f"{low:,}" if low == high else f"{low:,} – {high:,}", n)
        for low, high, n in of["histogram"]
    ]
    return bar_chart(title, bars, words, x_label=x_label, y_label=y_label)


def _lengths(s: dict[str, Any], words: Words) -> Iterator[ReportBlock]:
    of = s["lengths"]
    if of["count"]:
        unit = words(f"unit_{of['unit']}")
        yield _numbers({words(of["unit"]): of}, words)
        yield Charts([_histogram(words("lengths"), of, unit, words("records_per_bin"), words)])


def _cuts(s: dict[str, Any], words: Words) -> Iterator[ReportBlock]:
    if not s["lengths"]["count"] and not any(row["refused"] for row in s["limits"]):
        return
    header = [
        "max_sequence_length",
        *(words(key) for key in ("cut", "share", "lost", "share", "refused")),
    ]
    rows = []
    for row in s["limits"]:
        limit, share = row["max_sequence_length"], percent(row["cut"] / max(s["good_records"], 1))
        limit = f"{limit:,} ←" if limit == s["max_length"] else limit
        rows.append(
            [limit, row["cut"], share, row["tokens_lost"], percent(row["share_lost"]), row["refused"]]
        )
    yield ReportTable(header, rows)
    yield Note(f"← {words('this_one')}")
    yield Note(words("refused_note"))


def _fill(s: dict[str, Any], words: Words) -> Iterator[ReportBlock]:
    if s["rows"]:
        header = [
            "max_num_tokens",
            *(words(key) for key in ("packed", "one_sample_each", "samples_each", "longer")),
        ]
        rows = [
            [
                row["max_num_tokens"],
                percent(row["fill"]),
                percent(row["single"]),
                f"{row['samples_per_row']:,.1f}",
                row["longer"],
            ]
            for row in s["rows"]
        ]
        yield ReportTable(header, rows)


def _pictures(s: dict[str, Any], words: Words) -> Iterator[ReportBlock]:
    p = s["pictures"]
    if not p["pieces"]:
        return
    measured = {"vae_tokens": p["latent_tokens"], "vit_tokens": p["vit_tokens"]}
    measured = {words(key): of for key, of in measured.items() if of["count"]}
    if measured:
        yield _numbers(measured, words)
        per_bin = words("pictures_per_bin")
        yield Charts([_histogram(name, of, words("tokens"), per_bin, words) for name, of in measured.items()])
    rows = [[f"{w:,} × {h:,}", n, percent(n / p["pieces"])] for w, h, n in p["sizes"]]
    others = p["distinct_sizes"] - len(rows)
    if others:
        n = p["pieces"] - sum(n for _, _, n in p["sizes"])
        rows.append([words("other_sizes", n=others), n, percent(n / p["pieces"])])
    yield ReportTable([words("size"), words("count"), words("share")], rows)
    of = p["latent_tokens"]["count"]
    if of:
        yield Note(words("upscaled_line", n=p["upscaled"], of=of, share=p["upscaled"] / of))


def _repetitions(s: dict[str, Any], words: Words) -> Iterator[ReportBlock]:
    found = {kind: of for kind, of in s["repeats"].items() if of["distinct"]}
    if not found:
        return
    header = [words(key) for key in ("repeated", "distinct", "surplus")]
    yield ReportTable(
        header, [[words(f"same_{kind}"), of["distinct"], of["surplus"]] for kind, of in found.items()]
    )
    for kind, of in found.items():
        # one picture in many records is ordinary: editing chains, several questions
        if of["most"] and kind != "pictures":
            inside = in_language(INSIDE, words.language)
            rows = [
                [_joined(most["what"]).replace(INSIDE, inside), most["count"], _joined(most["where"])]
                for most in of["most"]
            ]
            what = words("named", name=words(f"same_{kind}"), value=words("what"))
            yield ReportTable([what, words("count"), words("where")], rows, True)


def _near_empty(s: dict[str, Any], words: Words) -> Iterator[ReportBlock]:
    if s["near_empty"]["records"]:
        rows = [[where, repr(text)] for where, text in s["near_empty"]["first"]]
        more = s["near_empty"]["records"] - len(rows)
        yield ReportTable([words("place"), words("what")], rows, True)
        if more:
            yield Note(words("more", n=more))


def _joined(value: Any) -> str:
    return "\n".join(value) if isinstance(value, list) else value
