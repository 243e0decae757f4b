"""How fast the data side is, on this machine: ``python benchmarks/data.py [check|loader|rows|cache ...]``.

- check: seconds for a file of text records, and the most memory of all processes together.
- loader: samples a second and worker, against decoding and resizing the same pictures with PIL alone.
- rows: how full rows of 16,384 tokens get on a mixed set, and what packing costs.
- cache: pictures a second through decoding and the encoders, against reading what ``unigen cache`` stored.

Everything is made in a temporary folder. Run it on an idle machine; the figures of the last run are in
docs/data.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unigen.cache.store import about, entry_key
from unigen.config import Config
from unigen.data.dataset import UnifiedGenerationDataset
from unigen.data.loader import LoaderState, PackStream, RankSlice, load_batches
from unigen.data.mixing import DataSource, Mixture
from unigen.model.weights import load_planner
from unigen.sequence.contents import digest
from unigen.sequence.images import to_image


def photograph(seed: int, width: int, height: int) -> Any:
    """A picture with the spectrum of a photograph: noise whose amplitude falls with frequency."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    spectrum = np.fft.rfft2(generator.standard_normal((3, height, width)), axes=(1, 2)) / np.maximum(
        frequency, 1 / max(width, height)
    )
    pixels = np.fft.irfft2(spectrum, s=(height, width), axes=(1, 2))
    return to_image(torch.from_numpy(pixels / (3 * pixels.std())).float())


def peak_memory(process: subprocess.Popen[bytes]) -> int:
    """The most resident memory in bytes that the process and its children have together, until it ends."""
    most = 0
    while process.poll() is None:
        total = 0
        for pid in descendants(process.pid):
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                # shared pages count once
                total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
            except (OSError, IndexError):
                continue
        most = max(most, total)
        time.sleep(0.5)
    return most


