"""``unigen fetch``: records whose pictures are addresses become records whose pictures are files.

Training never opens a connection; this command does, once, and what it writes needs no network. It reads the
records twice: to collect the addresses, and, when the pictures are there, to write the new data.
"""

from __future__ import annotations

import ipaddress
import os
import queue
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from unigen.bars import Bar
from unigen.commands.fetch.addresses import FetchError, Network, masked, parse_url
from unigen.commands.fetch.client import Client
from unigen.commands.fetch.rewrite import RewrittenFile, Writer, records
from unigen.commands.fetch.store import FETCH, LOG, OWN, Entry, PictureStore, is_log
from unigen.config import UserError
from unigen.data.captions import is_picture
from unigen.data.containers import no_record
from unigen.data.embedded import Address
from unigen.data.finding import find_files
from unigen.data.mapping import ReadOptions
from unigen.data.probe import require_match
from unigen.data.splits import LeftOut, describing
from unigen.files import Busy, locked, sha256_of
from unigen.messages import in_language
from unigen.outputs import RECEIPT, claim, is_own, output_folder, read_receipt, unwritten, write_receipt
from unigen.printing import printable, typed
from unigen.show.terminal import say
from unigen.values import Count, Options, PathText, Plugin, Range, Renames

Seconds = Annotated[float, Range(0, 86400, above=True)]


@dataclass
class FetchOptions(Options):
    """Fetch the pictures that records name by http and https addresses, and write the data again with files
    in their place.

    Args:
        paths: JSON, JSONL, Parquet, Arrow, CSV, TSV or tar files, data sets saved by Hugging Face datasets,
            folders of them.
        output_dir: Folder for the new data (JSONL), the pictures, fetched.log and failed.log; the same folder
            continues a fetch.
        image_root: Folder that relative paths of pictures start from. Default: that of the file that names
            them.
        fields: What fields of the records are called here, as NAME=PLACE, as in training; the new data has
            the names.
        plugin: Modules of your own that add formats or kinds of files; as in training.
        on_failure: skip leaves records with a failed picture out of the new data and lists them; error writes
            no data then.
        retry_failed: Try addresses again that failed in an earlier run.
        deep: Decode every picture, not only its header; a damaged one counts as failed.
        max_bytes: Largest picture in bytes; reading stops there, whatever length was announced.
        timeout: Seconds for one picture, all in all: name, connection, redirects, retries and their waits. A
            server that sends a byte a second does not outlast it.
        connect_timeout: Seconds for one connection.
        max_redirects: Redirects to follow; each one is checked as the first address was.
        retries: Further attempts after answers 429 and 5xx and after lost connections, after 1, 2, 4, ...
            seconds or what Retry-After says. Nothing else is tried again.
        connections: Pictures fetched at the same time. Each takes at most about twice max_bytes of memory.
        connections_per_host: Of them from one host; hosts take turns.
        allow_network: Networks that are not public and yet trusted, such as 10.1.0.0/16; all others that are
            not public are refused.
    """

    paths: list[PathText]
    output_dir: PathText = "fetched"
    image_root: PathText | None = None
    fields: Renames = field(default_factory=dict)
    plugin: list[Plugin] = field(default_factory=list)
    on_failure: Literal["skip", "error"] = "skip"
    retry_failed: bool = True
    deep: bool = False
    max_bytes: Annotated[int, Range(1, 1 << 30)] = 32 << 20
    timeout: Seconds = 60.0
    connect_timeout: Seconds = 10.0
    max_redirects: Annotated[int, Range(0, 100)] = 0
    retries: Annotated[int, Range(0, 100)] = 3
    connections: Annotated[int, Range(1, 1024)] = 16
    connections_per_host: Count = 4
    allow_network: list[str] = field(default_factory=list)

    def client(self) -> Client:
        """Raises UserError for a value out of range."""
        self.reread()
        allowed = tuple(map(_network, self.allow_network))
        return Client(
            self.max_bytes, self.timeout, self.connect_timeout, self.max_redirects, self.retries, allowed
        )


