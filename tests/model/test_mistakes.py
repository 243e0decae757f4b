"""Folders that are given for a checkpoint and are none, or one that cannot be read: each is named, with its
fix."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unigen import cli
from unigen.config import Config, DataOptions, UserError
from unigen.inference.inferencer import InterleaveInferencer
from unigen.model.adapters import parse_adapter
from unigen.model.mistakes import as_new_run
from unigen.model.storage import MAX_HEADER, CheckpointFolderError, scan_safetensors
from unigen.model.weights import SIDE_FILES, build_bagel, load_planner, save_bagel
from unigen.training.changes import changes


def in_a_run(model: Path, place: Path) -> Path:
    for name in ("step_2", "step_10", "best"):
        shutil.copytree(model, place / name)
    return place


def in_a_cache(model: Path, place: Path) -> Path:
    shutil.copytree(model, place / "snapshots" / "abc")
    return place


def in_a_hub(model: Path, place: Path) -> Path:
    in_a_cache(model, place / "models--a--b")
    return place


def adapter_over(base: Path, place: Path) -> Path:
    """As a run with adapters saves them, of one matrix."""
    place.mkdir()
    target = "language_model.model.layers.0.self_attn.q_proj_moe_gen"
    said = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": str(base)}
    (place / "adapter_config.json").write_text(json.dumps(said))
    halves = {f"base_model.model.{target}.lora_{half}.weight": torch.zeros(1, 1) for half in "AB"}
    save_file(halves, place / "adapter_model.safetensors")
    return place


def of_the_reference(model: Path, place: Path) -> Path:
    place.mkdir()
    shutil.copy(model / "ema.safetensors", place)
    shutil.copy(model / "ema.safetensors", place / "model.safetensors")
    (place / "scheduler.pt").touch()
    return place


def a_file(name: str) -> Callable[[Path, Path], Path]:
    def make(model: Path, place: Path) -> Path:
        place.mkdir()
        (place / name).write_bytes(b"\x80\x02")
        return place

    return make


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (in_a_run, "Fix: give .*/best"),
        (in_a_cache, "Fix: give .*snapshots/abc"),
        (in_a_hub, "Fix: give .*models--a--b/snapshots/abc"),
        (of_the_reference, r"ema\.safetensors.*without configs.*copy llm_config\.json"),
        (
            a_file("pytorch_model.bin"),
            r"pytorch_model\.bin is a GGUF file or a pickle, which is never loaded",
        ),
        (a_file("bagel-q4.gguf"), "never loaded"),
    ],
)
def test_what_the_folder_is_is_told(golden: Path, tmp_path: Path, make: Callable, said: str):
    place = make(golden / "model", tmp_path / "given")
    for use in (build_bagel, lambda folder: load_planner(folder, DataOptions())):
        with pytest.raises(CheckpointFolderError, match=said) as caught:
            use(place)
        assert "\n" not in str(caught.value)


def test_an_adapter_stands_for_its_base_where_no_weights_are_read(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # a page is written there
    adapter = adapter_over(golden / "model", tmp_path / "step_2")
    assert load_planner(adapter).identity == load_planner(golden / "model").identity
    data = tmp_path / "a.jsonl"
    data.write_text('{"text_prompt": "a"}\n')
    assert cli.main(["plan", "--model_path", str(adapter), "--auto", str(tmp_path / "plan.yaml")]) == 0
    assert f"model_path: {golden / 'model'}" in (tmp_path / "plan.yaml").read_text()
    for command in ("check", "preview"):
        capsys.readouterr()
        assert cli.main([command, str(data), "--model_path", str(adapter)]) == 1  # the record is bad
        assert "text_prompt" in capsys.readouterr().out


def test_an_adapter_is_told_beside_the_configs_of_its_base(golden: Path, tmp_path: Path):
    adapter = adapter_over(golden / "model", tmp_path / "step_2")
    for name in ("llm_config.json", "vit_config.json"):
        shutil.copy(golden / "model" / name, adapter)
    with pytest.raises(CheckpointFolderError, match=f"an adapter, no model: give its base, {golden}/model"):
        build_bagel(adapter)
    assert parse_adapter(f"{adapter}:0.5") == (adapter, 0.5)


def test_a_new_run_from_an_adapter_begins_with_the_merged_model(golden: Path, tmp_path: Path):
    """All messages that send a run to another folder say it by this one line."""
    adapter = adapter_over(golden / "model", tmp_path / "step_2")
    assert as_new_run(tmp_path) == f"--model_path {tmp_path}"
    assert as_new_run(adapter).endswith(f"after unigen ckpt export {adapter} NEW_FOLDER --merge")
    with pytest.raises(UserError, match=f"--seed 1, or .*export {adapter} NEW_FOLDER --merge"):
        changes(adapter, Config(seed=1).to_dict(), Config(seed=2), 2, (4, 4))


def test_what_was_meant_by_a_path_that_is_no_folder_is_told(golden: Path, tmp_path: Path):
    for name in ("own", "out/step_2", "out/step_10"):
        shutil.copytree(golden / "model", tmp_path / name)
    for given, fix in (
        ("out/best", f"name a checkpoint that {tmp_path}/out holds: step_10, step_2"),
        ("out/step_3", f"name a checkpoint that {tmp_path}/out holds: step_10, step_2"),
        ("own/ema.safetensors", f"name its folder, {tmp_path}/own"),
        ("owns", f"correct the path: {tmp_path}/own is there"),
        ("BAGEL-7B-MoT", "check the path; docs/start.md says how BAGEL is fetched"),
    ):
        for use in (
            build_bagel,
            lambda folder: load_planner(folder, DataOptions()),
            InterleaveInferencer.from_pretrained,
        ):
            with pytest.raises(CheckpointFolderError) as caught:
                use(tmp_path / given)
            assert f"Fix: {fix}" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>restricted</html>", "web page"),
        (b"", "is empty"),
        (b"PK\x03\x04" + bytes(60), "pickled"),
        (b"GGUF" + bytes(60), "GGUF"),
    ],
)
@pytest.mark.parametrize("name", ["ema.safetensors", "llm_config.json", "vit_config.json"])
def test_what_stands_in_a_files_place_is_told(
    golden: Path, tmp_path: Path, name: str, content: bytes, said: str
):
    folder = shutil.copytree(golden / "model", tmp_path / "model")
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointFolderError, match=rf"{name}: .*{said}.*Fix: "):
        build_bagel(folder)


@pytest.mark.parametrize(
    "name", ["LICENSE", "chat_template.jinja", "ema.safetensors", "llm_config.json", "ae.safetensors"]
)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_link_out_and_a_pipe_are_refused_before_anything_is_read(
    golden: Path, tmp_path: Path, name: str, kind: str
):
    folder = shutil.copytree(golden / "model", tmp_path / "model")
    secret = tmp_path / "secret"
    if (folder / name).exists():
        (folder / name).rename(secret)
    else:
        secret.write_text("secret")
    (folder / name).symlink_to(secret) if kind == "link" else os.mkfifo(folder / name)
    for use in (build_bagel, lambda place: load_planner(place, DataOptions())):
        with pytest.raises(UserError, match=rf"{name}: it (lies outside|is a folder, pipe)"):
            use(folder)


def test_a_link_that_comes_later_is_not_copied(golden: Path, tmp_path: Path):
    folder = shutil.copytree(golden / "model", tmp_path / "model")
    model, _ = build_bagel(folder)
    (tmp_path / "secret").write_text("secret")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="LICENSE"):
        save_bagel(model.to_empty(device="cpu"), tmp_path / "saved")
    assert "LICENSE" in SIDE_FILES and not (tmp_path / "saved" / "LICENSE").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_of_a_wrapper_are_told(golden: Path, tmp_path: Path, prefix: str):
    folder = shutil.copytree(golden / "model", tmp_path / "model")
    tensors = load_file(folder / "ema.safetensors")
    save_file({prefix + name: t for name, t in tensors.items()}, folder / "ema.safetensors")
    with pytest.raises(CheckpointFolderError, match=rf"begin with '{prefix}'"):
        build_bagel(folder)


@pytest.mark.parametrize(
    ("dtype", "said"), [(torch.float8_e4m3fn, "FP8"), (torch.int8, "dtype I8"), (torch.bool, "dtype BOOL")]
)
def test_quantised_weights_are_told(golden: Path, tmp_path: Path, dtype: torch.dtype, said: str):
    folder = shutil.copytree(golden / "model", tmp_path / "model")
    tensors = load_file(folder / "ema.safetensors")
    tensors["llm2vae.weight"] = tensors["llm2vae.weight"].to(dtype)
    save_file(tensors, folder / "ema.safetensors")
    with pytest.raises(CheckpointFolderError, match=rf"{said}.*Fix: use the weights in bfloat16"):
        build_bagel(folder)


# ---- headers


def header(entries: str, data: int) -> bytes:
    text = entries.encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def entry(name: str, start: int, stop: int) -> str:
    shape = [(stop - start) // 4]
    return f'"{name}":' + json.dumps({"dtype": "F32", "shape": shape, "data_offsets": [start, stop]})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entries", "data", "said"),
    [
        ([entry("a", 0, 8), entry("b", 4, 12)], 12, "'b' overlaps"),
        ([entry("a", 0, 8), entry("b", 0, 8)], 8, "overlaps"),
        ([entry("a", 0, 8), entry("b", 12, 16)], 16, "'b' leaves a gap of 4"),
        ([entry("a", 4, 8)], 8, "leaves a gap"),
        ([entry("a", 0, 8)], 9, "1 bytes follow the last tensor"),
        ([entry("a", 0, 8)], 7, "truncated"),
        ([entry("a", 0, 8), entry("a", 0, 8)], 8, "name 'a' twice"),
        (['"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}'], 8, "name 'dtype' twice"),
        (['"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}'], 8, r"shape\[0\] is -2"),
        (['"a":{"dtype":"F32","shape":[1e2],"data_offsets":[0,8]}'], 8, r"shape\[0\] is 100.0"),
        (['"a":{"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,8]}'], 8, r"shape\[0\]"),
        (['"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}'], 8, r"shape\[0\] is nan"),
        ([entry(f"n{i}", 0, 0) for i in range(100_001)], 0, "100,001 tensors"),
    ],
    ids=range(13),
)
def test_a_header_that_others_would_read_otherwise_is_refused(
    tmp_path: Path, entries: list[str], data: int, said: str
):
    path = tmp_path / "a.safetensors"
    path.write_bytes(header("{" + ",".join(entries) + "}", data))
    with pytest.raises(CheckpointFolderError, match=said):
        scan_safetensors(path)


def test_empty_tensors_and_any_order_are_fine(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    entries = [entry("b", 8, 12), entry("none", 8, 8), entry("a", 0, 8), entry("also", 12, 12)]
    path.write_bytes(header("{" + ",".join(entries) + "}", 12))
    assert scan_safetensors(path).keys() == {"a", "b", "none", "also"}


def test_a_header_of_a_million_names_is_not_even_read(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((MAX_HEADER + 1).to_bytes(8, "little") + b"{")
    os.truncate(path, 1 << 33)
    with pytest.raises(CheckpointFolderError, match="its header has 16,777,217 bytes, above"):
        scan_safetensors(path)
