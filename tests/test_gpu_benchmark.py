"""``benchmarks/gpu.py``: every part gives its results, and what happens to one costs that one only."""

import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import gpu
import gpu_predictions
import gpu_report
import gpu_setup
import pytest
import torch
from kills import context

from unigen.config import Config
from unigen.model.bagel import Bagel

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
GUIDE = ROOT / "benchmarks" / "gpu.md"

# What a part must give at least; patterns.
ATTENTION = [f"{dtype} heads 4/2 of {width}" for dtype in ("bfloat16", "float32") for width in (16, 32)]
EXPECTED = {
    "env": ["versions", "card", "copy", "product: gate, up", "product: float32, TF32"],
    "flex": [
        *(f"{heads}, {tokens} tokens: error" for heads in ATTENTION for tokens in (60, 107, 128, 300, 1000)),
        *(
            f"attention {what}: {how}"
            for what in ("drawing", "edit")
            for how in ("forward", "forward and backward", "made ready")
        ),
        "fell back to other attention",
    ],
    "agree": [
        *(f"reference: {case}" for case in ("t2i", "edit", "understand", "VAE", "packed")),
        *("bfloat16: losses", "bfloat16: gradients"),
    ],
    "train": [
        *(
            "first documented command",
            "first documented command: loss",
            "bfloat16: resumed",
            "float32: resumed",
            "float16: resumed",
        ),
        *(
            "fsdp2: resumed",
            "fsdp2, offloaded: resumed",
            "8-bit Adam: resumed",
            "selective: resumed",
            "draws only: resumed",
        ),
    ],
    "layers": [
        *(
            "drawing, draws only, full recompute: 28 layers",
            "drawing, draws only, full recompute: 28 layers, *MFU",
        ),
        *("edit, everything, *: 4 layers", "*: 4 layers, peak", "*tokens a second"),
    ],
    "infer": [
        *("weights", "decode", "kernels a token", "prefill", "VAE encodes *", "VAE decodes *: peak"),
        *(
            f"Euler step, {guidance}"
            for guidance in ("no guidance", "text guidance", "text and image guidance")
        ),
    ],
    "adapters": [
        *(
            f"{run}: {what}"
            for run in ("QLoRA, 4k*", "QLoRA, 16k tokens, 24 GB", "QLoRA, *all on*", "LoRA bf16*")
            for what in ("peak", "tokens a second")
        )
    ],
    "full": [
        "layers",
        "step: peak of the first micro-batch",
        "step: peak of the second micro-batch",
        "step",
        "step: honest MFU",
    ],
    "vit": ["a new size costs", "patches a second"],
    "kernels": ["top", "share of products", "share of attention", "share of other kernels"],
    "small": [
        "trains on nothing",
        "trains on no label",
        "generate text: exit code",
        "generate image: exit code",
        "generate edit: exit code",
    ],
    "options": ["as the model: forward"],
}
# Predictions of what a tiny run on a CPU does not do.
GPU_ONLY = ["vit/cuDNN*", "*, compiled: *", "full/compiled *"]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- the whole of it


class Fork:
    """As much of ``Popen`` as the runner asks of the process of a part."""

    def __init__(self, name: str, folder: Path, variables: dict[str, str]):
        for end in ("in", "out"):
            os.mkfifo(folder / f"{name}.{end}")
        self.stdin = open(os.open(folder / f"{name}.in", os.O_RDWR), "wb", 0)  # noqa: SIM115
        self.stdout = open(os.open(folder / f"{name}.out", os.O_RDONLY | os.O_NONBLOCK), "rb", 0)  # noqa: SIM115
        self.process = context().Process(target=run_part, args=(name, str(folder), variables))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        self.process.join(seconds)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("part", seconds or 0)
        return self.process.exitcode