def fetch(options: FetchOptions) -> int:
    """Runs the command: 0 when every picture was fetched, 1 when records are left out or fit no
    format.

    Raises:
        UserError: Nothing can be read or written, or an option cannot work.
    """
    client = options.client()
    out = output_folder("output_dir", options.output_dir)
    sources = _sources(options, out)
    _claim(out, sources)
    with _alone(out), closing(PictureStore(out)) as store:
        with Bar("reading addresses") as shown_bar:
            urls: dict[str, None] = {}
            for source in sources:
                for url in _addresses(source):
                    urls[url] = None
                    shown_bar.update()
        damaged = store.verify(urls)
        there = {url: entry for url in urls if (entry := store.entries.get(url))}
        known = {url for url, entry in there.items() if entry.good or not options.retry_failed}
        if damaged:
            say(f"damaged    {damaged:,} pictures of an earlier run; they are fetched again")
        _fetch_all([url for url in urls if url not in known], client, store, options)
        writer = Writer(store, options.deep)
        writer.run(sources, options.on_failure == "skip")
        store.settle()
        _report(urls, known, store, sources, writer)
    return 0 if writer.learnt and not writer.failures else 1


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text.strip(), strict=False)
    except ValueError:
        raise UserError(
            f"--allow_network {text!r} is no network; write an address, or one with a prefix such as"
            " 10.1.0.0/16"
        ) from None


# ---- reading


def _sources(options: FetchOptions, out: Path) -> list[RewrittenFile]:
    """The files to read and to write. What an earlier run wrote is no source, also where the output lies in a
    source's folder."""
    root, paths, read = out.resolve(), options.paths, ReadOptions.of(options)
    found: dict[Path, Path] = {}
    named = {Path(path).resolve() for path in paths}
    left_out: list[LeftOut] = []
    for path, name in find_files(paths, split=None, left_out=left_out):
        if path.resolve().is_relative_to(root):
            if path.resolve() in named or root in named:
                raise UserError(f"{path}: it lies in the output folder {out}. Name another --output_dir.")
            continue
        if is_picture(path):
            raise UserError(
                f"{path}: a folder of pictures with texts names no address. Train on it as it is."
            )
        stem = Path(name).with_suffix("") if path.suffix.lower() in (".gz", ".zst") else Path(name)
        target = out / stem.with_suffix(".jsonl")
        if target in found:
            raise UserError(
                f"{path}: {target} would be written for it and for {found[target]}. Fetch it alone, into"
                " another --output_dir."
            )
        found[target] = path
    if not found:
        raise UserError(
            f"there is nothing to read outside of the output folder {out}. Name the files with the records."
        )
    require_match(list(found.values()), read)
    if about := describing([one for one in left_out if not one.path.resolve().is_relative_to(root)]):
        say(f"Files about the data or of other kinds, left out: {about}")
    return [RewrittenFile(path, target, read) for target, path in found.items()]


def _claim(out: Path, sources: list[RewrittenFile]) -> None:
    """Makes the output folder ours. Raises UserError where something in it is in the way that no fetch wrote,
    or that was changed since."""
    targets = [source.target for source in sources]
    with unwritten("output_dir", out):
        if is_log(out / LOG) and not (out / RECEIPT).exists():  # of a version without receipts
            write_receipt(out, FETCH, {_name(t, out): [sha256_of(t)] for t in targets if t.is_file()})
        claim("output_dir", out, FETCH, [*OWN, *(_name(target, out) for target in targets)])
        own = read_receipt(out, FETCH)
        for target in targets:
            if os.path.lexists(target) and not is_own(target, own.get(_name(target, out), [])):
                raise UserError(
                    f"{target}: it is there already, and no fetch wrote it as it is now. Fix: name another"
                    " --output_dir, or move it away"
                )


