"""What the statistics of a data set suggest. The rules are here, their words in
``assets/text/``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from unigen.data.keys import counts_of
from unigen.data.verdict import Verdict, percents

# Shares above which a finding is a warning.
CUT, DUPLICATES, SAME_TEXT, UPSCALED, NEAR_EMPTY = 0.01, 0.01, 0.05, 0.05, 0.01
FEW_RECORDS, FEW_TOKENS = 0.05, 0.005  # shares of a modality below which the data is lopsided
FULL = 0.97  # of a packed sequence
PACKS = 10  # fewer say nothing: the last one, which ends with the data, weighs too much


_PROBLEMS = {
    **{"few": "few_problems", "many": "problems", "lost": "lost_file"},
    **dict.fromkeys(("nothing", "clean"), "no_records"),  # in all, or beside good ones in one source
}


class Advice(NamedTuple):
    """One suggestion: its code, whether it is a warning or a note, and the numbers its words need."""

    code: str
    level: Literal["warn", "note"]
    values: dict[str, Any]


def advise(summary: dict[str, Any], problems: int, deep: bool, language: str | None = None) -> list[Advice]:
    """The suggestions for what :meth:`unigen.commands.check.findings.Findings.summary` says; warnings first.

    Args:
        summary: The statistics.
        problems: How many problems there are.
        deep: Whether every picture was decoded.
        language: Of the values; default: that of the command.
    """
    found = [
        *_of_records(summary, problems, language),
        *_of_balance(summary),
        *_of_pictures(summary, deep),
        *_of_lengths(summary),
    ]
    return [advice for level in ("warn", "note") for advice in found if advice.level == level]


def _of_records(s: dict[str, Any], problems: int, language: str | None) -> Iterator[Advice]:
    good = max(s["good_records"], 1)
    if problems:
        bad = s["records"] - s["good_records"] - sum(s["unlearnt"].values())
        verdict = Verdict(s["good_records"], bad, s["lost_files"], s["max_bad_share"])
        values = {"n": problems, "share": verdict.share, "limit": percents(verdict.max_bad_share)}
        yield Advice(_PROBLEMS[verdict.code], "warn", values)
    for kind, level in (("splits", "warn"), ("about", "note")):
        if s["left_out"][kind]:
            yield Advice(f"left_out_{kind}", level, {"files": s["left_out"][kind]})
    if s["unread"]:
        yield Advice(
            "unread", "warn", {"fields": counts_of(s["unread"], s["good_records"], language=language)}
        )
    surplus = s["repeats"]["records"]["surplus"]
    if surplus:
        yield Advice(
            "duplicates", _level(surplus / good, DUPLICATES), {"n": surplus, "share": surplus / good}
        )
    if s["learnt_too"]:
        yield Advice("learnt_too", "warn", {"n": s["learnt_too"]})
    for most in s["repeats"]["texts"]["most"][:1]:
        share = most["count"] / max(s["targets"]["records_with_text"], 1)
        if most["count"] >= 20 and share >= SAME_TEXT:
            yield Advice("same_text", "warn", {"text": most["what"], "n": most["count"], "share": share})
    empty = s["near_empty"]["records"]
    if empty:
        yield Advice("near_empty", _level(empty / good, NEAR_EMPTY), {"n": empty, "share": empty / good})


def _of_balance(s: dict[str, Any]) -> Iterator[Advice]:
    targets = s["targets"]
    records = {kind: targets[f"records_with_{kind}"] for kind in ("text", "image")}
    tokens = {kind: targets[f"{kind}_tokens"] for kind in ("text", "image")}
    if not s["good_records"]:
        return
    captions = s["formats"].get("image_to_text", 0)
    if captions and not s["tasks"].keys() & {"generate", "interleaved"}:
        yield Advice("captions_describe", "warn", {"n": captions})
    if not records["image"] or not records["text"]:
        yield Advice("only_text" if not records["image"] else "only_image", "note", {})
        return
    few = min(records, key=lambda kind: records[kind])
    if records[few] / s["good_records"] < FEW_RECORDS:
        yield Advice(
            f"few_{few}_records", "warn", {"n": records[few], "share": records[few] / s["good_records"]}
        )
    few = min(tokens, key=lambda kind: tokens[kind])
    share = tokens[few] / max(sum(tokens.values()), 1)
    if share < FEW_TOKENS:
        yield Advice(f"few_{few}_tokens", "warn", {"n": tokens[few], "share": share})


def _of_pictures(s: dict[str, Any], deep: bool) -> Iterator[Advice]:
    pictures = s["pictures"]
    share = pictures["upscaled"] / max(pictures["latent_tokens"]["count"], 1)
    if pictures["upscaled"]:
        yield Advice("upscaled", _level(share, UPSCALED), {"n": pictures["upscaled"], "share": share})
    copies = s["repeats"].get("copies", {"surplus": 0})["surplus"]
    if copies:
        yield Advice("copies", "note", {"n": copies})
    if pictures["pieces"] and not deep:
        yield Advice("not_deep", "note", {})


def _of_lengths(s: dict[str, Any]) -> Iterator[Advice]:
    for row in s["limits"]:
        if row["max_sequence_length"] == s["max_length"] and row["cut"]:
            share = row["cut"] / max(s["good_records"], 1)
            level = _level(max(share, row["share_lost"]), CUT)
            yield Advice(
                "cut",
                level,
                {
                    "limit": row["max_sequence_length"],
                    "n": row["cut"],
                    "share": share,
                    "lost": row["share_lost"],
                },
            )
    rows = [row for row in s["rows"] if row["rows"] >= PACKS]
    if rows:
        whole = [row for row in rows if not row["longer"]] or rows[-1:]
        row = next((row for row in whole if row["fill"] >= FULL), max(whole, key=lambda row: row["fill"]))
        yield Advice(
            "rows", "note", {"budget": row["max_num_tokens"], "fill": row["fill"], "single": row["single"]}
        )
    if s["lengths"]["unit"] == "words" and s["good_records"]:
        yield Advice("estimate", "note", {})


def _level(share: float, bar: float) -> Literal["warn", "note"]:
    return "warn" if share >= bar else "note"
