"""Metrics of texts against what their authors publish, hand computation, and independent code."""

import math
import sys

import numpy as np
import pytest
import sacrebleu
import tiny_towers

from unigen.evaluation import text as metrics
from unigen.evaluation.statistics import compare

# The example of sacrebleu's README ("Using SacreBLEU from Python"), which prints 48.53 and 59.73.
SYSTEM = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


def test_bleu_and_chrf_are_those_of_sacrebleus_readme():
    bleu, chrf = metrics.bleu(SYSTEM, REFERENCES), metrics.chrf(SYSTEM, REFERENCES)
    assert round(bleu.value, 2) == 48.53 and round(chrf.value, 2) == 59.73
    version = sacrebleu.__version__
    assert bleu.name == f"bleu[nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}|n=3]"
    assert chrf.name == f"chrf2[nrefs:2|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{version}|n=3]"


@pytest.mark.parametrize("seed", range(6))
def test_sums_give_what_sacrebleu_gives_for_any_corpus(seed):
    random = np.random.default_rng(seed)
    words = ["a", "b", "c", "d", "e", "f", "gg", "hh", "ii", "jj"]
    made, wanted = (
        [" ".join(random.choice(words, random.integers(0, 9))) for _ in range(5)] for _ in range(2)
    )
    assert metrics.bleu(made, wanted).value == pytest.approx(
        sacrebleu.corpus_bleu(made, [wanted]).score, abs=1e-9
    )
    assert metrics.chrf(made, wanted).value == pytest.approx(
        sacrebleu.corpus_chrf(made, [wanted]).score, abs=1e-9
    )


def test_samples_of_bleu_are_sentence_scores():
    result = metrics.bleu(SYSTEM, REFERENCES)
    expected = [sacrebleu.sentence_bleu(text, given).score for text, given in zip(SYSTEM, REFERENCES)]
    assert result.samples == pytest.approx(expected)


def test_chinese_bleu_is_cut_into_characters_by_script():
    made, wanted = ["猫坐在垫子上。"], ["猫在垫子上坐着。"]
    result = metrics.bleu(made, wanted)
    assert "tok:zh" in result.name
    assert result.value == pytest.approx(sacrebleu.corpus_bleu(made, [wanted], tokenize="zh").score)
    assert result.value > 30 and "tok:13a" in metrics.bleu(made, wanted, lang="en").name
    assert "tok:char" in metrics.bleu(["ねこがいる"], ["ねこがいた"]).name


def test_each_prediction_may_have_its_own_number_of_references():
    result = metrics.bleu(["a b c d", "e f g h"], [["a b c d", "x"], ["e f g h"]])
    assert result.value == pytest.approx(100) and "nrefs:var" in result.name


# By hand. English: "the cat sat on the mat" against "the cat was on the mat": 5 of 6 words, 3 of 5 pairs, the
# longest common subsequence has 5. Chinese, by character: 猫坐在垫子上 against 猫在垫子上 shares 5 of 6 and of 5;
# pairs 在垫 垫子 子上: 3 of 5 and of 4; the subsequence has 5.
@pytest.mark.parametrize(
    ("made", "wanted", "one", "two", "longest"),
    [
        ("the cat sat on the mat", "the cat was on the mat", 5 / 6, 3 / 5, 5 / 6),
        ("猫坐在垫子上。", "猫在垫子上", 10 / 11, 6 / 9, 10 / 11),
        ("testing", "testing one two", 1 / 2, 0, 1 / 2),  # rouge-score's own test
        ("", "猫", 0, 0, 0),
    ],
)
def test_rouge_by_hand(made, wanted, one, two, longest):
    values = [metrics.rouge([made], [wanted], kind=kind).value for kind in ("1", "2", "L")]
    assert values == pytest.approx([one, two, longest])


def test_rouge_lsum_is_that_of_the_paper():
    # Lin 2004, section 3.2: recall of the union of the subsequences is 4 of 5. The prediction has 10 words.
    made, wanted = "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5"
    precision, recall = 4 / 10, 4 / 5
    assert metrics.rouge([made], [wanted], kind="Lsum").value == pytest.approx(
        2 * precision * recall / (precision + recall)
    )


def test_rouge_takes_the_best_reference():
    assert metrics.rouge(["a b"], [["x y", "a b"]], kind="1").value == 1


