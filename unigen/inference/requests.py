"""A request before the model works: its texts and pictures, and whether they and the answer fit its
context."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from unigen.config import SamplingOptions
from unigen.data.captions import is_picture
from unigen.inference.options import InferenceError, idle_settings
from unigen.inference.pictures import drawn_tokens, tokens_as_trained
from unigen.model.config import BagelConfig
from unigen.sequence.images import Confined, PILImage, image_size
from unigen.sequence.plan import Planner
from unigen.sequence.tokens import Tokenizer, is_media_tag
from unigen.sequence.types import Block, Image, Kind, Sample, Text
from unigen.values import shown

TEXT, IMAGE = "text", "image"
Piece = Any  # str, or a picture: PIL image, pathlib.Path, bytes


def picture_of(given: Any) -> Any:
    """A picture as the pieces of a prompt name one: here a text is a path, too. Raises InferenceError."""
    if not isinstance(given, str | Path | Confined | bytes | PILImage):
        raise InferenceError(
            f"image is {shown(given)}. Fix: give a path, a PIL image (PIL.Image.fromarray(...) makes one),"
            " bytes, or a list of them"
        )
    if isinstance(given, str) and not given:
        raise InferenceError("image is an empty path. Fix: name the picture's file, or leave image out")
    return Path(given) if isinstance(given, str) else given


def prompt_pieces(prompt: Piece | Sequence[Piece]) -> list[Piece]:
    """The pieces of a prompt, which may be one of them alone."""
    return list(prompt) if isinstance(prompt, list | tuple) else [prompt]


def sample_of(prompt: Piece | Sequence[Piece], called: str = "the prompt") -> Sample:
    """The segments of a prompt, each looked at: texts as they are, pictures by their headers; ``called`` in
    messages.

    Raises:
        InferenceError: there is none, or one is empty or neither a text nor a picture, or a text is the path
            of a picture.
        PictureError: a picture cannot be read.
    """
    sample: Sample = []
    for number, piece in enumerate(prompt_pieces(prompt), 1):
        name = f"piece {number} of {called}"
        if isinstance(piece, str):
            check_text(piece, name)
            if _names_picture(piece):
                raise InferenceError(
                    f"{name} is the text {shown(piece)}, and a picture lies there. Fix: Path(...) or"
                    " PIL.Image.open(...) around it (on the command line --image)"
                )
            sample.append(Text(piece))
            continue
        if not isinstance(piece, Path | Confined | bytes | PILImage):
            raise InferenceError(
                f"{name} is {shown(piece)}. Fix: give a text (str), or a picture: a pathlib.Path, a PIL image"
                " or bytes"
            )
        image_size(piece)
        sample.append(Image(piece))
    if not sample:
        raise InferenceError("a prompt is empty. Fix: give at least one text or picture")
    return sample


def _names_picture(text: str) -> bool:
    try:
        return is_picture(Path(text)) and Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with a NUL
        return False


def check_text(text: str, name: str) -> None:
    """Raises InferenceError for one that says nothing or cannot be cut into tokens."""
    if not text.strip():
        raise InferenceError(f"{name} is empty. Fix: write it, or leave it out")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InferenceError(
            f"{name} holds half a character (a lone surrogate). Fix: write it anew"
        ) from None


def check_tokens(sample: Sample, tokenizer: Tokenizer, called: str) -> None:
    """Raises InferenceError where a text holds what training refuses in one: a token that is no text to the
    model, or a tag without a picture."""
    for number, piece in enumerate(sample, 1):
        control = tokenizer.control_token(piece.text) if isinstance(piece, Text) else None
        if control and is_media_tag(control[0]):
            raise InferenceError(
                f"piece {number} of {called}: the tag {control[0]} at character {control[1] + 1} names no"
                " picture. Fix: take it out; --image puts pictures before the text, and in Python they stand"
                " in their places: [Path('a.png'), 'and', Path('b.png'), 'What differs?']. Or send"
                " it as text: --allow_control_tokens, in Python allow_control_tokens=True"
            )
        if control:
            raise InferenceError(
                f"piece {number} of {called}: the token {control[0]} at character {control[1] + 1} would"
                " open, close or end a part of the sequence. Fix: take it out, or mean it so:"
                " --allow_control_tokens, in Python allow_control_tokens=True"
            )


class Room:
    """What a prompt and its answer take of the model's context, in tokens as training counts them.

    Args:
        planner: Shows pictures as training does.
        limit: Tokens of the context.
    """

    def __init__(self, planner: Planner, limit: int):
        self.planner, self.limit = planner, limit

    def shape(self, sample: Sample) -> tuple[int, int]:
        """Height and width of a picture for which none are asked: the last picture's, or the largest
        square that training draws."""
        vae = self.planner.transforms.vae
        size = vae.size(vae.max_size, vae.max_size)
        for piece in sample:
            if isinstance(piece, Image):
                size = piece.source.size if piece.target else vae.size(*image_size(piece.source))
        return size[1], size[0]

    def refusal(
        self,
        sample: Sample,
        outputs: Sequence[str],
        options: SamplingOptions,
        shape: tuple[int, int] | None,
        thought: bool = False,
        draws: bool = False,
    ) -> str:
        """Why an answer of these pieces to ``sample`` cannot be, with the counts; empty where it fits.

        Args:
            shape: Height and width asked for.
            thought: The model writes a text before them.
            draws: It has drawn before.
        """
        prompt = tokens_as_trained(self.planner, sample, draws or IMAGE in outputs)
        shape, last, answer = shape or self.shape(sample), len(outputs) - 1, 0
        for i, kind in enumerate(outputs):
            if kind == TEXT:  # its closing token enters where anything follows
                answer += options.max_new_tokens + (i < last)
            else:
                answer += drawn_tokens(self.planner, shape, seen=i < last)
        answer += thought * (options.max_new_tokens + 1)
        return self.words(prompt, answer, thought + sum(kind == TEXT for kind in outputs), options)

    def words(self, prompt: int, answer: int, texts: int, options: SamplingOptions) -> str:
        """As :meth:`refusal`, of tokens and the number of texts that the model writes."""
        over = prompt + answer - self.limit
        if over <= 0:
            return ""
        fewer = options.max_new_tokens - -(-over // texts) if texts else 0
        return (
            f"the prompt takes {prompt:,} tokens and the answer up to {answer:,}"
            + (f" (max_new_tokens {options.max_new_tokens:,})" if texts else "")
            + f", and the model's context holds {self.limit:,}. Fix: "
            + (f"max_new_tokens of at most {fewer}, or " if fewer > 0 else "")
            + "a shorter prompt, or fewer or smaller pictures"
        )


class Requests:
    """What is asked of one model, checked before it works.

    Args:
        config: of the model.
        planner: shows pictures as training does.
        think_prompts: the system prompts of thinking mode.
    """

    def __init__(self, config: BagelConfig, planner: Planner, think_prompts: Mapping[str, str]):
        self.config, self.think_prompts = config, think_prompts
        self.room = Room(planner, config.llm.max_position_embeddings)
        self.usual = SamplingOptions()  # what differs from these settings was asked for
        self.warn: Callable[[str], None] = logging.getLogger("unigen").warning
        self._told: set[str] = set()  # each warning once

    def prepare(
        self,
        prompts: Sequence[Piece | Sequence[Piece]],
        outputs: Sequence[str] | None,
        options: SamplingOptions,
    ) -> tuple[list[Sample], tuple[int, int] | None]:
        """The prompts as samples, and the height and width asked for, after all checks that need no work of
        the model.

        Raises:
            InferenceError, PictureError: as :meth:`unified_generate_batch`.
        """
        if isinstance(outputs, str) or not isinstance(outputs, Sequence | None):
            raise InferenceError(f"outputs is {outputs!r}. Fix: a list such as ['text', 'image']")
        for kind in outputs or ():
            if kind not in (TEXT, IMAGE):
                raise InferenceError(f"outputs names {kind!r}. Fix: a piece is 'text' or 'image'")
        decides = outputs is None
        if outputs and IMAGE in outputs:
            self.needs_gen()
        draws = self.config.visual_gen if decides else IMAGE in outputs
        if outputs != []:
            self.tell_idle(options, decides or TEXT in outputs or options.think, draws)
        asked = draws and options.height is not None
        shape = self.canvas_shape(options.height, options.width) if asked else None
        if not isinstance(prompts, list | tuple):
            raise InferenceError(
                f"prompts is {shown(prompts)}. Fix: a list of prompts, each a text, a picture or a list"
            )
        several = len(prompts) > 1
        names = [f"prompt {n}" if several else "the prompt" for n in range(1, len(prompts) + 1)]
        samples = [self.sample(prompt, options, name) for prompt, name in zip(prompts, names, strict=True)]
        if first := [TEXT] if decides else list(outputs):
            thinks = [Text(self.think_prompt(first[0]))] if options.think else []
            for sample in samples:
                thought = options.think and first[0] == IMAGE
                self.check_room([*thinks, *sample], first, options, shape, thought)
        return samples, shape

    def sample(
        self, prompt: Piece | Sequence[Piece], options: SamplingOptions, called: str = "the prompt"
    ) -> Sample:
        """:func:`sample_of` a prompt, its texts as :func:`check_tokens` wants them where ``options`` do."""
        sample = sample_of(prompt, called)
        if not options.allow_control_tokens:
            check_tokens(sample, self.room.planner.tokenizer, called)
        return sample

    def check_room(self, sample: Sample, outputs: Sequence[str], *rest: Any) -> None:
        if words := self.room.refusal(sample, outputs, *rest):
            raise InferenceError(words)

    def think_prompt(self, kind: str | None) -> str:
        return self.think_prompts["generate" if kind == IMAGE else "understand"]

    def canvas_shape(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The height and width that the model draws where these are asked for: rounded down to multiples of
        its stride, with a warning that says so. Default: its largest square.

        Raises:
            InferenceError: a side is outside what its position table has room for.
        """
        config = self.config
        stride, limit = config.latent_stride, config.max_latent_size * config.latent_stride
        if height is None or width is None:
            side = min(config.vae_transform["max_size"], limit) // stride * stride
            return side, side
        for name, value in (("height", height), ("width", width)):
            if value < stride or value > limit:
                raise InferenceError(
                    f"{name} is {value} pixels; this model draws from {stride} to {limit}. Fix: choose a"
                    " side in that range"
                )
        rounded = (height // stride * stride, width // stride * stride)
        if rounded != (height, width):
            self.tell(
                f"height {height} and width {width} are rounded down to {rounded[0]} x {rounded[1]},"
                f" multiples of {stride} pixels"
            )
        return rounded

    def tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self.warn(message)

    def tell_idle(self, options: SamplingOptions, writes: bool, draws: bool) -> None:
        """Names the settings that have no effect."""
        idle = idle_settings(options, self.usual, writes, draws)
        if idle:
            self.tell(f"no effect on this answer: {', '.join(idle)}")

    def needs_gen(self) -> None:
        if not self.config.visual_gen:
            raise InferenceError(
                "this model was loaded with visual_gen=False and cannot draw. Fix: load it with"
                " visual_gen=True"
            )

    def check_parts(
        self,
        parts: Sequence[str | list[Block]],
        shape: tuple[int, int],
        noise: Tensor | None,
        understanding: bool,
        options: SamplingOptions,
    ) -> None:
        """Raises InferenceError where the request is longer than the context, or the noise of another
        shape."""
        rows = (shape[0] // self.config.latent_stride) * (shape[1] // self.config.latent_stride)
        prompt = sum(
            2 + len(self.room.planner.tokenizer.encode(part))
            if isinstance(part, str)
            else sum(map(len, part))
            for part in parts
        )
        texts = int(understanding or options.think)
        answer = texts * options.max_new_tokens + (0 if understanding else 2 + rows + texts)
        if words := self.room.words(prompt, answer, texts, options):
            raise InferenceError(words)
        expected = (rows, self.config.patch_dim)
        if noise is not None and tuple(noise.shape) != expected:
            raise InferenceError(
                f"initial_noise is {list(noise.shape)}; a picture of {shape[0]} x {shape[1]} takes"
                f" {list(expected)}."
                " Fix: noise of that shape, or image_shapes to match"
            )

    def last_shape(self, parts: Sequence[str | list[Block]]) -> tuple[int, int] | None:
        """Height and width at which the VAE sees the last picture."""
        grids = [b.grid for part in parts if not isinstance(part, str) for b in part if b.kind == Kind.CLEAN]
        stride = self.config.latent_stride
        return (grids[-1][0] * stride, grids[-1][1] * stride) if grids and grids[-1] else None
