"""``unigen evaluate``: a checkpoint answers held-out records, and metrics say how well."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unigen.config import SamplingOptions
from unigen.values import Count, Device, PathText, Seed, Whole

if TYPE_CHECKING:
    from unigen.evaluation.answered import Answered
    from unigen.evaluation.results import Result
    from unigen.evaluation.score import Tools
    from unigen.evaluation.statistics import Comparison


@dataclass(kw_only=True)
class EvaluateOptions(SamplingOptions):
    """Which checkpoint answers what, and how its answers are measured.

    Args:
        model_path: Folder of the checkpoint, in the published BAGEL layout.
        data_path: Held-out records, of the kinds that training reads: files or folders. The last answer of
            each is asked for.
        output_dir: Folder for report.html, metrics.json, predictions.jsonl and the pictures. The same command
            goes on where it was stopped.
        samples: The first so many records; default: all.
        batch_size: Records answered at once. It is part of what the answers depend on.
        data_root: Folder that every picture must lie in, links resolved; for data one does not trust.
            Default: no limit.
        features: Whose features pictures are compared by: a transformers folder, bagel-vit:FOLDER,
            inception-tf1:FILE or inception-clean:FILE. Default: distances and similarities are left out.
        clip: Folder of a CLIP or SigLIP, for the CLIP score.
        bert: Folder of a text encoder, for BERTScore.
        bert_layer: Its layer; default: the usual one of a model of that name.
        wordnet: The wordnet folder of nltk, for synonyms in METEOR.
        alexnet: File of its weights, for LPIPS of edits.
        lang: Language of the texts, for the tokenizer of BLEU; default: by their script.
        device: auto, cpu, cuda, or one GPU such as cuda:1.
        compare: More checkpoints that answer the same prompts with the same seeds; each is compared with
            model_path's by paired tests. Their answers lie in folders of their own in output_dir.
        language: Language of the report: en or zh.
    """

    model_path: PathText
    data_path: PathText | list[PathText]
    output_dir: PathText = "outputs/evaluate"
    samples: Count | None = None
    batch_size: Count = 8
    data_root: PathText | None = None
    features: str | None = None
    clip: PathText | None = None
    bert: PathText | None = None
    bert_layer: Whole | None = None
    wordnet: PathText | None = None
    alexnet: PathText | None = None
    lang: str | None = None
    device: Device = "auto"
    compare: list[PathText] = field(default_factory=list)
    language: Literal["en", "zh"] = "en"
    seed: Seed | None = 42


def evaluate(options: EvaluateOptions) -> int:
    """0; 1 where a library, or what an option gives, could not be used for its metric.

    Raises:
        UserError: an option cannot work, the data, the checkpoint or a tool cannot be read, or the folder
            holds other answers.
    """
    o = options
    from unigen.config import ConfigError
    from unigen.inference.options import check_sampling

    check_sampling(o)
    if o.seed is None:
        raise ConfigError("seed is none, and answers without one cannot be repeated. Fix: --seed 42")
    from unigen.data.dataset import UnifiedGenerationDataset
    from unigen.evaluation.cases import cases_of

    dataset = UnifiedGenerationDataset(o.data_path, data_root=o.data_root)
    cases, silent = cases_of(dataset, o.samples)
    if not cases:
        raise ConfigError(f"no record of {o.data_path} asks anything. Fix: give records with a target")
    # before the model, which takes longer to load, and before anything is generated
    from unigen.commands.evaluate.page import write
    from unigen.outputs import output_folder, unwritten
    from unigen.show.language import Words

    tools = _tools(o)
    models, out = [o.model_path, *o.compare], Path(o.output_dir)
    output_folder(
        "output_dir", out, [*models, *([o.data_path] if isinstance(o.data_path, str) else o.data_path)]
    )
    answered = [
        _answer_and_score(o, model, folder, cases, silent, dataset.fingerprint, tools)
        for model, folder in zip(models, folders_of(out, models), strict=True)
    ]
    with unwritten("output_dir", out):
        compared = _write_comparisons(out, answered) if o.compare else {}
        page = write(out / "report.html", cases, answered, compared, Words(o.language, "evaluate"))
    _report(answered, compared, page)
    everything = (result for one in answered for results in one.scores.values() for result in results)
    return 1 if any(_failed(result, o) for result in everything) else 0


def _answer_and_score(
    o: EvaluateOptions,
    model: str,
    folder: Path,
    cases: list[Any],
    silent: int,
    fingerprint: str,
    tools: Tools,
) -> Answered:
    """Has a checkpoint answer all cases into ``folder``, and measures the answers.

    Raises:
        UserError: the checkpoint cannot be read, or the folder holds other answers or cannot be written.
    """
    from unigen.cache.encoders import digest_weights
    from unigen.config import ConfigError
    from unigen.evaluation.answered import Answered
    from unigen.evaluation.answers import answer_all
    from unigen.evaluation.score import as_json, score
    from unigen.files import atomic
    from unigen.inference.inferencer import InterleaveInferencer
    from unigen.printing import bar
    from unigen.version import __version__

    sampling = {name: value for name, value in asdict(o).items() if hasattr(SamplingOptions(), name)}
    inferencer = InterleaveInferencer.from_pretrained(model, o.device)
    about = {
        "checkpoint": digest_weights(inferencer.model.named_parameters(), None)[:12],
        "data": fingerprint,
        "device": inferencer.model.device.type,
        "sampling": sampling,
        "version": __version__,
    }

    def ask(prompts: Sequence[Sequence[Any]], outputs: Sequence[str], seed: int) -> list[list[Any]]:
        return inferencer.unified_generate_batch(prompts, outputs=list(outputs), options=o, seed=seed)

    assert o.seed is not None
    try:
        with bar("records", total=len(cases), unit="") as shown:
            predictions = answer_all(
                cases, ask, folder, about, batch_size=o.batch_size, seed=o.seed,
                tick=lambda done: shown.update(done - shown.n),
            )  # fmt: skip
        scores = score(cases, predictions, tools)
        held = {"about": about, "records": len(cases), "without_question": silent, "tasks": as_json(scores)}
        with atomic(folder / "metrics.json") as file:
            file.write(json.dumps(held, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error}). Fix: give another --output_dir") from error
    return Answered(model, about, predictions, scores)


def _write_comparisons(folder: Path, answered: list[Answered]) -> dict[str, dict[str, list[Comparison]]]:
    """``compare.json``: every checkpoint against the first; returns them by the checkpoint's name."""
    from unigen.evaluation.answered import comparisons
    from unigen.files import atomic

    base, *others = answered
    found = {other.name: comparisons(base, other) for other in others}
    held = {
        "base": base.name,
        "against": {
            name: {task: [asdict(one) for one in ones] for task, ones in tasks.items()}
            for name, tasks in found.items()
        },
    }
    with atomic(folder / "compare.json") as file:
        file.write(json.dumps(held, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    return found


def folders_of(output_dir: Path, models: Sequence[str]) -> list[Path]:
    """The folder of each checkpoint's answers: ``output_dir`` itself for one, otherwise ``1-NAME``,
    ``2-NAME``."""
    if len(models) == 1:
        return [output_dir]
    names = [re.sub(r"[^\w.-]+", "_", Path(model).resolve().name)[:60] for model in models]
    return [output_dir / f"{number}-{name}" for number, name in enumerate(names, 1)]


def _failed(result: Result, o: EvaluateOptions) -> bool:
    """Has a metric no value for want of a library, or of what an option gives? Too few samples are no
    failure."""
    from unigen.evaluation.results import INSTALL

    given = {"clip_score": o.clip, "bertscore": o.bert, "meteor": o.wordnet, "lpips": o.alexnet}
    return result.value is None and (result.fix == INSTALL or given.get(result.kind) is not None)


def _tools(o: EvaluateOptions) -> Tools:
    """What the metrics need, loaded. Raises CannotRun: one cannot be."""
    import torch

    from unigen.evaluation.features import FeatureStore, load_extractor
    from unigen.evaluation.score import Tools
    from unigen.evaluation.towers import PictureTower, TokenTower

    device = ("cuda" if torch.cuda.is_available() else "cpu") if o.device == "auto" else o.device
    if o.bert is not None:
        TokenTower.load(o.bert, o.bert_layer)  # to know that it can be
    return Tools(
        extractor=load_extractor(o.features, device) if o.features else None,
        clip=PictureTower.load(o.clip, device, texts=True) if o.clip else None,
        bert=o.bert, layer=o.bert_layer, wordnet=o.wordnet, alexnet=o.alexnet, lang=o.lang,
        cache=FeatureStore(Path(o.output_dir) / "features"), device=device,
    )  # fmt: skip


def _report(answered: list[Answered], compared: dict[str, dict[str, list[Comparison]]], page: Path) -> None:
    from unigen.show.terminal import say, table

    for one in answered:
        for task, results in one.scores.items():
            say(f"\n{task}" if len(answered) == 1 else f"\n{one.name}: {task}")
            say(table(["metric", "value", "95 %", "n"], [_row(result) for result in results]))
            for result in results:
                for note in result.notes:
                    say(f"{result.kind}: {note}")
    for name, tasks in compared.items():
        for task, ones in tasks.items():
            say(f"\n{name} against {answered[0].name}: {task}")
            say(table(["metric", "verdict"], [[one.name.partition("[")[0], one.sentence()] for one in ones]))
    say(f"\nWritten to {page}")


def _row(result: Result) -> list[str]:
    if result.value is None:
        return [result.kind, "none", f"{result.reason}. Fix: {result.fix}", ""]
    ends = "" if result.interval is None else "{:.4g} to {:.4g}".format(*result.interval)
    to = "to=source"
    return [
        result.kind + (" to source" if to in result.name else ""),
        f"{result.value:.4g}",
        ends,
        str(result.n),
    ]
