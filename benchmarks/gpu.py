"""Everything that only a GPU can tell, in one call of at most eight minutes.

What decides most comes first. Every part is a process of its own with a limit of its own, and every result is
one line of JSON, printed and written at once, so that a part that fails, hangs or crashes costs its own
results only. Beside what was measured stands what was predicted (``gpu_predictions.py``), and whether the
prediction holds. ``gpu.md`` says how to run this on a bare machine.

    python benchmarks/gpu.py --out results                  all parts, on a GPU
    python benchmarks/gpu.py --small                        all parts with tiny sizes, on a CPU
    python benchmarks/gpu.py --only flex,layers             these parts alone
    python benchmarks/gpu.py --report results/gpu.jsonl     the results as a page of Markdown
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LEAST = 10.0  # seconds that must be left to begin a part
TAIL = 1500  # characters of a part's errors that go into the results
RESULTS, LOG = "gpu.jsonl", "gpu.log"


@dataclass(frozen=True)
class Part:
    """A process of the benchmark."""

    module: str  # its function has the part's name
    seconds: float  # most that it may take
    about: str


PARTS = {
    "env": Part("gpu_speed", 45, "versions, the card, its memory bandwidth and matrix products"),
    "flex": Part("gpu_right", 110, "flex attention against dense attention, values and gradients; its speed"),
    "agree": Part("gpu_right", 60, "the reference's losses, gradients, tokens, latents; bfloat16"),
    "train": Part("gpu_right", 90, "the first documented command; precisions, engines, optimisers; resume"),
    "layers": Part("gpu_train_speed", 110, "time and memory of layers at full width, and so of 28 of them"),
    "infer": Part("gpu_speed", 90, "decoded tokens, Euler steps at 1024 x 1024, prefill, the VAE"),
    "full": Part(
        "gpu_train_speed",
        90,
        "training steps of the whole model, or of as many layers as fit: memory as predicted?",
    ),
    "adapters": Part(
        "gpu_adapters", 90, "adapters over the whole model in 4 bits and in bfloat16: memory as planned?"
    ),
    "vit": Part("gpu_speed", 40, "the ViT on pictures of new sizes"),
    "kernels": Part("gpu_train_speed", 45, "which kernels take a training step's time"),
    "small": Part("gpu_right", 45, "sequences that lack something; unigen generate from end to end"),
    "options": Part("gpu_train_speed", 60, "options of flex attention's kernels side by side"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the parts that were asked for; 0 where none failed, 1 otherwise, 130 when interrupted."""
    o = parse(argv)
    if o.report:
        from gpu_report import report

        print(report(Path(o.report)), end="")
        return 0
    if o.part:
        return run_part(o.part, o.small)
    names = [name for name in PARTS if not o.only or name in o.only]
    out = Path(o.out)
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, interrupt)
    with Runner(out, o.seconds, o.small) as runner:
        runner.say(
            "run",
            "began",
            measured=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            commit=commit(),
            small=o.small,
            parts=names,
        )
        try:
            runner.run(names)
        except KeyboardInterrupt:
            runner.say("run", "interrupted", failed="interrupted")
            return 130
        runner.say("run", "ended", measured=round(runner.passed(), 1), unit="s", failures=runner.failures)
    return 1 if runner.failures else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; ``only`` as a list of parts."""
    about = "\n".join(f"  {name:8} {part.seconds:4.0f} s  {part.about}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"parts, in this order, and their limits:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        default="outputs/gpu",
        help=f"folder for {RESULTS} (appended to) and {LOG} (the parts' messages)",
    )
    parser.add_argument("--seconds", type=float, default=450, help="most that all parts together may take")
    parser.add_argument("--only", default="", help="names of parts, with commas between them")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--report", help="turn these results into Markdown, and run nothing")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    o = parser.parse_args(argv)
    o.only = [name.strip() for name in o.only.split(",") if name.strip()]
    if unknown := [name for name in o.only if name not in PARTS]:
        parser.error(f"--only names {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    return o


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def commit() -> str:
    """Which sources these are, as far as git knows."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


# ---- the runner


