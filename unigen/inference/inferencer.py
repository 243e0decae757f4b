"""``InterleaveInferencer``: understand, draw, edit, think as the reference does, and answer in text and
pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unigen.config import SamplingOptions
from unigen.inference.context import Context, ContextBuilder
from unigen.inference.options import InferenceError, Renamed, Settings, sampling_options
from unigen.inference.pictures import blocks_as_reference, trained_transform, within
from unigen.inference.requests import IMAGE, TEXT, Piece, Requests, picture_of, sample_of
from unigen.inference.sampler import Canvas, decode_pixels, draw, feed, write
from unigen.model.adapters import AdapterError
from unigen.model.backends import pick_device, prefer_flash
from unigen.model.bagel import Bagel
from unigen.model.lora import activate
from unigen.model.weights import load_bagel
from unigen.sequence.images import ImageTransform, to_image
from unigen.sequence.plan import Transforms
from unigen.sequence.tokens import Tokenizer
from unigen.sequence.types import Block, Image, Kind, Sample, Text

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The system prompts of thinking mode, with which the released checkpoints were trained (exact, blanks
# included).
THINK_PROMPTS = {
    "understand": (
        "You should first think about the reasoning process in the mind and then provide the user with the"
        " answer. \nThe reasoning process is enclosed within <think> </think> tags, i.e. <think> reasoning"
        " process here </think> answer here"
    ),
    "generate": (
        "You should first think about the planning process in the mind and then generate the image. \nThe"
        " planning process is enclosed within <think> </think> tags, i.e. <think> planning process here"
        " </think> image here"
    ),
}
_DEFAULT = SamplingOptions()


class InterleaveInferencer:
    """Answers with text and pictures.

    Args:
        model: from ``load_bagel``.
        vae_model: a codec; default the model's own.
        tokenizer: a :class:`Tokenizer`, or a transformers tokenizer; default that of the folder the model
            came from.
        vae_transform: how pictures are resized for the VAE, and the size an edit keeps; default: as the run
            that wrote the model's folder resized them, otherwise by the model's own constants.
        vit_transform: how they are resized for the ViT where the model looks at them to answer; default the
            model's.
        new_token_ids: accepted for the reference's signature; the tokenizer knows its ids.
        think_prompts: system prompts of thinking mode, ``{"understand": ..., "generate": ...}``.
        vit_edit_transform: how they are resized for the ViT where the model draws; default the model's.

    :meth:`unified_generate` shows pictures as training does. :meth:`interleave_inference` shows them as the
    reference
    does: resized by ``vae_transform`` (default: the model's constants), then for the ViT always by
    ``vit_transform``.
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
        *,
        vit_edit_transform: ImageTransform | None = None,
    ):
        prefer_flash()
        self.model = model.eval()
        if vae_model is not None:
            object.__setattr__(model, "codec", vae_model)
        if tokenizer is None:
            if model.source is None:
                raise InferenceError(
                    "tokenizer is missing and the model was not loaded from a folder. Fix: pass tokenizer="
                )
            tokenizer = Tokenizer.load(model.source)
        self.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer(tokenizer)
        config, own = model.config, model.config.transforms()
        self.vae_transform = within(vae_transform or own.vae, own.vae)
        self.vit_transform = within(vit_transform or own.vit, own.vit)
        transforms = Transforms(
            vae=self.vae_transform
            if vae_transform
            else trained_transform(config, model.trained_in or model.source),
            vit=self.vit_transform,
            vit_edit=within(vit_edit_transform or own.vit_edit, own.vit_edit),
        )
        self.builder = ContextBuilder(model, self.tokenizer, transforms)
        self.think_prompts = dict(think_prompts or THINK_PROMPTS)
        self.requests = Requests(config, self.builder.planner, self.think_prompts)
        # Where processes share one model every token that was chosen goes through here: they must take the
        # same one.
        self.agree: Callable[[int], int] = lambda token: token

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        adapters: Sequence[str | Path] = (),
        quantize: str | None = None,
        double_quant: bool = False,
    ) -> InterleaveInferencer:
        """Loads a checkpoint folder, or an adapter's over its base; bfloat16 on a GPU, float32 on a CPU
        unless ``dtype`` says otherwise. ``adapters`` are added up: ``FOLDER`` or ``FOLDER:FACTOR``;
        ``quantize`` and ``double_quant`` as :func:`load_bagel`."""
        place = pick_device(device)
        dtype = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
        bits = {"quantize": quantize, "double_quant": double_quant}
        return cls(load_bagel(folder, place, dtype, adapters=adapters, **bits))

    def use_adapters(self, *factors: float) -> None:
        """How much of each loaded adapter takes part from now on, in the order in which they were loaded; 0
        for nothing of it. What adapters trained whole stays as it was loaded.

        Raises:
            AdapterError: another number of adapters was loaded.
        """
        names = list(self.model.adapters)
        if len(factors) != len(names):
            raise AdapterError(f"{len(factors)} factors for {len(names)} adapters. Fix: give one for each")
        activate(self.model, dict(zip(names, factors, strict=True)))

    # ---- drawing

    def _draw(
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

    def _noise(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        stride = self.model.config.latent_stride
        return torch.randn(
            (shape[0] // stride) * (shape[1] // stride), self.model.config.patch_dim, generator=generator
        )

    # ---- as the reference

    def interleave_inference(
        self,
        input_lists: Sequence[Piece],
        think: bool = _DEFAULT.think,
        understanding_output: bool = False,
        max_think_token_n: int = _DEFAULT.max_new_tokens,
        do_sample: bool = _DEFAULT.do_sample,
        text_temperature: float = _DEFAULT.temperature,
        cfg_text_scale: float = _DEFAULT.cfg_text_scale,
        cfg_img_scale: float = _DEFAULT.cfg_img_scale,
        cfg_interval: Sequence[float] = _DEFAULT.cfg_interval,
        timestep_shift: float = _DEFAULT.timestep_shift,
        num_timesteps: int = _DEFAULT.num_timesteps,
        cfg_renorm_min: float = _DEFAULT.cfg_renorm_min,
        cfg_renorm_type: str = _DEFAULT.cfg_renorm_type,
        image_shapes: Sequence[int] | None = None,
        enable_taylorseer: bool = False,
        *,
        seed: int | None = None,
        initial_noise: Tensor | None = None,
        trace: dict[str, list[Tensor]] | None = None,
        **settings: Unpack[Renamed],
    ) -> list[Any]:
        """One request as the reference answers it: a text (``understanding_output``), or a picture, after a
        thought with ``think``.

        The parameters are the reference's; ``settings`` may name those of :class:`SamplingOptions` that are
        called otherwise here (``max_new_tokens``, ``temperature``, ``height`` and ``width``).
        ``image_shapes`` is (height, width); default the last input picture's, which the reference takes even
        where a shape is given. ``seed`` makes it repeatable; ``trace`` collects tokens, latents and
        pictures as tensors.

        Raises:
            InferenceError: a setting is unknown or cannot work, this model cannot do what is asked, or the
                request is longer than its context.
            PictureError: a picture cannot be read.
        """
        asked: dict[str, Any] = {
            "think": think, "do_sample": do_sample, "cfg_text_scale": cfg_text_scale,
            "cfg_img_scale": cfg_img_scale,
            "cfg_interval": cfg_interval, "timestep_shift": timestep_shift, "num_timesteps": num_timesteps,
            "cfg_renorm_min": cfg_renorm_min, "cfg_renorm_type": cfg_renorm_type, "seed": seed,
            "enable_taylorseer": enable_taylorseer, **settings,
        }  # fmt: skip
        for old, value, default in (
            ("max_think_token_n", max_think_token_n, _DEFAULT.max_new_tokens),
            ("text_temperature", text_temperature, _DEFAULT.temperature),
            ("image_shapes", image_shapes, None),
        ):
            if value != default:
                asked[old] = value
        options, trace = sampling_options(**asked), {} if trace is None else trace
        think, generator = options.think, _generator(options.seed)
        if not understanding_output:
            self.requests.needs_gen()
        self.requests.tell_idle(options, understanding_output or think, not understanding_output)
        context, builder = Context(self.model.config.llm.num_hidden_layers), self.builder
        context.reset(drawing=not understanding_output)
        parts = self._reference_parts(input_lists, think, context.drawing)
        shape = self.requests.last_shape(parts) if options.height is None or understanding_output else None
        shape = shape or self.requests.canvas_shape(None if understanding_output else _shape(options))
        self.requests.check_parts(parts, shape, initial_noise, understanding_output, options)
        for part in parts:
            if isinstance(part, str):
                builder.add_text([context], [part])
            else:
                builder.add_image([context], [part])
        output: list[Any] = []
        if understanding_output or think:
            pick = self._picker(options, [generator])
            past = [context.full.snapshot()]
            ids = write(self.model, self.tokenizer.special, past, options.max_new_tokens, pick)[0]
            trace.setdefault("tokens", []).append(torch.tensor(ids))
            output.append(self._text(ids))
        if understanding_output:
            return output
        if think:
            builder.add_text([context], [output[0]], only_full=True)
        noise = self._noise(shape, generator) if initial_noise is None else initial_noise
        tokens, pixels = self._draw([context], [shape], [noise], options)[0]
        picture = to_image(pixels.cpu())
        trace.setdefault("latent", []).append(tokens.cpu())
        trace.setdefault("image", []).append(torch.from_numpy(_array(picture)))
        return [*output, picture]

    def _reference_parts(
        self, pieces: Sequence[Piece], think: bool, drawing: bool
    ) -> list[str | list[Block]]:
        """The texts of a request as they are, its pictures as blocks; the system prompt of thinking first."""
        parts: list[str | list[Block]] = []
        if think:
            parts.append(self.think_prompts["generate" if drawing else "understand"])
        for piece in sample_of(pieces):
            if isinstance(piece, Text):
                parts.append(piece.text)
                continue
            self.builder.check_sees(drawing)
            parts.append(
                blocks_as_reference(
                    self.model.config, self.vae_transform, self.vit_transform, piece.source, drawing
                )
            )
        return parts

    def __call__(self, image: Any = None, text: str | None = None, **options: Any) -> dict[str, Any]:
        """``{"image": ..., "text": ...}`` for a picture (a path, a PIL image, bytes, or a list of them), a
        text or both; options of :meth:`interleave_inference`.

        Raises:
            InferenceError: neither is given, or one is neither a picture nor a text.
            PictureError: a picture cannot be read.
        """
        if not isinstance(text, str | None):
            raise InferenceError(f"text is {type(text).__name__}. Fix: give a text (str)")
        images = image if isinstance(image, list | tuple) else [] if image is None else [image]
        pieces = [*map(picture_of, images), *([] if text is None else [text])]
        if not pieces:
            raise InferenceError("neither an image nor a text is given. Fix: pass image=, text= or both")
        result: dict[str, Any] = {"image": None, "text": None}
        for piece in self.interleave_inference(pieces, **options):
            result["text" if isinstance(piece, str) else "image"] = piece
        return result

    def _picker(
        self, options: SamplingOptions, generators: Sequence[torch.Generator]
    ) -> Callable[[Tensor, int], int]:
        def pick(logits: Tensor, i: int) -> int:
            if not options.do_sample:
                return self.agree(int(logits.argmax()))
            return self.agree(
                int(
                    torch.multinomial(
                        (logits / options.temperature).softmax(-1).cpu(), 1, generator=generators[i]
                    )
                )
            )

        return pick

    def _text(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids))
        return text.split("<|im_end|>")[0].split("<|im_start|>")[1]

    # ---- answers of any shape

    def unified_generate(
        self,
        prompt: Piece | Sequence[Piece],
        *,
        outputs: Sequence[str] | None = None,
        max_pieces: int = 8,
        options: SamplingOptions | None = None,
        **settings: Unpack[Settings],
    ) -> list[Any]:
        """Answers one prompt (a text, a picture, or a list of both) with texts and pictures; see
        :meth:`unified_generate_batch`."""
        pieces = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        return self.unified_generate_batch(
            [pieces], outputs=outputs, max_pieces=max_pieces, options=options, **settings
        )[0]

    @torch.no_grad()
    def unified_generate_batch(
        self,
        prompts: Sequence[Sequence[Piece]],
        *,
        outputs: Sequence[str] | None = None,
        max_pieces: int = 8,
        options: SamplingOptions | None = None,
        **settings: Unpack[Settings],
    ) -> list[list[Any]]:
        """Answers several prompts at once.

        The model decides by its trained transitions when to write, when to draw and when to stop; what it
        draws it sees before it goes on. ``outputs``, such as ``["text", "image"]``, prescribes the pieces
        where a checkpoint was never trained to decide. Pictures of a prompt enter as the model was trained:
        through the ViT alone while the answer is text, through the VAE too from the moment it draws, in the
        sizes of training.

        Args:
            prompts: lists of texts and pictures.
            outputs: the pieces to produce, in order; default: the model's own choice.
            max_pieces: most pieces of one answer.
            options: how to write and draw; default :class:`SamplingOptions`. Prompt i uses ``seed + i``.
            settings: fields of :class:`SamplingOptions` that differ from ``options``. With ``think`` the
                first piece is thought about: a thought precedes a picture as a text of its own, a text holds
                it.

        Raises:
            InferenceError: a setting is unknown or cannot work, this model cannot do what is asked, or a
                prompt and its answer are longer than its context.
            PictureError: a picture cannot be read.
        """
        o = sampling_options(options, **settings)
        samples, shape = self.requests.prepare(prompts, outputs, o)
        contexts = [self._context(sample) for sample in samples]
        if not isinstance(max_pieces, int) or isinstance(max_pieces, bool) or max_pieces < 1:
            raise InferenceError(f"max_pieces is {max_pieces!r}. Fix: a whole number of at least 1")
        generators = [_generator(None if o.seed is None else o.seed + i) for i in range(len(prompts))]
        answers: list[list[Any]] = [[] for _ in prompts]

        def write_in(chosen: list[int], by: Callable[..., list[str]], *rest: bool) -> None:
            pick = self._picker(o, [generators[i] for i in chosen])
            for i, text in zip(
                chosen, by([contexts[i] for i in chosen], o.max_new_tokens, pick, *rest), strict=True
            ):
                answers[i].append(text)

        turns, active, kinds = (
            len(outputs) if outputs is not None else max_pieces,
            list(range(len(prompts))),
            {},
        )
        for turn in range(turns):
            if turn == 0:
                kinds = dict(enumerate(self._begin(contexts, outputs, o, shape)))
            else:
                kinds = {
                    i: outputs[turn] if outputs is not None else self._next_fitting(contexts[i], o, shape)
                    for i in active
                }
            active, last = [i for i in active if kinds[i] is not None], turn == turns - 1
            writing, drawing = ([i for i in active if kinds[i] == kind] for kind in (TEXT, IMAGE))
            if writing:
                write_in(writing, self._write_pieces, last)
            if drawing and o.think and turn == 0:
                write_in(drawing, self._think)
            if drawing:
                noises = [generators[i] for i in drawing]
                pictures = self._draw_pieces([contexts[i] for i in drawing], shape, noises, o, last)
                for i, picture in zip(drawing, pictures, strict=True):
                    answers[i].append(picture)
        return answers

    def _context(self, sample: Sample) -> Context:
        context = Context(self.model.config.llm.num_hidden_layers)
        context.pieces = sample
        return context

    def _begin(
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
            kinds = [self._next_kind(context, first=True) for context in contexts]
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

    def _next_kind(self, context: Context, first: bool) -> str | None:
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

    def _next_fitting(
        self, context: Context, options: SamplingOptions, shape: tuple[int, int] | None
    ) -> str | None:
        """As :meth:`_next_kind` after the first piece; an answer ends, with a warning, where the context is
        full."""
        kind = self._next_kind(context, first=False)
        if kind is None:
            return None
        words = self.requests.room.refusal(context.pieces, [kind], options, shape, draws=context.drawing)
        if words:
            self.requests.tell(f"an answer ends early: with what was answered so far {words}")
        return None if words else kind

    def _think(
        self, contexts: Sequence[Context], max_tokens: int, pick: Callable[[Tensor, int], int]
    ) -> list[str]:
        """Writes a thought in each context, which then holds it in the full context alone."""
        special = self.tokenizer.special
        written = write(
            self.model,
            special,
            [c.full.snapshot() for c in contexts],
            max_tokens,
            pick,
            (special.text_end, special.end),
        )
        texts = [self.tokenizer.decode(ids[1:]) for ids in written]
        for context, text in zip(contexts, texts, strict=True):
            context.thought = len(context.pieces)
            context.pieces.append(Text(text, target=True))
        self.builder.add_text(contexts, texts, only_full=True)
        return texts

    def _write_pieces(
        self,
        contexts: Sequence[Context],
        max_tokens: int,
        pick: Callable[[Tensor, int], int],
        last: bool = False,
    ) -> list[str]:
        """Writes a text in each context; nothing follows the ``last`` one."""
        special = self.tokenizer.special
        before = [c.full.snapshot() for c in contexts]
        written = write(
            self.model,
            special,
            [c.full for c in contexts],
            max_tokens,
            pick,
            stop=(special.text_end, special.end),
        )
        texts = [self.tokenizer.decode(ids[1:]) for ids in written]
        if last:
            return texts
        hidden = feed(self.model, [c.full for c in contexts], [special.text_end] * len(contexts))
        for context, past, state, text in zip(contexts, before, hidden, texts, strict=True):
            context.no_text, context.last = past, state
            context.pieces.append(Text(text, target=True))
        self.builder.extend_no_image(
            contexts, [Block(Kind.TEXT, len(ids) - 1, ids=ids[1:]) for ids in written]
        )
        return texts

    def _draw_pieces(
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
        noises = [self._noise(s, g) for s, g in zip(shapes, generators, strict=True)]
        pictures = [to_image(pixels.cpu()) for _, pixels in self._draw(contexts, shapes, noises, options)]
        if last:
            return pictures
        for context, picture in zip(contexts, pictures, strict=True):
            context.pieces.append(Image(picture, target=True))
        self.builder.add_image(contexts, [self.builder.shown(c, len(c.pieces) - 1) for c in contexts])
        return pictures


def _shape(options: SamplingOptions) -> tuple[int, int] | None:
    return None if options.height is None or options.width is None else (options.height, options.width)


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
