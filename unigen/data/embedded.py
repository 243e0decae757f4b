"""Pictures that stand in a record itself (``data:`` URIs, base64 texts), and addresses in place of paths."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from urllib.parse import unquote

from unigen import remote
from unigen.foreign import kind_of_start
from unigen.sequence.files import MAX_BYTES

_DATA = re.compile(r"data:[^,;]{0,100}(;[^,;]{0,100}){0,9},", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+=*\s*")
_LEAST = 64  # characters of a picture written as base64; the smallest PNG takes 90


@dataclass(frozen=True)
class Address:
    """A picture on the web (http, https), which training does not open and ``unigen fetch`` does."""

    url: str


def decoded(text: str, certain: bool = False) -> bytes | None:
    """The bytes of a picture that is written as a ``data:`` URI or as base64; None for any other text. With
    ``certain`` the text can be nothing else.

    Raises:
        ValueError: It is a ``data:`` URI that cannot be decoded, or of more than 256 MiB.
    """
    if text[:5].lower() == "data:":
        head = _DATA.match(text)
        if head is None or not head[0].lower().endswith(";base64,"):
            raise ValueError("a data: URI without ;base64,")
        return _base64(text[head.end() :])
    if certain:
        return _base64(text)
    if len(text) < _LEAST or kind_of_start(_start(text)) is None or not _BASE64.fullmatch(text):
        return None
    return _base64(text)


def _start(text: str) -> bytes:
    """What the first characters stand for, as far as they are base64."""
    try:
        return base64.b64decode(text[:48], validate=True)
    except (binascii.Error, ValueError):
        return b""


def _base64(text: str) -> bytes:
    if len(text) > MAX_BYTES // 3 * 4 + 4:
        raise ValueError(f"base64 of more than {MAX_BYTES:,} bytes")
    packed = re.sub(r"\s+", "", unquote(text) if "%" in text[-12:] else text)
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"base64 that cannot be decoded ({error})") from None


def place_of(text: str) -> str | Address:
    """The path that a text names (``file://`` taken off; of an address of object storage that of its copy),
    or its address on the web.

    Raises:
        ValueError: It is an address of another kind; its two arguments are why, and the fix.
    """
    if path := remote.path_of(text):
        return path
    scheme = remote.scheme_of(text)
    if scheme is None:
        return text
    if scheme in ("http", "https"):
        return Address(text)
    if problem := remote.problem_with(scheme):
        why, fix = problem
        if scheme in remote.STORES:
            fix = (
                f"{fix}copy the files once ({remote.tool_for(text)}), write the rest of the address as a"
                " path, and give --image_root DIR"
            )
        raise ValueError(why, fix)
    try:
        return str(remote.copy_of(text))  # a picture there is copied when it is first opened
    except remote.RemoteError as error:
        raise ValueError(error.problem, error.fix) from None
