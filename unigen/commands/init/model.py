"""A small BAGEL with random weights and a tokenizer that reads the user's texts, in the published layout."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from unigen.data.dataset import UnifiedGenerationDataset
from unigen.data.mapping import ReadOptions
from unigen.model.bagel import Bagel
from unigen.model.config import small_config
from unigen.model.weights import save_bagel
from unigen.sequence.types import Text

# Sides in pixels, of a picture, of a latent token and of a ViT patch: 16 latent tokens a picture, and 64. A
# token has 3 x stride² numbers, and the width must be well above that: the velocity holds all of the noise.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"side": 16, "stride": 4, "patch": 4, "width": 128, "layers": 4, "inner": 384, "colour": True},
    "small": {"side": 32, "stride": 4, "patch": 4, "width": 256, "layers": 6, "inner": 768, "colour": True},
}
MOST_TOKENS = 4096  # of a tokenizer that learns the user's texts: the rarest words stay in parts
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
# How Qwen2 cuts a text before it merges bytes: digits one by one, letters apart from signs. A Chinese
# character stands alone, so that a phrase is made of characters that others share.
_CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)| ?\p{Han}|[^\r\n\p{L}\p{N}]?[\p{L}&&[^\p{Han}]]+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def create_model(folder: Path, texts: Sequence[str], seed: int = 0, **sizes: Any) -> Bagel:
    """Writes a model with random weights, and a tokenizer of ``texts``, into ``folder``; ``sizes`` are those
    of :func:`small_config`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = small_config(write_tokenizer(folder, texts), **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Bagel(config)
        model.initialise()
    save_bagel(model, folder)
    return model


def texts_of(paths: Sequence[str], read: ReadOptions, split: str | None) -> Iterator[str]:
    """Every text of a data set, caption variants too, read as a training with the same options does.

    Raises:
        BadData: nothing to read, or a record that no training could use either.
    """
    data = UnifiedGenerationDataset(list(paths), check_pictures="headers", read=read, named_split=split)
    for record in data:
        for segment in record.sample:
            if isinstance(segment, Text):
                yield from segment.variants


def pre_tokens(text: str) -> list[str]:
    """The parts of a text that a token never goes beyond."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(_CUTS), "isolated")
    return [part for part, _ in split.pre_tokenize_str(unicodedata.normalize("NFC", text))]


def write_tokenizer(folder: Path, texts: Iterable[str]) -> int:
    """Writes a Qwen2 tokenizer (byte-level BPE) with few tokens into ``folder``, and returns their number.

    It holds all 256 bytes, so it reads any text (Qwen2 brings text to Unicode's NFC first); the words and the
    Chinese characters of ``texts`` are one token each, the most frequent ones where there are too many.
    Digits stay single and never take the space before them: that is Qwen2's pre-tokenizer. Load it with
    ``Tokenizer.load(folder)``.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_CUTS), "isolated"), to_bytes]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=MOST_TOKENS, initial_alphabet=to_bytes.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((unicodedata.normalize("NFC", text) for text in texts), trainer)
    size = tokenizer.get_vocab_size()
    specials = {token: size + n for n, token in enumerate(SPECIAL_TOKENS)}

    options = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {str(n): {"content": token, **options, "special": True} for token, n in specials.items()}
    ends = {"eos_token": SPECIAL_TOKENS[0], "pad_token": SPECIAL_TOKENS[0], "unk_token": SPECIAL_TOKENS[0]}
    config = {
        "added_tokens_decoder": decoder,
        **ends,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 1 << 20,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    tables = {"added_tokens": specials, "special_tokens_map": ends, "tokenizer_config": config}
    for name, content in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return size + len(specials)
