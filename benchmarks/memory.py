"""Host memory of loading and sharding a checkpoint: ``python benchmarks/memory.py [--gigabytes 1.2]
[--processes 1 2 3]``.

Makes a checkpoint of random float32 weights in the published layout, then lets every engine load it with 1, 2
and 3 fresh processes on this CPU. Reported are the most memory of all processes together (PSS, so that shared
pages count once, sampled every 50 ms; interpreters and libraries included) and the sum of what each process
says was its own most (VmHWM, which misses no moment but counts shared pages once a process). For fsdp2 and
ZeRO 3 (zero3) the first must stay below 1.2 times the checkpoint + 1 GB. ``tests/training/test_memory.py``
runs the same on half a GB.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENGINES = ("single", "ddp", "fsdp2", "zero3")
INTERVAL_S = 0.05
PATIENCE_S = 300.0
GB = 10**9


@dataclass(frozen=True)
class Peak:
    """What loading took: bytes and seconds."""

    start: int  # PSS of all processes with everything imported and nothing loaded
    together: int  # most PSS of all processes together
    separate: int  # sum of each process's most resident memory
    held: int  # parameters of all processes together, afterwards
    seconds: float  # of loading, in the slowest process


def limit(checkpoint: int) -> float:
    """Most bytes that loading and sharding a checkpoint of so many bytes may take."""
    return 1.2 * checkpoint + GB


# ---- the checkpoint


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Writes a checkpoint of about ``gigabytes`` (10^9 bytes) of float32, a tensor at a time, all rows of one
    alike; its exact size in bytes."""
    import torch
    from transformers import Qwen2Config, SiglipVisionConfig

    from unigen.model.bagel import Bagel
    from unigen.model.codec import VaeConfig
    from unigen.model.config import BagelConfig
    from unigen.model.storage import WEIGHTS, write_safetensors
    from unigen.model.weights import side_files, write_side_files

    def model_of(layers: int) -> Bagel:
        llm = Qwen2Config(
            hidden_size=1024, intermediate_size=5504, num_hidden_layers=layers, num_attention_heads=16,
            num_key_value_heads=2,
            vocab_size=4096, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )  # fmt: skip
        vit = SiglipVisionConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=5, num_attention_heads=4,
            image_size=224, patch_size=14,
            hidden_act="gelu_pytorch_tanh",
        )  # fmt: skip
        with torch.device("meta"):
            return Bagel(BagelConfig(llm, vit, VaeConfig(type="pixel", z_channels=3 * 8**2)))

    def bytes_of(model: Bagel) -> int:
        return sum(4 * p.numel() for p in model.parameters())

    base, layer = bytes_of(model_of(1)), bytes_of(model_of(2)) - bytes_of(model_of(1))
    model = model_of(1 + max(0, round((gigabytes * GB - base) / layer)))
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    plan = {
        name: (
            torch.float32,
            tuple(p.shape),
            lambda shape=tuple(p.shape): (torch.randn(shape[1:], generator=generator) * 0.02).expand(shape),
        )
        for name, p in model.named_parameters()
    }
    write_safetensors(folder / WEIGHTS, plan)
    write_side_files(side_files(model), folder)
    return bytes_of(model)


# ---- a process of a run


def load(folder: str, engine: str) -> None:
    """Loads as a run does. Says when it is ready to, waits for a line on its input, and says what it took."""
    import torch

    from unigen.config import Config
    from unigen.training.engine import open_engine

    torch.set_num_threads(1)
    options: dict[str, Any] = {"engine": engine}
    if engine == "zero3":
        json_file = Path(tempfile.mkdtemp()) / "ds.json"
        json_file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
        options = {"engine": "deepspeed", "deepspeed_config": str(json_file)}
    with open_engine(Config(device="cpu", **options)) as opened:
        opened.gather("all here")
        print("ready", flush=True)
        sys.stdin.readline()
        began = time.perf_counter()
        opened.load_model(Path(folder))
        # there DeepSpeed makes copies, moments and gradients, which the others make with the first step
        if engine != "zero3":
            opened.start()
        seconds = time.perf_counter() - began
        opened.gather("all done")
        parts = (
            [p.ds_tensor for p in opened.model.parameters()]
            if engine == "zero3"
            else [shard.value for shard in opened.shards()]
        )
        held = sum(part.numel() * part.element_size() for part in parts)
        most = next(
            line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")
        )
        print(f"took {int(most.split()[1]) * 1024} {held} {seconds:.3f}", flush=True)
        sys.stdin.readline()


# ---- measuring


def pss(pid: int) -> int:
    """Bytes of a process's memory, pages shared with others in part."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def start(folder: Path, engine: str, world: int, port: int, rank: int) -> subprocess.Popen[str]:
    environment = {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, __file__, "--load", str(folder), engine]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def answer(process: subprocess.Popen[str], word: str) -> list[str]:
    """The rest of the next line that begins with ``word``."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line.split()[1:]
    raise RuntimeError(f"a process ended with {process.wait()} before it said {word!r}")


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go on\n")
    process.stdin.flush()


def measure(folder: Path, engine: str, world: int) -> Peak:
    """Loads the checkpoint with ``world`` fresh processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [start(folder, engine, world, port, rank) for rank in range(world)]
    deadline = threading.Timer(PATIENCE_S, lambda: [process.kill() for process in processes])
    deadline.start()
    samples: list[int] = []
    over = threading.Event()

    def sample() -> None:
        while not over.is_set():
            samples.append(sum(pss(process.pid) for process in processes))
            over.wait(INTERVAL_S)

    sampler = threading.Thread(target=sample)
    try:
        for process in processes:
            answer(process, "ready")
        sampler.start()
        while not samples:
            time.sleep(INTERVAL_S)
        for process in processes:
            tell(process)
        told = [answer(process, "took") for process in processes]
        over.set()
        sampler.join()
        samples.append(sum(pss(process.pid) for process in processes))
        for process in processes:
            tell(process)
            process.wait()
    finally:
        over.set()
        deadline.cancel()
        for process in processes:
            process.kill()
            process.communicate()
    return Peak(
        samples[0],
        max(samples),
        sum(int(t[0]) for t in told),
        sum(int(t[1]) for t in told),
        max(float(t[2]) for t in told),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.2, help="size of the checkpoint, in 10^9 bytes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--folder", help="where the checkpoint is made; default: a temporary folder")
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "ENGINE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(*options.load)
        return
    with tempfile.TemporaryDirectory(prefix="unigen-memory-", dir=options.folder) as folder:
        size = make_checkpoint(Path(folder) / "model", options.gigabytes)
        print(f"S = {size / GB:.3f} GB; 1.2 S + 1 GB = {limit(size) / GB:.3f} GB")
        print(
            f"{'engine':8} {'processes':>9} {'before':>8} {'peak PSS':>9} {'sum VmHWM':>10} {'held':>8}"
            f" {'seconds':>8}   (GB)"
        )
        for engine in options.engines:
            for world in options.processes:
                if (engine == "single") != (world == 1) and engine not in ("fsdp2", "zero3"):
                    continue
                p = measure(Path(folder) / "model", engine, world)
                verdict = (
                    ("  holds" if p.together <= limit(size) else "  TOO MUCH")
                    if engine in ("fsdp2", "zero3")
                    else ""
                )
                numbers = (
                    f"{p.start / GB:8.3f} {p.together / GB:9.3f} {p.separate / GB:10.3f} {p.held / GB:8.3f}"
                    f" {p.seconds:8.1f}"
                )
                print(f"{engine:8} {world:9} {numbers}{verdict}", flush=True)


if __name__ == "__main__":
    main()
