"""The tokenizer and the special ids."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unigen.config import UserError


class TokenizerError(UserError):
    """The checkpoint's tokenizer cannot be used; the message says why and the fix."""


@dataclass(frozen=True)
class SpecialIds:
    """The five tokens that structure a sequence."""

    text_start: int  # <|im_start|>
    text_end: int  # <|im_end|>
    image_start: int  # <|vision_start|>
    image_end: int  # <|vision_end|>
    end: int  # <|endoftext|>


NAMES = {
    "text_start": "<|im_start|>",
    "text_end": "<|im_end|>",
    "image_start": "<|vision_start|>",
    "image_end": "<|vision_end|>",
    "end": "<|endoftext|>",
}


class Tokenizer:
    """Text <-> ids with the ids that BAGEL's sequences are built from."""

    def __init__(self, tokenizer: Any, special: SpecialIds | None = None):
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}  # prompts and instructions come again and again
        self.special = special or SpecialIds(
            **{name: tokenizer.convert_tokens_to_ids(token) for name, token in NAMES.items()}
        )

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """The tokenizer of a checkpoint folder.

        Raises:
            TokenizerError: files are missing, or a special token is not in the vocabulary.
        """
        from transformers import AutoTokenizer
        from transformers.utils import logging

        verbosity = logging.get_verbosity()
        # it warns that it does not know the model type "bagel", which no tokenizer needs
        logging.set_verbosity_error()
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise TokenizerError(
                f"{folder}: no tokenizer could be loaded ({str(error).splitlines()[0]}). "
                "Fix: put the checkpoint's vocab.json, merges.txt and tokenizer_config.json there"
            ) from error
        finally:
            logging.set_verbosity(verbosity)
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in NAMES.values() if token not in vocabulary]
        if missing:
            raise TokenizerError(
                f"{folder}: the tokenizer has no {', '.join(missing)}. Fix: use the tokenizer files of"
                " BAGEL-7B-MoT, which has them"
            )
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        if text not in self._known:
            if len(self._known) >= 10_000:
                self._known.clear()
            self._known[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return list(self._known[text])

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


# Words with the space before them, single digits and CJK characters, runs of signs, of spaces: near what a
# byte-level tokenizer of English and Chinese makes of common text.
_PIECES = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\d| ?[^\W\d_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|"
    r" ?[^\w\s]+|_+|\s+"
)


class WordTokenizer(Tokenizer):
    """Cuts texts into words and Chinese characters, for looking at data without a checkpoint. Its counts are
    estimates."""

    def __init__(self) -> None:
        self._words = list(NAMES.values())
        self._ids = {word: i for i, word in enumerate(self._words)}
        self.tokenizer = None
        self.special = SpecialIds(*range(len(NAMES)))

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in _PIECES.findall(text):
            if word not in self._ids:
                self._ids[word] = len(self._words)
                self._words.append(word)
            ids.append(self._ids[word])
        return ids

    def count(self, text: str) -> int:
        """``len(encode(text))``, without keeping the words."""
        return len(_PIECES.findall(text))

    def decode(self, ids: list[int]) -> str:
        return "".join(self._words[i] for i in ids)
