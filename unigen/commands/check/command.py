"""``unigen check``: reads all data, reports every problem and what the data holds. Exit code 0 clean, 1
problems, 2 cannot run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unigen.bars import Bar
from unigen.config import ConfigError, DataOptions, SourceOptions, TrainSource, UserError
from unigen.messages import in_language
from unigen.outputs import output_file, unwritten
from unigen.show.terminal import reader_may_leave, say
from unigen.topics import Workers
from unigen.values import Count, PathText

if TYPE_CHECKING:
    from unigen.commands.check.part import CheckedData
    from unigen.data.splits import Split


@dataclass
class CheckOptions(DataOptions, SourceOptions):
    """What to check, how thoroughly, and where the report goes; lengths count what chance may leave out. The
    recipe of a training names the data, the fields and the model, and the rest of it is passed over.

    Args:
        paths: Files and folders to check, in place of the data of a training (train_data_path and the like).
        deep: Decode every picture to its last row (true), or read headers alone (false). Default: decode
            where there are at most 5,000 distinct pictures, as training does at its start.
        json: Print one JSON document in place of the report.
        output: An HTML page to write the report to.
        problems: A JSONL file to write every problem to.
        model_path: Folder of a checkpoint, whose tokenizer and picture sizes make the lengths exact; its
            weights are not needed.
        max_num_tokens: A token budget of packed sequences; says how full they would get.
        num_workers: Processes; 0 for none. Default: one for each core.
        language: Language of the report and of all that is said; default that of the locale.
    """

    paths: list[PathText] = field(default_factory=list)
    deep: bool | None = None
    json: bool = False
    output: PathText | None = None
    problems: PathText | None = None
    model_path: PathText | None = None
    max_num_tokens: Count | None = None
    num_workers: Workers | None = None
    language: Literal["en", "zh"] | None = None

    @classmethod
    def from_training(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """As that of :class:`SourceOptions`; a training that decodes every picture asks for the same here."""
        deep = {"deep": True} if given.get("check_pictures") == "full" else {}
        return super().from_training(given) | deep


def run(options: CheckOptions) -> int:
    """``unigen check``; returns 0 where all is well, 1 where there are problems, 130 where it was
    interrupted.

    Raises:
        UserError: There is nothing to check, or an option cannot work.
    """
    options.reread()
    from unigen.commands.check.advice import advise
    from unigen.commands.check.findings import BUDGETS, CHECK, LIMITS, Findings, Problems, check
    from unigen.commands.check.terminal import report
    from unigen.show.language import Words

    data = _data(options)
    inputs = [*(path for one in data for path in one.paths), options.model_path]
    output = options.output and output_file("output", options.output, CHECK, inputs)
    listing = Path(options.problems) if options.problems else None
    if listing:
        output_file("problems", listing, CHECK, [*inputs, output], ".jsonl")
    words = Words(options.language, "check")
    budgets = [*BUDGETS, options.max_num_tokens] if options.max_num_tokens else list(BUDGETS)

    def look(deep: bool) -> Findings:
        with _bar() as progress:
            return check(
                data,
                deep=deep,
                limits=[*LIMITS, data[0].planner.max_length],
                num_workers=options.num_workers,
                problems=Problems(listing),
                progress=progress,
            )

    found = look(bool(options.deep))
    if options.deep is None and found.to_be_decoded:
        found.problems.close()
        found = look(True)
    with closing(found.problems) as problems:
        summary = found.summary(budgets)
        advice = advise(summary, len(problems), found.deep, "en" if options.json else None)
        failed: list[UserError] = []  # what could not be written; the report is shown all the same
        if listing:
            with _noted(failed), unwritten("problems", listing):
                problems.save()
            problems.path = None if failed else listing
        page = options.output
        if output:
            from unigen.commands.check import page as check_page

            with _noted(failed), unwritten("output", output):
                check_page.write(output, found, summary, advice, words)
            page = None if failed else page
        if options.json:
            _print_json(found, summary, advice)
        else:
            say(*report(found, summary, advice, words, page))
        for error in failed[:1]:
            raise error
        return 130 if found.interrupted else 1 if len(problems) else 0


@contextmanager
def _noted(failed: list[UserError]) -> Iterator[None]:
    """Keeps an error for later."""
    try:
        yield
    except UserError as error:
        failed.append(error)


def _data(options: CheckOptions) -> list[CheckedData]:
    """What to check, as a training reads it. Raises UserError."""
    from unigen.commands.check.part import CheckedData
    from unigen.data.mapping import ReadOptions
    from unigen.data.probe import check_roots
    from unigen.model.weights import load_planner

    learnt, held_out = options.sources(), [*options.held_out(), *options.probed()]
    if options.paths:
        learnt, held_out = [TrainSource(options.paths, "paths", split=options.split)], []
    found: list[CheckedData] = []
    for source in [*learnt, *held_out]:
        split: Split = "train" if source in learnt else "validation"
        read = ReadOptions.of(source, options)
        check_roots(read)
        planner = load_planner(options.model_path, options, source)
        found.append(CheckedData(source.name, source.paths, planner, read, split, source.split))
    if not found:
        raise ConfigError(
            "paths are missing; name the files or folders to check (unigen check data/train.jsonl)"
        )
    return found


@contextmanager
def _bar() -> Iterator[Callable[[int, int, int, int], None]]:
    """A bar, and what it is told."""
    with Bar("checking", 0, "B") as shown:

        def progress(done: int, total: int, records: int, problems: int) -> None:
            shown.total = max(total, done)
            shown.notes = [
                in_language(f"{records:,} records"),
                in_language(f"{problems:,} problem{'' if problems == 1 else 's'}"),
            ]
            shown.update(done - shown.done)

        yield progress


def _print_json(found: Any, summary: dict[str, Any], advice: Sequence[Any]) -> None:
    """One document, its problems written one by one: there may be more of them than fit into memory."""
    from unigen.commands.check.report import advice_line
    from unigen.show.language import Words

    english = Words("en", "check")
    head = {
        "clean": not len(found.problems),
        "interrupted": found.interrupted,
        "deep": found.deep,
        "seconds": round(found.seconds, 3),
        "paths": [str(path) for path in found.files],
        "problem_count": len(found.problems),
        "problems_by_code": dict(found.problems.counts.most_common()),
        "statistics": summary,
        "advice": [
            {"code": a.code, "level": a.level, **a.values, "text": advice_line(a, english)} for a in advice
        ],
    }
    with reader_may_leave():
        print(json.dumps(head, indent=1)[:-2] + ',\n "problems": [', end="")
        for i, problem in enumerate(found.problems):
            print(("," if i else "") + "\n  " + json.dumps(problem), end="")
        print("\n ]\n}", flush=True)
