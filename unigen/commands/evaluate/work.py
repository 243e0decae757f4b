"""``unigen evaluate``: checkpoints answer held-out records one after another, and are measured."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from unigen.bars import Bar
from unigen.cache.encoders import digest_weights
from unigen.commands.evaluate.options import EvaluateOptions
from unigen.commands.evaluate.page import BY, write
from unigen.commands.evaluate.terminal import report, report_check
from unigen.config import ConfigError, DataOptions, SamplingOptions
from unigen.data.captions import PICTURES, is_picture
from unigen.data.dataset import UnifiedGenerationDataset
from unigen.data.examine import CountTokens
from unigen.data.finding import need_paths
from unigen.data.mapping import ReadOptions
from unigen.evaluation.answers import (
    ABOUT,
    BATCHES,
    FILES,
    Answer,
    BatchesOfProcess,
    Prediction,
    answer_all,
    claim_answers,
    digest_of_pictures,
    factors_of,
    row_by_row,
    same_threads,
)
from unigen.evaluation.cases import IMAGE, TEXT, Case, cases_of
from unigen.evaluation.detectors import Detector
from unigen.evaluation.features import Extractor, FeatureStore, load_extractor
from unigen.evaluation.given import read_predictions
from unigen.evaluation.judge import Judge
from unigen.evaluation.material import Material, Opinion, Tools
from unigen.evaluation.probes import PictureProbe, likelihood, other_texts
from unigen.evaluation.results import INSTALL, CannotRun, Result, digest_of
from unigen.evaluation.score import METRICS, Answered, as_json, comparisons, score
from unigen.evaluation.statistics import Comparison
from unigen.evaluation.towers import PictureTower, TokenTower
from unigen.files import atomic, sha256_of
from unigen.inference.inferencer import InterleaveInferencer
from unigen.inference.options import NAMES, check_sampling, idle_settings
from unigen.messages import listed
from unigen.model.adapters import parse_adapter
from unigen.model.backends import pick_device
from unigen.model.quantise import bits_of, need_backend, told_bits
from unigen.model.weights import base_of, build_bagel, load_planner
from unigen.outputs import claim, holds, output_folder, unwritten, written_by
from unigen.runs.channel import Channel, processes
from unigen.runs.checkpoint import steps
from unigen.runs.layout import step_of
from unigen.sequence.files import Confined
from unigen.sequence.tokens import Tokenizer
from unigen.show.language import Words
from unigen.show.terminal import say
from unigen.values import nearest
from unigen.version import __version__

MOST_PIECES = 8  # of an answer whose pieces the model chooses
FEATURES, SCORES, COMPARED, REPORT = "features", "metrics.json", "compare.json", "report.html"
OF_PIECES = ("structure", "stopped")
VERIFIED = ("verify", "verify_margin")
DESCRIBED = ("cycle_rougeL", "cycle_chrf2", "described_as_real")


@dataclass(frozen=True)
class Extras:
    """What a caller in Python adds to the options: features of its own, other real pictures, more results of
    a task."""

    extractor: Extractor | None = None
    real: Sequence[Any] = ()
    more: Callable[[Material], list[Result]] = lambda material: []


@dataclass(frozen=True)
class AnswerSource:
    """Who answers: a checkpoint's folder or a file of answers; ``folder`` is where its answers lie, and
    ``adapters`` are those over the checkpoint."""

    name: str
    folder: Path
    adapters: Sequence[str] = ()


@dataclass(frozen=True)
class Work:
    """What stays the same from checkpoint to checkpoint."""

    options: EvaluateOptions
    cases: list[Case]
    silent: int
    fingerprint: str
    tools: Tools
    judge: Judge | None
    part: BatchesOfProcess = field(default_factory=BatchesOfProcess)
    extras: Extras = field(default_factory=Extras)
    kinds: Sequence[str] = ()  # of the metrics; all where none is named
    images: str | None = None  # digest of the pictures of all cases

    def wants(self, kind: str) -> bool:
        return not self.options.metrics or kind in self.options.metrics

    def wants_views(self) -> bool:
        asked = self.options.views and any(map(self.wants, (*VERIFIED, *DESCRIBED)))
        return asked and any(IMAGE in case.outputs for case in self.cases)


def run(o: EvaluateOptions, extras: Extras | None = None) -> int:
    """``unigen evaluate``; see there."""
    _check_options(o)
    extras = extras or Extras()
    need_paths([o.data_path] if isinstance(o.data_path, str) else o.data_path)
    with processes() as (rank, channel):
        names = _names(o)
        dataset = UnifiedGenerationDataset(
            o.data_path,
            read=ReadOptions.of(o),
            split="validation",
            named_split=o.split,
            token_lengths=_lengths(names, o),
            progress=rank == 0,
        )
        cases, silent = cases_of(dataset, o.samples, dataset.numbers.tolist())
        if not cases:
            raise ConfigError(f"no record of {o.data_path} asks anything. Fix: give records with a target")
        # before the model, which takes longer to load, and before anything is generated
        _check_names(names, cases, o)
        with Bar("loading what the metrics need"):
            tools = replace(load_tools(o, extras), lang=o.lang)
        part = BatchesOfProcess(rank, channel.world, lambda: _meet(channel))
        judge = _judge(o)
        kinds = o.metrics or _usual_kinds(o, names)
        work = Work(o, cases, silent, dataset.fingerprint, tools, judge, part, extras, kinds)
        if o.check:
            return _check(work, names) if rank == 0 else 0
        inputs = [*names, *([o.data_path] if isinstance(o.data_path, str) else o.data_path)]
        out = output_folder("output_dir", o.output_dir, inputs)
        folders = claim_folders(out, names)
        _tell_idle(work, names, rank)
        work = replace(work, images=digest_of_pictures(one for case in cases for one in case.pictures))
        pairs = zip(names, folders, strict=True)
        sources = [AnswerSource(*pair, [] if number else o.adapter) for number, pair in enumerate(pairs)]
        said = [_answers(work, source) for source in sources]
        if rank:
            return 0
        answered = [_scored(work, source, *found) for source, found in zip(sources, said, strict=True)]
        return finish(o, out, cases, answered)


def finish(o: EvaluateOptions, out: Path, cases: Sequence[Case], answered: list[Answered]) -> int:
    """Compares, writes the report, and says what is in it; the exit code."""
    with unwritten("output_dir", out):
        compared = _write_comparisons(out, answered) if len(answered) > 1 else {}
        page = write(out / REPORT, cases, answered, compared, Words(o.language, "evaluate"))
    report(answered, compared, page)
    return exit_code(o, [r for one in answered for results in one.scores.values() for r in results])


def _meet(channel: Channel) -> None:
    channel.gather("")


# ---- before anything is generated


def _check_options(o: EvaluateOptions) -> None:
    check_sampling(o)
    if o.seed is None:
        raise ConfigError("seed is none, and answers without one cannot be repeated. Fix: --seed 42")
    given = [name for name in ("model_path", "predictions", "run") if getattr(o, name) is not None]
    if len(given) != 1:
        said = f"{listed(given)} are given" if given else "nobody answers"
        raise ConfigError(
            f"{said}. Fix: one of --model_path FOLDER, --run FOLDER of a training run, --predictions FILE"
        )
    if o.adapter and o.model_path is None:
        raise ConfigError("adapter is given without model_path. Fix: --model_path with the adapter's base")
    for one in o.adapter:
        parse_adapter(one)
    if o.predictions is not None and not Path(o.predictions).is_file():
        raise ConfigError(f"predictions is {o.predictions}, which is no file. Fix: a JSONL file of answers")
    for kind in o.metrics:
        if kind not in METRICS:
            near = nearest(kind, list(METRICS))
            raise ConfigError(
                f"metrics names {kind!r}, which is no metric"
                + (f"; did you mean {near}?" if near else ".")
                + f" Fix: of {', '.join(METRICS)}"
            )
    if o.judge_model and not o.judge_url:
        raise ConfigError("judge_model is given without judge_url. Fix: --judge_url http://127.0.0.1:8000/v1")
    for name in ("verify_question", "describe_question"):
        if getattr(o, name) and not o.views:
            raise ConfigError(f"{name} is given without views. Fix: --views, or leave it out")
    if o.verify_question and "{text}" not in o.verify_question:
        raise ConfigError("verify_question has no {text}. Fix: say where the text goes")
    if o.predictions is not None and not _checkpoints([o.predictions, *o.compare]):
        given_idle = {"views is given": o.views, "pieces is model": o.pieces == "model"}
        for said, idle in {**given_idle, "quantize is given": o.quantize or o.double_quant}.items():
            if idle:
                raise ConfigError(
                    f"{said}, and no checkpoint answers: predictions are there already. Fix: leave it out, or"
                    " give --model_path FOLDER in place of --predictions"
                )


def _names(o: EvaluateOptions) -> list[str]:
    """Who answers, the one first that the others are compared with."""
    if o.run is not None and not steps(Path(o.run)):
        raise ConfigError(f"run is {o.run}, which holds no checkpoint. Fix: the output_dir of a training")
    given = [str(o.run or o.model_path or o.predictions), *o.compare]
    return [name for one in given for name in ([str(step) for step in reversed(steps(Path(one)))] or [one])]


def _checkpoints(names: Sequence[str]) -> list[str]:
    """Those that are no file of answers."""
    return [name for name in names if not Path(name).is_file()]


def _usual_kinds(o: EvaluateOptions, names: Sequence[str]) -> list[str]:
    """The metrics that are measured where none is named: those of pieces only where an answer can have others
    than its record."""
    chosen = o.pieces == "model" or len(_checkpoints(names)) < len(names)
    return [kind for kind in METRICS if chosen or kind not in OF_PIECES]


def _check_names(names: Sequence[str], cases: Sequence[Case], o: EvaluateOptions) -> None:
    """Raises UserError: one of them cannot answer. It is to be known before the others do."""
    for name in names:
        if Path(name).is_file():
            read_predictions(name, cases, o.data_root)
            continue
        base = base_of(name, [])[0]
        build_bagel(base)  # no weights are read
        need_backend(bits_of(base, o.quantize, o.double_quant)[0], pick_device(o.device))
        Tokenizer.load(base)


def _lengths(names: Sequence[str], o: EvaluateOptions) -> CountTokens | None:
    """Counts a record's tokens as the first checkpoint does, and refuses what any of them cannot take; None
    where none answers. Raises UserError."""
    options = DataOptions(allow_control_tokens=o.allow_control_tokens)
    bases = dict.fromkeys(base_of(name, [])[0] for name in _checkpoints(names))
    planners = [load_planner(base, options) for base in bases]
    counts = [planner.token_lengths for planner in {p.identity: p for p in reversed(planners)}.values()]
    return (lambda record: [count(record) for count in counts][-1]) if counts else None


def claim_folders(out: Path, names: Sequence[str]) -> list[Path]:
    """The folder of each source's answers: ``out`` itself for one, otherwise ``1-NAME``, ``2-NAME``; they
    are ours from now on.

    Raises:
        UserError: what would be written is there, and somebody else's, or a folder cannot be written.
    """
    short = [re.sub(r"[^\w.-]+", "_", Path(name).resolve().name)[:60] for name in names]
    folders = [out / f"{number}-{name}" for number, name in enumerate(short, 1)] if len(names) > 1 else [out]
    inside = [folder.name for folder in folders if folder != out]
    # versions without receipts left these
    before = any(holds(folder, (ABOUT, name)) for folder in folders for name in (BATCHES, SCORES))
    if not before and written_by(out / REPORT) != BY:
        with unwritten("output_dir", out):
            claim("output_dir", out, BY, [*inside, *FILES, SCORES, COMPARED, REPORT, FEATURES, "likelihood"])
    return folders


def load_tools(o: EvaluateOptions, extras: Extras) -> Tools:
    """What the metrics need, loaded. Raises CannotRun: one cannot be."""
    device = str(pick_device(o.device))
    if o.bert is not None:
        TokenTower.load(o.bert, o.bert_layer)  # to know that it can be
    real = extras.real
    if o.real is not None:
        real = sorted(path for path in Path(o.real).rglob("*") if is_picture(path))
        if not real:
            raise ConfigError(
                f"real is {o.real}, which holds no picture. Fix: a folder of {', '.join(PICTURES)}"
            )
        real = [path if o.data_root is None else Confined(path, o.data_root) for path in real]
    if real and not (o.features or extras.extractor):
        raise ConfigError("real is given without features. Fix: --features FOLDER")
    return Tools(
        extractor=extras.extractor or (load_extractor(o.features, device) if o.features else None),
        real=real, clip=PictureTower.load(o.clip, device, texts=True) if o.clip else None,
        bert=o.bert, layer=o.bert_layer, wordnet=o.wordnet, alexnet=o.alexnet,
        cache=FeatureStore(Path(o.output_dir) / FEATURES), device=device,
        detector=Detector.load(o.detector, device) if o.detector else None, scores=o.detector_scores,
    )  # fmt: skip


def _judge(o: EvaluateOptions) -> Judge | None:
    """The judge, where one is given and answers. Raises CannotRun: it does not."""
    if o.judge_url is None:
        return None
    judge = Judge(o.judge_url, o.judge_model)
    judge.meet()
    return judge


def _check(work: Work, names: Sequence[str]) -> int:
    """``--check``: every metric measures the references themselves; what only a model can say is promised."""
    promised = {"judge"} if work.judge else set()
    if _checkpoints(names):
        promised |= {"likelihood", "views"} if work.options.views else {"likelihood"}
    right = [
        Prediction(
            case.number, case.where, case.task, None,
            tuple(given[0] if kind == TEXT else given for kind, given in zip(case.outputs, case.references)),
            True,
        )
        for case in work.cases
    ]  # fmt: skip
    # features of the references are computed here and kept nowhere: the folder stays as it is
    tools = replace(work.tools, cache=None)
    scores = score(work.cases, right, tools, kinds=work.kinds, more=work.extras.more)
    report_check(scores, promised)
    results = [r for results in scores.values() for r in results if r.lacks not in promised]
    return exit_code(work.options, results, [r.kind for ones in scores.values() for r in ones])


def exit_code(o: EvaluateOptions, results: Sequence[Result], there: Sequence[str] | None = None) -> int:
    """1 where a metric has no value that was asked for, or for want of a library or of what an option gives;
    too few samples are a reason only where it was named."""
    for kind in o.metrics:
        if kind not in (there if there is not None else [result.kind for result in results]):
            say(f"{kind}: no record asks for what it measures")
            return 1

    def asked_for(result: Result) -> bool:
        failed = not result.lacks and (result.fix == INSTALL or _is_given(result.kind, o))
        return result.kind in o.metrics or failed

    return int(any(result.value is None and asked_for(result) for result in results))


def _is_given(kind: str, o: EvaluateOptions) -> bool:
    """Does an option give what the metric needs?"""
    needs = {one.needs for one in METRICS.get(kind, [])} | ({"wordnet"} if kind == "meteor" else set())
    given = vars(o) | {"extractor": o.features, "judge": o.judge_url, "views": o.views or None}
    return any(given.get(need) is not None for need in needs)


def _tell_idle(work: Work, names: Sequence[str], rank: int) -> None:
    """Names once what was asked for and changes nothing."""
    o = work.options
    kinds = {kind for case in work.cases for kind in case.outputs} | (
        {TEXT, IMAGE} if o.pieces == "model" else set()
    )
    idle = idle_settings(o, SamplingOptions(), TEXT in kinds or o.think, IMAGE in kinds)
    if not _checkpoints(names):  # nobody samples
        usual = EvaluateOptions(data_path=o.data_path)
        idle = [name for name in NAMES if getattr(o, name) != getattr(usual, name)]
    if idle and rank == 0:
        say(f"no effect on any record: {', '.join(idle)}")


# ---- answers


Said = dict[str, dict[int, Opinion]]


def _answers(work: Work, source: AnswerSource) -> tuple[dict[str, Any], list[Prediction], Said]:
    """What a source answers, what the answers depend on, and what models say of them; every process takes its
    part and gets all.

    Raises:
        UserError: the checkpoint cannot be read, or the folder holds other answers or cannot be written.
    """
    with unwritten("output_dir", source.folder):
        about, predictions, said = (_generated if _checkpoints([source.name]) else _given)(work, source)
        if work.judge is not None and work.wants("judge"):
            said["judge"] = _judged(work, source, predictions, work.judge)
        return about, predictions, said


def _given(work: Work, source: AnswerSource) -> tuple[dict[str, Any], list[Prediction], Said]:
    predictions = read_predictions(source.name, work.cases, work.options.data_root)
    drawn = [piece for one in predictions for piece in one.pieces if not isinstance(piece, str)]
    given = sha256_of(Path(source.name))[:12]
    about = {
        "predictions": digest_of(given, digest_of_pictures(drawn)) if drawn else given,
        "data": work.fingerprint, "images": work.images, "version": __version__, "sampling": {},
    }  # fmt: skip
    claim_answers(source.folder, {**about, "cases": len(work.cases)})
    return about, predictions, {}


def _generated(work: Work, source: AnswerSource) -> tuple[dict[str, Any], list[Prediction], Said]:
    o = work.options
    assert o.seed is not None
    device = pick_device(o.device, work.part.rank)
    bits: tuple[str | None, bool] = (o.quantize, o.double_quant)
    inferencer = InterleaveInferencer.from_pretrained(source.name, str(device), None, source.adapters, *bits)
    inferencer.requests.usual = o  # what has no effect was told once for all
    sampling = {name: getattr(o, name) for name in NAMES}
    about = {
        "checkpoint": digest_weights(inferencer.model.state_dict().items(), None)[:12],
        "quantize": told_bits(*bits_of(base_of(source.name)[0], *bits)),
        "data": work.fingerprint, "device": device.type, "pieces": o.pieces, "sampling": sampling,
        "version": __version__, "images": work.images, "adapter": factors_of(source.adapters),
    }  # fmt: skip
    if device.type == "cpu":
        same_threads(source.folder)

    def ask(prompts: Sequence[Sequence[Any]], outputs: Sequence[str], seed: int) -> list[Answer]:
        wanted = list(outputs) if o.pieces == "record" else None
        answers = inferencer.unified_generate_batch(
            prompts, outputs=wanted, max_pieces=MOST_PIECES, options=o, seed=seed
        )
        return [Answer(pieces, _stopped(pieces, wanted, inferencer, o)) for pieces in answers]

    def over(
        name: str, cases: Sequence[Case], job: Callable[..., list[dict[str, Any]]]
    ) -> dict[int, Opinion]:
        with _bar(name, len(cases)) as tick:
            folder = source.folder / name.replace(" ", "-")
            return row_by_row(cases, job, folder, batch_size=o.batch_size, tick=tick, part=work.part)

    with _bar("records", len(work.cases)) as tick:
        predictions = answer_all(
            work.cases, ask, source.folder, about, batch_size=o.batch_size, seed=o.seed, tick=tick,
            part=work.part,
        )  # fmt: skip
    said: Said = {}
    if work.wants("perplexity") and any(case.texts for case in work.cases):
        said["likelihood"] = over("likelihood", work.cases, lambda cases: likelihood(inferencer, cases))
    if work.wants_views():
        viewer = PictureProbe(
            inferencer, o.verify_question, o.describe_question,
            verifies=any(map(work.wants, VERIFIED)), describes=any(map(work.wants, DESCRIBED)),
        )  # fmt: skip
        found, others = {one.number: one for one in predictions}, other_texts(work.cases)
        name = f"views {digest_of(viewer.about())}"  # other questions, other rows
        rows = over(name, work.cases, lambda cases: viewer.views(cases, found, others))
        said["views"] = {-1: viewer.about(), **rows}
    return about, predictions, said


def _stopped(
    pieces: Sequence[Any], wanted: Sequence[str] | None, inferencer: InterleaveInferencer, o: SamplingOptions
) -> bool:
    """Did an answer end by itself? The opening token counts among those of a text."""
    texts = [piece for piece in pieces if isinstance(piece, str)]
    cut = any(len(inferencer.tokenizer.encode(text)) + 1 >= o.max_new_tokens for text in texts)
    return not cut and (wanted is not None or len(pieces) < MOST_PIECES)


def _judged(
    work: Work, source: AnswerSource, predictions: list[Prediction], judge: Judge
) -> dict[int, Opinion]:
    """What the judge says, asked by the first process alone, which waits for answers most of the time."""
    if work.part.rank:
        return {}
    found = {one.number: one for one in predictions}
    folder = source.folder / f"judge-{digest_of(judge.about(), judge.url)}"
    try:
        with _bar("judge", len(work.cases)) as tick:
            rows = row_by_row(
                work.cases, lambda cases: judge.judged(cases, found), folder,
                batch_size=work.options.batch_size, tick=tick,
            )  # fmt: skip
    except CannotRun as error:  # what it said so far is kept
        return {-1: {"reason": error.reason, "fix": error.fix}}
    return {-1: judge.about(), **rows}


@contextmanager
def _bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that is told how many are done."""
    with Bar(name.partition(" ")[0], total) as shown:
        yield lambda done: shown.update(done - shown.done)


