"""``unigen ckpt``: what is listed, what is found damaged, and that an export is the run's weights, to the
bit."""

import json
import os
import resource
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

from unigen import cli, load_bagel, save_bagel
from unigen.commands.ckpt.export import ExportError, export
from unigen.commands.ckpt.listing import checkpoint_facts, checkpoints_of
from unigen.commands.ckpt.options import CkptOptions
from unigen.config import Config, UserError
from unigen.inference.pictures import trained_transform
from unigen.model.run_options import RUN_OPTIONS
from unigen.model.storage import scan_folder, scan_safetensors
from unigen.runs.checkpoint import read_manifest
from unigen.training.sample_plan import decides

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def golden_tensors(golden: Path) -> dict[str, torch.Tensor]:
    return {name: entry.read() for name, entry in scan_folder(golden / "model").items()}


@pytest.fixture(scope="session")
def whole(golden: Path, golden_tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 3 as two processes wrote it: the golden model as the average, every number one higher in training.
    Not to be changed."""
    return write_checkpoint(
        tmp_path_factory.mktemp("runs") / "run", 3, golden_tensors, model=golden / "model"
    )


def ckpt(*words: object) -> int:
    return cli.main(["ckpt", *map(str, words)])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """Are names, dtypes and bits the same?"""
    return found.keys() == wanted.keys() and all(
        v.dtype == wanted[n].dtype and torch.equal(v, wanted[n]) for n, v in found.items()
    )


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: entry.read() for name, entry in scan_folder(folder).items()}


# ---- the command


def test_what_cannot_be_done_is_said_with_exit_code_2(tmp_path: Path, whole: Path, capsys):
    for words, said in [
        ((), "say what to do: ls, verify, export; nothing was said"),
        (("verfy", whole), "did you mean verify?"),
        (("ls",), "takes one folder: unigen ckpt ls RUN; found 0"),
        (("ls", whole, whole), "found 2"),
        (("export", whole), "takes two folders"),
        (("verify",), "found 0"),
        (("ls", tmp_path / "nowhere"), "there is no such folder"),
        (("verify", tmp_path), "holds no checkpoints"),
        (("export", whole.parent, tmp_path / "out"), "is a run. Fix: name one of its checkpoints: step_3"),
        (("export", tmp_path / "step_9", tmp_path / "out"), "there is no such folder"),
        (("export", whole, tmp_path / "out", "--max_shard_gb", 0), "max_shard_gb is 0.0; it is out of range"),
        (("export", whole, tmp_path / "out", "--merge"), "holds no adapter. Fix: leave --merge out\n"),
    ]:
        assert ckpt(*words) == 2 and said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- ls


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a checkpoint in every state."""
    run = tmp_path / "run"
    for step in (2, 10, 30):
        write_checkpoint(run, step)
    write_checkpoint(run, 20, world=1, average=False)
    write_checkpoint(run, 20, name="best", world=1)
    (run / "step_30" / "optimizer-00002-of-00002.safetensors").write_bytes(b"short")
    (run / "step_30" / "trainer.json").unlink()
    (run / "step_40").mkdir()
    shutil.copytree(run / "step_2", run / ".step_50.partial-7")
    shutil.copytree(run / "step_2", run / ".best.old-7")
    lines = [{"step": 10, "loss": 9.0}, {"step": 10, "val_loss": 1.5}, {"step": 20, "val_loss": 1.25}]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "val_loss": 1.', "utf-8"
    )
    return run


def test_ls_shows_every_checkpoint_with_its_state(run: Path, capsys):
    assert ckpt("ls", run) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == [
        "checkpoint",
        "step",
        "written",
        "size",
        "processes",
        "engine",
        "holds",
        "val_loss",
        "state",
    ]
    assert [line[0] for line in lines[1:-1]] == [
        "step_2",
        "step_10",
        "step_20",
        "step_30",
        "step_40",
        "best",
        "best",
        "step_50",
    ]
    size = sum(p.stat().st_size for p in (run / "step_10").iterdir() if p.name != "manifest.json")
    assert lines[2][4:] == [
        f"{size / 1000:.1f}",
        "kB",
        "2",
        "fsdp2",
        "ema",
        "model",
        "optimizer",
        "1.5000",
        "whole",
    ]
    assert lines[3][6:] == ["1", "single", "ema", "optimizer", "1.2500", "whole"]
    text = [" ".join(line) for line in lines]
    assert (
        "damaged; optimizer-00002-of-00002.safetensors has 5 bytes instead of" in text[4]
        and "trainer.json is missing" in text[4]
    )
    assert "- damaged; manifest.json is missing" in text[5] and text[6].endswith("1.2500 whole, weights only")
    assert text[7].endswith("set aside") and text[8].endswith("half written")


