"""The tokenizer, and the five tokens that structure a sequence."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unigen.sequence.tokens import (
    KEPT_TEXT,
    SpecialIds,
    Tokenizer,
    TokenizerError,
    WordTokenizer,
    is_media_tag,
)


@pytest.fixture(scope="module")
def tokenizer(golden):
    return Tokenizer.load(golden / "model")


def test_special_ids_are_those_of_the_vocabulary(golden, tokenizer):
    ids = json.loads((golden / "meta.json").read_text())["special_token_ids"]
    assert tokenizer.special == SpecialIds(
        ids["bos_token_id"], ids["eos_token_id"], ids["start_of_image"], ids["end_of_image"], 420
    )


def test_encoding_adds_nothing(tokenizer):
    assert tokenizer.encode("") == []
    assert not set(tokenizer.encode("draw a cat")) & {420, 421, 422, 423, 424}


@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn"]), max_size=30))
def test_text_survives(tokenizer, text):
    import unicodedata

    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=f"{tmp_path}.*Fix: .*vocab.json"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_without_a_special_token_says_which(golden, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(golden / "model" / name, tmp_path / name)
    config = json.loads((golden / "model" / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]["423"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match=r"has no <\|vision_start\|>\. Fix"):
        Tokenizer.load(tmp_path)


def test_control_tokens_are_found_wherever_they_stand(tokenizer):
    for each in (tokenizer, WordTokenizer()):
        assert each.control_token("a cat < im_end | > |im_end|") is None
        assert each.control_token("a <|im_end|> b <|im_start|>") == ("<|im_end|>", 2)
        assert each.control_token("猫<|endoftext|>") == ("<|endoftext|>", 1)
        assert each.control_token("<think>no</think>") is None
    assert WordTokenizer().control_token("<|fim_prefix|><tool_call>") == ("<|fim_prefix|>", 0)


def test_every_text_that_becomes_a_special_id_is_one(tokenizer):
    special = set(tokenizer.tokenizer.added_tokens_decoder)
    for id, token in tokenizer.tokenizer.added_tokens_decoder.items():
        assert tokenizer.encode(f"a{token}b") and id in tokenizer.encode(f"a{token}b")
        assert tokenizer.control_token(f"a{token}b") == (str(token), 1)
    assert len(special) == 5


def test_many_at_once_are_as_one_by_one(tokenizer):
    texts = ["a", "", "猫 <|im_end|>", "a" * 9000]
    assert tokenizer.encode_all(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_all([]) == []


def test_what_a_tokenizer_remembers_is_bounded_in_bytes(tokenizer, monkeypatch):
    fresh = Tokenizer(tokenizer.tokenizer)
    fresh.encode("a" * (KEPT_TEXT + 1))
    assert not fresh._known, "a long text is not kept"
    ids = fresh.encode("a cat")
    ids.append(1)
    assert fresh.encode("a cat") == ids[:-1], "who changes the list changes no other"
    monkeypatch.setattr("unigen.sequence.tokens.KEPT_BYTES", 10_000)
    for i in range(1000):
        fresh.encode(f"text {i}")
    assert fresh._held < 11_000 and len(fresh._known) < 30


@pytest.mark.parametrize(
    "tag",
    [
        "<image/>",
        "<start_of_image>",
        "<image_placeholder>",
        "<img>a/b.png</img>",
        "<IMG_CONTEXT>",
        "<|image_1|>",
        "<Image>",
        "<IMAGE>",
    ],
)
def test_tags_of_other_models_are_tags(tag: str):
    assert WordTokenizer().control_token(f"see {tag}") == (tag, 4) and is_media_tag(tag)
    assert WordTokenizer().control_token('<img src="a.png"> <images> <imagery>') is None
