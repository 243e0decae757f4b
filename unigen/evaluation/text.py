"""Metrics of texts against references: BLEU, chrF, ROUGE, METEOR, BERTScore, answers, variety, length.

Every function takes ``predictions``, n texts, and ``references``: for each prediction one text, or several of
which the best counts. All draws of intervals come from ``seed``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from unigen.evaluation.results import (
    CannotRun,
    Result,
    Unfit,
    digest_of,
    identity,
    libraries,
    metric,
    same_length,
)
from unigen.evaluation.statistics import estimate, estimate_by, value_of
from unigen.evaluation.words import TOKENIZER, language, normalised, tokens
from unigen.printing import first_line

References = Sequence[str] | Sequence[Sequence[str]]
Lists = list[list[str]]  # the references of each prediction
ANLS_THRESHOLD = 0.5

# Tokenizers of sacrebleu that need no data; Japanese and Thai by character, since theirs need more packages.
_BLEU_TOKENIZERS = {"zh": "zh", "en": "13a"}


def _pairs(predictions: Sequence[str], references: References) -> Lists:
    """The references as a list for each prediction. Raises CannotRun where there are none at all."""
    same_length(predictions, references)
    lists = [[given] if isinstance(given, str) else list(given) for given in references]
    for number, given in enumerate(lists):
        if not given:
            raise CannotRun(f"prediction {number} has no reference", "give at least one, or leave it out")
    return lists


def _nrefs(lists: Lists) -> str:
    """How many references each prediction has, as a name says it."""
    counts = {len(given) for given in lists}
    return f"nrefs:{counts.pop() if len(counts) == 1 else 'var'}"


def _mean(
    kind: str,
    values: Sequence[float],
    lists: Lists,
    seed: int,
    *variant: str,
    lib: str | None = None,
    notes: tuple[str, ...] = (),
) -> Result:
    """The result of a value for each sample; ``variant`` and ``lib`` stand in its name."""
    name = identity(kind, *variant, _nrefs(lists), n=len(values), lib=lib)
    return estimate(name, np.array(values, np.float64), seed=seed, data=digest_of(lists), notes=notes)


def _of_sums(
    kind: str, rule: str, signature: str, parts: np.ndarray, samples: list[Any], lists: Lists, seed: int
) -> Result:
    """The result of the sums that sacrebleu resamples, ``parts`` [n, k]; its signature stands in the name."""
    signature = f"{_nrefs(lists)}|case:mixed|{signature}|version:{libraries('sacrebleu').rpartition('-')[2]}"
    name = identity(kind, signature, n=len(parts))
    return estimate(name, parts, rule, seed=seed, samples=np.array(samples), data=digest_of(lists))


@metric("bleu", "Papineni et al. 2002; sacrebleu (Post 2018), corpus level, 0 to 100")
def bleu(
    predictions: Sequence[str], references: References, *, lang: str | None = None, seed: int = 0
) -> Result:
    """BLEU of the corpus, 0 to 100, by sacrebleu; per sample its sentence BLEU (effective order).

    The name holds sacrebleu's signature. ``lang``: ``zh`` cuts Chinese as sacrebleu's ``zh`` does, ``en``
    stands for 13a, any other for single characters; default by the script of the references.
    """
    from sacrebleu.metrics import BLEU

    lists = _pairs(predictions, references)
    lang = lang or language([text for given in lists for text in given])
    scorer = BLEU(tokenize=_BLEU_TOKENIZERS.get(lang, "char"), effective_order=True)
    scores: list[Any] = [scorer.sentence_score(text, given) for text, given in zip(predictions, lists)]
    parts = np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in scores], np.float64)
    signature = f"eff:no|tok:{scorer.tokenizer_signature}|smooth:exp"
    return _of_sums("bleu", "bleu", signature, parts, [s.score for s in scores], lists, seed)


@metric("chrf", "Popović 2015; sacrebleu (Post 2018), corpus level, 0 to 100")
def chrf(predictions: Sequence[str], references: References, *, seed: int = 0) -> Result:
    """chrF2 of the corpus, 0 to 100, by sacrebleu: F-score of character n-grams up to 6, for any script; per
    sample the same of it alone. The name holds sacrebleu's signature."""
    from sacrebleu.metrics import CHRF

    lists = _pairs(predictions, references)
    scorer = CHRF()
    # sacrebleu's own resampling reads these sums; its public functions give only the score
    parts = np.array(
        [
            scorer._extract_corpus_statistics([text], [[one] for one in given])[0]
            for text, given in zip(predictions, lists)
        ],
        np.float64,
    )
    samples = [value_of(part[None], "chrf") for part in parts]
    return _of_sums("chrf2", "chrf", "eff:yes|nc:6|nw:0|space:no", parts, samples, lists, seed)