def test_meteor_is_that_of_nltks_documentation():
    # nltk.translate.meteor_score: 0.6944 with WordNet, which changes nothing for this pair
    made = "It is a guide to action which ensures that the military always obeys the commands of the party"
    wanted = "It is a guide to action that ensures that the military will forever heed Party commands"
    result = metrics.meteor([made], [wanted])
    assert round(result.value, 4) == 0.6944
    assert result.name.startswith("meteor[exact+stem|")


def test_meteor_by_hand():
    # Chinese: 5 matches of 6 and 5; two runs, 猫 and 在垫子上. Stems: "cats sat" against "cat sat": one run of 2.
    precision, recall = 5 / 6, 1.0
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    assert metrics.meteor(["猫坐在垫子上。"], ["猫在垫子上"]).value == pytest.approx(
        mean * (1 - 0.5 * (2 / 5) ** 3)
    )
    assert metrics.meteor(["cats sat"], ["cat sat"]).value == pytest.approx(1 - 0.5 * (1 / 2) ** 3)
    assert metrics.meteor(["hound"], ["dog"]).value == 0


@pytest.fixture
def wordnet(tmp_path):
    """A WordNet of one meaning, which dog and hound share."""
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for part in ("noun", "verb", "adj", "adv"):
        for name in (f"data.{part}", f"index.{part}", f"{part}.exc"):
            (folder / name).write_text("  1 a licence\n" if "exc" not in name else "")
    (folder / "lexnames").write_text("".join(f"{n:02d}\tname{n}\t1\n" for n in range(45)))
    (folder / "cntlist.rev").write_text("")
    head = "  1 WordNet 3.0 Copyright\n"
    (folder / "data.adj").write_text(head)
    (folder / "data.noun").write_text(f"{head}{len(head):08d} 05 n 02 dog 0 hound 0 000 | an animal  \n")
    (folder / "index.noun").write_text(
        head + "".join(f"{word} n 1 0 1 0 {len(head):08d}  \n" for word in ("dog", "hound"))
    )
    return folder


def test_meteor_knows_synonyms_where_wordnet_is_given(wordnet):
    result = metrics.meteor(["hound"], ["dog"], wordnet=wordnet)
    assert result.value == pytest.approx(0.5) and "exact+stem+wordnet" in result.name
    assert (
        compare(
            metrics.meteor(["hound"] * 2, ["dog"] * 2),
            metrics.meteor(["dog"] * 2, ["dog"] * 2, wordnet=wordnet),
        ).verdict
        == "not compared"
    )


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_that_is_no_wordnet_gives_no_value(made, tmp_path):
    folder = tmp_path / "wordnet"
    if made:
        folder.mkdir()
    result = metrics.meteor(["hound"], ["dog"], wordnet=folder)
    assert result.value is None and "wordnet" in result.reason and result.fix


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_towers.write_bert(tmp_path_factory.mktemp("towers") / "bert-base-uncased")


def test_bertscore_by_hand(bert):
    import torch
    from transformers import AutoModel, AutoTokenizer

    made, wanted = ["the cat sat on the mat", "a red square"], ["the dog sat on a mat", "a blue circle"]
    result = metrics.bertscore(made, wanted, model=bert, layer=2)
    model, tokenizer = AutoModel.from_pretrained(bert), AutoTokenizer.from_pretrained(bert)
    expected = []
    for pair in zip(made, wanted):
        with torch.no_grad():
            x, y = (
                model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0]
                for text in pair
            )
        cosine = torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=-1)
        # start and end may be matched, but do not count
        precision, recall = cosine.max(1).values[1:-1].mean(), cosine.max(0).values[1:-1].mean()
        expected.append(float(2 * precision * recall / (precision + recall)))
    assert result.samples == pytest.approx(expected, abs=1e-5)
    assert (
        result.name.startswith("bertscore[bert-base-uncased@")
        and "|layer=2|f1|rescaled:no|idf:no|" in result.name
    )


def test_bertscore_of_equal_texts_is_one_and_of_empty_ones_nothing(bert):
    result = metrics.bertscore(["猫坐在垫子上", "", "dog"], ["猫坐在垫子上", "dog", ""], model=bert, layer=1)
    assert result.samples == pytest.approx([1, 0, 0], abs=1e-5)


