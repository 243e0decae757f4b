"""``unigen cache``: encodes every picture of the data once, as training would, into a store that training
reads.

Two passes. The first reads each picture and looks its entries up, so the second knows what is missing and how
much room it takes. Pictures are decoded and written by threads; the encoders take them one at a time, so that
an entry depends on no other picture.
"""

from __future__ import annotations

import logging
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from unigen.bars import each
from unigen.cache.encoders import Encoders
from unigen.cache.store import Encoder, Store, about, entry_key
from unigen.config import Config, ConfigError
from unigen.data.dataset import UnifiedGenerationDataset
from unigen.data.loader import cores
from unigen.data.mapping import ReadOptions
from unigen.outputs import output_folder
from unigen.sequence.contents import Seen, View, digest, named
from unigen.sequence.draw import RandomKey
from unigen.sequence.images import PictureError, image_size, read_picture
from unigen.sequence.plan import Planner
from unigen.sequence.tokens import Tokenizer
from unigen.sequence.types import Image, Kind
from unigen.training.engine import Engine

log = logging.getLogger("unigen")
A, B = TypeVar("A"), TypeVar("B")

SHOWN = 20  # pictures that cannot be used, in full


@dataclass
class CacheOptions(Config):
    """Encoded pictures for training: give the options of the training run, best as its recipe, and cache_dir.

    Args:
        shard: This process's part of the pictures, as 0/4 (the first of four); default: torchrun's, else all.
        prune: Remove entries that nothing of this data, model and precision uses.
    """

    shard: str | None = None
    prune: bool = False


@dataclass(frozen=True)
class EncodeJob:
    """A picture as one record shows it, by numbers: the pictures themselves may be bytes of a table."""

    part: int
    record: int
    segment: int
    names: tuple[str, ...]  # the encoders that look at it


@dataclass
class Report:
    """What one run did."""

    found: int = 0  # entries that were there
    written: int = 0
    nbytes: int = 0  # written
    pictures: int = 0  # decoded and encoded
    decoding: float = 0.0  # seconds of it, of all threads
    encoding: float = 0.0  # seconds of it
    views: int = 0  # pictures, once for each way that a sample shows them
    keys: set[str] = field(default_factory=set)  # entries that the data uses
    bad: dict[str, str] = field(default_factory=dict)  # pictures that cannot be used, and why


def run(options: CacheOptions) -> int:
    """``unigen cache``: 0 when every picture is in the cache, 1 when some cannot be used.

    Raises:
        UserError: the options, the checkpoint, the data or the cache folder cannot work; the disk is full.
    """
    options.resolve()
    if not options.cache_dir:
        raise ConfigError(
            "cache_dir is missing; give the folder that takes the encoded pictures (--cache_dir ...)"
        )
    output_folder("cache_dir", options.cache_dir, [options.model_path])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with Engine(options) as engine:
        shard = parse_shard(options.shard) if options.shard else (engine.rank, engine.world)
        if options.prune and shard[1] > 1:
            raise ConfigError(
                "prune needs to see every picture, and shard leaves some to others (run it once more, alone,"
                " with --prune)"
            )
        log.info("%s", engine.precision)
        encoders = Encoders.load(options, engine.device, engine.dtype)
        if not encoders.names:
            log.info(
                "Nothing is worth caching: a pixel codec costs nothing, and there is no frozen ViT"
                " (--freeze_vit)"
            )
            return 0
        filler = Filler(options, encoders, shard)
        report = filler.run()
    log.info("%s", filler.describe(report))
    return 1 if report.bad else 0