def _name(target: Path, out: Path) -> str:
    return target.relative_to(out).as_posix()


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds the output folder for this process; the system lets go of it however the process ends."""
    with ExitStack() as stack:
        try:
            with unwritten("output_dir", out):
                out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(out / ".lock", wait=False))
        except Busy:
            raise UserError(
                f"{out}: another unigen fetch is writing there. Wait for it, or name another --output_dir."
            ) from None
        yield


def _addresses(source: RewrittenFile) -> Iterator[str]:
    """The addresses that can be asked, in the one spelling under which they are stored."""
    for read in records(source):
        for place in read.places:
            if isinstance(place.value, Address):
                try:
                    yield str(parse_url(place.value.url))
                except FetchError:
                    continue  # refused again, and listed, when the data is written


# ---- fetching


class _Turns:
    """Addresses in turn over their hosts, at most ``limit`` of one host at a time."""

    def __init__(self, urls: Iterable[str], limit: int):
        self._limit = limit
        self._waiting: dict[str, deque[str]] = {}  # the host whose turn it is comes first
        for url in urls:
            self._waiting.setdefault(parse_url(url).host, deque()).append(url)
        self._busy: Counter[str] = Counter()
        self._changed = threading.Condition()

    def take(self) -> tuple[str, str] | None:
        """The next host and address, when there is one; None when nothing is left."""
        with self._changed:
            while self._waiting:
                host = next((h for h in self._waiting if self._busy[h] < self._limit), None)
                if host is None:
                    self._changed.wait()
                    continue
                urls = self._waiting.pop(host)
                if len(urls) > 1:
                    self._waiting[host] = urls  # behind the others
                self._busy[host] += 1
                return host, urls.popleft()
            return None

    def done(self, host: str) -> None:
        with self._changed:
            self._busy[host] -= 1
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._waiting.clear()
            self._changed.notify_all()


def _fetch_all(urls: list[str], client: Client, store: PictureStore, options: FetchOptions) -> None:
    """Fetches ``urls``; every result is in the store as soon as it is there. Raises UserError when the disk
    fails."""
    turns, results = _Turns(urls, options.connections_per_host), queue.SimpleQueue[Entry | BaseException]()

    def work() -> None:
        while got := turns.take():
            host, url = got
            try:
                results.put(store.keep(url, client.get(url), options.deep))
            except FetchError as error:
                results.put(Entry.failed(url, error))
            except BaseException as error:
                results.put(error)
            finally:
                turns.done(host)

    for _ in range(min(options.connections, len(urls))):
        threading.Thread(target=work, daemon=True).start()  # a daemon: Ctrl-C does not wait for slow servers
    failed = 0
    with Bar("fetching", len(urls), "pictures", shown=bool(urls)) as shown_bar:
        try:
            for _ in urls:
                entry = results.get()
                if isinstance(entry, BaseException):
                    raise entry
                store.note(entry)
                failed += not entry.good
                shown_bar.notes = [in_language(f"{failed:,} failed")]
                shown_bar.update()
        finally:
            turns.stop()


def _report(
    urls: dict[str, None], known: set[str], store: PictureStore, sources: list[RewrittenFile], writer: Writer
) -> None:
    """The summary, and the failures by reason with the first of each."""
    good = [entry for url in urls if (entry := store.entries[url]).good]
    size = sum({entry.file: entry.bytes for entry in good}.values())
    before = sum(entry.url in known for entry in good)
    say(
        f"addresses  {len(good):,} of {len(urls):,} fetched, {before:,} of them in an earlier run"
        f" ({size / 1e6:,.1f} MB)"
    )
    say(f"records    {writer.written:,} written, {writer.left_out:,} with failures")
    for reason, count in writer.failures.most_common():
        first = writer.first[reason]
        line = f":{first['line']}" if first["line"] else f"[{first['index']}]"
        url = f", {masked(first['url'])}" if first["url"] else ""
        place = f"{first['file']}{line}, {first['field']}{url}"
        told = printable(f"{place}: {first['problem']}. Fix: {first['cure']}")
        say(f"  {reason:<18} {count:>8,}  first in {told}")
    if writer.failures:
        say(f"All failures are listed in {store.folder / 'failed.log'}.")
    if writer.left_out and not writer.written:
        say("No data was written.")
        return
    if not writer.learnt:
        say(f"Nothing to train on: {no_record([source.path for source in sources], writer.written)}")
        return
    data = sources[0].target if len(sources) == 1 else store.folder
    say(f"Train with --train_data_path {typed(data)}")
