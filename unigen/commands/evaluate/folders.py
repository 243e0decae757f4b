"""``unigen evaluate --layout geneval``: folders of a benchmark's pictures are measured; nobody answers."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from unigen.commands.evaluate.options import EvaluateOptions
from unigen.commands.evaluate.terminal import report_check
from unigen.commands.evaluate.work import Extras, claim_folders, exit_code, finish, load_tools, write_scores
from unigen.config import ConfigError
from unigen.evaluation.answers import claim_answers
from unigen.evaluation.results import digest_of
from unigen.evaluation.score import Answered, score
from unigen.evaluation.scored_folders import check_same, read_geneval, with_overall
from unigen.files import sha256_of
from unigen.outputs import output_folder, unwritten

KINDS = ("geneval", "clip_score")
_READ = {
    "layout", "data_path", "output_dir", "compare", "check", "metrics", "detector", "detector_scores", "clip",
    "device", "language",
}  # fmt: skip


def run_folders(o: EvaluateOptions) -> int:
    """The exit code, as that of :func:`unigen.commands.evaluate.command.evaluate`.

    Raises:
        UserError: an option cannot work or has no effect here, or a folder or a tool cannot be read.
    """
    names = [_folder(o), *o.compare]
    read = [read_geneval(Path(name)) for name in names]
    cases = read[0][0]
    for name, (others, _) in zip(names[1:], read[1:]):
        check_same(cases, others, name)
    if not (o.detector or o.metrics or o.check):
        raise ConfigError(
            f"layout {o.layout} is measured with an object detector, and none is given. Fix: --detector"
            " FOLDER, of a DETR, Mask2Former or OWL-ViT, or --metrics clip_score"
        )
    tools = load_tools(o, Extras())
    kinds = o.metrics or KINDS
    asked = replace(o, metrics=o.metrics or [o.layout])  # what a layout is there for is asked for
    if o.check:
        # a prompt of each task is measured, which shows what can run
        first = list({case.task: number for number, case in reversed(list(enumerate(cases)))}.values())
        ones = [[found[number] for number in sorted(first)] for found in read[0]]
        scores = with_overall(score(ones[0], ones[1], tools, kinds=kinds))
        report_check(scores, set())
        return exit_code(asked, [result for results in scores.values() for result in results])
    out = output_folder("output_dir", o.output_dir, names)
    answered = []
    for name, folder, (_, predictions) in zip(names, claim_folders(out, names), read, strict=True):
        about = _about(Path(name), predictions)
        with unwritten("output_dir", folder):
            claim_answers(folder, {**about, "cases": len(cases)})
        scores = with_overall(score(cases, predictions, tools, kinds=kinds))
        one = Answered(name, about, predictions, scores)
        write_scores(folder, one, len(cases))
        answered.append(one)
    return finish(asked, out, cases, answered)


def _folder(o: EvaluateOptions) -> str:
    """The folder that is measured, after all checks of the options."""
    names = [o.data_path] if isinstance(o.data_path, str) else o.data_path
    if len(names) != 1:
        raise ConfigError("data_path names several, and layout measures one folder. Fix: --compare OTHER")
    usual = EvaluateOptions(data_path=o.data_path)
    for field in fields(o):
        if field.name not in _READ and getattr(o, field.name) != getattr(usual, field.name):
            raise ConfigError(
                f"{field.name} has no effect with layout: the pictures are drawn already. Fix: leave it out"
            )
    for kind in o.metrics:
        if kind not in KINDS:
            raise ConfigError(f"metrics names {kind}, which needs references. Fix: of {', '.join(KINDS)}")
    return str(names[0])


def _about(folder: Path, predictions: list[Any]) -> dict[str, Any]:
    """What the pictures are, and how ``unigen generate`` says that it drew them."""
    pictures = [piece for one in predictions for piece in one.pieces]
    try:
        said = json.loads((folder / ".unigen" / "answers.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        said = {}
    known = {name: said[name] for name in ("preset", "checkpoint", "version") if said.get(name)}
    return {
        **known,
        "predictions": digest_of([sha256_of(path) for path in pictures]),
        "sampling": said.get("sampling", {}),
    }
