"""Texts as the preview's page shows them: a chip for each token, a name for what cannot be seen."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from unigen.commands.preview.view import BlockView, TokenView
from unigen.sequence.tokens import NAMES, Tokenizer
from unigen.show.language import Words

SIGNS = {
    "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "NBSP", "\u00ad": "SHY", "\u200b": "ZWSP", "\u200c": "ZWNJ",
    "\u200d": "ZWJ",
    "\u200e": "LRM", "\u200f": "RLM", "\u202a": "LRE", "\u202b": "RLE", "\u202c": "PDF", "\u202d": "LRO",
    "\u202e": "RLO",
    "\u2060": "WJ", "\u2066": "LRI", "\u2067": "RLI", "\u2068": "FSI", "\u2069": "PDI", "\ufeff": "BOM",
}  # fmt: skip
JOINERS = "\u200c\u200d"  # inside a word or an emoji they shape it, and are no surprise
HIDDEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs")  # Unicode categories that show nothing
HEAD, TAIL = 64, 10  # tokens of a long text that are not folded away
CHIPS = 2400  # tokens of a sample with a tooltip each; the others are shown as plain text
PLAIN = 4000  # characters of such a plain text
LONGEST_CHARACTER = 8  # byte tokens that one character may take; more are shown as they are


def sign(character: str) -> str | None:
    """What stands for a character that shows nothing, or None for one that can be seen (a plain space counts
    as seen)."""
    if character in SIGNS:
        return SIGNS[character]
    if character == " " or unicodedata.category(character) not in HIDDEN:
        return None
    return chr(0x2400 + ord(character)) if ord(character) < 32 else f"U+{ord(character):04X}"


def signs_named(value: object) -> str:
    """Text in which what cannot be seen, or would turn the rest around, is named."""
    return "".join(c if c == "\n" or not (s := sign(c)) else f"⟨{s}⟩" for c in str(value))


class Chip(NamedTuple):
    """A token in the page, or all tokens of one character."""

    text: str
    kind: str = ""  # special, next (what a closing token learns to open), cut, or a text's own
    learnt: bool = False
    tip: str = ""
    tokens: int = 1

    @property
    def parts(self) -> list[tuple[str, str]]:
        """The text as ``(text, "")``, ``(" ", "space")`` for spaces, and ``(sign, name)`` for characters that
        cannot be seen."""
        made: list[tuple[str, str]] = []
        for i, c in enumerate(self.text):
            shown = None if c in JOINERS and 0 < i < len(self.text) - 1 else sign(c)
            if shown:
                made.append((shown, f"U+{ord(c):04X} {unicodedata.name(c, '').title()}".rstrip()))
                made += [("\n", "")] if c == "\n" else []
            elif c == " ":
                made.append((c, "space"))
            elif made and not made[-1][1]:
                made[-1] = (made[-1][0] + c, "")
            else:
                made.append((c, ""))
        return made


class FoldedText(NamedTuple):
    """The chips of a text; those of the middle of a long one are ``folded`` away."""

    head: list[Chip]
    folded: Sequence[Chip] = ()
    tail: Sequence[Chip] = ()
    more: int = 0  # tokens that are folded away


class Chips:
    """Makes the chips of one sample: knows the tokenizer, and how many tooltips are left."""

    def __init__(self, tokenizer: Tokenizer, words: Words):
        self.tokenizer, self.words, self.left = tokenizer, words, CHIPS
        self.special = {getattr(tokenizer.special, name): shown for name, shown in NAMES.items()}

    def name(self, id: int) -> str:
        """A token in a tooltip or a label."""
        return signs_named(self.special.get(id) or self.tokenizer.decode([id]))

    def tip(self, token: TokenView) -> str:
        """The token's column of the pack."""
        label = f" · {self._label(token.label)} “{self.name(token.label)}”" if token.label >= 0 else ""
        return self.words("tip", index=token.index, position=token.position, id=token.id) + label

    def _label(self, id: int) -> str:
        return self.words("tip_label", id=id)

    def _place(self, key: str, index: int, label: int) -> str:
        return self.words(
            "named",
            name=self.words(key),
            value=f"{self.words('tip_index', index=index)} · {self._label(label)}",
        )

    def text(self, block: BlockView) -> FoldedText:
        """The tokens of a text block, and what was cut off it."""
        first, *inner, last = block.tokens
        parts, at = [], 0
        for text, n in characters(self.tokenizer, [token.id for token in inner]):
            parts.append((text, inner[at : at + n]))
            at += n
        end = [*self._cut(block), self._marker(last), *self.next_modality(block)]
        if len(parts) <= HEAD + 3 * TAIL:
            return FoldedText([self._marker(first), *self._run(parts), *end])
        # before the middle, which may use up the tooltips
        head, tail = [self._marker(first), *self._run(parts[:HEAD])], [*self._run(parts[-TAIL:]), *end]
        middle = parts[HEAD:-TAIL]
        return FoldedText(head, self._run(middle), tail, sum(len(tokens) for _, tokens in middle))

    def next_modality(self, block: BlockView) -> list[Chip]:
        """What the closing token learns to open next."""
        label = block.next_modality
        if label is None:
            return []
        return [Chip(self.name(label), "next", tip=self._place("l_next", block.stop - 1, label))]

    def _marker(self, token: TokenView) -> Chip:
        return Chip(self.name(token.id), "special", token.learnt, self.tip(token))

    def _run(self, parts: Sequence[tuple[str, Sequence[TokenView]]]) -> list[Chip]:
        """What can be read, each with the tokens that it is made of; beyond the sample's tooltips as one
        plain text."""
        chips = []
        for done, (text, tokens) in enumerate(parts):
            if self.left <= 0:
                rest = "".join(text for text, _ in parts[done:])
                return [*chips, Chip(rest[:PLAIN] + "…" * (len(rest) > PLAIN), learnt=tokens[0].learnt)]
            self.left -= len(tokens)
            if len(tokens) == 1 and tokens[0].id in self.special:
                chips.append(self._marker(tokens[0]))
            else:
                tip = "\n".join(map(self.tip, tokens))
                chips.append(Chip(text, "", tokens[0].learnt, tip, len(tokens)))
        return chips

    def _cut(self, block: BlockView) -> list[Chip]:
        if not block.block.cut:
            return []
        label = block.tokens[-2].label  # of the last token before the cut: what stood behind it
        assert label == block.lost[0]
        tip = self._place("l_cut_label", block.stop - 2, label)
        more = len(block.lost) - HEAD
        text = self.tokenizer.decode(block.lost[:HEAD])
        return [Chip(text + (f" {self.words('more_tokens', n=more)}" if more > 0 else ""), "cut", tip=tip)]


def characters(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[str, int]]:
    """The text of ``ids`` in the smallest parts that can be read: (text, how many tokens). A byte-level token
    may be a third of a character, which is no text."""
    found, held = [], []
    for id in ids:
        held.append(id)
        text = tokenizer.decode(held)
        if text.endswith("\ufffd") and len(held) < LONGEST_CHARACTER:
            continue
        found.append((text, len(held)))
        held = []
    return found + ([(tokenizer.decode(held), len(held))] if held else [])