@dataclass
class Child:
    """The process of a part. It imports what it needs, then waits for a line on its input."""

    name: str
    process: subprocess.Popen[bytes]
    errors: Path

    def go(self, seconds: float) -> None:
        """Lets the part begin, and tells it how long it may take."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died while it waited; its exit code will tell
            self.process.stdin.write(f"{seconds}\n".encode())
            self.process.stdin.flush()

    def lines(self, seconds: float) -> Iterator[dict[str, Any]]:
        """The results as they come. Ends with the output, or raises TimeoutError after ``seconds``."""
        assert self.process.stdout is not None
        end, rest, source = time.monotonic() + seconds, b"", self.process.stdout.fileno()
        while True:
            if not select.select([source], [], [], min(1.0, max(0.0, end - time.monotonic())))[0]:
                if self.process.poll() is not None:
                    return  # what it started holds its output open
                if time.monotonic() >= end:
                    raise TimeoutError
                continue
            data = os.read(source, 1 << 16)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from (json.loads(line) for line in lines)

    def end(self, seconds: float = 0.0) -> int:
        """Waits so long for the end, then kills the process and whatever it started; its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its own group, see `Runner.start`
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()
        return self.process.wait()

    def messages(self) -> str:
        """What it wrote besides results."""
        return self.errors.read_text(encoding="utf-8", errors="replace")


class Runner:
    """Runs parts one after another, and writes down what they say.

    While a part runs, the process of the next one already imports PyTorch and the others, and then waits.
    """

    def __init__(self, out: Path, seconds: float, small: bool):
        self.began, self.seconds, self.small = time.monotonic(), seconds, small
        self.failures = 0
        self.results, self.log = out / RESULTS, out / LOG
        self.folder = tempfile.TemporaryDirectory(prefix="unigen-gpu-")
        self.children: list[Child] = []

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.end()
        self.folder.cleanup()

    def passed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def say(self, part: str, name: str, **values: Any) -> None:
        """Prints and writes one result."""
        self.failures += "failed" in values
        line = json.dumps(
            {"part": part, "name": name, **values, "at": round(self.passed(), 1)}, ensure_ascii=False
        )
        print(line, flush=True)
        with open(self.results, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def run(self, names: list[str]) -> None:
        """Runs the parts."""
        coming = self.start(names[0])
        for name, after in zip(names, [*names[1:], None], strict=True):
            left = self.seconds - self.passed()
            if left < LEAST:
                self.say(name, "part", skipped=f"no time left: {max(left, 0):.0f} of {self.seconds:.0f} s")
                continue
            child, coming = coming, self.start(after) if after else coming
            self.watch(child, min(PARTS[name].seconds * (3 if self.small else 1), left))

    def start(self, name: str) -> Child:
        """A process that gets ready for a part."""
        errors, pipe = Path(self.folder.name) / f"{name}.txt", subprocess.PIPE
        with open(errors, "wb") as stderr:
            process = subprocess.Popen(
                self.command(name),
                stdin=pipe,
                stdout=pipe,
                stderr=stderr,
                env=environment(self.small),
                start_new_session=True,
            )
        self.children.append(Child(name, process, errors))
        return self.children[-1]

    def command(self, name: str) -> list[str]:
        """What starts the process of a part."""
        return [sys.executable, str(Path(__file__).resolve()), "--part", name, *(["--small"] * self.small)]

    def watch(self, child: Child, limit: float) -> None:
        """Lets a part run for at most ``limit`` seconds, and writes down what it says and how it ended."""
        began, failed = self.passed(), ""
        child.go(limit)
        try:
            for result in child.lines(limit):
                self.say(child.name, **result)
            code = child.end(seconds=5)
            failed = f"ended with exit code {code}" if code else ""
        except TimeoutError:
            child.end()
            failed = f"killed after {limit:.0f} s"
        finally:
            child.end()
            self.children.remove(child)
        messages = child.messages()
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"==== {child.name}\n{messages}\n")
        more = {"failed": failed, "stderr": messages[-TAIL:]} if failed else {}
        self.say(
            child.name, "part", measured=round(self.passed() - began, 1), unit="s", limit=round(limit), **more
        )


def environment(small: bool) -> dict[str, str]:
    """Of a part: what the first one compiles the others find, and nothing asks a network."""
    cache = Path(tempfile.gettempdir()) / f"unigen-gpu-{os.getuid()}"
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    asked = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "OMP_NUM_THREADS": "1" if small else "4",
        **({"CUDA_VISIBLE_DEVICES": ""} if small else {}),
    }
    kept = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
    return {**kept, **os.environ, **asked}


# ---- the process of a part


def run_part(name: str, small: bool) -> int:
    """Gets ready, waits for a line, and runs the part; does not return from that.

    Only results go to the standard output.
    """
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import importlib

    import gpu_setup

    function = getattr(importlib.import_module(PARTS[name].module), name)
    gpu_setup.prepare(name, small, results)
    if not (seconds := sys.stdin.readline()):
        return 0  # nobody wants this part any more
    gpu_setup.begin(float(seconds))
    function()
    results.close()
    os._exit(0)  # tearing everything down takes seconds, and all is written


if __name__ == "__main__":
    sys.exit(main())
