"""Edited files of a model's folder: each edit works or is refused in one line, with file and key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from edits import GONE, edited, sampled

from unigen.config import UserError
from unigen.model.codec import VaeConfig
from unigen.model.weights import build_bagel, load_codec
from unigen.sequence.tokens import Tokenizer, TokenizerError

# Edits that make another value of the kind: a model of that shape is what the folder then says.
HARMLESS = {
    "llm_config.json": {"architectures", "torch_dtype", "use_cache", "initializer_range"},
    "vit_config.json": {"attention_dropout"},
    "vae_config.json": {"resolution", "in_channels", "out_ch", "scale_factor", "shift_factor"},
    "config.json": {"architectures", "model_type", "interpolate_pos", "timestep_shift"},
}
TOKENIZER = ("tokenizer_config.json", "vocab.json")


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    """A model whose config.json says every constant."""
    folder = shutil.copytree(golden / "model", tmp_path / "model")
    model, _ = build_bagel(folder)
    constants = {n: v for n, v in model.config.to_dict().items() if not n.endswith("_config")}
    (folder / "config.json").write_text(json.dumps(constants))
    return folder


def use(folder: Path, name: str) -> None:
    if name in TOKENIZER:
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.encode("a cat")
        return
    model, _ = build_bagel(folder)
    if name == "vae_config.json":
        load_codec(folder, model.config)
    if name == "llm_config.json":
        Tokenizer.load(folder)


def try_all(folder: Path, name: str, every: int, limit: int = 1000) -> tuple[int, set[str]]:
    """How many edits are refused, and the first keys of those that are not."""
    path = folder / name
    value, refused, taken = json.loads(path.read_text("utf-8")), 0, set()
    for keys, new in sampled(value, every, limit):
        path.write_text(json.dumps(edited(value, keys, new)), "utf-8")
        try:
            use(folder, name)
            if new is not None and new is not GONE:  # those mean the default
                taken.add(str(keys[0]))
        except UserError as error:
            text, refused = str(error), refused + 1
            assert "\n" not in text and name in text and "Fix: " in text, (keys, new, text)
            named = [str(key) for key in keys if not isinstance(key, int)] + list(map(str, keys[:1]))
            assert name == "vocab.json" or any(key in text for key in named), (keys, new, text)
    return refused, taken


@pytest.mark.slow
@pytest.mark.parametrize("name", HARMLESS)
def test_an_edit_of_a_config_works_or_is_refused_with_file_and_key(folder: Path, name: str):
    refused, taken = try_all(folder, name, 7)
    assert refused > 5 and taken <= HARMLESS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", HARMLESS)
def test_every_edit_of_a_config_works_or_is_refused_with_file_and_key(folder: Path, name: str):
    refused, taken = try_all(folder, name, 1)
    assert refused > 60 and taken <= HARMLESS[name]


@pytest.mark.parametrize("name", TOKENIZER)
def test_an_edit_of_a_tokenizer_works_or_is_refused_with_its_file(folder: Path, name: str):
    refused, _ = try_all(folder, name, 19, limit=40)
    assert refused > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZER)
def test_every_edit_of_a_tokenizer_works_or_is_refused_with_its_file(folder: Path, name: str):
    refused, _ = try_all(folder, name, 1, limit=60)
    assert refused > 200


@pytest.mark.parametrize(
    ("name", "key", "value", "tensor"),
    [
        ("llm_config.json", "vocab_size", 426, "embed_tokens"),
        ("llm_config.json", "hidden_size", 128, "embed_tokens"),
        ("llm_config.json", "intermediate_size", 161, "gate_proj"),
        ("llm_config.json", "num_hidden_layers", 2, "layers"),
        ("llm_config.json", "num_attention_heads", 8, "q_proj"),
        ("llm_config.json", "num_key_value_heads", 4, "k_proj"),
        ("vit_config.json", "hidden_size", 96, "patch_embedding"),
        ("vit_config.json", "patch_size", 16, "patch_embedding"),
        ("vit_config.json", "image_size", 224, "position_embedding"),
        ("vit_config.json", "num_hidden_layers", 4, "encoder.layers"),
        ("config.json", "latent_patch_size", 4, "vae2llm"),
    ],
)
def test_a_value_that_does_not_fit_the_weights_names_both(
    folder: Path, name: str, key: str, value: Any, tensor: str
):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=rf"{name}: .*{key} is {value}.*{tensor}.*Fix: "):
        build_bagel(folder)


@pytest.mark.parametrize(
    ("key", "value", "tensor"),
    [
        ("ch", 64, "conv_in"), ("z_channels", 8, "decoder.conv_in"), ("num_res_blocks", 2, "blocks"),
        ("ch_mult", [1, 1, 1, 2], r"down\.3"),
    ],
)  # fmt: skip
def test_a_vae_that_does_not_fit_its_weights_names_both(golden: Path, key: str, value: Any, tensor: str):
    said = json.loads((golden / "model" / "vae_config.json").read_text()) | {key: value}
    config = build_bagel(golden / "model")[0].config
    config.vae = VaeConfig.from_dict(said)
    with pytest.raises(UserError, match=rf"vae_config.json: {key} is .*{tensor}"):
        load_codec(golden / "model", config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llm_config.json", {"num_attention_heads": 5}, "num_attention_heads is 5, which does not divide"),
        ("llm_config.json", {"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide"),
        ("vit_config.json", {"num_attention_heads": 5}, "num_attention_heads is 5, which does not divide"),
        ("llm_config.json", {"auto_map": {"AutoConfig": "a.B"}}, "auto_map names code"),
        ("config.json", {"auto_map": {"AutoModel": "a.B"}}, "auto_map names code"),
        ("llm_config.json", {"rope_theta": GONE}, "rope_theta is missing"),
        ("llm_config.json", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be silu"),
        ("llm_config.json", {"tie_word_embeddings": True}, "tie_word_embeddings is true; it must be false"),
        ("config.json", {"vit_transform": {"max_size": 14, "min_size": 28}}, "vit_transform.min_size is 28"),
    ],
)
def test_values_that_cannot_be_are_refused(folder: Path, name: str, changes: dict[str, Any], said: str):
    path = folder / name
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not GONE}))
    with pytest.raises(UserError, match=rf"{name}: .*{said}"):
        build_bagel(folder)


# ---- the tokenizer


def test_a_tokenizer_with_code_is_refused_and_the_code_does_not_run(folder: Path, tmp_path: Path):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: auto_map names code"):
        Tokenizer.load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_vocabulary_or_merges_is_refused(folder: Path):
    for gone in (["merges.txt"], ["vocab.json", "merges.txt"]):
        for name in gone:
            (folder / name).unlink(missing_ok=True)
        with pytest.raises(
            TokenizerError, match=rf"{gone[0]}.* missing.*Fix: put the checkpoint's vocab\.json"
        ):
            Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda lines: lines[: len(lines) // 2], "tokens come from no merge"),
        (lambda lines: [*lines, "Ġ"], "must be two tokens"),
        (lambda lines: [*lines, "zz zz"], "no token of vocab.json"),
        (lambda lines: ["<!DOCTYPE html>"], "web page"),
        (lambda lines: ["version https://git-lfs.github.com/spec/v1"], "Git LFS pointer"),
        (lambda lines: [], "come from no merge|is empty"),
    ],
)
def test_merges_that_do_not_belong_to_the_vocabulary_are_refused(folder: Path, spoil: Any, said: str):
    path = folder / "merges.txt"
    path.write_text("\n".join(spoil(path.read_text("utf-8").splitlines())), "utf-8")
    with pytest.raises(TokenizerError, match=said):
        Tokenizer.load(folder)


def test_a_tokenizer_of_another_model_is_refused(folder: Path):
    path = folder / "llm_config.json"
    config = json.loads(path.read_text())
    for key, value in (("vocab_size", 424), ("eos_token_id", 7)):
        path.write_text(json.dumps(config | {key: value}))
        with pytest.raises(TokenizerError, match=rf"llm_config\.json: {key} is {value}"):
            Tokenizer.load(folder)


def test_a_single_tokenizer_file_gives_the_same_ids(folder: Path, golden: Path, tmp_path: Path):
    before = Tokenizer.load(golden / "model")
    before.tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    after = Tokenizer.load(tmp_path / "saved")
    text = "A red house <|im_end|> 海边 123"
    assert after.encode(text) == before.encode(text) and after.special == before.special
    path = tmp_path / "saved" / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace("[^\\\\r\\\\n\\\\p{L}", "[^\\\\p{L}"), "utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: pre_tokenizer has the pattern"):
        Tokenizer.load(tmp_path / "saved")