@metric("rouge", "Lin 2004; rouge-score, mean F1 of the samples, 0 to 1")
def rouge(
    predictions: Sequence[str],
    references: References,
    *,
    kind: Literal["1", "2", "L", "Lsum"] = "L",
    seed: int = 0,
) -> Result:
    """ROUGE-1, -2, -L or -Lsum: mean F1 over the samples, 0 to 1, by rouge-score over our tokens: words, and
    single characters where a script writes no spaces. Without stemming; Lsum takes lines for sentences."""
    from rouge_score.rouge_scorer import RougeScorer

    lists = _pairs(predictions, references)
    scorer = RougeScorer([f"rouge{kind}"], tokenizer=SimpleNamespace(tokenize=tokens))
    values = [
        scorer.score_multi(given, text)[f"rouge{kind}"].fmeasure for text, given in zip(predictions, lists)
    ]
    variant = ("f1", f"tok:{TOKENIZER}")
    return _mean(f"rouge{kind}", values, lists, seed, *variant, lib=libraries("rouge-score"))


@metric("meteor", "Lavie & Agarwal 2007 (alpha 0.9, beta 3, gamma 0.5); nltk, mean of the samples, 0 to 1")
def meteor(
    predictions: Sequence[str],
    references: References,
    *,
    wordnet: str | Path | None = None,
    seed: int = 0,
) -> Result:
    """METEOR by nltk over our tokens: exact and Porter-stem matches, and synonyms where ``wordnet``, nltk's
    folder of that name, is given. Mean over the samples, 0 to 1; the best of several references."""
    from nltk.translate.meteor_score import meteor_score

    lists = _pairs(predictions, references)
    without = SimpleNamespace(synsets=lambda word: [])
    synonyms: Any = without if wordnet is None else _read_wordnet(str(wordnet))
    values = [
        meteor_score([tokens(one) for one in given], tokens(text), wordnet=synonyms)
        for text, given in zip(predictions, lists)
    ]
    stages = "exact+stem" if wordnet is None else f"exact+stem+wordnet-{synonyms.get_version()}"
    return _mean("meteor", values, lists, seed, stages, f"tok:{TOKENIZER}", lib=libraries("nltk"))


@cache
def _read_wordnet(folder: str) -> Any:
    """nltk's reader of a WordNet folder. Raises CannotRun: the folder is no such thing."""
    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class WordNet(WordNetCorpusReader):
        def map_wn(self, version: str = "wordnet") -> None:
            """Other languages are not looked up; their mapping would need a second WordNet."""

    folder = str(Path(folder).resolve())
    if folder not in nltk.data.path:
        nltk.data.path.append(folder)  # nltk reads nothing that lies elsewhere
    fix = "give nltk's wordnet folder (nltk_data/corpora/wordnet, unpacked), or leave the synonyms out"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it knows no other languages
            reader = WordNet(folder, omw_reader=None)
        if not reader.synsets("dog"):
            raise OSError("it knows no word")
    except (OSError, ValueError, LookupError, AssertionError) as error:  # nltk has no base class of its own
        raise CannotRun(f"{folder} is no WordNet ({first_line(error)})", fix) from None
    return reader


@metric("bertscore", "Zhang et al. 2020, equations 1-3: F1 of greedy matches, no idf, not rescaled")
def bertscore(
    predictions: Sequence[str],
    references: References,
    *,
    model: str | Path,
    layer: int | None = None,
    device: str = "cpu",
    batch_size: int = 32,
    seed: int = 0,
) -> Result:
    """BERTScore F1, mean over the samples, neither rescaled nor weighted by idf.

    Each token is matched to the most similar of the other text by the cosine of their embeddings, those of
    ``layer`` of ``model``: the folder of a transformers encoder, or a name that is in the hub's local cache.
    Default layer: the one that bert-score uses for a model of this name. Start and end tokens can be matched
    but are not counted.
    """
    from unigen.evaluation.towers import TokenTower, cut_note

    lists = _pairs(predictions, references)
    tower = TokenTower.load(model, layer, device)
    texts = list(dict.fromkeys([*predictions, *(one for given in lists for one in given)]))
    embedded = dict(zip(texts, tower.embed(texts, batch_size)))
    values = [
        max(_greedy_f1(embedded[text], embedded[one]) for one in given)
        for text, given in zip(predictions, lists)
    ]
    variant = (tower.identity, "f1", "rescaled:no", "idf:no")
    notes = cut_note(tower.truncated)
    return _mean("bertscore", values, lists, seed, *variant, lib=tower.libraries, notes=notes)


