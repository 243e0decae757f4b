"""``tools/compare_reference.py``: passes on the reference's numbers, fails on any that is changed, and reads
every constant from the folder it is given."""

import importlib.util
import json
import runpy
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from pictures import noise
from safetensors.torch import load_file, save_file

from unigen.inference.inferencer import InterleaveInferencer
from unigen.model.bagel import StateReader
from unigen.model.mask import Tokens, allowed
from unigen.model.weights import load_bagel
from unigen.sequence.images import open_image
from unigen.sequence.pack import pack_blocks
from unigen.sequence.tokens import Tokenizer
from unigen.sequence.transform import ImageTransform
from unigen.sequence.types import Block, Kind

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "compare_reference.py"


@pytest.fixture(scope="module")
def compare():
    """The tool's ``main`` in this process: the list of its lines, and its exit status."""
    spec = importlib.util.spec_from_file_location("compare_reference", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def command(folder):
    return subprocess.run(
        [sys.executable, str(TOOL), str(folder)], capture_output=True, text=True, check=False
    )


def edit_tensors(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file)


def edit_json(file: Path, change) -> None:
    value = json.loads(file.read_text(encoding="utf-8"))
    change(value)
    file.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


@pytest.mark.slow
def test_the_reference_s_numbers_are_ours(golden):
    done = command(golden)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "all passed" and all(line.startswith("pass ") for line in lines[:-1])
    for name in json.loads((golden / "train_cases.json").read_text()):
        for part in ("packing", "hidden states", "loss", "gradient norms"):
            assert any(f"{name}: " in line and part in line for line in lines), (name, part)
    for part in (
        "state dict",
        "image resize: 240",
        "VAE: posterior mean",
        "VAE: decoding",
        "t2i: final latent",
        "edit: picture",
        "understand: tokens",
    ):
        assert any(part in line for line in lines), part


@pytest.mark.slow
def test_the_reference_s_numbers_are_ours_by_onednn(golden, by_onednn, compare, capsys):
    assert compare([str(golden)]) == 0, capsys.readouterr().out


def test_a_folder_without_a_model_is_explained(tmp_path, compare, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare([str(tmp_path)])
    assert stopped.value.code == 2 and "has no folder model/" in capsys.readouterr().err


# ---- one number changed


def bump(name, at=0, by=1):
    def change(tensors):
        flat = tensors[name].view(-1)
        flat[at] = ~flat[at] if flat.dtype == torch.bool else flat[at] + by

    return change


def bump_largest(name, factor):
    def change(tensors):
        flat = tensors[name].view(-1)
        flat[flat.abs().argmax()] *= factor

    return change


CHANGES = [  # file, what is changed in it, what the failing line says
    ("train_edit.safetensors", bump("in.packed_text_ids", 3), "edit: packing*packed_text_ids"),
    ("train_edit.safetensors", bump("in.packed_text_indexes", 3), "edit: packing*packed_text_indexes"),
    ("train_edit.safetensors", bump("in.packed_position_ids", 20), "edit: packing*packed_position_ids"),
    (
        "train_edit.safetensors",
        bump("in.packed_vit_position_ids", 5),
        "edit: packing*packed_vit_position_ids",
    ),
    (
        "train_edit.safetensors",
        bump("in.packed_latent_position_ids", 5),
        "edit: packing*packed_latent_position_ids",
    ),
    ("train_edit.safetensors", bump("in.mse_loss_indexes", 2), "edit: packing*mse_loss_indexes"),
    ("train_edit.safetensors", bump("in.allowed_attention.0", 700), "edit: packing*mask 0"),
    ("train_edit.safetensors", bump("in.noise", 900, 0.5), "edit: image squared error"),
    ("train_edit.safetensors", bump("out.mse", 7, 0.01), "edit: image squared error"),
    ("train_edit.safetensors", bump("out.last_hidden_state", 7, 0.01), "edit: hidden states"),
    ("train_edit.safetensors", bump("out.last_hidden_state", 7, float("nan")), "edit: hidden states"),
    ("train_edit.safetensors", bump("out.loss", 0, 0.001), "edit: loss"),
    ("train_edit.safetensors", bump_largest("grad.vae2llm.weight", 1.01), "edit: gradient vae2llm.weight"),
    (
        "train_interleaved.safetensors",
        bump("in.packed_label_ids", 2),
        "interleaved: packing*packed_label_ids",
    ),
    ("train_interleaved.safetensors", bump("out.ce", 2, 0.01), "interleaved: text cross-entropy"),
    ("train_packed.safetensors", bump("in.allowed_attention.2", 9), "packed: packing*mask 2"),
    ("inference.safetensors", bump("understand.tokens", 4), "understand: tokens"),
    ("inference.safetensors", bump("edit.final_latent", 4, 0.05), "edit: final latent"),
    ("inference.safetensors", bump("t2i.image", 4, 9), "t2i: picture"),
    ("vae.safetensors", bump("latent_mean", 4, 0.05), "VAE: posterior mean"),
    (
        "model/ema.safetensors",
        bump("language_model.model.layers.1.mlp_moe_gen.down_proj.weight", 0, 0.5),
        "edit: hidden states",
    ),
    ("model/ema.safetensors", bump("connector.fc1.weight", 0, 0.5), "vlm: hidden states"),
    ("train_cases.json", lambda c: c["edit"]["sample_lens"].__setitem__(0, 55), "edit: packing*sample_lens"),
    (
        "train_cases.json",
        lambda c: c["edit"]["grad_norms"].update({"llm2vae.bias": 1.0}),
        "edit: 136 gradient norms",
    ),
    ("train_cases.json", lambda c: c["edit"]["grad_norms"].pop("llm2vae.bias"), "edit: 135 gradient norms"),
    ("inference_cases.json", lambda c: c["jobs"]["understand"].update(text=["no"]), "understand: text"),
    ("image_resize.json", lambda c: c[17].update(out=[14, 14]), "image resize: 240 sizes"),
    ("state_dict_shapes.json", lambda c: c.update({"vae2llm.bias": [3]}), "state dict: keys and shapes"),
]


def reduced(golden: Path, folder: Path, file: str, expected: str) -> Path:
    """A copy of the golden folder with what is needed to look at one change."""
    shutil.copytree(golden, folder)
    case = expected.split(":")[0]
    inference = {"inference.safetensors", "inference_cases.json"}
    for name in inference | {"vae.safetensors", "image_resize.json", "state_dict_shapes.json"}:
        if name != file and not (name in inference and file in inference):
            (folder / name).unlink()
    training = file.startswith(("train", "model"))
    edit_json(
        folder / "train_cases.json",
        lambda cases: [cases.pop(c) for c in list(cases) if not training or c != case],
    )
    if file in inference:
        edit_json(
            folder / "inference_cases.json",
            lambda cases: [cases["jobs"].pop(c) for c in list(cases["jobs"]) if c != case],
        )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "change", "expected"), CHANGES, ids=[f"{c[0]}-{c[2]}-{i}" for i, c in enumerate(CHANGES)]
)
def test_one_changed_number_fails_its_case(golden, tmp_path, compare, capsys, file, change, expected):
    folder = reduced(golden, tmp_path / "changed", file, expected)
    (edit_json if file.endswith(".json") else edit_tensors)(folder / file, change)
    assert compare([str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("FAIL")]
    assert [line for line in failed if fnmatch(line, f"FAIL  {expected}*")], lines
    assert lines[-1] == f"{len(failed)} failed"
    if (
        file.startswith("train_")
        and file.endswith(".safetensors")
        and "noise" not in expected
        and expected.split(": ")[1] != "image squared error"
    ):
        assert len(failed) == 1  # and no other


def test_a_failure_is_the_exit_status(golden, tmp_path, monkeypatch, capsys):
    folder = reduced(golden, tmp_path / "changed", "vae.safetensors", "VAE: x")
    edit_tensors(folder / "vae.safetensors", bump("decoded", 0, 0.5))
    monkeypatch.setattr(sys, "argv", [str(TOOL), str(folder)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TOOL), run_name="__main__")
    out = capsys.readouterr().out
    assert stopped.value.code == 1 and "FAIL  VAE: decoding" in out and "1 failed" in out


# ---- other constants

CONSTANTS = {
    "interpolate_pos": True,
    "timestep_shift": 2.5,
    "latent_patch_size": 2,
    "max_latent_size": 16,
    "vit_max_num_patch_per_side": 8,
}
PROMPTS = {"understand": "think first", "generate": "plan it, then draw"}
DRAWING = {
    "num_timesteps": 4,
    "timestep_shift": 1.7,
    "cfg_interval": [0.2, 0.9],
    "cfg_renorm_type": "channel",
    "cfg_renorm_min": 0.3,
}
JOBS = {
    "draw": (
        ["a blue square"],
        {"image_shapes": [32, 48], "cfg_text_scale": 2.5, "cfg_img_scale": 1.0, **DRAWING},
    ),
    "edit_channel": (["input.png", "add a hat"], {"cfg_text_scale": 3.0, "cfg_img_scale": 2.0, **DRAWING}),
    "think_draw": (
        ["a red circle"],
        {"think": True, "max_think_token_n": 7, "image_shapes": [32, 32], "cfg_text_scale": 4.0, **DRAWING},
    ),
    "think_answer": (
        ["input.png", "what is it"],
        {"think": True, "understanding_output": True, "max_think_token_n": 9},
    ),
}


@pytest.fixture(scope="module")
def other(golden, tmp_path_factory):
    """A folder in the golden layout with other constants and cases and a sharded checkpoint. Its numbers are
    our own: what it shows is that the tool takes everything from the folder."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(golden / "model", folder / "model")
    tensors = load_file(folder / "model" / "ema.safetensors")
    names = sorted(tensors)
    files = ["ema-00001-of-00002.safetensors", "ema-00002-of-00002.safetensors"]
    for i, file in enumerate(files):
        save_file({n: tensors[n] for n in names[i::2]}, folder / "model" / file)
    index = {"weight_map": {n: files[i % 2] for i, n in enumerate(names)}}
    (folder / "model" / "ema.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model" / "ema.safetensors").unlink()
    (folder / "meta.json").write_text(json.dumps(CONSTANTS))
    (folder / "think_prompts.json").write_text(json.dumps(PROMPTS))
    noise(70, 50).save(folder / "input.png")
    model, tokenizer = load_bagel(golden / "model", constants=CONSTANTS), Tokenizer.load(golden / "model")
    write_training(folder, model, tokenizer)
    write_inference(folder, model, tokenizer)
    return folder


def write_training(folder, model, tokenizer):
    g = torch.Generator().manual_seed(0)
    items = [
        ("vae", (48, 32), 0),
        ("vit", (42, 28), 0),
        ("text", "add a hat", 1),
        ("vae", (32, 64), 1),
        ("text", "done", 1),
    ]
    sample, blocks, u = [], [], 0.4
    for i, (kind, content, with_loss) in enumerate(items):
        text = kind == "text"
        item = {
            "kind": kind,
            "text": content if text else None,
            "size_hw": None if text else list(content),
            "loss": with_loss,
        }
        sample.append({**item, "special_token_label": 423 if i == 2 else None})
        if text:
            ids = tokenizer.encode(content)
            blocks.append(
                Block(
                    Kind.TEXT,
                    len(ids),
                    i,
                    loss=bool(with_loss),
                    closing_label=423 if i == 2 else None,
                    ids=ids,
                )
            )
            continue
        stride = 14 if kind == "vit" else 16
        grid = (content[0] // stride, content[1] // stride)
        n = grid[0] * grid[1]
        block = Block(
            Kind.VIT if kind == "vit" else Kind.NOISED if with_loss else Kind.CLEAN,
            n,
            i,
            grid,
            loss=bool(with_loss),
        )
        if kind == "vit":
            block.patches = torch.randn(n, 588, generator=g)
        else:
            block.latent = torch.randn(16, grid[0] * 2, grid[1] * 2, generator=g)
            block.noise = torch.randn(n, 64, generator=g)
            block.u = u if with_loss else float("-inf")
        blocks.append(block)
    pack = pack_blocks([blocks], tokenizer.special, model.config.geometry)
    order = pack.index.argsort()
    kind, label, place = pack.kind[order], pack.label[order], lambda mask: mask.nonzero().squeeze(1)
    vae = (kind == Kind.CLEAN) | (kind == Kind.NOISED)
    padded = torch.zeros(2, 16, 6, 8)
    for i, latent in enumerate(pack.latents):
        padded[i, :, : latent.shape[1], : latent.shape[2]] = latent
    tokens = Tokens.of(pack).at(order)
    inputs = {
        "packed_text_ids": pack.ids[order][kind == Kind.TEXT],
        "packed_text_indexes": place(kind == Kind.TEXT),
        "packed_position_ids": pack.position[order], "packed_vit_token_indexes": place(kind == Kind.VIT),
        "packed_vit_position_ids": pack.vit_position, "vit_token_seqlens": torch.tensor(pack.vit_lengths),
        "packed_vae_token_indexes": place(vae), "packed_latent_position_ids": pack.vae_position,
        "packed_timesteps": pack.u,
        "ce_loss_indexes": place(label >= 0), "packed_label_ids": label[label >= 0],
        "mse_loss_indexes": place(kind == Kind.NOISED),
        "packed_vit_tokens": pack.vit_patches, "padded_latent": padded, "noise": pack.noise,
        "allowed_attention.0": allowed(tokens.unsqueeze(1), tokens.unsqueeze(0)),
    }  # fmt: skip
    out = model(pack, reader=StateReader.of_all(pack))
    loss = out.ce.mean() + out.mse.mean()
    loss.backward()
    outputs = {"last_hidden_state": out.read[order], "ce": out.ce, "mse": out.mse, "loss": loss.reshape(1)}
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    saved = {f"in.{n}": t for n, t in inputs.items()} | {f"out.{n}": t.detach() for n, t in outputs.items()}
    save_file(
        {
            n: t.contiguous()
            for n, t in (saved | {"grad.llm2vae.weight": gradients["llm2vae.weight"]}).items()
        },
        folder / "train_mine.safetensors",
    )
    norms = {n: float(t.norm()) for n, t in gradients.items()}
    case = {
        "samples": [sample],
        "sample_lens": [len(pack)],
        "patchified_vae_latent_shapes": [list(s) for s in pack.vae_grid],
        "grad_norms": norms,
    }
    (folder / "train_cases.json").write_text(json.dumps({"mine": case}))


def write_inference(folder, model, tokenizer):
    transforms = {"vae_transform": (96, 32, 16), "vit_transform": (84, 28, 14)}
    cases = {
        name: dict(zip(("max_size", "min_size", "stride"), v, strict=True)) for name, v in transforms.items()
    }
    made = {name: ImageTransform(*v) for name, v in transforms.items()}
    inferencer = InterleaveInferencer(model, tokenizer=tokenizer, think_prompts=PROMPTS, **made)
    cases["jobs"], saved = {}, {}
    for job, (inputs, options) in JOBS.items():
        pieces = [open_image(folder / x) if x.endswith(".png") else x for x in inputs]
        trace = {}
        shape = options.get("image_shapes")
        if shape is None and not options.get("understanding_output"):
            resized = inferencer.vae_transform.resize(pieces[0])
            shape = [resized.height, resized.width]
        noise = (
            None
            if shape is None
            else torch.randn(shape[0] * shape[1] // 256, 64, generator=torch.Generator().manual_seed(1))
        )
        output = inferencer.interleave_inference(pieces, initial_noise=noise, trace=trace, **options)
        cases["jobs"][job] = {
            "inputs": inputs,
            "kwargs": options,
            "text": [x for x in output if isinstance(x, str)],
        }
        if noise is not None:
            saved |= {
                f"{job}.init_noise": noise,
                f"{job}.final_latent": trace["latent"][0],
                f"{job}.image": trace["image"][0],
            }
        if trace.get("tokens"):
            saved[f"{job}.tokens"] = trace["tokens"][0]
    save_file(saved, folder / "inference.safetensors")
    (folder / "inference_cases.json").write_text(json.dumps(cases, ensure_ascii=False), encoding="utf-8")


@pytest.mark.slow
def test_another_folder_with_other_constants_passes(other, compare, capsys):
    assert compare([str(other)]) == 0
    out = capsys.readouterr().out
    for part in (
        "mine: packing",
        "think_draw: tokens",
        "think_draw: text",
        "think_draw: final latent",
        "think_answer: text",
        "edit_channel: picture",
    ):
        assert f"pass  {part}" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("meta.json", lambda m: m.update(interpolate_pos=False), "mine: packing"),
        ("meta.json", lambda m: m.update(timestep_shift=1.0), "mine: hidden states"),
        ("meta.json", lambda m: m.update(special_token_ids={"bos_token_id": 7}), "mine: packing"),
        ("think_prompts.json", lambda p: p.update(generate="draw"), "think_draw: final latent"),
        ("think_prompts.json", lambda p: p.update(understand="no"), "think_answer: tokens"),
        (
            "inference_cases.json",
            lambda c: c["jobs"]["edit_channel"]["kwargs"].update(cfg_renorm_type="global"),
            "edit_channel: final latent",
        ),
        (
            "inference_cases.json",
            lambda c: c["jobs"]["draw"]["kwargs"].update(timestep_shift=3.0),
            "draw: final latent",
        ),
        (
            "inference_cases.json",
            lambda c: c["jobs"]["draw"]["kwargs"].update(cfg_interval=[0.0, 1.0]),
            "draw: final latent",
        ),
        (
            "inference_cases.json",
            lambda c: c["vit_transform"].update(max_size=56),
            "edit_channel: final latent",
        ),
    ],
)
def test_every_constant_comes_from_the_folder(other, tmp_path, compare, capsys, file, change, expected):
    folder = shutil.copytree(other, tmp_path / "changed")
    edit_json(folder / file, change)
    if not expected.startswith("mine"):
        (folder / "train_cases.json").unlink()
    elif file == "meta.json":
        (folder / "inference_cases.json").unlink()
    assert compare([str(folder)]) == 1
    assert f"FAIL  {expected}" in capsys.readouterr().out
