"""``unigen evaluate``: a checkpoint answers held-out records, and metrics say how well."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigen.config import SamplingOptions
from unigen.values import Count, Device, PathText, Seed, Whole

if TYPE_CHECKING:
    from unigen.evaluation.results import Result
    from unigen.evaluation.score import Tools


@dataclass(kw_only=True)
class EvaluateOptions(SamplingOptions):
    """Which checkpoint answers what, and how its answers are measured.

    Args:
        model_path: Folder of the checkpoint, in the published BAGEL layout.
        data_path: Held-out records, of the kinds that training reads: files or folders. The last answer of
            each is asked for.
        output_dir: Folder for metrics.json, predictions.jsonl and the pictures. The same command goes on
            where it was stopped.
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
    tools = _tools(o)
    return _answer_and_score(o, cases, silent, dataset.fingerprint, tools)


def _answer_and_score(
    o: EvaluateOptions, cases: list[Any], silent: int, fingerprint: str, tools: Tools
) -> int:
    from tqdm import tqdm

    from unigen.cache.encoders import digest_weights
    from unigen.config import ConfigError
    from unigen.evaluation.answers import answer_all
    from unigen.evaluation.score import as_json, score
    from unigen.files import atomic
    from unigen.inference.inferencer import InterleaveInferencer
    from unigen.version import __version__

    folder = Path(o.output_dir)
    sampling = {name: value for name, value in asdict(o).items() if hasattr(SamplingOptions(), name)}
    inferencer = InterleaveInferencer.from_pretrained(o.model_path, o.device)
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
        with tqdm(total=len(cases), desc="records", unit="", disable=None) as bar:
            predictions = answer_all(
                cases, ask, folder, about, batch_size=o.batch_size, seed=o.seed,
                tick=lambda done: bar.update(done - bar.n),
            )  # fmt: skip
        scores = score(cases, predictions, tools)
        shown = {"about": about, "records": len(cases), "without_question": silent, "tasks": as_json(scores)}
        with atomic(folder / "metrics.json") as file:
            file.write(json.dumps(shown, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error}). Fix: give another --output_dir") from error
    _report(scores, folder)
    return 1 if any(_failed(result, o) for results in scores.values() for result in results) else 0


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


def _report(scores: dict[str, list[Result]], folder: Path) -> None:
    from unigen.show.terminal import say, table

    for task, results in scores.items():
        say(f"\n{task}")
        say(table(["metric", "value", "95 %", "n"], [_row(result) for result in results]))
        for result in results:
            for note in result.notes:
                say(f"{result.kind}: {note}")
    say(f"\nWritten to {folder / 'metrics.json'}")


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
