"""The report of ``unigen check`` as tables and charts, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from unigen.commands.check.advice import Advice
from unigen.show.language import Words


class Line(NamedTuple):
    """A sentence."""

    text: str


class Table(NamedTuple):
    """Rows of texts and numbers under a header."""

    header: list[str]
    rows: list[list[Any]]


class Bars(NamedTuple):
    """A histogram: ``(label, name in the tooltip, count)`` each. Pages alone show it."""

    title: str
    bars: list[tuple[str, str, float]]
    x_label: str
    y_label: str


class Shares(NamedTuple):
    """Parts of a whole, ``(name, amount)`` each. Pages alone show it."""

    title: str
    parts: list[tuple[str, int]]


Block = Line | Table | Bars | Shares


def sections(summary: dict[str, Any], words: Words) -> list[tuple[str, list[Block]]]:
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
    """A share that tells nothing from next to nothing: 0 %, 0.03 %, 1.2 %, 47.1 %."""
    return f"{share:.1%}" if share >= 0.01 or share == 0 else f"{share:.2%}" if share >= 0.0001 else "< 0.01%"


def _contents(s: dict[str, Any], words: Words) -> Iterator[Block]:
    good = max(s["good_records"], 1)
    if s["formats"]:
        formats = sorted(s["formats"].items(), key=lambda entry: -entry[1])
        yield Table(
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
        yield Table(header, rows)


def _balance(s: dict[str, Any], words: Words) -> Iterator[Block]:
    t, good = s["targets"], max(s["good_records"], 1)
    if not s["good_records"]:
        return
    loss = max(t["text_tokens"] + t["image_tokens"], 1)
    header = [words(key) for key in ("modality", "records", "share", "pieces", "tokens_with_loss", "share")]
    rows = []
    for kind, many in (("text", "texts"), ("image", "images")):
        records, tokens = t[f"records_with_{kind}"], t[f"{kind}_tokens"]
        rows.append([words(many), records, percent(records / good), t[many], tokens, percent(tokens / loss)])
    yield Table(header, rows)
    if t["text_tokens"] + t["image_tokens"]:
        yield Shares(
            words("tokens_with_loss"),
            [(words("texts"), t["text_tokens"]), (words("images"), t["image_tokens"])],
        )
    every = max(sum(s["tokens"].values()), 1)
    rows = [[words(f"kind_{kind}"), n, percent(n / every)] for kind, n in s["tokens"].items() if n]
    yield Table([words("kind"), words("tokens"), words("share")], rows)
    yield Shares(words("kind"), [(words(f"kind_{kind}"), n) for kind, n in s["tokens"].items() if n])


def _numbers(name: str, of: dict[str, Any], words: Words) -> Table:
    q = of["quantiles"]
    header = [
        "",
        *(words(key) for key in ("minimum",)),
        "5 %",
        "25 %",
        words("median"),
        "75 %",
        "95 %",
        "99 %",
    ]
    row = [name, of["min"], q["0.05"], q["0.25"], q["0.5"], q["0.75"], q["0.95"], q["0.99"]]
    return Table(
        [*header, words("maximum"), words("mean"), words("sum")],
        [[*row, of["max"], f"{of['mean']:,.1f}", of["total"]]],
    )


def _histogram(title: str, of: dict[str, Any], x_label: str, y_label: str) -> Bars:
    bars = [
        (f"{low:,}", f"{low:,}" if low == high else f"{low:,} – {high:,}", n)
        for low, high, n in of["histogram"]
    ]
    return Bars(title, bars, x_label, y_label)


def _lengths(s: dict[str, Any], words: Words) -> Iterator[Block]:
    of = s["lengths"]
    if of["count"]:
        yield _numbers(words(of["unit"]), of, words)
        yield _histogram(words("lengths"), of, words(f"unit_{of['unit']}"), words("records_per_bin"))


def _cuts(s: dict[str, Any], words: Words) -> Iterator[Block]:
    if not s["lengths"]["count"] and not any(row["refused"] for row in s["limits"]):
        return
    header = [
        "max_sequence_length",
        *(words(key) for key in ("cut", "share", "lost", "share", "refused")),
        "",
    ]
    rows = []
    for row in s["limits"]:
        limit, share = row["max_sequence_length"], percent(row["cut"] / max(s["good_records"], 1))
        mark = words("this_one") if limit == s["max_length"] else ""
        rows.append(
            [limit, row["cut"], share, row["tokens_lost"], percent(row["share_lost"]), row["refused"], mark]
        )
    yield Table(header, rows)
    yield Line(words("refused_note"))


def _fill(s: dict[str, Any], words: Words) -> Iterator[Block]:
    if s["rows"]:
        header = [
            "max_num_tokens",
            *(words(key) for key in ("packed", "one_a_row", "samples_a_row", "longer")),
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
        yield Table(header, rows)


def _pictures(s: dict[str, Any], words: Words) -> Iterator[Block]:
    p = s["pictures"]
    if not p["pieces"]:
        return
    for key, of in (("vae_tokens", p["latent_tokens"]), ("vit_tokens", p["vit_tokens"])):
        if of["count"]:
            yield _numbers(words(key), of, words)
    for key, of in (("vae_tokens", p["latent_tokens"]), ("vit_tokens", p["vit_tokens"])):
        if of["count"]:
            yield _histogram(words(key), of, words("tokens"), words("pictures_per_bin"))
    rows = [[f"{w:,} × {h:,}", n, percent(n / p["pieces"])] for w, h, n in p["sizes"]]
    others = p["distinct_sizes"] - len(rows)
    if others:
        n = p["pieces"] - sum(n for _, _, n in p["sizes"])
        rows.append([words("other_sizes", n=others), n, percent(n / p["pieces"])])
    yield Table([words("size"), words("count"), words("share")], rows)
    of = p["latent_tokens"]["count"]
    if of:
        yield Line(words("upscaled_line", n=p["upscaled"], of=of, share=p["upscaled"] / of))


def _repetitions(s: dict[str, Any], words: Words) -> Iterator[Block]:
    found = {kind: of for kind, of in s["repeats"].items() if of["distinct"]}
    if not found:
        return
    header = [words(key) for key in ("repeated", "distinct", "surplus")]
    yield Table(
        header, [[words(f"same_{kind}"), of["distinct"], of["surplus"]] for kind, of in found.items()]
    )
    for kind, of in found.items():
        # one picture in many records is ordinary: editing chains, several questions
        if of["most"] and kind != "pictures":
            rows = [[_joined(most["what"]), most["count"], _joined(most["where"])] for most in of["most"]]
            yield Table([f"{words(f'same_{kind}')}: {words('what')}", words("count"), words("where")], rows)


def _near_empty(s: dict[str, Any], words: Words) -> Iterator[Block]:
    if s["near_empty"]["records"]:
        rows = [[where, repr(text)] for where, text in s["near_empty"]["first"]]
        more = s["near_empty"]["records"] - len(rows)
        yield Table([words("place"), words("what")], rows)
        if more:
            yield Line(words("more", n=more))


def _joined(value: Any) -> str:
    return "\n".join(value) if isinstance(value, list) else value