def descendants(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from descendants(int(child))


def check(folder: Path, lines: int) -> None:
    """``unigen check`` of ``lines`` text records, as a user calls it."""
    path, pick = folder / "lines.jsonl", random.Random(0)
    words = [
        "the",
        "model",
        "reads",
        "and",
        "writes",
        "text",
        "pictures",
        "of",
        "cats",
        "dogs",
        "houses",
        "模型",
        "读写",
        "文字",
        "图片",
    ]
    with path.open("w", encoding="utf-8") as file:
        for i in range(lines):
            question, answer = (" ".join(pick.choices(words, k=pick.randint(5, 40))) for _ in range(2))
            turns = [{"role": "user", "content": f"{i} {question}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    command = [sys.executable, "-m", "unigen", "check", str(path), "--output", str(folder / "check.html")]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = peak_memory(process)
    seconds = time.perf_counter() - began
    print(
        f"check    {lines:,} lines, {path.stat().st_size / 2**20:.0f} MiB: {seconds:.1f} s"
        f" ({lines / seconds:,.0f} a second), ",
        end="",
    )
    print(f"at most {most / 2**20:.0f} MiB in all processes; exit code {process.returncode}")
    path.unlink()


def pictures(folder: Path, n: int) -> list[Path]:
    found = []
    for i in range(n):
        width, height = [(1024, 768), (1600, 1200), (768, 1024), (2048, 1536)][i % 4]
        found.append(folder / f"{i}.jpg")
        photograph(i, width, height).save(found[-1], quality=90)
    return found


def loader(folder: Path, n: int) -> None:
    """One process decodes, resizes, draws noise and packs, against PIL decoding and resizing the same
    pictures to the same sizes.

    Pictures of the environment variable PICTURES (a folder), or made ones of the spectrum of photographs.
    """
    from PIL import Image

    given = os.environ.get("PICTURES")
    found = sorted(p.resolve() for p in Path(given).rglob("*.jpg"))[:n] if given else pictures(folder, n)
    kinds = {
        "draw": [{"text_prompt": "A picture", "image_path": str(p)} for p in found],
        "describe": [{"image_path": str(p), "caption": "A picture of many things."} for p in found],
    }
    for kind, records in kinds.items():
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        config = Config(single_image_stop_prob=0.0)
        planner = load_planner(None, config)
        dataset = UnifiedGenerationDataset(
            path, token_lengths=planner.token_lengths, check_pictures="headers"
        )
        stream = PackStream(Mixture([DataSource(kind, dataset, planner)], seed=0), batch_size=1)
        transform = planner.transforms.vae if kind == "draw" else planner.transforms.vit

        def plain(transform: Any = transform) -> None:
            for p in found:
                with Image.open(p) as picture:
                    np.asarray(
                        picture.convert("RGB").resize(transform.size(*picture.size), Image.Resampling.BICUBIC)
                    )

        def ours(stream: PackStream = stream) -> None:
            for _ in load_batches(stream, RankSlice(), LoaderState(), limit=len(found)):
                pass

        best = {"plain": float("inf"), "ours": float("inf")}
        for _ in range(7):  # in turn, since other work on the machine comes and goes
            for name, work in (("plain", plain), ("ours", ours)):
                began = time.perf_counter()
                work()
                best[name] = min(best[name], time.perf_counter() - began)
        rates = {name: len(found) / seconds for name, seconds in best.items()}
        ratio = rates["ours"] / rates["plain"]
        print(
            f"loader   {kind}: {rates['ours']:.1f} samples/s a worker, plain decode + resize"
            f" {rates['plain']:.1f}: {ratio:.2f} of it"
        )


def rows(folder: Path, n: int) -> None:
    """Rows of 16,384 tokens of texts, questions about pictures, drawings and edits."""
    pick = random.Random(0)
    sizes = [(640, 480), (1024, 1024), (1600, 900), (768, 1152), (512, 512)]
    for i, (width, height) in enumerate(sizes):
        to_image(torch.zeros(3, height, width)).save(folder / f"size{i}.png")

    def name() -> str:
        return f"size{pick.randrange(len(sizes))}.png"

    def words(most: int) -> str:
        return "word " * pick.randint(5, most)

    makers = [
        lambda: {
            "messages": [{"role": "user", "content": words(60)}, {"role": "assistant", "content": words(900)}]
        },
        lambda: {"image_path": name(), "caption": words(300)},
        lambda: {"text_prompt": words(80), "image_path": name()},
        lambda: {
            "input_image": name(),
            "editing_steps": [{"instruction": words(20), "result_image": name()}],
        },
    ]
    path = folder / "mixed.jsonl"
    path.write_text("".join(json.dumps(pick.choice(makers)()) + "\n" for _ in range(n)))
    planner = load_planner(None, Config())
    dataset = UnifiedGenerationDataset(path, token_lengths=planner.token_lengths, check_pictures="headers")
    stream = PackStream(Mixture([DataSource("mixed", dataset, planner)], seed=0), budget=16_384)
    began = time.perf_counter()
    steps = stream.steps_in(0, 1)
    seconds = time.perf_counter() - began
    order = stream.mixture.order(0)
    full = stream.mixture.lengths(order.records, order.passes).sum() / (steps * 16_384)
    print(
        f"rows     {n:,} samples in {steps:,} rows of 16,384 tokens: {full:.2%} full;"
        f" {seconds / n * 1e6:.0f} µs a sample to pack"
    )


def cache(folder: Path, n: int) -> None:
    """A full-size FLUX VAE with random weights on pictures of 512 pixels: decoded and encoded, and found in
    the cache."""
    from unigen.cache.encoders import Encoders
    from unigen.cache.store import FeatureCache, Store
    from unigen.model.codec import FluxCodec, VaeConfig
    from unigen.model.config import BagelConfig
    from unigen.sequence.types import Image, Text

    found = []
    for i in range(n):
        found.append(folder / f"{i}.jpg")
        photograph(i, 512, 512).save(found[-1], quality=90)
    torch.set_num_threads(os.cpu_count() or 1)
    planner = load_planner(None, Config())
    vae = VaeConfig()
    encoders = Encoders(
        BagelConfig(None, None, vae), FluxCodec(vae).eval(), None, torch.float32, torch.device("cpu")
    )
    encoder = encoders.identity("vae")
    assert encoder is not None
    store = Store.create(folder / "cache")
    viewer = planner.viewer([Text("A picture"), Image(found[0], True)])
    began = time.perf_counter()
    for path in found:
        data = path.read_bytes()
        seen = viewer.decode(data, True, False)
        store.put(
            entry_key(encoder, digest(data), seen.view),
            encoders.encode(seen)["vae"],
            about(encoder, digest(data), seen.view),
        )
    encoded = (time.perf_counter() - began) / n
    looked_up = FeatureCache(store, encoder, None, vae)
    began = time.perf_counter()
    for path in found:
        assert viewer.look(path, True, False, looked_up).posterior is not None
    ready = (time.perf_counter() - began) / n
    print(
        f"cache    a 512 x 512 picture: {encoded * 1000:,.0f} ms to decode, encode and store,"
        f" {ready * 1000:.1f} ms to find",
        end="",
    )
    print(f": {encoded / ready:,.0f} times faster")


PARTS = {"check": (check, 1_000_000), "loader": (loader, 48), "rows": (rows, 20_000), "cache": (cache, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", choices=[*PARTS, []], help="what to measure; everything by default"
    )
    parser.add_argument(
        "--number", type=int, help="lines, pictures or samples, in place of each part's own number"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}"
    print(f"{machine}, load {os.getloadavg()[0]:.1f} at the start")
    for part in arguments.parts or PARTS:
        work, number = PARTS[part]
        with tempfile.TemporaryDirectory() as folder:
            work(Path(folder), arguments.number or number)


if __name__ == "__main__":
    main()