def test_ls_gives_the_same_as_json(run: Path, capsys):
    assert ckpt("ls", run, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in rows] == ["whole"] * 3 + ["damaged"] * 2 + [
        "whole",
        "set aside",
        "half written",
    ]
    manifest = read_manifest(run / "step_10")
    assert rows[1] == {
        "name": "step_10", "step": 10, "time": manifest["time"],
        "bytes": sum(f["size"] for f in manifest["files"].values()),
        "processes": 2, "engine": "fsdp2", "holds": ["ema", "model", "optimizer"], "resumable": True,
        "val_loss": 1.5, "state": "whole", "skipped_steps": None, "diverging": False,
        "problems": [],
    }  # fmt: skip
    assert (
        rows[5]["resumable"] is False
        and rows[3]["problems"][-1] == "trainer.json is missing"
        and rows[7]["bytes"] > 1000
    )


def test_ls_of_one_checkpoint_and_of_a_run_without_any(run: Path, tmp_path: Path, capsys):
    assert ckpt("ls", run / "step_10") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-1]] == ["step_10"]
    (tmp_path / "empty").mkdir()
    assert ckpt("ls", tmp_path / "empty") == 0 and "holds no checkpoints" in capsys.readouterr().out
    assert ckpt("ls", tmp_path / "empty", "--json") == 0 and json.loads(capsys.readouterr().out) == []
    assert checkpoints_of(run / "best") == [run / "best"]
    (run / "best" / "manifest.json").unlink()
    assert (
        checkpoints_of(run / "best") == [run / "best"]
        and checkpoint_facts(run / "best")["state"] == "damaged"
    )


# ---- verify


def test_verify_says_ok_or_every_problem_and_its_exit_code_follows(run: Path, capsys):
    """Passes when the whole ones are OK with exit code 0, and of a run with damaged ones each damaged file is
    named, with exit code 1."""
    assert ckpt("verify", run / "step_2", run / "step_10", run / "best") == 0
    assert capsys.readouterr().out == f"{run}/step_2: OK\n{run}/step_10: OK\n{run}/best: OK\n"
    flip(run / "step_10" / "ema-00001-of-00002.safetensors")  # of the right size: ls cannot see it
    assert checkpoint_facts(run / "step_10")["state"] == "whole"
    assert ckpt("verify", run) == 1
    size = read_manifest(run / "step_30")["files"]["optimizer-00002-of-00002.safetensors"]["size"]
    assert capsys.readouterr().out.splitlines() == [
        f"{run}/step_2: OK",
        f"{run}/step_10: damaged",
        "  ema-00001-of-00002.safetensors has changed since it was written (SHA-256 differs)",
        f"{run}/step_20: OK",
        f"{run}/step_30: damaged",
        f"  optimizer-00002-of-00002.safetensors has 5 bytes instead of {size}",
        "  trainer.json is missing",
        f"{run}/step_40: damaged",
        "  manifest.json is missing: no whole checkpoint",
        f"{run}/best: OK",
    ]
    assert ckpt("verify", run / "step_40", run / "step_2", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found == {
        str(run / "step_40"): ["manifest.json is missing: no whole checkpoint"],
        str(run / "step_2"): [],
    }
    for action in (["verify", run / "step_2"], ["verify"], ["ls"]):  # nothing is read of the others
        assert ckpt(*action, run / "step_77") == 2
        told = capsys.readouterr()
        assert "step_77: there is no such folder. Fix: " in told.err and not told.out


def test_verify_reads_every_file(whole: Path, tmp_path: Path, capsys):
    folder = shutil.copytree(whole, tmp_path / "step_3")
    files = sorted(p.name for p in folder.iterdir() if p.name != "manifest.json")
    assert len(files) > 20
    for name in files:
        flip(folder / name)
    assert ckpt("verify", folder) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines[1:]) == files


