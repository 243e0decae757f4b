"""Tokens, the language of a corpus, and short answers made equal."""

import pytest
from rouge_score.tokenizers import DefaultTokenizer

from unigen.evaluation.words import language, normalised, tokens


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat's mat, 2nd_floor!", ["the", "cat", "s", "mat", "2nd", "floor"]),
        ("猫坐在垫子上。", list("猫坐在垫子上")),
        ("用GPT-4画3只猫", ["用", "gpt", "4", "画", "3", "只", "猫"]),
        ("ＡＢＣ１２", ["abc12"]),  # full-width letters and digits
        ("ねこ カード", list("ねこカード")),
        ("ที่นี่", ["ที่", "นี่"]),  # marks stay with their consonant
        ("나는 학교에 간다", ["나는", "학교에", "간다"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),  # marks do not cut a word
        ("naïve café", ["naïve", "café"]),
        ("\u0301 a", ["a"]),  # a mark without a letter
        ("... !?", []),
        ("", []),
    ],
)
def test_tokens(text, expected):
    assert tokens(text) == expected


@pytest.mark.parametrize("text", ["Hello, World! It's 3.5 o'clock_x -- isn't it?", "a\tb\nc  d", "x2 2x"])
def test_ascii_tokens_are_those_of_rouge_score(text):
    assert tokens(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a red square", "a dog"], "en"),
        (["红色的方块", "一只 dog"], "zh"),
        (["東京へ行きます"], "ja"),
        (["แมวนั่งบนเสื่อ"], "th"),
        (["나는 학교에 간다"], "en"),
        (["The word 猫 means cat, as everybody knows."], "en"),
        (["123 !"], "en"),
        ([], "en"),
    ],
)
def test_language_is_read_from_the_script(texts, expected):
    assert language(texts) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The Eiffel Tower.", "eiffel tower"),
        ("1,000", "1000"),
        ("３", "3"),
        ("答案 是 猫。", "答案是猫"),
        (" yes! ", "Yes"),
        ("−5", "-5"),
        ("it's", "its"),
    ],
)
def test_answers_that_mean_the_same_become_equal(one, other):
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("-5", "5"), ("3.5", "35"), (".5", "5"), ("+", "-"), ("?", "!"), ("a", "the"), ("a b", "ab")],
)
def test_answers_that_differ_stay_different(one, other):
    assert normalised(one) != normalised(other)
