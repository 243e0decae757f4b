"""What strangers and mistakes bring: ``python benchmarks/hostile.py [--only KIND ...] [--limit N] [--jobs
2]``.

Well over 1,500 cases (``hostile_cases.py``) are made by themselves: edited configs, resealed checkpoints,
tokenizer files, broken weights, special files, options, recipes, outputs, data, folders of runs. Each runs
``unigen`` in a forked child with limits of time and memory, in a folder of its own, and has one of these
ends:

    held        refused in one line that names the trouble, or accepted with the outcome of the unedited input
    traceback   a traceback, a signal, or another exit code than the documented ones
    hang        it took longer than ``--seconds``, or more memory than ``--memory``
    silent      accepted, though the outcome differs; or a file that is not the program's was changed
    vague       refused in one line that names neither the file nor the key

All that did not hold is written to ``--report`` with its output; ``--name`` runs single cases again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # a fork inherits no threads
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from hostile_cases import Case, Originals, cases, digest_of, forget, originals  # noqa: E402

ENDS = ("held", "traceback", "hang", "silent", "vague")
CLEAN = {0, 1, 2, 3, 75, 130}  # documented exit codes


class End(NamedTuple):
    end: str
    code: int
    why: str
    output: str


def preload() -> None:
    """Imports what a child would, so that a case costs no start."""
    import transformers.models.qwen2.modeling_qwen2
    import transformers.models.siglip.modeling_siglip  # noqa: F401

    import unigen.commands.cache
    import unigen.commands.check.command
    import unigen.commands.ckpt.command
    import unigen.commands.fetch.command
    import unigen.commands.generate.one
    import unigen.commands.preview.command
    import unigen.commands.watch.command
    import unigen.inference.inferencer
    import unigen.training.trainer  # noqa: F401


class Child:
    """A case that runs in a fork of this process."""

    def __init__(self, case: Case, made: Originals, folder: Path, memory: int):
        self.case, self.folder = case, folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.argv = case.make(made, folder)
        self.before = {path: digest_of(path) for path in case.kept(folder)}
        self.output = folder.with_suffix(".out")
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(memory)

    def _run(self, memory: int) -> None:
        code = 1
        try:
            os.setsid()
            out = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0), os.dup2(out, 1), os.dup2(out, 2)
            pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (pages + memory, pages + memory))
            os.chdir(self.folder)
            from unigen.cli import main

            code = main(self.argv)
            sys.stdout.flush()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def ended(self, seconds: float, baseline: dict[str, str]) -> End | None:
        """How it ended; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            if time.monotonic() - self.started < seconds:
                return None
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            return End("hang", -9, f"longer than {seconds:.0f} s", self.text())
        code = os.waitstatus_to_exitcode(status)
        return End(*self._judge(code, self.text(), baseline), self.text()[-4000:])

    def text(self) -> str:
        with open(self.output, "rb") as file:
            return file.read(1 << 20).decode("utf-8", "replace")

    def _judge(self, code: int, text: str, baseline: dict[str, str]) -> tuple[str, int, str]:
        changed = [str(path) for path, digest in self.before.items() if digest_of(path) != digest]
        if changed:
            return "silent", code, f"changed: {', '.join(changed)}"
        if "MemoryError" in text or "can't allocate memory" in text:
            return "hang", code, "memory"
        if code not in CLEAN or "Traceback (most recent call last)" in text:
            return "traceback", code, f"exit code {code}"
        if re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\u202a-\u202e\u2066-\u2069]", text):
            return "silent", code, "control sequences reached the terminal"
        named = not self.case.names or any(name in text for name in self.case.names)
        if code != 0:
            line = [line for line in text.splitlines() if "error:" in line or "Error" in line]
            if not line and self.case.wants_error_line:
                return "vague", code, "no line with an error"
            return ("held", code, "refused") if named else ("vague", code, "names neither file nor key")
        if self.case.accepted == "any" or (self.case.accepted == "named" and named):
            return "held", code, "accepted"
        if self.case.accepted == "same":
            outcome = self.case.outcome(self.folder)
            if outcome == baseline[self.case.baseline]:
                return "held", code, "accepted, same outcome"
            return "silent", code, "accepted, and the outcome differs"
        return "silent", code, "accepted"


def run_all(
    todo: list[Case], made: Originals, args: argparse.Namespace, work: Path
) -> list[tuple[Case, End]]:
    ends: list[tuple[Case, End]] = []
    baseline: dict[str, str] = {}
    for case in [case for case in cases(made) if case.kind == "baseline"]:
        child = Child(case, made, work / "baseline", args.memory << 20)
        while (end := child.ended(args.seconds, {case.baseline: "?"})) is None:
            time.sleep(0.02)
        assert end.code == 0, f"the unedited input fails: {case.name}\n{end.output}"
        baseline[case.baseline] = case.outcome(child.folder)
    running: dict[int, Child] = {}
    queue = list(reversed(todo))
    shown = time.monotonic()
    while queue or running:
        for slot in range(args.jobs):
            if slot not in running and queue:
                running[slot] = Child(queue.pop(), made, work / f"case{slot}", args.memory << 20)
        for slot, child in list(running.items()):
            end = child.ended(args.seconds, baseline)
            if end is not None:
                ends.append((child.case, end))
                forget(child.folder)
                del running[slot]
        if time.monotonic() - shown > 20:
            shown = time.monotonic()
            print(
                f"{len(ends)} of {len(todo)}: {dict(Counter(e.end for _, e in ends))}",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(0.005)
    return ends


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[], help="kinds")
    parser.add_argument("--name", default="", help="a regular expression that names cases")
    parser.add_argument(
        "--limit", type=int, default=0, help="so many cases of each kind, evenly chosen; 0: all"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="a case that takes longer hangs")
    parser.add_argument("--memory", type=int, default=3072, help="MiB a case may take more than its start")
    parser.add_argument("--report", type=Path, help="a text file of all that did not hold")
    args = parser.parse_args()
    preload()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        made = originals(work / "originals")
        todo = [case for case in cases(made) if case.kind != "baseline"]
        kinds = sorted({case.kind for case in todo})
        todo = [
            case
            for case in todo
            if (not args.only or case.kind in args.only) and re.search(args.name, case.name)
        ]
        if args.limit:
            few = []
            for kind in kinds:
                of_kind = [case for case in todo if case.kind == kind]
                few += of_kind[:: max(1, -(-len(of_kind) // args.limit))]
            todo = few
        ends = run_all(todo, made, args, work)
    table = {kind: Counter(end.end for case, end in ends if case.kind == kind) for kind in kinds}
    print("| kind | cases | " + " | ".join(ENDS) + " |\n| --- |" + " ---: |" * (len(ENDS) + 1))
    for kind, count in [*table.items(), ("all", Counter(end.end for _, end in ends))]:
        if count:
            print(f"| {kind} | {sum(count.values())} | " + " | ".join(str(count[end]) for end in ENDS) + " |")
    held = sum(end.end == "held" for _, end in ends)
    print(f"held: {100 * held / max(1, len(ends)):.1f} %")
    if args.report:
        with open(args.report, "w", encoding="utf-8") as file:
            for case, end in ends:
                if end.end != "held":
                    file.write(f"== {end.end} {case.kind} {case.name}: {end.why} (exit code {end.code})\n")
                    file.write(
                        json.dumps(end.output[-1500:], ensure_ascii=True)[1:-1].replace("\\n", "\n") + "\n\n"
                    )
    return 0 if held >= 0.99 * len(ends) and not any(end.end == "silent" for _, end in ends) else 1


if __name__ == "__main__":
    sys.exit(main())
