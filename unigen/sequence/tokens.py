"""The tokenizer and the special ids."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unigen.config import UserError
from unigen.foreign import ForeignFileError
from unigen.sequence.vocabulary import FILES, NAMED, bad_tokenizer, check_model, read_vocabulary


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


# What else Qwen2's tokenizer makes one token of, for data that is looked at without a checkpoint.
_QWEN2 = (
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
    "<|quad_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>",
    "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
# A tokenizer may have these as tokens of their own, and answers that think are written with them.
_WRITTEN = ("<think>", "</think>")
# what data sets write in a text where a picture, a video or a sound belongs, in any letters
_MEDIA = re.compile(
    r"(?i:<\|?(?:image|video|audio)(?:[ _-]?(?:\d+|placeholder|token|soft_token))? ?/?\|?>"
    r"|<(?:start|end)_of_(?:image|video|audio)>|<IMG_CONTEXT>|<ImageHere>|<bbox>|<ref-object>|<img>[^<>]{0,1000}</img>)"
)

KEPT_BYTES = 16 << 20  # of texts that a tokenizer remembers in each process, about
KEPT_TEXT = (
    4096  # characters of a text that it remembers: prompts and instructions come again, long texts not
)
_SENTENCES = ("A red house by the sea, at 10:45.", "海边有一座红色的房子。")
"""What every tokenizer must give back as it was."""


def is_media_tag(token: str) -> bool:
    """Is this token of :meth:`Tokenizer.control_token` a tag, and no token of the vocabulary?"""
    return _MEDIA.fullmatch(token) is not None


class Tokenizer:
    """Text <-> ids with the ids that BAGEL's sequences are built from."""

    def __init__(self, tokenizer: Any, special: SpecialIds | None = None):
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self._held = 0  # bytes of them, about
        self._control: re.Pattern[str] | None = None
        self.special = special or SpecialIds(
            **{name: tokenizer.convert_tokens_to_ids(token) for name, token in NAMES.items()}
        )

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """The tokenizer of a checkpoint folder.

        It is a Qwen2 tokenizer, whatever class the files name; no code of the folder runs.

        Raises:
            TokenizerError: files are missing or make no sense, a special token is not in the vocabulary, or
                the model of the folder is another's.
        """
        try:
            made = cls(_qwen2(Path(folder)))
        except ForeignFileError as error:
            raise TokenizerError(str(error)) from None
        for text in _SENTENCES:
            ids = made.encode(text)
            if made.decode(ids) != text:
                raise TokenizerError(
                    f"{folder}: the tokenizer makes {made.decode(ids)!r} of {text!r}. Fix: put the"
                    f" checkpoint's {FILES} there"
                )
        return made

    @property
    def identity(self) -> str:
        """A digest of the vocabulary and the rules by which texts are cut."""
        rules = self.tokenizer.backend_tokenizer.to_str()
        return hashlib.sha256(f"{self.special} {rules}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text; of up to ``KEPT_BYTES`` of short texts they are remembered."""
        known = self._known.get(text)
        if known is None:
            (known,) = self.encode_all([text])
            if len(text) <= KEPT_TEXT:
                if self._held > KEPT_BYTES:
                    self._known.clear()
                    self._held = 0
                self._known[text] = known
                self._held += 300 + 4 * len(text) + 40 * len(known)  # objects of Python, of any script
        return list(known)

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """The ids of many texts at once, none remembered."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def control_token(self, text: str) -> tuple[str, int] | None:
        """The first token in a text that is no text to the model, and the character it begins at: it would
        become the id that opens, closes or ends a part of a sequence; or the first tag that stands for a
        picture, a video or a sound. None where there is none."""
        if self._control is None:
            names = sorted(self._control_tokens() - set(_WRITTEN), key=len, reverse=True)
            self._control = re.compile("|".join([*map(re.escape, names), _MEDIA.pattern]))
        found = self._control.search(text)
        return (found[0], found.start()) if found else None

    def _control_tokens(self) -> set[str]:
        """All that the tokenizer finds in a text before it cuts that into words."""
        added = (str(token) for token in self.tokenizer.added_tokens_decoder.values())
        return {*NAMES.values(), *added, *self.tokenizer.all_special_tokens} - {""}

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


def _qwen2(folder: Path) -> Any:
    """The transformers tokenizer of a folder, with the ids that its files name. Raises ForeignFileError."""
    from transformers import AddedToken
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer

    found = read_vocabulary(folder, PRETOKENIZE_REGEX)
    added = {n: AddedToken(**token) for n, token in found.added.items()}
    by_content = {token["content"]: added[n] for n, token in found.added.items()}
    options = {
        name: by_content.get(value, value) if name in NAMED else value
        for name, value in found.options.items()
    }
    try:
        tokenizer = Qwen2Tokenizer(
            vocab=found.tokens, merges=found.merges, added_tokens_decoder=added, **options
        )
    except BaseException as error:  # a panic of the library is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        problem = f"no tokenizer can be made of its files ({str(error).partition(chr(10))[0]})"
        raise bad_tokenizer(folder, problem, f"put the checkpoint's {FILES} there") from error
    ids, source = tokenizer.get_vocab(), folder / found.source
    place = "added_tokens_decoder" if found.source == "tokenizer_config.json" else "the tokenizer"
    if missing := [token for token in NAMES.values() if token not in ids]:
        fix = "use the tokenizer files of BAGEL-7B-MoT, which has them"
        raise bad_tokenizer(source, f"{place} has no {', '.join(missing)}", fix)
    # the library counts on from the last token, whatever ids the files name
    for n, token in found.added.items():
        if (got := ids.get(token["content"])) != n:
            problem = f"{place}: {token['content']!r} has id {n}, where {got} comes next"
            raise bad_tokenizer(source, problem, "take the tokenizer's files of one and the same checkpoint")
    check_model(folder, ids, {token: ids[token] for token in NAMES.values()})
    return tokenizer


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
        self._control = None
        self.special = SpecialIds(*range(len(NAMES)))

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in _PIECES.findall(text):
            if word not in self._ids:
                self._ids[word] = len(self._words)
                self._words.append(word)
            ids.append(self._ids[word])
        return ids

    @property
    def identity(self) -> str:
        return "words"

    def _control_tokens(self) -> set[str]:
        return {*NAMES.values(), *_QWEN2}

    def count(self, text: str) -> int:
        """``len(encode(text))``, without keeping the words."""
        return len(_PIECES.findall(text))

    def decode(self, ids: list[int]) -> str:
        return "".join(self._words[i] for i in ids)
