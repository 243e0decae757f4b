"""The process side of the check: lengths counted in batches."""

from unigen.commands.check.part import CountingTokenizer
from unigen.config import DataOptions
from unigen.model.weights import load_planner


def test_batched_lengths_are_those_of_the_tokenizer(golden):
    texts = [
        "",
        " ",
        "a",
        "The quick brown fox",
        "猫在垫子上",
        "🙂 x̄ \u202eabc",
        "<|im_start|>user",
        "a\n\n\tb   c",
        "1234567890",
        "ﬁ" * 99,
    ]
    for tokenizer in (load_planner(folder, DataOptions()).tokenizer for folder in (golden / "model", None)):
        batched = CountingTokenizer(tokenizer)
        batched.learn(texts)
        batched.learn([*texts, "new one"])
        assert [len(batched.encode(t)) for t in [*texts, "not learnt"]] == [
            len(tokenizer.encode(t)) for t in [*texts, "not learnt"]
        ]