def parse_shard(text: str) -> tuple[int, int]:
    """``0/4`` as (0, 4): the first of four. Raises ConfigError."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ConfigError(
            f"shard is {text!r}; write it as NUMBER/COUNT, from 0/4 to 3/4 for four processes (--shard ...)"
        )
    return int(number), int(count)


class Filler:
    """Fills a store with what the encoders make of the pictures of the data. Of ``shard``, (number, count),
    this process takes one picture of ``count``."""

    def __init__(self, options: CacheOptions, encoders: Encoders, shard: tuple[int, int] = (0, 1)):
        assert options.cache_dir is not None
        self.options, self.encoders, self.shard = options, encoders, shard
        self.parts = list(self._parts())
        self.store = Store.create(options.cache_dir)
        self.identities: dict[str, Encoder] = {}
        for name in encoders.names:
            identity = encoders.identity(name)
            assert identity is not None
            self.identities[name] = identity
        self.threads = options.num_workers or min(8, os.cpu_count() or 1)

    def run(self) -> Report:
        """Both passes, and the pruning where it is asked for. Raises CacheError."""
        report = Report()
        with ThreadPoolExecutor(self.threads) as pool:
            missing, needed = self._look_up(pool, report)
            self.store.check_space(needed * self.shard[1])  # the other shards write to the same disk
            counts = (f"{report.found:,}", f"{len(missing):,}", f"about {needed / 1e6:,.1f} MB")
            log.info("%s entries are there; %s pictures are to be encoded, %s", *counts)
            for encoder in self.identities.values():
                self.store.introduce(encoder)
            self._fill(pool, missing, report)
        if self.options.prune and report.bad:
            n = len(report.bad)
            log.warning("Not pruned: %d pictures could not be read, so what they use is unknown", n)
        elif self.options.prune:
            removed, freed = self.store.prune(report.keys)
            log.info("Pruned: %s entries, %s MB", f"{removed:,}", f"{freed // 10**6:,}")
        return report

    # ---- the data

    def _parts(self) -> Iterator[tuple[UnifiedGenerationDataset, Planner]]:
        """Every source with its planner, as the trainer makes them; validation data too."""
        c = self.options
        assert c.model_path is not None
        tokenizer = Tokenizer.load(Path(c.model_path))
        # Clean copies that a share of the epoch passes have are shown in all of these.
        always = replace(c, single_image_stop_prob=1.0 if c.single_image_stop_prob else 0.0)
        for source in [*c.sources(), *c.held_out()]:
            planner = self.encoders.config.planner(tokenizer, always, source)
            dataset = UnifiedGenerationDataset(
                source.path,
                on_bad_record=c.on_bad_record,
                max_bad_share=c.max_bad_share,
                check_pictures="headers",  # they are decoded below
                token_lengths=planner.token_lengths,
                read=ReadOptions.of(source, c),
                split="validation" if source.name == "val_data_path" else "train",
                named_split=source.split,
                lengths_key=planner.identity,
                num_workers=cores(),
                progress=True,
            )
            yield dataset, planner

    def jobs(self) -> Iterator[EncodeJob]:
        """Every picture of this shard once for each way that a sample shows it."""
        met: set[int] = set()
        for number, (dataset, planner) in enumerate(self.parts):
            assert dataset.lengths is not None
            for i in range(len(dataset)):
                sample = dataset[i].sample
                shown: dict[int, set[str]] = {}
                for block in planner.outline(
                    sample, dataset.lengths[i], RandomKey(self.options.seed, 0, i, training=False)
                ):
                    if block.kind != Kind.TEXT:
                        shown.setdefault(block.segment, set()).add("vit" if block.kind == Kind.VIT else "vae")
                for segment, kinds in shown.items():
                    names = tuple(sorted(kinds & self.identities.keys()))
                    source = sample[segment].source  # type: ignore[union-attr]
                    what = f"{number}/{i}/{segment}" if isinstance(source, bytes) else str(source)
                    way = hash((what, planner.viewer(sample), names))
                    part = zlib.crc32(what.encode("utf-8", "surrogatepass")) % self.shard[1]
                    if names and part == self.shard[0] and way not in met:
                        met.add(way)
                        yield EncodeJob(number, i, segment, names)

    def _open(self, job: EncodeJob) -> tuple[Any, bytes, str, View]:
        """The source of a picture, its bytes, their digest, and the sizes at which it is seen. Raises
        PictureError."""
        dataset, planner = self.parts[job.part]
        sample = dataset[job.record].sample
        picture = sample[job.segment]
        assert isinstance(picture, Image)
        data = read_picture(picture.source)
        with named(picture.source):
            return picture.source, data, digest(data), planner.viewer(sample).view(*image_size(data))

    # ---- first pass

    def _look_up(self, pool: ThreadPoolExecutor, report: Report) -> tuple[list[EncodeJob], int]:
        """What is to be encoded, and how many bytes that will take in the store."""

        def keys(job: EncodeJob) -> list[tuple[str, str, bool, View]]:
            """(encoder, key, is a sound entry there, sizes) of each encoder."""
            _, _, picture, view = self._open(job)
            found = [(name, entry_key(self.identities[name], picture, view)) for name in job.names]
            return [(name, key, self.store.get(key) is not None, view) for name, key in found]

        jobs = list(self.jobs())
        report.views = len(jobs)
        missing, needed = [], 0
        for job, found in self._each(pool, keys, jobs, "looking up", report):
            fresh = [(name, view) for name, key, there, view in found if key not in report.keys and not there]
            report.found += sum(there and key not in report.keys for _, key, there, _ in found)
            report.keys |= {key for _, key, _, _ in found}
            if fresh:
                missing.append(replace(job, names=tuple(name for name, _ in fresh)))
            for name, view in fresh:
                needed += self.encoders.nbytes(name, (view.vae if name == "vae" else view.vit) or (0, 0))
        return missing, needed

    # ---- second pass

    def _fill(self, pool: ThreadPoolExecutor, missing: list[EncodeJob], report: Report) -> None:
        def decode(job: EncodeJob) -> tuple[str, str, Seen, float]:
            """The picture's name, the digest of its bytes, what the encoders take, and the seconds that
            took."""
            began = time.perf_counter()
            dataset, planner = self.parts[job.part]
            source, data, picture, _ = self._open(job)
            record = dataset[job.record]
            with named(source):
                seen = planner.viewer(record.sample).decode(data, "vae" in job.names, "vit" in job.names)
            name = str(record.origin if isinstance(source, bytes) else source)
            return name, picture, seen, time.perf_counter() - began

        writes: deque[Future[int]] = deque()
        with ThreadPoolExecutor(2) as writers:
            for _, (name, picture, seen, seconds) in self._each(pool, decode, missing, "encoding", report):
                began = time.perf_counter()
                answers = self.encoders.encode(seen)
                report.encoding += time.perf_counter() - began
                report.decoding += seconds
                report.pictures += 1
                for which, tensors in answers.items():
                    if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
                        report.bad[name] = (
                            f"the {which} makes numbers of it that are not finite. Fix: bf16 in place of fp16"
                        )
                        continue
                    encoder = self.identities[which]
                    key, of = entry_key(encoder, picture, seen.view), about(encoder, picture, seen.view)
                    writes.append(writers.submit(self.store.put, key, tensors, of))
                while writes and (len(writes) > 16 or writes[0].done()):
                    self._written(writes, report)
            while writes:
                self._written(writes, report)

    @staticmethod
    def _written(writes: deque[Future[int]], report: Report) -> None:
        report.nbytes += writes.popleft().result()  # raises what the writer raised: the disk is full, say
        report.written += 1

    def _each(
        self, pool: ThreadPoolExecutor, work: Callable[[A], B], items: list[A], title: str, report: Report
    ) -> Iterator[tuple[A, B]]:
        """Results in order, computed a bounded number ahead by threads; a picture that cannot be used goes to
        ``report.bad``."""
        ahead: deque[tuple[A, Future[B]]] = deque()
        upcoming = iter(items)
        try:
            for _ in each(title, items, "pictures"):
                while len(ahead) < 2 * self.threads and (item := next(upcoming, None)) is not None:
                    ahead.append((item, pool.submit(work, item)))
                item, future = ahead.popleft()
                try:
                    yield item, future.result()
                except PictureError as error:
                    report.bad[error.name] = f"{error.problem}. Fix: {error.fix}"
        finally:
            for _, future in ahead:
                future.cancel()

    # ---- the summary

    def describe(self, report: Report) -> str:
        """Entries, sizes, times, what a pass over the data saves; and the pictures that cannot be used."""
        shard = f" (shard {self.shard[0]} of {self.shard[1]})" if self.shard[1] > 1 else ""
        there = report.found + report.written
        lines = [
            f"Cache {self.store.folder}{shard}: {there:,} entries of this data, {report.written:,} of"
            " them new"
        ]
        if report.written:
            decoding, encoding = report.decoding / report.pictures, report.encoding / report.pictures
            reading = self._reading(report.keys) * len(report.keys) / max(report.views, 1)
            saved = (decoding + encoding - reading) * report.views
            lines += [
                f"  size      {report.nbytes / report.written / 1e3:,.1f} kB an entry",
                (
                    f"  time      a picture takes {decoding:.4f} s to decode and {encoding:.4f} s to encode"
                    f" on {self.encoders.device}, and {reading:.4f} s to read back"
                ),
                (
                    f"  saving    about {max(saved, 0.0):,.1f} s in each pass over the {report.views:,}"
                    " pictures (device and workers together)"
                ),
            ]
        for name, problem in list(report.bad.items())[:SHOWN]:
            lines.append(f"  left out  {name}: {problem}")
        if len(report.bad) > SHOWN:
            lines.append(f"  left out  and {len(report.bad) - SHOWN:,} more")
        return "\n".join(lines)

    def _reading(self, keys: set[str]) -> float:
        """Seconds that reading an entry takes, from a few of them."""
        some = sorted(keys)[:32]
        began = time.perf_counter()
        for key in some:
            self.store.get(key)
        return (time.perf_counter() - began) / max(len(some), 1)
