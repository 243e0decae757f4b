"""Our HTML pages, taken apart, and their parts alone."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from typing import Any

from PIL import Image as PILImage

from unigen.show.pages import environment

VOID = {"meta", "img", "br"}


def part(name: str, *values: Any) -> Any:
    """A macro of ``parts.html``, drawn: markup for a template."""
    return getattr(environment().get_template("parts.html").module, name)(*values)


class Page(HTMLParser):
    """A page's elements, text, pictures and curves. Checks the nesting, that nothing leads outside, and that
    no attribute runs code; of scripts the caller judges."""

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.pictures: list[PILImage.Image] = []
        self.charts: list[Any] = []  # the data of those that tell values where one points
        self.feed(str(source))  # markup would escape what is taken from it
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    @property
    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]

    def of(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        """The attributes of the elements of a tag, and a class where one is given."""
        return [
            values
            for name, values in self.elements
            if name == tag and (not kind or kind in (values.get("class") or "").split())
        ]

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert not [name for name in values if name.startswith("on") or name in ("href", "srcset")]
        assert "url(" not in (values.get("style") or "")
        self.elements.append((tag, values))
        if "src" in values:
            kind, data = values["src"].split(",", 1)
            assert tag == "img" and kind in ("data:image/png;base64", "data:image/jpeg;base64"), (tag, kind)
            self.pictures.append(PILImage.open(io.BytesIO(base64.b64decode(data, validate=True))))
        if "data-curves" in values:
            self.charts.append(json.loads(values["data-curves"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += data
