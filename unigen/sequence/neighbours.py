"""The file a wrong path most likely meant: a neighbour on disk whose name is written in another way."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from urllib.parse import unquote

MOST = 200_000  # entries of a folder that are looked through

# What is written where a path should be, one after another: how to read it, and what to write.
_SPELLINGS: tuple[tuple[Callable[[str], str], str], ...] = (
    (lambda path: path.replace("\\", "/"), "write / in place of \\"),
    (unquote, "write the characters themselves in place of %20 and the like"),
    (lambda path: os.path.expanduser(path[path.find("/~/") + 1 :]) if "/~/" in path else path,
     "~ is not expanded: write the whole path"),
    (lambda path: "/".join(part.strip() for part in path.split("/")), "take out the blanks around the name"),
)  # fmt: skip
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
_ENDING = "if that is the one, write its ending as it is there"
_CASE = "names are case-sensitive: write it as it is there"
_FORM = "its name has another Unicode form (NFC or NFD): write it as it is there"
_BLANKS = "the file's name has blanks around it: rename the file"


def neighbour(path: str) -> tuple[str, str] | None:
    """A file that exists though the one at ``path`` does not, and how to write its name; None where there is
    none.

    It differs in backslashes, percent escapes, ``~``, blanks around a name, capital letters, the Unicode form
    or its ending.
    """
    written, words = path, []
    for read, what in _SPELLINGS:
        if read(written) != written:
            written, words = read(written), [*words, what]
    found = _as_it_is(written)
    if found is None:
        stem, ending = os.path.splitext(written)
        stem = stem if ending.lower() in _ENDINGS else written
        other = next((path for end in _ENDINGS if (path := _as_it_is(stem + end))), None)
        return (other, "; ".join([*words, _ENDING])) if other else None
    if found != written:
        same = unicodedata.normalize("NFC", written) == unicodedata.normalize("NFC", found)
        close = (
            unicodedata.normalize("NFC", written).casefold() == unicodedata.normalize("NFC", found).casefold()
        )
        words.append(_FORM if same else _CASE if close else _BLANKS)
    return found, "; ".join(words)


def _as_it_is(path: str) -> str | None:
    """The file at ``path``, each part of which may be spelt another way."""
    if os.path.isfile(path):
        return path
    at = "/" if path.startswith("/") else "."
    for part in filter(None, path.split("/")):
        if part == ".." or os.path.lexists(os.path.join(at, part)):
            at = os.path.join(at, part)
            continue
        try:
            name = _names(at, os.stat(at).st_mtime_ns).get(_key(part))
        except OSError:
            return None
        if name is None:
            return None
        at = os.path.join(at, name)
    return at if os.path.isfile(at) else None


@lru_cache(16)
def _names(folder: str, changed: int) -> dict[str, str]:
    """The entries of a folder by what their spellings share."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in islice(entries, MOST + 1)]
    return {_key(name): name for name in names} if len(names) <= MOST else {}


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().strip()
