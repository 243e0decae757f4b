"""Pages to look at: one self-contained HTML file each, made of the templates and styles in ``assets/``.

They need no network, follow the reader's light or dark mode, and every text in them is escaped by the
templates. A picture is a ``PIL.Image.Image``, a path, or encoded bytes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from unigen.config import UserError
from unigen.figures import cell, figures_alone
from unigen.files import atomic
from unigen.messages import in_language, spoken
from unigen.outputs import is_own, refuse_foreign, same, written_by
from unigen.show.language import TAGS, Words

GENERATE, INDEX = "unigen generate", "index.html"
_PIECE = re.compile(r"[0-9]{2,}_(text\.txt|image\.png)")
_WHOLE = re.compile(r"(?<![\w-])--[a-z][\w-]*|\b[np] = [\d.]+|\[[-+.\de]+, [-+.\de]+\]")
MAX_SIDE = 1024  # of a picture in a page; the files beside the page keep their size
SMALL = 192  # pictures up to this side are magnified with hard pixels
# the browser itself refuses anything from outside
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# What HTML cannot hold, and what would turn the order of the texts around it, as visible signs.
SIGNS = {n: 0x2400 + n for n in range(32) if chr(n) not in "\n\t"} | {
    n: 0xFFFD for n in (*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def readable(value: Any) -> Any:
    """What a template shows of a value; markup of its own stays."""
    if hasattr(value, "__html__"):
        return value
    return str(value).replace("\r\n", "\n").translate(SIGNS).encode("utf-8", "replace").decode("utf-8")


def unbroken(value: Any) -> Any:
    """What a template shows of a text; names of options in it do not break after their hyphens, nor figures
    from what they are of."""
    from markupsafe import Markup, escape

    return Markup(_WHOLE.sub(r'<span class="whole">\g<0></span>', str(escape(readable(value)))))


@cache
def environment() -> Any:
    """The templates (a ``jinja2.Environment``), which escape everything that is not markup of their own."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("unigen", "assets/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=readable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"cell": cell, "whole": unbroken, "share": "{:.2%}".format, "said": in_language}
    made.globals["right_aligned"] = figures_alone
    return made


def write_page(
    path: Path,
    template: str,
    values: Mapping[str, Any],
    *,
    by: str = "unigen",
    **options: Any,
) -> Path:
    """Writes a page, as :func:`render` makes it, to ``path``, whose folder it makes, in one rename. An
    earlier page by the same command gives way.

    Raises:
        UserError: Something else is at ``path``.
        OSError: The page cannot be written.
    """
    source = render(template, values, by=by, **options)
    path = Path(path)
    refuse_foreign(path, by)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(Path(os.path.realpath(path)), sync=False) as file:
        file.write(source)
    return path


def render(
    template: str,
    values: Mapping[str, Any],
    *,
    title: str,
    by: str,
    language: str | None = None,
    styles: Sequence[str] = (),
    script: str = "",
) -> bytes:
    """The bytes of a page.

    Args:
        template: Name of a file in ``assets/templates/`` that extends ``page.html``.
        values: What the template shows.
        title: Of the page, its heading too.
        by: The command that writes it; the page's generator.
        language: Its tag, such as ``zh-CN``; default that of the command.
        styles: Names in ``assets/styles/``, without ``.css``; ``page`` comes first by itself.
        script: Name in ``assets/scripts/``, without ``.js``. The browser runs no other (SHA-256).
    """
    code = _asset(f"scripts/{script}.js") if script else ""
    assert "</" not in code, "it would end the element"
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode("ascii")
    text: str = (
        environment()
        .get_template(template)
        .render(
            values,
            title=title,
            generator=by,
            language=language or TAGS[spoken()],
            policy=POLICY + (f"; script-src 'sha256-{digest}'" if code else ""),
            style="".join(_asset(f"styles/{name}.css") for name in ("page", *styles)),
            script=code,
        )
    )
    return text.encode("utf-8")


def _asset(name: str) -> str:
    return (files("unigen") / "assets" / name).read_text("utf-8")


# ---- pictures


class Embedded(NamedTuple):
    """A picture inside a page, for the macro ``picture``: ``small`` ones are magnified with hard pixels, to
    ``width`` where one is given."""

    src: str
    small: bool = False
    width: int | None = None


def embed(picture: Any, min_width: int = 0) -> Embedded:
    """A picture for a page, scaled down to ``MAX_SIDE``; a small one is magnified to ``min_width`` at least.

    Raises:
        PictureError: It cannot be read.
    """
    image = _open(picture).copy()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    small = max(image.size) <= SMALL
    width = image.width * max(1, math.ceil(min_width / image.width)) if small and min_width else None
    return Embedded(data_uri(_png(image), "png"), small, width)