def test_verify_of_a_model_without_checksums_finds_an_interrupted_download(golden, tmp_path: Path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(golden / "model", folder)
    assert ckpt("verify", folder) == 0
    said = capsys.readouterr().out
    assert f"{folder}: OK" in said and "no checksums" in said
    for name in ("ema.safetensors", "ae.safetensors"):
        with open(folder / name, "r+b") as file:
            file.truncate(file.seek(0, 2) - 1)
    assert ckpt("verify", folder) == 1
    said = capsys.readouterr().out
    assert "damaged" in said and "ema.safetensors" in said and "ae.safetensors" in said


def test_verify_also_asks_whether_the_tensors_are_there(tmp_path: Path, capsys):
    """Passes when an index with a gap that was sealed as it is, so that every checksum is right, is found."""
    from unigen.files import sha256_of
    from unigen.runs.checkpoint import manifest_hash

    folder = write_checkpoint(tmp_path, 1)
    path = folder / "ema.safetensors.index.json"
    index = json.loads(path.read_text("utf-8"))
    del index["pieces"]["embed"]["parts"][1]
    path.write_text(json.dumps(index), "utf-8")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    manifest["files"][path.name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    manifest["sha256"] = manifest_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert ckpt("verify", folder) == 1
    assert "the parts of embed end at element 320 of 640" in capsys.readouterr().out


# ---- export: what comes out


@pytest.mark.parametrize(("weights", "add"), [("ema", 0), ("raw", 1)])
def test_an_export_of_two_processes_is_the_weights_to_the_bit_and_loads(
    whole, golden_tensors, tmp_path, capsys, weights, add
):
    """Passes when the folder holds every tensor to the bit, loads as the model, and has the configs,
    tokenizer and VAE to the byte."""
    assert ckpt("export", whole, tmp_path / "out", "--weights", weights) == 0
    name = "average" if weights == "ema" else "weights"
    assert f"Exported step 3 ({name}, " in capsys.readouterr().out
    wanted = {key: value + add for key, value in golden_tensors.items()}
    assert same(tensors_of(tmp_path / "out"), wanted)
    model = load_bagel(tmp_path / "out")
    assert all(torch.equal(p, wanted[key]) for key, p in model.named_parameters())
    ours = {"ema.safetensors", "export.json", RUN_OPTIONS}
    others = {p.name for p in (tmp_path / "out").iterdir()} - ours
    assert {
        "ae.safetensors",
        "vocab.json",
        "merges.txt",
        "config.json",
        "llm_config.json",
        "vit_config.json",
    } <= others
    assert all((tmp_path / "out" / other).read_bytes() == (whole / other).read_bytes() for other in others)
    assert not others & {
        "trainer.json",
        "training_config.json",
        "manifest.json",
        "ema.safetensors.index.json",
    }
    about = json.loads((tmp_path / "out" / "export.json").read_text("utf-8"))
    assert (about["step"], about["average"], about["dtype"]) == (3, weights == "ema", "as_stored")
    assert about["files"]["ema.safetensors"]["size"] == (tmp_path / "out" / "ema.safetensors").stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.slow
def test_the_export_of_a_real_run_is_what_the_run_ended_with(golden: Path, tmp_path: Path):
    """Passes when, after two steps with an average, raw and ema exports load as the trainer's own weights and
    average, to the bit."""
    from tiny import built

    record = {
        "messages": [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(record) + "\n")
    trainer = built(
        model_path=str(golden / "model"), train_data_path=str(tmp_path / "train.jsonl"),
        output_dir=str(tmp_path / "run"), max_steps=2,
        ema=0.5, learning_rate=1e-2, device="cpu", num_workers=0, freeze_vit=True,
    )  # fmt: skip
    trainer.train()
    raw = {name: p.detach() for name, p in trainer.run.model.named_parameters()}
    average = {
        s.name: trainer.run.ema.average(s.name).view(s.shape) if s.trains else s.value.view(s.shape)
        for s in trainer.engine.shards()
    }
    assert not same(raw, average)
    for weights, wanted in (("raw", raw), ("ema", average)):
        assert ckpt("export", tmp_path / "run" / "step_2", tmp_path / weights, "--weights", weights) == 0
        assert same(dict(load_bagel(tmp_path / weights).named_parameters()), wanted)


@pytest.mark.slow
def test_bfloat16_rounds_to_nearest_and_float32_is_exact(golden: Path, golden_tensors, tmp_path: Path):
    mixed = {
        name: value.bfloat16() if i % 2 else value for i, (name, value) in enumerate(golden_tensors.items())
    }
    folder = write_checkpoint(tmp_path / "run", 1, mixed, model=golden / "model")
    for dtype, wanted in [
        ("bfloat16", {name: value.bfloat16() for name, value in mixed.items()}),
        ("float32", {name: value.float() for name, value in mixed.items()}),
        ("as_stored", mixed),
    ]:
        assert ckpt("export", folder, tmp_path / dtype, "--dtype", dtype) == 0
        assert same(tensors_of(tmp_path / dtype), wanted)
    assert next(load_bagel(tmp_path / "bfloat16").parameters()).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0.3e-3, 0.05e-3])
def test_shards_are_no_larger_than_asked_and_load_the_same(
    whole: Path, golden_tensors, tmp_path: Path, limit: float
):
    """Passes when every file holds at most the limit, but for tensors that are larger alone, no two files
    could be one, and the index finds every tensor."""
    out = tmp_path / "out"
    assert ckpt("export", whole, out, "--max_shard_gb", limit) == 0
    files = sorted(out.glob("ema-*.safetensors"))
    assert len(files) >= 1.76e-3 / limit and not (out / "ema.safetensors").exists()
    assert [p.name for p in files] == [
        f"ema-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    held = [[entry.nbytes for entry in scan_safetensors(path).values()] for path in files]
    assert all(sum(sizes) <= limit * 1e9 or len(sizes) == 1 for sizes in held)
    assert all(sum(a) + sum(b) > limit * 1e9 for a, b in pairwise(held))  # no more files than it takes
    index = json.loads((out / "ema.safetensors.index.json").read_text("utf-8"))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in golden_tensors.values())
    assert same(tensors_of(out), golden_tensors)
    assert same(dict(load_bagel(out).named_parameters()), dict(load_bagel(whole).named_parameters()))
    # the index is a file of the export as the others are
    before = (out / "ema.safetensors.index.json").read_bytes()
    flip(out / "ema.safetensors.index.json")
    assert ckpt("verify", out) == 1 and ckpt("export", whole, out, "--overwrite") == 2
    (out / "ema.safetensors.index.json").write_bytes(before)
    assert ckpt("verify", out) == 0 and ckpt("export", whole, out, "--overwrite") == 0
    assert not list(out.glob("ema*index*")) and same(tensors_of(out), golden_tensors)


@pytest.mark.slow
def test_which_weights_a_checkpoint_has(golden_tensors, golden: Path, tmp_path: Path, capsys):
    """Passes when raw is refused of one that holds an average alone, and ema of a run without one gives the
    weights, and says so."""
    best = write_checkpoint(tmp_path / "run", 1, golden_tensors, name="best", model=golden / "model")
    assert (
        ckpt("export", best, tmp_path / "a", "--weights", "raw") == 2
        and "holds the average alone" in capsys.readouterr().err
    )
    assert ckpt("export", best, tmp_path / "a") == 0 and "(average, " in capsys.readouterr().out
    plain = write_checkpoint(tmp_path / "run", 2, golden_tensors, average=False, model=golden / "model")
    for weights in ("ema", "raw"):
        assert (
            ckpt("export", plain, tmp_path / weights, "--weights", weights) == 0
            and "(weights, " in capsys.readouterr().out
        )
        assert same(tensors_of(tmp_path / weights), golden_tensors)


# ---- export: what must not happen


def test_a_damaged_checkpoint_is_exported_only_when_told_and_what_is_not_exported_does_not_count(
    whole: Path, tmp_path: Path, capsys
):
    folder = shutil.copytree(whole, tmp_path / "run" / "step_3")
    flip(folder / "optimizer-00001-of-00002.safetensors")
    flip(folder / "model-00001-of-00002.safetensors")
    assert ckpt("export", folder, tmp_path / "a") == 0
    assert ckpt("export", folder, tmp_path / "b", "--weights", "raw") == 2
    said = capsys.readouterr().err
    assert (
        "model-00001-of-00002.safetensors has changed" in said
        and "--no_verify" in said
        and not (tmp_path / "b").exists()
    )
    assert ckpt("export", folder, tmp_path / "b", "--weights", "raw", "--no_verify") == 0
    flip(folder / "vocab.json")
    assert ckpt("export", folder, tmp_path / "c") == 2 and "vocab.json has changed" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "run"]


