"""A plan as text, as JSON and as a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from unigen.commands.plan.changes import Changed, Outcome
from unigen.config import Config
from unigen.figures import figure, gb
from unigen.messages import in_language
from unigen.show.language import Words
from unigen.show.terminal import line, notices, table
from unigen.values import written

if TYPE_CHECKING:
    from unigen.commands.plan.options import PlanOptions
    from unigen.show.terminal import RenderableType

PARTS = (
    *("weights", "moments", "average", "gradients", "activations"),
    *("work", "copy", "teacher", "vae", "program", "fragments"),
)


def report(outcome: Outcome, facts: dict[str, Any], words: Words) -> Iterator[RenderableType]:
    """What the terminal shows of a plan, part by part; ``facts`` are those of :func:`command.print_plan`."""
    plan, load = outcome.plan, outcome.load
    yield from _asked(outcome, words)
    yield line(
        words(
            "model",
            parameters=plan.parameters,
            trained=plan.trained,
            precision=outcome.precision,
            engine=outcome.engine,
            gpus=facts["gpus"],
        )
    )
    yield line(words("sequence", tokens=load.tokens, gen=load.gen, vit=load.patches, labels=load.labels))
    if outcome.config.sources():
        yield line(words("unread"))
    yield ""
    at_peak = plan.at_peak
    rows = [[words(f"part_{name}"), gb(at_peak[name])] for name in PARTS if at_peak.get(name)]
    rows.append([words("sum"), gb(plan.peak)])
    yield line((f"== {words('device', point=words(f'point_{_key(plan.point)}'))} ==", "bold"))
    yield table(("", ""), rows)
    yield ""
    yield line((f"== {words('host')} ==", "bold"))
    host = [[words(f"phase_{name}"), gb(pinned), gb(other)] for name, (pinned, other) in plan.host.items()]
    yield table(("", words("pinned"), words("unpinned")), host)
    yield ""
    yield line(words("disk", each=gb(plan.disk), best=gb(plan.best)))
    yield line(words("work", flop=figure(plan.flop / 1e12), tokens=plan.tokens))
    if facts["seconds"] is not None:
        card = facts["card"] or words("card")
        speed = figure(plan.tokens / facts["seconds"])
        yield line(
            words(
                "time",
                s=figure(facts["seconds"]),
                speed=speed,
                share=100 * facts["share"],
                card=card,
                tflops=facts["tflops"],
            )
        )
    yield ""
    if said := outcome.config.warnings():
        yield notices([("warn", in_language(text)) for text in said])
        yield ""
    yield from _verdict(outcome, words)
    if facts["auto"]:
        yield line(f"-> {facts['auto']}")


def _asked(outcome: Outcome, words: Words) -> Iterator[RenderableType]:
    """The run that was asked for, and what changes of it; nothing where the plan is of that run."""
    room, asked = outcome.room, outcome.asked.peak
    if room is None or not outcome.changes:
        return
    yield line((words("as_asked", sum=gb(asked), verdict=words("too_much", by=gb(asked - room))), "bad"))
    yield ""
    yield line((f"== {words('with', changes=_changes(outcome, words))} ==", "bold"))
    yield notices(
        [("note", f"{words(f'change_{name}')}: {flags(values)}") for name, values in outcome.changes]
    )
    yield ""


def _verdict(outcome: Outcome, words: Words) -> Iterator[RenderableType]:
    """Whether the run that the plan is of fits."""
    if outcome.room is None:
        yield line(words("no_room"))
        return
    left, changed = outcome.room - outcome.plan.peak, bool(outcome.changes)
    if left >= 0:
        key = "fits_with" if changed else "fits"
        yield line((words(key, left=gb(left), changes=_changes(outcome, words)), "good"))
    else:
        yield line((words("never" if changed else "too_much", by=gb(-left)), "bad"))


def _changes(outcome: Outcome, words: Words) -> str:
    return words("these" if len(outcome.changes) > 1 else "this")


def _key(point: str) -> str:
    return point.replace(" ", "_")


def flags(values: Changed) -> str:
    """Options as they are typed."""
    switches = {True: "--{}", False: "--no_{}"}
    return " ".join(
        switches[value].format(name) if isinstance(value, bool) else f"--{name} {written(value)}"
        for name, value in values.items()
    )


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The plan as plain values, bytes as numbers."""
    plan = outcome.plan
    return {
        "generator": "unigen plan",
        "fits": outcome.fits if outcome.room is not None else None,
        "room": outcome.room,
        "peak": plan.peak,
        "asked_peak": outcome.asked.peak,
        "at": plan.point,
        "device": plan.at_peak,
        "points": {point: sum(found.values()) for point, found in plan.moments.items()},
        "host": {phase: {"pinned": p, "unpinned": u} for phase, (p, u) in plan.host.items()},
        "disk": {"step": plan.disk, "best": plan.best},
        "parameters": plan.parameters,
        "trained": plan.trained,
        "parts": plan.parts,
        "flop": plan.flop,
        "tokens": plan.tokens,
        "precision": outcome.precision,
        "engine": outcome.engine,
        "sequence": asdict(outcome.load),
        "warnings": outcome.config.warnings(),
        "changes": [{"name": name, "options": values} for name, values in outcome.changes],
    }


def recipe(outcome: Outcome, options: PlanOptions) -> str:
    """The recipe of what was planned: all that differs from the defaults."""
    import yaml

    config, defaults = outcome.config, Config().to_dict()
    values = {name: value for name, value in config.to_dict().items() if value != defaults[name]}
    values.pop("model_load_mode", None)  # it says what quantize says
    peak = gb(outcome.plan.peak)
    room = f" of {options.gpu_memory}" if options.gpu_memory else ""
    verdict = "" if outcome.fits else " (DOES NOT FIT)"
    lines = [
        '# generator: "unigen plan"',
        f"# Planned for {options.gpus} GPU(s): at most {peak}{room} each{verdict}; "
        f"packed sequences of {outcome.load.tokens:,} tokens.",
        "# unigen train --config THIS_FILE --train_data_path data/train.jsonl",
        yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110),
    ]
    return "\n".join(lines)
