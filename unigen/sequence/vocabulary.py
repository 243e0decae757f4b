"""The files of a checkpoint's tokenizer, read as data and checked; nothing of the folder is run.

tokenizer.json, or vocab.json and merges.txt     tokens of the byte-level BPE, and its merges
tokenizer_config.json, or added_tokens.json      the special tokens and their ids
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unigen.foreign import ForeignFileError, known_mistake, read_bytes, read_json, roots_of
from unigen.messages import listed
from unigen.schema import Either, Flag, Items, Maybe, NoCode, Number, Rule, String, Table, short, whole

FILES = "vocab.json, merges.txt and tokenizer_config.json"
CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
_FLAGS = {name: Flag() for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
_NAME = String(least=1)
_ADDED = Table({"content": _NAME}, _FLAGS)
_TOKEN = Maybe(Either((_ADDED, _NAME)))
_ID = whole(0, 1 << 24)
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
_SWITCHES = ("clean_up_tokenization_spaces", "split_special_tokens", "add_prefix_space")


def _is_id(name: str) -> str:
    return "" if name.isascii() and name.isdigit() and len(name) < 9 else "is no id of a token"


_CONFIG = Table(
    {},
    {
        "auto_map": NoCode(),
        "tokenizer_class": Maybe(String(CLASSES)),
        "added_tokens_decoder": Table(rest=_ADDED, name=_is_id),
        "additional_special_tokens": Maybe(Items(_TOKEN)),
        "extra_special_tokens": Maybe(Either((Table(rest=_TOKEN), Items(_TOKEN)))),
        "model_max_length": Maybe(Number(1, 1e40)),
        **dict.fromkeys(NAMED, _TOKEN),
        **dict.fromkeys(_SWITCHES, Maybe(Flag())),
    },
)
_VOCABULARY = Table(rest=_ID)
_MERGES: Rule = Items(Either((Items(String(), 2, 2), String())))
_MODEL = Table({"vocab": _VOCABULARY, "merges": _MERGES}, {"type": Maybe(String(("BPE",)))})
_WHOLE = Table({"model": _MODEL}, {"added_tokens": Items(Table({"id": _ID, "content": _NAME}, _FLAGS))})
_LLM = Table(
    {},
    {f"{name}_token_id": Maybe(Either((Items(_ID), _ID))) for name in ("bos", "eos")} | {"vocab_size": _ID},
)


@dataclass(frozen=True)
class Vocabulary:
    """What the files say."""

    tokens: dict[str, int]  # of the BPE, by id
    merges: list[tuple[str, ...]]  # pairs
    added: dict[int, dict[str, Any]]  # by id: content, and flags of the added token
    options: dict[str, Any]  # of the tokenizer
    source: str  # the file that names the added tokens


def read_vocabulary(folder: Path, pattern: str) -> Vocabulary:
    """The tokenizer's files of a checkpoint folder; ``tokenizer.json`` may cut texts by ``pattern`` alone.

    Raises:
        ForeignFileError: a file is missing, cannot be opened or makes no sense; with the key or line.
    """
    roots = roots_of(folder)

    def there(name: str) -> bool:
        return os.path.lexists(folder / name)

    config = (
        read_json(folder / "tokenizer_config.json", roots, _CONFIG) if there("tokenizer_config.json") else {}
    )
    added = {int(n): dict(token) for n, token in config.get("added_tokens_decoder", {}).items()}
    source = "tokenizer_config.json"
    if there("tokenizer.json"):
        path = folder / "tokenizer.json"
        stored = read_json(path, roots, _WHOLE)
        _check_pattern(path, stored.get("pre_tokenizer"), pattern)
        tokens = stored["model"]["vocab"]
        merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in stored["model"]["merges"]]
        if not added:
            added, source = {token["id"]: dict(token) for token in stored.get("added_tokens", [])}, path.name
        where = [f"model.merges[{i}]" for i in range(len(merges))]
    else:
        missing = [name for name in ("vocab.json", "merges.txt") if not there(name)]
        if missing:
            problem = f"the tokenizer's {listed(missing)} {'is' if len(missing) == 1 else 'are'} missing"
            raise ForeignFileError("missing", folder, problem, f"put the checkpoint's {FILES} there")
        path = folder / "vocab.json"
        tokens = read_json(path, roots, _VOCABULARY)
        merges, where = _read_merges(folder / "merges.txt", roots)
    if not added and there("added_tokens.json"):
        source = "added_tokens.json"
        special = {_content(config[name]) for name in NAMED if config.get(name)}
        added = {
            n: {"content": token, "normalized": token not in special, "special": token in special}
            for token, n in read_json(folder / source, roots, _VOCABULARY).items()
        }
    _check_tokens(path, tokens, {token["content"] for token in added.values()}, merges)
    _check_merges(
        path if path.name == "tokenizer.json" else folder / "merges.txt", tokens, merges, where, path.name
    )
    for token in added.values():
        token.pop("id", None)
    options = {name: _content(config[name]) for name in NAMED if name in config}
    options |= {name: config[name] for name in _SWITCHES if config.get(name) is not None}
    if config.get("model_max_length"):
        options["model_max_length"] = config["model_max_length"]
    return Vocabulary(tokens, merges, added, options, source)


def check_model(folder: Path, ids: Mapping[str, int], special: Mapping[str, int]) -> None:
    """Holds the ids of all tokens, and of those that structure a sequence, against the ``llm_config.json`` of
    the folder, where there is one.

    Raises:
        ForeignFileError: the model has no embedding of a token, or means another one by the end of a text.
    """
    path = folder / "llm_config.json"
    if not os.path.lexists(path):
        return
    said = read_json(path, roots_of(folder), _LLM)
    fix = "take the tokenizer's files and llm_config.json of one and the same checkpoint"
    size, (last, number) = said.get("vocab_size"), max(ids.items(), key=lambda item: item[1])
    if size is not None and number >= size:
        problem = f"vocab_size is {size:,}, but the tokenizer's {short(last)} has id {number:,}"
        raise bad_tokenizer(path, problem, fix)
    for key in ("bos_token_id", "eos_token_id"):
        value = said.get(key)
        if isinstance(value, int) and value not in special.values():
            known = ", ".join(f"{token} ({n})" for token, n in special.items())
            problem = f"{key} is {value}, which is no special token of the tokenizer: {known}"
            raise bad_tokenizer(path, problem, fix)


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def bad_tokenizer(
    path: Path, problem: str, fix: str = "take this file from the original checkpoint again"
) -> ForeignFileError:
    return ForeignFileError("content", path, problem, fix)


def _read_merges(path: Path, roots: list[Path]) -> tuple[list[tuple[str, ...]], list[str]]:
    """The merges, and where each stands."""
    data = read_bytes(path, roots)
    if found := known_mistake(data[:64]):
        raise bad_tokenizer(path, *found)
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise bad_tokenizer(path, f"it is no UTF-8 text ({error})") from None
    rows = [(n, line.rstrip("\r")) for n, line in enumerate(lines, 1)]
    rows = [(n, line) for n, line in rows if line and not line.startswith("#version")]
    return [tuple(line.split(" ")) for _, line in rows], [f"line {n}" for n, _ in rows]


def _check_merges(
    path: Path, tokens: Mapping[str, int], merges: list[tuple[str, ...]], where: list[str], vocabulary: str
) -> None:
    for merge, place in zip(merges, where, strict=True):
        if len(merge) != 2 or not all(merge):
            raise bad_tokenizer(
                path, f"{place} is {short(' '.join(merge))}; it must be two tokens and a space between"
            )
        if strange := [part for part in (*merge, "".join(merge)) if part not in tokens]:
            raise bad_tokenizer(path, f"{place} names {short(strange[0])}, which is no token of {vocabulary}")


def _check_tokens(
    path: Path, tokens: Mapping[str, int], added: set[str], merges: list[tuple[str, ...]]
) -> None:
    """Each id once, every byte, and a merge for all that is longer: else texts would lose characters, or be
    cut otherwise than the model learnt."""
    if len(set(tokens.values())) < len(tokens):
        seen: dict[int, str] = {}
        first, second = next(
            (seen[n], token) for token, n in tokens.items() if seen.setdefault(n, token) != token
        )
        raise bad_tokenizer(path, f"{short(first)} and {short(second)} have the same id, {tokens[second]}")
    if lost := [letter for letter in _byte_letters() if letter not in tokens]:
        raise bad_tokenizer(path, f"{len(lost)} of the 256 bytes have no token, such as {short(lost[0])}")
    made = {"".join(merge) for merge in merges}
    unmade = [
        token
        for token in tokens
        if len(token) > 1 and token not in made and token not in added and not token.startswith("<|")
    ]
    if unmade:
        problem = f"{len(unmade):,} tokens come from no merge, such as {short(unmade[0])}"
        fix = "take the vocabulary and the merges (merges.txt) of one and the same checkpoint, whole"
        raise bad_tokenizer(path, problem, fix)


def _byte_letters() -> list[str]:
    """The characters that stand for the 256 bytes in a byte-level vocabulary (GPT-2's)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, plain), *(chr(256 + n) for n in range(256 - len(plain)))]


def _check_pattern(path: Path, value: Any, pattern: str) -> None:
    """Raises ForeignFileError where a pre-tokenizer cuts texts by another pattern."""
    level = [value]
    while level:
        item = level.pop()
        if isinstance(item, dict):
            if "Regex" in item and item["Regex"] != pattern:
                problem = f"pre_tokenizer has the pattern {short(item['Regex'])}, not that of Qwen2"
                raise bad_tokenizer(path, problem, "use the tokenizer files of BAGEL-7B-MoT")
            level += item.values()
        elif isinstance(item, list):
            level += item