# ---- numbers


def _scored(
    work: Work, source: AnswerSource, about: dict[str, Any], predictions: list[Prediction], said: Said
) -> Answered:
    """``metrics.json`` of a source."""
    scores = score(work.cases, predictions, work.tools, said, kinds=work.kinds, more=work.extras.more)
    one = Answered(source.name, about, predictions, scores, step_of(Path(source.name).name))
    write_scores(source.folder, one, len(work.cases), work.silent)
    return one


def write_scores(folder: Path, one: Answered, records: int, silent: int = 0) -> None:
    """``metrics.json`` of what one source answered; ``silent`` records asked nothing."""
    held = {"about": one.about, "records": records, "without_question": silent, "tasks": as_json(one.scores)}
    with unwritten("output_dir", folder):
        _write(folder / SCORES, held)


def _write_comparisons(folder: Path, answered: list[Answered]) -> dict[str, dict[str, list[Comparison]]]:
    """``compare.json``: every source against the first; returns them by the source's name."""
    base, *others = answered
    found = {other.name: comparisons(base, other) for other in others}
    held = {
        "base": base.name,
        "against": {
            name: {task: [asdict(one) for one in ones] for task, ones in tasks.items()}
            for name, tasks in found.items()
        },
    }
    _write(folder / COMPARED, held)
    return found


def _write(path: Path, held: dict[str, Any]) -> None:
    with atomic(path) as file:
        file.write(json.dumps(held, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")