def run_part(name: str, folder: str, variables: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(variables)
    sys.path.append(str(ROOT / "tools"))
    ends = {"in": os.O_RDONLY, "out": os.O_WRONLY, "txt": os.O_WRONLY | os.O_CREAT}
    for number, (end, how) in enumerate(ends.items()):
        os.dup2(os.open(f"{folder}/{name}.{end}", how), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    multiprocessing.set_start_method("fork", force=True)  # as in a program that no forkserver has started
    sys.exit(gpu.run_part(name, small=True))


class Forked(gpu.Runner):
    """Forks all parts but the first from a process that has imported everything: that is most of the time that
    they would take."""

    def start(self, name):
        if name == "env":
            return super().start(name)
        folder = Path(self.folder.name)
        self.children.append(
            gpu.Child(name, Fork(name, folder, gpu.environment(True)), folder / f"{name}.txt")
        )
        return self.children[-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_gives_its_results_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "Runner", Forked)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        code = gpu.main(["--small", "--seconds", "800", "--out", str(tmp_path)])
    finally:
        signal.signal(signal.SIGTERM, handler)
    results = read(tmp_path / gpu.RESULTS)
    failed = [r for r in results if "failed" in r or "skipped" in r]
    assert failed == [] and code == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == results
    names = {part: [r["name"] for r in results if r["part"] == part] for part in gpu.PARTS}
    assert EXPECTED.keys() == gpu.PARTS.keys()
    missing = [
        (part, wanted)
        for part, those in EXPECTED.items()
        for wanted in those
        if not any(fnmatchcase(n, wanted) for n in names[part])
    ]
    assert missing == []
    assert [(r["name"], r["measured"]) for r in results if r.get("pass") is False] == []
    assert [r["name"] for r in results if r.get("pass")], "nothing was judged"
    full_names = [f"{part}/{name}" for part, those in names.items() for name in those]
    predicted = [
        pattern
        for pattern, _ in gpu_predictions.TABLE
        if not any(fnmatchcase(pattern, known) for known in GPU_ONLY)
    ]
    assert [
        pattern for pattern in predicted if not any(fnmatchcase(name, pattern) for name in full_names)
    ] == []
    page = gpu_report.report(tmp_path / gpu.RESULTS)
    assert all(
        f"| {r['part']} | {r['name']} |" in page
        for r in results
        if r["part"] == "train" and r["name"] != "part"
    )


# ---- whatever happens to a part

READY = """
import json, os, subprocess, sys, time
def say(name): print(json.dumps({"name": name, "measured": 1}), flush=True)
sys.stdin.readline()
"""
PROGRAMS = {
    "env": READY + "say('good')",
    "flex": (
        READY
        + "say('before'); child = subprocess.Popen(['sleep', '600']); say(str(child.pid)); time.sleep(600)"
    ),
    "agree": READY + "say('before'); print('the reason', file=sys.stderr, flush=True); os.abort()",
    "train": "raise SystemExit('cannot even start')",
    "layers": READY + "say('after')",
}


class Pretended(gpu.Runner):
    """Runs small programs in the place of the parts."""

    def command(self, name):
        return [sys.executable, "-c", PROGRAMS[name]]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_part_that_hangs_or_dies_costs_itself_only(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {name: gpu.Part("", 3, "") for name in PROGRAMS})
    with Pretended(tmp_path, 300, small=False) as runner:
        runner.run(list(PROGRAMS))
    results = read(tmp_path / gpu.RESULTS)
    assert [(r["part"], r["name"]) for r in results if not r["name"].isdigit()] == [
        ("env", "good"), ("env", "part"), ("flex", "before"), ("flex", "part"), ("agree", "before"),
        ("agree", "part"), ("train", "part"),
        ("layers", "after"), ("layers", "part"),
    ]  # fmt: skip
    ended = {r["part"]: r for r in results if r["name"] == "part"}
    assert "killed after 3 s" in ended["flex"]["failed"]
    assert str(-signal.SIGABRT) in ended["agree"]["failed"] and "the reason" in ended["agree"]["stderr"]
    assert (
        "cannot even start" in ended["train"]["stderr"] and "the reason" in (tmp_path / gpu.LOG).read_text()
    )
    assert "failed" not in ended["env"] and "failed" not in ended["layers"] and runner.failures == 3
    (grandchild,) = (int(r["name"]) for r in results if r["name"].isdigit())
    assert not alive(grandchild)


@pytest.mark.slow
def test_parts_without_time_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {name: gpu.Part("", 60, "") for name in PROGRAMS})
    with Pretended(tmp_path, gpu.LEAST + 2, small=False) as runner:
        runner.run(["flex", "layers"])
    killed, skipped = [r for r in read(tmp_path / gpu.RESULTS) if r["name"] == "part"]
    assert "killed" in killed["failed"] and killed["limit"] <= gpu.LEAST + 2
    assert skipped["part"] == "layers" and "no time left" in skipped["skipped"]


@pytest.mark.slow
def test_an_interrupted_run_leaves_its_results_and_no_process(tmp_path):
    code = f"""
import sys
sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(ROOT / "tests")!r}]
import gpu, test_gpu_benchmark as tests
gpu.Runner = tests.Pretended
sys.exit(gpu.main(["--only", "env,flex,layers", "--out", {str(tmp_path)!r}]))
"""
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    lines = (json.loads(line) for line in run.stdout)
    grandchild = next(int(line["name"]) for line in lines if line["name"].isdigit())
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == 130
    results = read(tmp_path / gpu.RESULTS)
    assert [r["name"] for r in results if r["part"] == "run"] == ["began", "interrupted"] and (
        "env",
        "good",
    ) in [(r["part"], r["name"]) for r in results]
    deadline = time.monotonic() + 30
    while alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(grandchild)
    assert "interrupted" in gpu_report.report(tmp_path / gpu.RESULTS)


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--only", "flex,lawyers"])
    assert stopped.value.code == 2 and "lawyers" in capsys.readouterr().err


# ---- predictions and the report


def test_a_prediction_holds_fails_or_is_for_another_card():
    judged = gpu_predictions.judged
    assert judged("env", "copy", 2.9, "NVIDIA H100 80GB HBM3") == (
        "≥ 2.7 on H100; what the estimates below assume",
        True,
    )
    assert judged("env", "copy", 2.9, "NVIDIA H200")[1] is False
    text, good = judged("env", "copy", 0.9, "NVIDIA L4")
    assert "H100" in text and good is None
    assert judged("train", "bfloat16: resumed", 0.0, "cpu")[1] is True
    assert judged("train", "bfloat16: resumed", 1e-7, "cpu")[1] is False
    assert judged("train", "bfloat16: resumed", float("nan"), "cpu")[1] is False
    assert judged("full", "step: peak with the update", 104.0, "cpu", value=100.0)[1] is True
    assert judged("full", "step: peak with the update", 89.0, "cpu", value=100.0)[1] is False
    assert judged("full", "step: peak with the update", None, "cpu", value=100.0)[1] is None
    assert judged("env", "card", {"name": "x"}, "cpu") == ("", None)


def test_every_prediction_has_a_part_and_a_source():
    for pattern, prediction in gpu_predictions.TABLE:
        assert pattern.partition("/")[0] in gpu.PARTS, pattern
        assert prediction.source, pattern


# Simulated on fake tensors of full size: GB above weights and moments in the second micro-batch.
SIMULATED = [
    ("full", True, 4096, 64, 29.8), ("full", True, 16384, 304, 39.3), ("full", True, 32768, 608, 52.2),
    ("selective", True, 4096, 64, 37.2), ("selective", True, 16384, 304, 68.9), ("selective", True, 32768,
    608, 111.3),
    ("full", False, 4096, 64, 61.8), ("full", False, 16384, 304, 70.3), ("full", False, 32768, 608, 83.2),
]  # fmt: skip


@pytest.fixture(scope="module")
def published():
    with torch.device("meta"):
        return Bagel(gpu_setup.published())


@pytest.mark.parametrize(("policy", "draws", "tokens", "und", "simulated"), SIMULATED)
def test_the_memory_formula_is_the_simulation(published, policy, draws, tokens, und, simulated):
    from unigen.model.parts import is_frozen

    config = Config(freeze_und=draws, freeze_vit=draws)
    trained = {name: p for name, p in published.named_parameters() if not is_frozen(name, config)}
    layer = sum(
        p.numel()
        for name, p in trained.items()
        if name.startswith("language_model.model.layers.0.") and p.ndim == 2
    )
    held = gpu_predictions.Held(0.0, sum(p.numel() for p in trained.values()), layer, 0.0)
    later = gpu_predictions.step_peaks(published.config.llm, policy, tokens, und, held)[1] / 1e9
    assert later == pytest.approx(simulated, rel=0.05)


def test_the_report_is_a_table_of_what_was_measured(tmp_path):
    lines = [
        {"part": "run", "name": "began", "measured": "2026-11-27 10:00:00 UTC", "commit": "abc"},
        {"part": "env", "name": "card", "measured": {"name": "NVIDIA H100", "GB": 85.0}},
        {"part": "env", "name": "versions", "measured": {"torch": "2.11.0"}},
        {"part": "env", "name": "copy", "measured": 2.9, "unit": "TB/s", "predicted": "≥ 2.7", "pass": True},
        {
            "part": "infer",
            "name": "decode",
            "measured": 30.0,
            "unit": "ms a token",
            "predicted": "≤ 15",
            "pass": False,
        },
        {
            "part": "infer",
            "name": "prefill",
            "measured": None,
            "pass": False,
            "failed": "OutOfMemoryError: a | b",
        },
        {"part": "flex", "name": "part", "measured": 100, "failed": "killed after 100 s"},
        {"part": "vit", "name": "part", "skipped": "no time left: 2 of 450 s"},
    ]
    file = tmp_path / "gpu.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    page = gpu_report.report(file)
    assert (
        page.startswith("## NVIDIA H100, 2026-11-27 10:00:00 UTC")
        and "torch 2.11.0" in page
        and "1 of 3" in page
    )
    assert (
        "| env | copy | 2.9 TB/s | ≥ 2.7 | yes |" in page
        and "| infer | decode | 30.0 ms a token | ≤ 15 | **no** |" in page
    )
    assert "| infer | prefill | FAILED: OutOfMemoryError: a / b |  | **no** |" in page
    assert (
        "- flex: killed after 100 s" in page
        and "- vit: no time left" in page
        and "did not come to its end" in page
    )


# ---- a bare machine


def carried() -> list[str]:
    """The packages that the guide takes along, with their versions."""
    command = next(
        c
        for c in re.findall(r"```bash\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)
        if "pip install" in c
    )
    return [
        word
        for word in shlex.split(command.replace("\\\n", " "), comments=True)
        if re.fullmatch(r"[\w-]+==[\w.]+", word)
    ]


def needed(names: list[str]) -> set[str]:
    """Distributions and what they need, without extras, as far as they are installed."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            waiting += [re.match(r"[\w.-]+", r)[0] for r in requires(name) or [] if "extra ==" not in r]
        except PackageNotFoundError:
            found.discard(name)
    return found


BARE = """
import sys
from importlib.machinery import PathFinder
allowed = set(sys.argv[1].split(","))
class Only(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        return super().find_spec(name, path, target) if top in allowed or top in sys.stdlib_module_names else None
sys.meta_path = [Only if finder is PathFinder else finder for finder in sys.meta_path]
import gpu_right, gpu_speed, gpu_train_speed
from gpu_setup import Here, begin, prepare
from unigen.model.codec import FluxCodec, VaeConfig
from unigen.training.adam8bit import _adamw8bit
import pathlib
prepare("train", True, sys.stdout)
FluxCodec(VaeConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1))
_adamw8bit()
gpu_right.documented(pathlib.Path(sys.argv[2]))
gpu_right.generate()
print("missing" if "pyarrow" not in allowed and "pyarrow" in sys.modules else "done")
"""


@pytest.mark.slow
def test_the_carried_packages_are_enough_for_a_bare_machine(tmp_path):
    """With the packages of the machine in the guide and those it takes along alone, the parts train and
    generate."""
    machine = needed(["torch", "transformers", "pillow"])
    along = {word.partition("==")[0].lower().replace("_", "-") for word in carried()}
    assert {"jsonargparse", "bitsandbytes"} <= along and not along & {
        "torch",
        "numpy",
        "triton",
        "transformers",
    }
    top = {
        name
        for name, dists in packages_distributions().items()
        if {re.sub(r"[-_.]+", "-", d).lower() for d in dists} & (machine | along)
    }
    own = {"unigen", "tiny_model", "compare_reference", *(file.stem for file in SCRIPT.parent.glob("*.py"))}
    assert "pyarrow" not in top and "torch" in top
    paths = [str(ROOT), *(str(ROOT / folder) for folder in ("benchmarks", "tests", "tools"))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", BARE, ",".join(sorted(top | own)), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "done", done.stderr[-3000:]


def test_the_carried_versions_are_those_that_tests_run_on():
    pinned = dict(
        line.partition(";")[0].split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()[::-1]
        if "==" in line
    )
    versions = {name.strip().lower().replace("_", "-"): version.strip() for name, version in pinned.items()}
    for word in carried():
        name, _, version = word.partition("==")
        assert versions[name.lower().replace("_", "-")] == version, word
