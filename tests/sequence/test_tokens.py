"""The tokenizer, and the five tokens that structure a sequence."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unigen.sequence.tokens import SpecialIds, Tokenizer, TokenizerError


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