def _greedy_f1(made: tuple[np.ndarray, np.ndarray], wanted: tuple[np.ndarray, np.ndarray]) -> float:
    """F1 of two texts, each unit vectors [tokens, width] and which of the tokens count [tokens]; 0 where one
    has none."""
    (x, counts_x), (y, counts_y) = made, wanted
    if not counts_x.any() or not counts_y.any():
        return 0.0
    similarity = x @ y.T
    precision = float(similarity.max(1)[counts_x].mean())
    recall = float(similarity.max(0)[counts_y].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


@metric("exact_match", "share of answers equal to a reference, spaces around them aside")
def exact_match(predictions: Sequence[str], references: References, *, seed: int = 0) -> Result:
    """Share of predictions that equal one of their references to the letter, spaces around them aside."""
    lists = _pairs(predictions, references)
    values = [text.strip() in {one.strip() for one in given} for text, given in zip(predictions, lists)]
    return _mean("exact_match", values, lists, seed)


@metric("accuracy", "exact match after SQuAD's normalisation (Rajpurkar et al. 2016), numbers kept whole")
def accuracy(predictions: Sequence[str], references: References, *, seed: int = 0) -> Result:
    """Share of predictions that equal one of their references without case, punctuation, articles and
    superfluous spaces (``words.normalised``)."""
    lists = _pairs(predictions, references)
    values = [
        normalised(text) in {normalised(one) for one in given} for text, given in zip(predictions, lists)
    ]
    return _mean("accuracy", values, lists, seed, "normalised:squad+numbers")


@metric("anls", "Biten et al. 2019, equation 1, threshold 0.5")
def anls(predictions: Sequence[str], references: References, *, seed: int = 0) -> Result:
    """Average normalised Levenshtein similarity of short answers, 0 to 1: ``1 - d / longer length``, of the
    best reference; below 0.5 it counts as 0. Case and spaces around do not matter."""
    lists = _pairs(predictions, references)
    values = [max(_similarity(text, one) for one in given) for text, given in zip(predictions, lists)]
    return _mean("anls", values, lists, seed, f"threshold:{ANLS_THRESHOLD}")


def _similarity(text: str, other: str) -> float:
    a, b = text.strip().lower(), other.strip().lower()
    longest = max(len(a), len(b))
    similarity = 1 - levenshtein(a, b) / longest if longest else 1.0
    # the paper counts distances below the threshold, so a similarity of exactly one half is none
    return similarity if 1 - similarity < ANLS_THRESHOLD else 0.0


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of characters that make ``b`` of ``a``."""
    codes = np.array([ord(character) for character in b], np.int64)
    steps = np.arange(len(b) + 1)
    row = steps.copy()
    for number, character in enumerate(a, 1):
        # from above or diagonally; then along the row, where each step costs one
        ahead = np.concatenate([[number], np.minimum(row[1:] + 1, row[:-1] + (codes != ord(character)))])
        row = np.minimum.accumulate(ahead - steps) + steps
    return int(row[-1])


@metric("distinct", "Li et al. 2016: different n-grams by all n-grams of the corpus")
def distinct(predictions: Sequence[str], *, order: int = 2, seed: int = 0) -> Result:
    """Different n-grams of our tokens by all of them, over all predictions, 0 to 1: low where a model repeats
    itself. It falls with the number of texts: compare equal numbers."""
    same_length(predictions)
    rows = np.empty(len(predictions), object)
    for number, text in enumerate(predictions):
        words = tokens(text)
        rows[number] = tuple(zip(*(words[start:] for start in range(order))))

    def value(some: np.ndarray) -> float:
        grams = [gram for row in some for gram in row]
        return len(set(grams)) / len(grams) if grams else 0.0

    if not any(rows):
        raise Unfit(f"no text has {order} words", "look at the predictions")
    name = identity(f"distinct{order}", f"tok:{TOKENIZER}", n=len(rows))
    return estimate_by(name, rows, value, seed=seed, bounds=(0, 1))


@metric("length_ratio", "tokens of the predictions by tokens of the references")
def length_ratio(predictions: Sequence[str], references: References, *, seed: int = 0) -> Result:
    """Tokens of all predictions by those of all references, of several the one nearest in length; 1 is as
    long as the references. Per sample its own ratio."""
    lists = _pairs(predictions, references)
    parts = np.empty((len(lists), 2))
    for number, (text, given) in enumerate(zip(predictions, lists)):
        made = len(tokens(text))
        parts[number] = made, min((len(tokens(one)) for one in given), key=lambda n: (abs(n - made), n))
    if not parts[:, 1].any():
        raise Unfit("the references hold no words", "give references with words in them")
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = np.where(parts[:, 1] > 0, parts[:, 0] / parts[:, 1], np.nan)
    name = identity("length_ratio", f"tok:{TOKENIZER}", _nrefs(lists), n=len(parts))
    return estimate(
        name, parts, "ratio", seed=seed, samples=samples, data=digest_of(lists), higher_is_better=None
    )