def test_nothing_is_overwritten_but_an_earlier_export_when_told(whole: Path, tmp_path: Path, capsys):
    (tmp_path / "empty").mkdir()
    assert ckpt("export", whole, tmp_path / "empty") == 0
    assert ckpt("export", whole, tmp_path / "empty", "--weights", "raw") == 2
    assert "exists already. Fix: choose another folder, or --overwrite" in capsys.readouterr().err
    before = tensors_of(tmp_path / "empty")
    assert ckpt("export", whole, tmp_path / "empty", "--weights", "raw", "--overwrite") == 0
    assert not same(tensors_of(tmp_path / "empty"), before)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert (
        ckpt("export", whole, tmp_path / "mine", "--overwrite") == 2
        and "is no earlier export" in capsys.readouterr().err
    )
    (tmp_path / "file").write_text("x")
    assert (
        ckpt("export", whole, tmp_path / "file", "--overwrite") == 2
        and "exists already" in capsys.readouterr().err
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "mine"]
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("name", ["notes.txt", "eval/results.json", "empty_folder/", "vocab.json", "link"])
def test_what_people_put_into_an_export_stays(whole: Path, tmp_path: Path, name: str, capsys):
    """Files of theirs, and files of ours that they changed: the export is refused and nothing moves."""
    out = tmp_path / "out"
    assert ckpt("export", whole, out) == 0
    theirs = out / name
    if name == "link":
        theirs.symlink_to(tmp_path)
    elif name.endswith("/"):
        theirs.mkdir()
    else:
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_text("years of work")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert ckpt("export", whole, out, "--overwrite") == 2
    assert f"holds {name.rstrip('/')}" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} and os.path.lexists(theirs)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [False, True])
