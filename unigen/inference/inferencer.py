"""``InterleaveInferencer``: understand, draw, edit, think as the reference does, and answer in text and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unigen.config import UserError
from unigen.inference.sampler import Canvas, ImageOptions, decode_pixels, draw, extend, feed, write
from unigen.model.backends import prefer_flash
from unigen.model.bagel import Bagel
from unigen.model.kv_cache import Cache
from unigen.model.weights import load_bagel
from unigen.sequence.grid import patchify
from unigen.sequence.images import ImageTransform, open_image, to_image
from unigen.sequence.tokens import Tokenizer
from unigen.sequence.types import Block, Kind

# The system prompts of thinking mode, with which the released checkpoints were trained (exact, blanks included).
THINK_PROMPTS = {
    "understand": "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. <think> reasoning process here </think> answer here",
    "generate": "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. <think> planning process here </think> image here",
}
Piece = Any  # str, or a picture: PIL image, pathlib.Path, bytes
TEXT, IMAGE = "text", "image"


class InferenceError(UserError):
    """A request cannot be answered; the message says why and the cure."""


class Context:
    """One conversation: the full context, and the two that guidance compares with.

    The no-text context is the one that stood before the last text (or after the last image, if that came later); the
    no-image context has only the texts.
    """

    def __init__(self, n_layers: int):
        self.n_layers = n_layers
        self.pieces: list[Piece] = []
        self.reset(drawing=False)

    def reset(self, drawing: bool) -> None:
        """Empties the caches; with ``drawing``, pictures will enter through the VAE too and guidance is possible."""
        self.full, self.no_text, self.no_image = (Cache(self.n_layers) for _ in range(3))
        self.drawing = drawing
        self.last: Tensor | None = None  # hidden state [D] of the last closing token
        self.shape: tuple[int, int] | None = None  # height, width of the last picture


class InterleaveInferencer:
    """Answers with text and pictures.

    Args:
        model: from ``load_bagel``.
        vae_model: a codec; default the model's own.
        tokenizer: a :class:`Tokenizer`, or a transformers tokenizer; default that of the folder the model came from.
        vae_transform: how pictures are resized for the VAE; default the model's.
        vit_transform: the same for the ViT.
        new_token_ids: accepted for the reference's signature; the tokenizer knows its ids.
        think_prompts: system prompts of thinking mode, ``{"understand": ..., "generate": ...}``.
    """

    def __init__(
        self,
        model: Bagel,
        vae_model: Any = None,
        tokenizer: Any = None,
        vae_transform: ImageTransform | None = None,
        vit_transform: ImageTransform | None = None,
        new_token_ids: Mapping[str, int] | None = None,
        think_prompts: Mapping[str, str] | None = None,
    ):
        prefer_flash()
        self.model = model.eval()
        if vae_model is not None:
            object.__setattr__(model, "codec", vae_model)
        if tokenizer is None:
            if model.source is None:
                raise InferenceError("tokenizer is missing and the model was not loaded from a folder. Cure: pass tokenizer=")
            tokenizer = Tokenizer.load(model.source)
        self.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer(tokenizer)
        transforms = model.config.transforms()
        self.vae_transform = _within(vae_transform or transforms.vae, transforms.vae)
        self.vit_transform = _within(vit_transform or transforms.vit, transforms.vit)
        self.think_prompts = dict(think_prompts or THINK_PROMPTS)
        # Where processes share one model every token that was chosen goes through here: they must take the same one.
        self.agree: Callable[[int], int] = lambda token: token

    @classmethod
    def from_pretrained(cls, folder: Path | str, device: str = "auto", dtype: torch.dtype | None = None) -> InterleaveInferencer:
        """Loads a checkpoint folder; bfloat16 on a GPU, float32 on a CPU unless ``dtype`` says otherwise."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(load_bagel(folder, device, dtype or (torch.float32 if device == "cpu" else torch.bfloat16)))

    # ---- contexts --------------------------------------------------------------------------------------------------

    def add_text(self, contexts: Sequence[Context], texts: Sequence[str], only_full: bool = False) -> None:
        """Appends a text to each context; ``only_full`` hides it from the guidance's contexts."""
        blocks = []
        for text in texts:
            ids = self.tokenizer.encode(text)
            blocks.append(Block(Kind.TEXT, len(ids), ids=ids))
        if not only_full:
            for context in contexts:
                context.no_text = context.full.snapshot()
        self._extend(contexts, blocks)
        drawing = [i for i, context in enumerate(contexts) if context.drawing]
        if drawing and not only_full:
            extend(self.model, self.tokenizer.special, [contexts[i].no_image for i in drawing], [blocks[i] for i in drawing])

    def add_image(self, contexts: Sequence[Context], pictures: Sequence[Piece]) -> None:
        """Appends a picture to each context: to the ViT, and before it to the VAE where the context draws."""
        resized = [self.vae_transform.resize(open_image(picture)) for picture in pictures]
        drawing = [i for i, context in enumerate(contexts) if context.drawing]
        if not self.model.config.visual_und and len(drawing) < len(contexts):
            raise InferenceError(
                "this model was loaded with visual_und=False and sees pictures only where it is asked to draw. Cure: load it with "
                "visual_und=True, or ask for a picture"
            )
        if drawing:
            self._extend([contexts[i] for i in drawing], [self._vae_block(resized[i]) for i in drawing])
        if self.model.config.visual_und:
            self._extend(contexts, [self._vit_block(picture) for picture in resized])
        for context, picture in zip(contexts, resized, strict=True):
            context.no_text = context.full.snapshot()
            context.shape = (picture.height, picture.width)

    def _extend(self, contexts: Sequence[Context], blocks: Sequence[Block]) -> None:
        hidden = extend(self.model, self.tokenizer.special, [context.full for context in contexts], blocks)
        for context, last in zip(contexts, hidden, strict=True):
            context.last = last

    def _vae_block(self, picture: Any) -> Block:
        pixels = self.vae_transform(picture)
        stride = self.model.config.latent_stride
        grid = (pixels.shape[1] // stride, pixels.shape[2] // stride)
        return Block(Kind.CLEAN, grid[0] * grid[1], 0, grid, pixels=pixels)

    def _vit_block(self, picture: Any) -> Block:
        pixels = self.vit_transform(picture)
        patch = self.model.config.vit.patch_size
        grid = (pixels.shape[1] // patch, pixels.shape[2] // patch)
        return Block(Kind.VIT, grid[0] * grid[1], 0, grid, patches=patchify(pixels, patch))

    def _draw(
        self, contexts: Sequence[Context], shapes: Sequence[tuple[int, int]], noises: Sequence[Tensor], options: ImageOptions
    ) -> list[Any]:
        """Draws a picture of ``shapes`` (height, width) in each context; (latent tokens, pixels) of each."""
        stride = self.model.config.latent_stride
        canvases = [
            Canvas(c.full, c.no_text, c.no_image, (h // stride, w // stride), noise)
            for c, (h, w), noise in zip(contexts, shapes, noises, strict=True)
        ]
        drawn = draw(self.model, self.tokenizer.special, canvases, options)
        return [(tokens, decode_pixels(self.model, tokens, canvas.grid)) for tokens, canvas in zip(drawn, canvases, strict=True)]

    def canvas_shape(self, shape: Sequence[int] | None) -> tuple[int, int]:
        """The height and width that the model draws where ``shape`` is asked for: multiples of its stride. Default: its largest square.

        Raises:
            InferenceError: a side is outside what its position table has room for.
        """
        config = self.model.config
        stride, limit = config.latent_stride, config.max_latent_size * config.latent_stride
        if shape is None:
            side = min(config.vae_transform["max_size"], limit) // stride * stride
            return side, side
        height, width = shape
        for name, value in (("height", height), ("width", width)):
            if value < stride or value > limit:
                raise InferenceError(
                    f"{name} is {value} pixels; this model draws from {stride} to {limit}. Cure: choose a side in that range"
                )
        return height // stride * stride, width // stride * stride

    def _noise(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        stride = self.model.config.latent_stride
        return torch.randn((shape[0] // stride) * (shape[1] // stride), self.model.config.patch_dim, generator=generator)

    def _needs_gen(self) -> None:
        if not self.model.config.visual_gen:
            raise InferenceError("this model was loaded with visual_gen=False and cannot draw. Cure: load it with visual_gen=True")

    # ---- as the reference ------------------------------------------------------------------------------------------

    def interleave_inference(
        self,
        input_lists: Sequence[Piece],
        think: bool = False,
        understanding_output: bool = False,
        max_think_token_n: int = 1000,
        do_sample: bool = False,
        text_temperature: float = 0.3,
        image_shapes: Sequence[int] | None = None,
        *,
        seed: int | None = None,
        initial_noise: Tensor | None = None,
        trace: dict[str, list[Tensor]] | None = None,
        cfg_text_scale: float = 3.0,
        **image_options: Any,
    ) -> list[Any]:
        """One request as the reference answers it: a text (``understanding_output``), or a picture, after a thought with ``think``.

        ``image_options`` are those of :class:`ImageOptions`; ``image_shapes`` is (height, width), the last input picture's
        where there is one. ``seed`` makes it repeatable; ``trace`` collects tokens, latents and pictures as tensors.
        """
        trace = trace if trace is not None else {}
        generator = _generator(seed)
        options = image_option_values(cfg_text_scale=cfg_text_scale, **image_options)
        if not understanding_output:
            self._needs_gen()
        context = Context(self.model.config.llm.num_hidden_layers)
        context.reset(drawing=not understanding_output)
        if think:
            self.add_text([context], [self.think_prompts["understand" if understanding_output else "generate"]])
        for piece in input_lists:
            if isinstance(piece, str):
                self.add_text([context], [piece])
            else:
                self.add_image([context], [piece])
        output: list[Any] = []
        if understanding_output or think:
            pick = self._picker(do_sample, text_temperature, [generator])
            ids = write(self.model, self.tokenizer.special, [context.full.snapshot()], max_think_token_n, pick)[0]
            trace.setdefault("tokens", []).append(torch.tensor(ids))
            output.append(self._text(ids))
        if understanding_output:
            return output
        if think:
            self.add_text([context], [output[0]], only_full=True)
        shape = context.shape or self.canvas_shape(image_shapes)
        noise = self._noise(shape, generator) if initial_noise is None else initial_noise
        tokens, pixels = self._draw([context], [shape], [noise], options)[0]
        picture = to_image(pixels.cpu())
        trace.setdefault("latent", []).append(tokens.cpu())
        trace.setdefault("image", []).append(torch.from_numpy(_array(picture)))
        return [*output, picture]

    def __call__(self, image: Any = None, text: str | None = None, **options: Any) -> dict[str, Any]:
        """``{"image": ..., "text": ...}`` for a picture, a text or both; options of :meth:`interleave_inference`.

        Raises:
            InferenceError: neither is given.
        """
        pieces = [piece for piece in (image, text) if piece is not None]
        if not pieces:
            raise InferenceError("neither an image nor a text is given. Cure: pass image=, text= or both")
        result: dict[str, Any] = {"image": None, "text": None}
        for piece in self.interleave_inference(pieces, **options):
            result["text" if isinstance(piece, str) else "image"] = piece
        return result

    def _picker(self, do_sample: bool, temperature: float, generators: Sequence[torch.Generator]) -> Callable[[Tensor, int], int]:
        if do_sample and not temperature > 0:
            raise InferenceError(f"text_temperature is {temperature}; it must be above 0. Cure: do_sample=False takes the likeliest token")

        def pick(logits: Tensor, i: int) -> int:
            if not do_sample:
                return self.agree(int(logits.argmax()))
            return self.agree(int(torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=generators[i])))

        return pick

    def _text(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids))
        return text.split("<|im_end|>")[0].split("<|im_start|>")[1]

    # ---- answers of any shape --------------------------------------------------------------------------------------

    def unified_generate(self, prompt: Piece | Sequence[Piece], **options: Any) -> list[Any]:
        """Answers one prompt (a text, a picture, or a list of both) with texts and pictures; see :meth:`unified_generate_batch`."""
        pieces = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        return self.unified_generate_batch([pieces], **options)[0]

    @torch.no_grad()
    def unified_generate_batch(
        self,
        prompts: Sequence[Sequence[Piece]],
        *,
        outputs: Sequence[str] | None = None,
        max_pieces: int = 8,
        max_new_tokens: int = 500,
        do_sample: bool = False,
        text_temperature: float = 0.3,
        image_shapes: Sequence[int] | None = None,
        seed: int | None = None,
        **image_options: Any,
    ) -> list[list[Any]]:
        """Answers several prompts at once.

        The model decides by its trained transitions when to write, when to draw and when to stop; what it draws it sees
        before it goes on. ``outputs``, such as ``["text", "image"]``, prescribes the pieces where a checkpoint was never
        trained to decide. Pictures of a prompt enter as the model was trained: through the ViT alone while the answer is
        text, through the VAE too from the moment it draws.

        Args:
            prompts: lists of texts and pictures.
            outputs: the pieces to produce, in order; default: the model's own choice.
            max_pieces: most pieces of one answer.
            max_new_tokens: most tokens of one text.
            do_sample: sample texts with ``text_temperature`` instead of taking the likeliest token.
            text_temperature: temperature of sampled texts.
            image_shapes: (height, width) of drawn pictures; default: the last picture's of the prompt, else the model's largest square.
            seed: makes the answers repeatable; prompt i uses ``seed + i``.
            image_options: fields of :class:`ImageOptions`.
        """
        options = image_option_values(**image_options)
        for kind in outputs or ():
            if kind not in (TEXT, IMAGE):
                raise InferenceError(f"outputs names {kind!r}; a piece is 'text' or 'image'")
        if outputs and IMAGE in outputs:
            self._needs_gen()
        generators = [_generator(None if seed is None else seed + i) for i in range(len(prompts))]
        contexts = [Context(self.model.config.llm.num_hidden_layers) for _ in prompts]
        for context, pieces in zip(contexts, prompts, strict=True):
            if not pieces:
                raise InferenceError("a prompt is empty. Cure: give at least one text or picture")
            context.pieces = list(pieces)
        self._replay(contexts, drawing=bool(outputs and IMAGE in outputs))
        answers: list[list[Any]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        for turn in range(len(outputs) if outputs is not None else max_pieces):
            kinds = {i: outputs[turn] if outputs is not None else self._next_kind(contexts[i], first=turn == 0) for i in active}
            active = [i for i in active if kinds[i] is not None]
            if not active:
                break
            writing, drawing = ([i for i in active if kinds[i] == kind] for kind in (TEXT, IMAGE))
            if writing:
                pick = self._picker(do_sample, text_temperature, [generators[i] for i in writing])
                for i, text in zip(writing, self._write_pieces([contexts[i] for i in writing], max_new_tokens, pick), strict=True):
                    answers[i].append(text)
            if drawing:
                shape = None if image_shapes is None else self.canvas_shape(image_shapes)
                pictures = self._draw_pieces([contexts[i] for i in drawing], shape, [generators[i] for i in drawing], options)
                for i, picture in zip(drawing, pictures, strict=True):
                    answers[i].append(picture)
        return answers

    def _replay(self, contexts: Sequence[Context], drawing: bool) -> None:
        """Builds the caches anew from the pieces so far."""
        for context in contexts:
            context.reset(drawing)
        for turn in range(max((len(c.pieces) for c in contexts), default=0)):
            at = [c for c in contexts if turn < len(c.pieces)]
            texts = [c for c in at if isinstance(c.pieces[turn], str)]
            images = [c for c in at if not isinstance(c.pieces[turn], str)]
            if texts:
                self.add_text(texts, [c.pieces[turn] for c in texts])
            if images:
                self.add_image(images, [c.pieces[turn] for c in images])

    def _next_kind(self, context: Context, first: bool) -> str | None:
        """What the model opens next: a text, an image, or (None) nothing more."""
        special = self.tokenizer.special
        kinds: dict[int, str | None] = {special.text_start: TEXT, special.image_start: IMAGE, special.end: None}
        if first:
            del kinds[special.end]
        if not self.model.config.visual_gen:
            del kinds[special.image_start]
        assert context.last is not None
        logits = self.model.logits(context.last)
        return kinds[self.agree(max(kinds, key=lambda token: float(logits[token])))]

    def _write_pieces(self, contexts: Sequence[Context], max_tokens: int, pick: Callable[[Tensor, int], int]) -> list[str]:
        special = self.tokenizer.special
        before = [c.full.snapshot() for c in contexts]
        written = write(self.model, special, [c.full for c in contexts], max_tokens, pick, stop=(special.text_end, special.end))
        hidden = feed(self.model, [c.full for c in contexts], [special.text_end] * len(contexts))
        texts = [self.tokenizer.decode(ids[1:]) for ids in written]
        for context, past, last, text in zip(contexts, before, hidden, texts, strict=True):
            context.no_text, context.last = past, last
            context.pieces.append(text)
        drawing = [(c, ids) for c, ids in zip(contexts, written, strict=True) if c.drawing]
        if drawing:
            blocks = [Block(Kind.TEXT, len(ids) - 1, ids=ids[1:]) for _, ids in drawing]
            extend(self.model, special, [c.no_image for c, _ in drawing], blocks)
        return texts

    def _draw_pieces(
        self, contexts: Sequence[Context], shape: tuple[int, int] | None, generators: Sequence[torch.Generator], options: ImageOptions
    ) -> list[Any]:
        self._needs_gen()
        self._replay([c for c in contexts if not c.drawing], drawing=True)
        shapes = [shape or c.shape or self.canvas_shape(None) for c in contexts]
        noises = [self._noise(s, g) for s, g in zip(shapes, generators, strict=True)]
        pictures = [to_image(pixels.cpu()) for _, pixels in self._draw(contexts, shapes, noises, options)]
        self.add_image(contexts, pictures)
        for context, picture in zip(contexts, pictures, strict=True):
            context.pieces.append(picture)
        return pictures


def image_option_values(**values: Any) -> ImageOptions:
    """:class:`ImageOptions` from keywords; a YAML or JSON list becomes the interval."""
    values.pop("enable_taylorseer", None)  # the reference's approximate cache; ours are exact
    if "cfg_interval" in values:
        values["cfg_interval"] = tuple(values["cfg_interval"])
    try:
        return ImageOptions(**values)
    except (TypeError, ValueError) as error:
        raise InferenceError(f"{error}. Cure: see the options of InterleaveInferencer.interleave_inference") from error


def _within(transform: ImageTransform, own: ImageTransform) -> ImageTransform:
    """``transform`` kept within the model's position table."""
    return replace(transform, limit=min(transform.limit or own.limit, own.limit))


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _array(picture: Any):
    import numpy as np

    return np.array(picture)