def data_uri(data: bytes, kind: str) -> str:
    """The bytes of a picture as an address; ``kind`` is png, jpeg or webp."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _open(picture: Any) -> Any:
    """A PIL picture of ``picture``: itself, or what ``open_image`` makes of a path or of encoded bytes."""
    if hasattr(picture, "convert"):
        return picture
    from unigen.sequence.images import open_image

    return open_image(picture)


def _png(image: Any) -> bytes:
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):  # PNG has no CMYK, and browsers no floats
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_answer(
    folder: Path,
    prompt: Sequence[Any],
    segments: Sequence[Any],
    title: str = "Unigen",
    made: Mapping[str, Any] | None = None,
) -> Path:
    """Writes an answer for people and programs: ``01_text.txt``, ``02_image.png``, ..., and ``index.html``
    that shows it under its prompt.

    Args:
        folder: Made where it is missing. An earlier answer in it gives way, all of its files; others stay.
        prompt: Texts (``str``, ``Text``) and pictures (PIL, path, bytes, ``Image``) in order. A ``str`` is
            always a text.
        segments: The answer, of the same kinds, in order.
        title: Heading of the page.
        made: What it was made with, which the page shows: ``facts`` and ``settings`` are (name, value), and
            ``command`` makes it again.

    Returns:
        The path of ``index.html``.

    Raises:
        PictureError: A picture cannot be read.
        UserError: A file of the folder is in the way that no answer left there, or that was changed since.
        OSError: The folder cannot be written.
    """
    folder = Path(folder)
    # opened before anything is written: the prompt may show a file of this folder
    asked, answered = _opened(prompt), _opened(segments)
    digits = max(2, len(str(len(answered))))
    files: dict[str, bytes] = {}
    for n, segment in enumerate(answered, start=1):
        if isinstance(segment, str):
            files[f"{n:0{digits}d}_text.txt"] = segment.encode("utf-8", "replace")
        else:
            files[f"{n:0{digits}d}_image.png"] = _png(segment)
    values = {
        name: [s if isinstance(s, str) else embed(s, min_width=160) for s in segments]
        for name, segments in (("prompt", asked), ("answer", answered))
    } | {"made": made, "words": Words(spoken(), "generate")}
    refuse_strangers(folder, files)
    before = _own_files(folder)
    after = {name: [hashlib.sha256(data).hexdigest()] for name, data in files.items()}

    def index(own: dict[str, list[str]]) -> Path:
        listed = values | {"files": json.dumps(own)}
        how = {"by": GENERATE, "title": title, "styles": ["generate"]}
        return write_page(folder / INDEX, "generate.html", listed, **how)

    # a kill leaves some of the old files and some of the new ones, and the page answers for all of them
    index({name: [*before.get(name, []), *after.get(name, [])] for name in {**before, **after}})
    for name, data in files.items():
        with atomic(folder / name, sync=False) as file:
            file.write(data)
    for name in before.keys() - after.keys():
        if is_own(folder / name, before[name]):
            (folder / name).unlink()
    return index(after)


def refuse_strangers(folder: Path, names: Iterable[str] | None = None, inputs: Sequence[Path] = ()) -> None:
    """Says no where an answer would replace what no answer left in a folder as it is now, or one of its
    ``inputs``. ``names`` are the answer's files; default: any that one may have. Raises UserError."""
    refuse_foreign(folder / INDEX, GENERATE)
    own = _own_files(folder)
    if names is None:
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        names = [INDEX, *filter(_PIECE.fullmatch, there)]
    for path in (folder / name for name in names):
        ours = path.name == INDEX or is_own(path, own.get(path.name, []))
        if os.path.lexists(path) and (not ours or any(same(path, given) for given in inputs)):
            why = "this command reads it" if ours else f"{GENERATE} did not write it as it is now"
            raise UserError(
                f"{path} is in the way of the answer: {why}. Fix: name another folder (--output_dir ...)"
            )


def _own_files(folder: Path) -> dict[str, list[str]]:
    """The files of the answer in a folder, and the SHA-256 that each may have, as its page says."""
    if written_by(folder / INDEX) != GENERATE:
        return {}
    try:
        with open(folder / INDEX, "rb") as file:
            found = re.search(rb'<meta name="files" content="([^"]*)">', file.read(1 << 20))
        own = json.loads(html.unescape(found[1].decode("utf-8"))) if found else {}
        return {name: list(map(str, sums)) for name, sums in own.items() if _PIECE.fullmatch(name)}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return {}


def _opened(segments: Sequence[Any]) -> list[Any]:
    """A text or a PIL picture for each segment, which is a text, a picture, a ``Text`` or an ``Image``."""
    # late, since it needs PyTorch, and pages without such segments do not
    from unigen.sequence.types import Image, Text

    plain = [s.text if isinstance(s, Text) else s.source if isinstance(s, Image) else s for s in segments]
    return [
        s if isinstance(s, str) and not isinstance(given, Image) else _open(s)
        for s, given in zip(plain, segments, strict=True)
    ]


def contact_sheet(pictures: Sequence[Any], columns: int, cell: int, gap: int = 4) -> Any:
    """A PIL picture that shows many: ``columns`` in a row, each ``cell`` pixels square (nearest neighbour),
    ``gap`` white pixels apart."""
    assert pictures and columns >= 1 and cell >= 1
    rows, step = math.ceil(len(pictures) / columns), cell + gap
    whole = _open(pictures[0]).convert("RGB").resize((columns * step + gap, rows * step + gap))
    sheet = whole.point(lambda level: 255)
    for n, picture in enumerate(pictures):
        square = _open(picture).convert("RGB").resize((cell, cell), resample=0)  # nearest neighbour
        sheet.paste(square, (gap + n % columns * step, gap + n // columns * step))
    return sheet