def test_what_a_killed_export_left_is_swept_by_the_next(whole: Path, tmp_path: Path, replaced: bool):
    """Its draft goes; an earlier export that was set aside when the kill came has its name back first."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert ckpt("export", whole, tmp_path / "out") == 0
    (tmp_path / f".out.partial-{gone.pid}").mkdir()
    (tmp_path / f".out.partial-{gone.pid}" / "ema.safetensors").write_bytes(b"half")
    (tmp_path / f".out.partial-{os.getppid()}").mkdir()  # of an export that goes on beside this one
    if replaced:
        (tmp_path / "out").rename(tmp_path / f".out.old-{gone.pid}")
    assert ckpt("export", whole, tmp_path / "out") == 2, "the earlier one is there"
    assert ckpt("export", whole, tmp_path / "out", "--overwrite") == 0
    assert {p.name for p in tmp_path.iterdir()} == {"out", f".out.partial-{os.getppid()}"}


def test_an_export_never_lies_in_a_checkpoint_or_looks_like_one(whole: Path, tmp_path: Path, capsys):
    folder = shutil.copytree(whole, tmp_path / "run" / "step_3")
    for place, said in [
        (folder, "lie in each other"),
        (folder / "out", "lie in each other"),
        (tmp_path / "run", "lie in each other"),
        (tmp_path / "run" / "step_4", "would look like a checkpoint"),
        (tmp_path / "run" / "best", "would look like a checkpoint"),
    ]:
        assert ckpt("export", folder, place, "--overwrite") == 2 and said in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["step_3"]
    assert ckpt("verify", folder) == 0


def test_a_failing_disk_leaves_the_earlier_export_and_nothing_else(whole: Path, tmp_path: Path):
    """The kernel's own refusal in the middle of a write."""
    options = CkptOptions(overwrite=True)
    export(whole, tmp_path / "out", options)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written .*File too large.*Fix:"):
            export(whole, tmp_path / "out", options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    whole: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("unigen.commands.ckpt.export.free_bytes", lambda folder: 1_000_000)
    with pytest.raises(ExportError, match=r"the export takes 1\.76 MB, 1 MB are free on .* Fix:"):
        export(whole, tmp_path / "out", CkptOptions())
    assert list(tmp_path.iterdir()) == []


MEASURE = """
import resource, sys
from pathlib import Path
from unigen.commands.ckpt.options import CkptOptions
from unigen.commands.ckpt.export import export
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
for dtype in ("as_stored", "bfloat16"):
    export(Path(sys.argv[1]), Path(sys.argv[2]) / dtype, CkptOptions(dtype=dtype))
    print("PEAK", peak() - before)
assert "unigen.training.engine" not in sys.modules and "unigen.runs.saver" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_an_export_takes_the_memory_of_its_largest_tensor(tmp_path: Path):
    """Passes when exporting 256 MB in tensors of 64 MB raises the peak by less than 64 MB + 40 MB, and in
    bfloat16, which is converted 16 million numbers at a time, by less than 32 MB + 110 MB."""
    from unigen.runs.channel import Channel
    from unigen.runs.saver import Contents, Saver, StateEntry

    shape = (4000, 4000)
    where = torch.empty(shape, device="meta")
    entries = [
        StateEntry("ema", f"w{i}", shape, where, read=lambda i=i: torch.full(shape, i + 0.5))
        for i in range(4)
    ]
    contents = Contents(1, entries, {"trainer": {}}, lambda _: None, {"engine": "single", "average": False})
    Saver(tmp_path / "run", 0, Channel(1, torch.device("cpu"))).save(contents)
    argv = [sys.executable, "-c", MEASURE, str(tmp_path / "run" / "step_1"), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    stored, converted = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("PEAK"))
    assert 64e6 < stored < 104e6 and converted < 142e6, (stored, converted)
    for dtype in ("as_stored", "bfloat16"):
        last = scan_folder(tmp_path / dtype)["w3"].read(0, 10)
        assert torch.equal(last, torch.full((10,), 3.5).to(last.dtype))
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)


# ---- how the model is asked


@pytest.mark.slow
def test_an_export_is_asked_as_its_checkpoint_and_says_no_more_of_the_run(
    whole: Path, tmp_path: Path, golden: Path
):
    step = tmp_path / "step_3"
    shutil.copytree(whole, step)
    sources = [{"path": "/home/me/a", "max_image_size": 96}, {"path": "/home/me/b", "max_image_tokens": 7}]
    for given in (
        {"max_image_tokens": 4, "train_transitions": False, "train_data_path": "/home/me/d.jsonl"},
        {"max_image_tokens": 5, "train_transitions": True, "train_sources": sources},
    ):
        (step / RUN_OPTIONS).write_text(json.dumps(Config(**given).to_dict()))
        places = [tmp_path / f"{name}{given['max_image_tokens']}" for name in ("plain", "again", "saved")]
        assert ckpt("export", step, places[0], "--no_verify") == 0
        assert ckpt("export", *places[:2]) == 0 and ckpt("verify", places[1]) == 0
        model = load_bagel(step)
        save_bagel(model, places[2])
        for place in places:
            assert trained_transform(model.config, place) == trained_transform(model.config, step)
            assert trained_transform(model.config, place) != trained_transform(model.config, golden / "model")
            assert decides(place) == decides(step) == given["train_transitions"]
            assert "/home/me" not in (place / RUN_OPTIONS).read_text()
    (step / RUN_OPTIONS).write_text("{")
    assert ckpt("export", step, tmp_path / "x", "--no_verify") == 2 and not (tmp_path / "x").exists()
