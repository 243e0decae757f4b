"""What an answer is made of, piece by piece: what comes next, texts, thoughts and pictures, each in its
context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unigen.config import SamplingOptions
from unigen.inference.context import Context, ContextBuilder
from unigen.inference.requests import IMAGE, TEXT, Requests
from unigen.inference.sampler import Canvas, decode_pixels, draw, feed_tokens, write_texts
from unigen.model.bagel import Bagel
from unigen.model.kv_cache import Cache
from unigen.sequence.images import to_image
from unigen.sequence.tokens import Tokenizer
from unigen.sequence.types import Block, Image, Kind, Text


class Pieces:
    """Decides, writes, thinks and draws; contexts hold afterwards what was made.

    Args:
        model: in eval mode.
        tokenizer: the model's.
        builder: puts texts and pictures into contexts.
        requests: says what the model can do and what fits.
    """

    def __init__(self, model: Bagel, tokenizer: Tokenizer, builder: ContextBuilder, requests: Requests):
        self.model, self.tokenizer, self.builder, self.requests = model, tokenizer, builder, requests
        # Where processes share one model every token that was chosen goes through here: they must take the
        # same one.
        self.agree: Callable[[int], int] = lambda token: token

    def picker(
        self, options: SamplingOptions, generators: Sequence[torch.Generator]
    ) -> Callable[[Tensor, int], int]:
        """What chooses the next token of text i by its logits ``[vocabulary]``."""

        def pick(logits: Tensor, i: int) -> int:
            if not options.do_sample:
                return self.agree(int(logits.argmax()))
            likely = (logits / options.temperature).softmax(-1).cpu()
            return self.agree(int(torch.multinomial(likely, 1, generator=generators[i])))

        return pick

    def text_of(self, ids: Sequence[int]) -> str:
        """The text between the tokens that open and close it."""
        text = self.tokenizer.decode(list(ids))
        return text.split("<|im_end|>")[0].split("<|im_start|>")[1]

    def draw_in(
        self,
        contexts: Sequence[Context],
        shapes: Sequence[tuple[int, int]],
        noises: Sequence[Tensor],
        options: SamplingOptions,
    ) -> list[Any]:
        """Draws a picture of ``shapes`` (height, width) in each context; (latent tokens, pixels) of each."""
        stride = self.model.config.latent_stride
        canvases = [
            Canvas(c.full, c.no_text, c.no_image, (h // stride, w // stride), noise)
            for c, (h, w), noise in zip(contexts, shapes, noises, strict=True)
        ]
        drawn = draw(self.model, self.tokenizer.special, canvases, options)
        return [
            (tokens, decode_pixels(self.model, tokens, canvas.grid))
            for tokens, canvas in zip(drawn, canvases, strict=True)
        ]

    def noise(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        """``[tokens, patch_dim]`` float32 for a picture of ``shape`` (height, width)."""
        stride = self.model.config.latent_stride
        return torch.randn(
            (shape[0] // stride) * (shape[1] // stride), self.model.config.patch_dim, generator=generator
        )

    def begin(
        self,
        contexts: Sequence[Context],
        outputs: Sequence[str] | None,
        options: SamplingOptions,
        shape: tuple[int, int] | None,
    ) -> list[str | None]:
        """Builds the contexts; what each answer begins with.

        The system prompt of thinking says what follows the thought, so that is decided before it: by
        ``outputs``, or by the model from the prompt alone.
        """
        draws = IMAGE in (outputs or ())
        if outputs is None:
            self.builder.replay(contexts, drawing=False)
            kinds = [self.next_kind(context, first=True) for context in contexts]
        else:
            kinds = [outputs[0]] * len(contexts)
        think = options.think
        if think:
            for context, kind in zip(contexts, kinds, strict=True):
                context.pieces.insert(0, Text(self.requests.think_prompt(kind)))
        for context, kind in zip(contexts, kinds, strict=True):
            if outputs is None and kind is not None:
                self.requests.check_room(context.pieces, [kind], options, shape, think and kind == IMAGE)
        if think or outputs is not None:
            for drawing in (False, True):
                these = [
                    c for c, kind in zip(contexts, kinds, strict=True) if (draws or kind == IMAGE) == drawing
                ]
                self.builder.replay(these, drawing)
        return kinds

    def next_kind(self, context: Context, first: bool) -> str | None:
        """What the model opens next: a text, an image, or (None) nothing more."""
        special = self.tokenizer.special
        kinds: dict[int, str | None] = {
            special.text_start: TEXT,
            special.image_start: IMAGE,
            special.end: None,
        }
        if first:
            del kinds[special.end]
        if not self.model.config.visual_gen:
            del kinds[special.image_start]
        assert context.last is not None
        logits = self.model.logits(context.last)
        return kinds[self.agree(max(kinds, key=lambda token: float(logits[token])))]

    def next_fitting(
        self, context: Context, options: SamplingOptions, shape: tuple[int, int] | None
    ) -> str | None:
        """As :meth:`next_kind` after the first piece; an answer ends, with a warning, where the context is
        full."""
        kind = self.next_kind(context, first=False)
        if kind is None:
            return None
        words = self.requests.room.refusal(context.pieces, [kind], options, shape, draws=context.drawing)
        if words:
            self.requests.tell(f"an answer ends early: with what was answered so far {words}")
        return None if words else kind

    def think(
        self, contexts: Sequence[Context], max_tokens: int, pick: Callable[[Tensor, int], int]
    ) -> list[str]:
        """Writes a thought in each context, which then holds it in the full context alone."""
        _, texts = self._write([c.full.snapshot() for c in contexts], max_tokens, pick)
        for context, text in zip(contexts, texts, strict=True):
            context.thought = len(context.pieces)
            context.pieces.append(Text(text, target=True))
        self.builder.add_text(contexts, texts, only_full=True)
        return texts

    def write_pieces(
        self,
        contexts: Sequence[Context],
        max_tokens: int,
        pick: Callable[[Tensor, int], int],
        last: bool = False,
    ) -> list[str]:
        """Writes a text in each context; nothing follows the ``last`` one."""
        before, caches = [c.full.snapshot() for c in contexts], [c.full for c in contexts]
        written, texts = self._write(caches, max_tokens, pick)
        if last:
            return texts
        hidden = feed_tokens(self.model, caches, [self.tokenizer.special.text_end] * len(contexts))
        for context, past, state, text in zip(contexts, before, hidden, texts, strict=True):
            context.no_text, context.last = past, state
            context.pieces.append(Text(text, target=True))
        blocks = [Block(Kind.TEXT, len(ids), ids=ids) for ids in written]
        self.builder.extend_no_image(contexts, blocks)
        return texts

    def _write(
        self, caches: Sequence[Cache], max_tokens: int, pick: Callable[[Tensor, int], int]
    ) -> tuple[list[list[int]], list[str]]:
        """The ids of a text in each cache, without the token that opens it, and the text."""
        special = self.tokenizer.special
        written = write_texts(self.model, special, caches, max_tokens, pick, (special.text_end, special.end))
        inner = [ids[1:] for ids in written]
        return inner, [self.tokenizer.decode(ids) for ids in inner]

    def draw_pieces(
        self,
        contexts: Sequence[Context],
        shape: tuple[int, int] | None,
        generators: Sequence[torch.Generator],
        options: SamplingOptions,
        last: bool = False,
    ) -> list[Any]:
        """Draws a picture in each context, which then sees it; nothing follows the ``last`` picture."""
        self.requests.needs_gen()
        self.builder.replay([c for c in contexts if not c.drawing], drawing=True)
        shapes = [shape or c.shape or self.requests.room.shape([]) for c in contexts]
        noises = [self.noise(s, g) for s, g in zip(shapes, generators, strict=True)]
        pictures = [to_image(pixels.cpu()) for _, pixels in self.draw_in(contexts, shapes, noises, options)]
        if last:
            return pictures
        for context, picture in zip(contexts, pictures, strict=True):
            context.pieces.append(Image(picture, target=True))
        self.builder.add_image(contexts, [self.builder.shown(c, len(c.pieces) - 1) for c in contexts])
        return pictures