def test_bertscore_says_what_it_cut_and_what_it_lacks(bert, tmp_path):
    assert "cut" in metrics.bertscore(["cat " * 30], ["cat"], model=bert, layer=1).notes[0]
    assert metrics.bertscore(["cat"], ["cat"], model=bert, layer=1).notes == ()
    # 9 is the layer for a model of this name, and this one has three
    for model, layer, word in [
        (bert, None, "layer 9"),
        (tmp_path, 1, "config.json"),
        (tmp_path / "no", 1, "not a folder"),
    ]:
        result = metrics.bertscore(["cat"], ["cat"], model=model, layer=layer)
        assert result.value is None and word in result.reason + result.fix, result
    (tmp_path / "mine").symlink_to(bert)
    assert metrics.bertscore(["cat"], ["cat"], model=tmp_path / "no-such-model").fix.startswith(
        "give layer (--bert_layer)"
    )


def test_answers():
    made, wanted = ["Paris", "paris.", "Rome"], ["Paris", ["Lyon", "Paris"], "Paris"]
    assert metrics.exact_match(made, wanted).samples.tolist() == [1, 0, 0]
    assert metrics.accuracy(made, wanted).samples.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("made", "wanted", "expected"),
    [
        ("hello", "hallo", 0.8),
        ("Hello ", "hello", 1),
        ("abcd", "abxy", 0),
        ("猫坐垫", "猫在垫", 2 / 3),
        ("", "", 1),
        ("", "a", 0),
    ],
)
def test_anls_by_hand(made, wanted, expected):
    assert metrics.anls([made], [wanted]).value == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(20))
def test_levenshtein_is_that_of_its_definition(seed):
    random = np.random.default_rng(seed)
    a, b = ("".join(random.choice(list("abc"), random.integers(0, 7))) for _ in range(2))

    def distance(i, j):
        if i == 0 or j == 0:
            return i + j
        return min(
            distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        )

    assert metrics.levenshtein(a, b) == distance(len(a), len(b))


def test_distinct_by_hand():
    # pairs: ab ba ab, and cd: three different of four
    result = metrics.distinct(["a b a b", "c d"], order=2)
    assert result.value == 3 / 4 and result.name.startswith("distinct2[")
    assert metrics.distinct(["猫猫猫"], order=1).value == pytest.approx(1 / 3)
    assert metrics.distinct(["a"], order=2).value is None


def test_length_ratio_by_hand():
    result = metrics.length_ratio(["a b c", "a"], [["a b", "a b c d e f"], "a b"])
    assert result.value == 4 / 4 and result.samples.tolist() == [1.5, 0.5]
    assert result.higher_is_better is None
    assert metrics.length_ratio(["a"], ["..."]).value is None


ALL = [
    metrics.bleu, metrics.chrf, metrics.rouge, metrics.meteor, metrics.exact_match, metrics.accuracy,
    metrics.anls, metrics.length_ratio,
]  # fmt: skip


@pytest.mark.parametrize("metric", ALL)
def test_no_samples_is_no_value_and_never_zero(metric):
    result = metric([], [])
    assert result.value is None and result.reason and result.fix and result.as_json()["value"] is None
    assert metric(["a"], [[]]).value is None


@pytest.mark.parametrize("metric", ALL)
def test_every_metric_is_best_for_the_reference_itself(metric):
    texts = ["the cat sat on the mat today", "猫坐在垫子上看着窗外", "一只 dog"]
    result = metric(texts, texts)
    best = {"bleu": 100, "chrf2": 100}.get(result.kind, 1)
    assert result.value == pytest.approx(best, rel=0.05) and result.n == 3 and result.source
    assert result.interval[0] <= result.value <= result.interval[1] + 1e-9
    assert math.isfinite(result.as_json()["interval"][0])


@pytest.mark.parametrize(
    ("metric", "library"),
    [
        (metrics.bleu, "sacrebleu"),
        (metrics.chrf, "sacrebleu"),
        (metrics.rouge, "rouge_score"),
        (metrics.meteor, "nltk"),
    ],
)
def test_a_library_that_is_missing_gives_no_value(metric, library, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)  # what Python itself does for one that cannot be imported
    result = metric(["a"], ["a"])
    assert result.value is None and library in result.reason and "the extra metrics" in result.fix


def test_other_references_are_other_data():
    a, b = metrics.rouge(["a", "b"], ["a", "b"]), metrics.rouge(["a", "b"], ["a", "c"])
    assert a.name == b.name and a.data != b.data
    assert compare(a, b).verdict == "not compared"


def test_the_interval_of_a_share_of_bigrams_is_one_of_shares():
    """Halves differ by so much that twice their spread leaves 0 to 1 on both sides."""
    assert metrics.distinct(["a a a a a a a a a a", "b c", *"xxxxxx"]).interval == (0, 1)
