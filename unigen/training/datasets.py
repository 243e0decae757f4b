"""The data of a run as streams of rows: training and validation."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from unigen.cache.store import FeatureCache
from unigen.config import Config, ConfigError, TrainSource, UserError
from unigen.data.dataset import UnifiedGenerationDataset
from unigen.data.finding import need_paths
from unigen.data.loader import PackStream, cores
from unigen.data.mapping import ReadOptions
from unigen.data.mixing import DataSource, Mixture
from unigen.data.splits import Split
from unigen.model.bagel import Bagel
from unigen.model.storage import few
from unigen.sequence.plan import Planner
from unigen.sequence.tokens import Tokenizer
from unigen.training.engine import Engine

log = logging.getLogger("unigen")

KEPT_SHARE = 0.25  # preserve_share where none is given


def need_data(config: Config) -> None:
    """Raises UserError where data that the config names are not there: before the model is read."""
    for source in [*config.sources(), *config.held_out(), *config.probed()]:
        need_paths(source.paths)


class RunData:
    """Reads and checks the data that the config names, on every process: the streams ``train``, ``val`` and
    ``probe`` (None without such data).

    Raises:
        UserError: the data, or the tokenizer, cannot be used; or the processes read different data.
    """

    def __init__(self, config: Config, engine: Engine, model: Bagel, cache: FeatureCache | None):
        self.config, self.engine, self.model, self.cache = config, engine, model, cache
        assert model.source is not None
        tokenizer = Tokenizer.load(model.source)
        vocabulary = model.config.llm.vocab_size
        if max(vars(tokenizer.special).values()) >= vocabulary:
            raise ConfigError(
                f"model_path: the tokenizer's special ids exceed the model's vocabulary of {vocabulary:,}"
            )
        held_out = config.held_out()
        self.train = self._stream(config.sources(), tokenizer, training=True)
        self.val = self._stream(held_out, tokenizer, training=False) if held_out else None
        if self.engine.main:
            _warn_of_shared_files(self.train.mixture.parts, self.val.mixture.parts if self.val else [])
        probe = config.probed()
        self.probe = self._stream(probe, tokenizer, training=False) if probe else None

    @property
    def tasks(self) -> set[str]:
        return {task for part in self.train.mixture.parts for task in part.dataset.statistics()["tasks"]}

    def _stream(self, sources: list[TrainSource], tokenizer: Tokenizer, training: bool) -> PackStream:
        c, parts = self.config, []
        for source in sources:
            planner = self.model.config.planner(tokenizer, c, source)
            dataset = self._dataset(source, planner, "train" if training else "validation")
            if self.engine.main:
                what = "Training" if training else "Validation"
                log.info("%s data (%s)\n%s", what, source.name, dataset.describe())
            planner.cache = self.cache
            times = (source.weight, source.repeat)
            parts.append(DataSource(source.name, dataset, planner, *times, preserve=source.preserve))
        share = c.preserve_share or KEPT_SHARE
        if training and c.preserve_data_path:
            learnt = sum(part.weight or len(part.dataset) for part in parts[:-1])
            parts[-1].weight = learnt * share / (1 - share)
        own = training and c.preserve_weight is not None and not any(part.preserve for part in parts)
        mixture = Mixture(parts, c.seed, training)
        if self.engine.main:
            log.info("%s", mixture.describe())
        # On a GPU attention takes its mask from the loader.
        masks = self.engine.device.type == "cuda"
        return PackStream(mixture, c.batch_size, c.max_num_tokens, masks, share if own else 0.0)

    def _dataset(self, source: TrainSource, planner: Planner, split: Split) -> UnifiedGenerationDataset:
        c, main = self.config, self.engine.main
        dataset = UnifiedGenerationDataset(
            source.path,
            on_bad_record=c.on_bad_record,
            max_bad_share=c.max_bad_share,
            # With "skip" every process must leave out the same records; with "error" one that looks closely
            # is enough.
            check_pictures=c.check_pictures if main or c.on_bad_record == "skip" else "headers",
            token_lengths=planner.token_lengths,
            read=ReadOptions.of(source, c),
            split=split,
            named_split=source.split,
            lengths_key=planner.identity,
            num_workers=max(1, cores() // self.engine.local_world),
            progress=main,
        )
        if len(set(self.engine.gather(dataset.fingerprint))) > 1:
            raise UserError(
                f"{source.name}: the processes read different data. Fix: give every machine the same files"
            )
        return dataset


def _warn_of_shared_files(train: Sequence[DataSource], val: Sequence[DataSource]) -> None:
    """Warns of a file that is read twice in the same way, and of one that is trained and validated on."""
    read = Counter(
        (path.resolve(), *sorted(part.dataset.read.fields.items()), part.dataset.read.trigger_word)
        for part in train
        for path in part.dataset.files
    )
    if twice := [str(path) for (path, *_), times in read.items() if times > 1]:
        log.warning(
            "Read more than once, so that an epoch meets each record as often: %s. Fix: name each file once;"
            " train_sources with a weight says that one is to be met more often",
            few(twice, 3),
        )
    held_out = {path.resolve() for part in val for path in part.dataset.files}
    if both := list(dict.fromkeys(str(path) for path, *_ in read if path in held_out)):
        log.warning(
            "Trained on and validated on: %s; the validation loss, and the best checkpoint by it, say nothing"
            " of data that was not learnt. Fix: --val_data_path with other records",
            few(both, 3),
        )
