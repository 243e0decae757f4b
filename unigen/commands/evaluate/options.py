"""The options of ``unigen evaluate``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from unigen.config import SamplingOptions
from unigen.values import Count, Device, PathText, Plugin, Renames, Seed, Share, Whole


@dataclass(kw_only=True)
class EvaluateOptions(SamplingOptions):
    """Which checkpoint answers what, and how its answers are measured. Of a training's recipe the held-out
    data and its fields are taken, and the rest is passed over.

    Args:
        model_path: Folder of the checkpoint, in the published BAGEL layout.
        predictions: Answers to measure in place of a checkpoint's: lines such as {"index": 0, "text": "..."},
            {"id": "a", "image": "a.png"}, or a predictions.jsonl of this command.
        run: Folder of a training run, in place of model_path: all its checkpoints answer, each is compared
            with the first, and the report draws the metrics over the steps.
        data_path: Held-out records, of the kinds that training reads: files or folders. The last answer of
            each is asked for. With layout: the folder of pictures.
        layout: The folder is that of a benchmark's pictures, as unigen generate writes it; they are measured,
            and nobody answers.
        output_dir: Folder for report.html, metrics.json, predictions.jsonl and the pictures. The same command
            goes on where it was stopped.
        compare: More checkpoints (or files of answers, or folders of runs, of which all checkpoints answer)
            for the same prompts, with the same seeds; each is compared with model_path's by paired tests.
            Their answers lie in folders of their own in output_dir.
        adapter: Folders of adapters to add up over model_path, FOLDER or FOLDER:FACTOR; model_path may itself
            be one. The checkpoints of compare answer without them.
        quantize: Hold the decoder's matrices of every checkpoint in 4 bits (nf4) or 8 bits (int8): less
            memory, and a little less true.
        double_quant: Quantise the scales of nf4, too: 0.4 bits fewer a number.
        check: Say which metrics can run and why others cannot, and end before anything is generated.
        metrics: Only these, by name; one that has no value then makes the exit code 1, whatever the reason.
        samples: The first so many records; default: all.
        batch_size: Records answered at once. It is part of what the answers depend on.
        pieces: record asks for the texts and pictures that the record has; model lets the checkpoint decide
            what to write and draw and when to stop, which structure and stopped then measure.
        data_root: Folder that every picture must lie in, links resolved; for data one does not trust.
            Default: no limit.
        image_root: Folder that relative paths of pictures start from. Default: that of the file that names
            them.
        fields: What fields of the records are called here, as NAME=PLACE; as in training.
        trigger_word: A word that every caption of a picture to draw begins with; as in training.
        split: The split to take of a folder that holds several, by its name. Default: the validation split.
        plugin: Modules of your own that add formats, kinds of files or metrics; as in training.
        features: Whose features pictures are compared by: a transformers folder, bagel-vit:FOLDER,
            inception-tf1:FILE or inception-clean:FILE.
        real: Folder of real pictures that are none of the references, for the distance from real to real.
        clip: Folder of a CLIP or SigLIP, for the CLIP score.
        detector: Folder of an object detector (DETR, Mask2Former, OWL-ViT), for the checks of GenEval.
        detector_scores: From which score an object counts: in general, and where objects are counted.
        bert: Folder of a text encoder, for BERTScore.
        bert_layer: Its layer; default: the usual one of a model of that name.
        wordnet: The wordnet folder of nltk, for synonyms in METEOR.
        alexnet: File of its weights, for LPIPS of edits.
        lang: Language of the texts, for the tokenizer of BLEU; default: by their script.
        views: Let the checkpoint look at what it drew: verify it against the text, and describe it.
        verify_question: How it is asked to verify, with {text} where the text goes. Default: a question in
            the text's language, to be answered by yes or no.
        describe_question: How it is asked to describe.
        judge_url: Address of an OpenAI-compatible server whose model scores the pictures, such as
            http://127.0.0.1:8000/v1. The pictures are sent there.
        judge_model: Which of its models; default: the first it names.
        device: auto, cpu, cuda, or one GPU such as cuda:1.
        language: Language of the report and of all that is said; default that of the locale.
    """

    model_path: PathText | None = None
    predictions: PathText | None = None
    run: PathText | None = None
    data_path: PathText | list[PathText]
    layout: Literal["geneval"] | None = None
    output_dir: PathText = "outputs/evaluate"
    compare: list[PathText] = field(default_factory=list)
    adapter: list[PathText] = field(default_factory=list)
    quantize: Literal["nf4", "int8"] | None = None
    double_quant: bool = False
    check: bool = False
    metrics: list[str] = field(default_factory=list)
    samples: Count | None = None
    batch_size: Count = 8
    pieces: Literal["record", "model"] = "record"
    data_root: PathText | None = None
    image_root: PathText | None = None
    fields: Renames = field(default_factory=dict)
    trigger_word: str | None = None
    split: str | None = None
    plugin: list[Plugin] = field(default_factory=list)
    features: str | None = None
    real: PathText | None = None
    clip: PathText | None = None
    detector: PathText | None = None
    detector_scores: tuple[Share, Share] = (0.3, 0.9)
    bert: PathText | None = None
    bert_layer: Whole | None = None
    wordnet: PathText | None = None
    alexnet: PathText | None = None
    lang: str | None = None
    views: bool = False
    verify_question: str | None = None
    describe_question: str | None = None
    judge_url: str | None = None
    judge_model: str | None = None
    device: Device = "auto"
    language: Literal["en", "zh"] | None = None
    seed: Seed | None = 42

    @classmethod
    def from_training(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """What is taken of the options ``given`` by the recipe of a training: the held-out data, and how it
        is read."""
        names = {"val_data_path": "data_path", "val_split": "split"}
        for name in ("data_root", "image_root", "fields", "trigger_word", "allow_control_tokens", "plugin"):
            names[name] = name
        return {names[name]: value for name, value in given.items() if name in names}
