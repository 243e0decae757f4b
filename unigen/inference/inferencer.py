"""``InterleaveInferencer``: understand, draw, edit, think as the reference does, and answer in text and
pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from unigen.config import SamplingOptions
from unigen.inference.context import Context, ContextBuilder
from unigen.inference.options import InferenceError, ReferenceSettings, Renamed, Settings, sampling_options
from unigen.inference.pictures import blocks_as_reference, trained_transform, within
from unigen.inference.pieces import Pieces
from unigen.inference.requests import IMAGE, TEXT, Piece, Requests, picture_of
from unigen.inference.sampler import write_texts
from unigen.model.adapters import AdapterError
from unigen.model.backends import pick_device, prefer_flash
from unigen.model.bagel import Bagel
from unigen.model.lora import activate
from unigen.model.weights import load_bagel
from unigen.sequence.images import to_image
from unigen.sequence.plan import Transforms
from unigen.sequence.tokens import Tokenizer
from unigen.sequence.transform import ImageTransform
from unigen.sequence.types import Block, Sample, Text
from unigen.values import shown

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
        if not isinstance(model, torch.nn.Module):
            raise InferenceError(
                f"model is {shown(model)}. Fix: load_bagel(FOLDER), or"
                " InterleaveInferencer.from_pretrained(FOLDER)"
            )
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
        folder = model.trained_in or model.source
        vae = self.vae_transform if vae_transform else trained_transform(config, folder)
        vit_edit = within(vit_edit_transform or own.vit_edit, own.vit_edit)
        transforms = Transforms(vae, self.vit_transform, vit_edit)
        self.builder = ContextBuilder(model, self.tokenizer, transforms)
        self.think_prompts = dict(think_prompts or THINK_PROMPTS)
        self.requests = Requests(config, self.builder.planner, self.think_prompts)
        self.pieces = Pieces(self.model, self.tokenizer, self.builder, self.requests)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        adapters: str | Path | Sequence[str | Path] = (),
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
            "think": think, "do_sample": do_sample, "cfg_text_scale": cfg_text_scale, "seed": seed,
            "cfg_img_scale": cfg_img_scale, "cfg_interval": cfg_interval, "timestep_shift": timestep_shift,
            "num_timesteps": num_timesteps, "cfg_renorm_min": cfg_renorm_min,
            "cfg_renorm_type": cfg_renorm_type, "enable_taylorseer": enable_taylorseer, **settings,
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
        context, builder = self._context([]), self.builder
        context.reset(drawing=not understanding_output)
        parts = self._reference_parts(input_lists, options, context.drawing)
        height, width = (None, None) if understanding_output else (options.height, options.width)
        shape = None if height else self.requests.last_shape(parts)
        shape = shape or self.requests.canvas_shape(height, width)
        self.requests.check_parts(parts, shape, initial_noise, understanding_output, options)
        for part in parts:
            if isinstance(part, str):
                builder.add_text([context], [part])
            else:
                builder.add_image([context], [part])
        output: list[Any] = []
        if understanding_output or think:
            pick = self.pieces.picker(options, [generator])
            past = [context.full.snapshot()]
            ids = write_texts(self.model, self.tokenizer.special, past, options.max_new_tokens, pick)[0]
            trace.setdefault("tokens", []).append(torch.tensor(ids))
            output.append(self.pieces.text_of(ids))
        if understanding_output:
            return output
        if think:
            builder.add_text([context], [output[0]], only_full=True)
        noise = self.pieces.noise(shape, generator) if initial_noise is None else initial_noise
        tokens, pixels = self.pieces.draw_in([context], [shape], [noise], options)[0]
        picture = to_image(pixels.cpu())
        trace.setdefault("latent", []).append(tokens.cpu())
        trace.setdefault("image", []).append(torch.from_numpy(np.array(picture)))
        return [*output, picture]

    def _reference_parts(
        self, pieces: Sequence[Piece], options: SamplingOptions, drawing: bool
    ) -> list[str | list[Block]]:
        """The texts of a request as they are, its pictures as blocks; the system prompt of thinking first."""
        parts: list[str | list[Block]] = []
        if options.think:
            parts.append(self.think_prompts["generate" if drawing else "understand"])
        for piece in self.requests.sample(pieces, options):
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

    def __call__(
        self, image: Any = None, text: str | None = None, **options: Unpack[ReferenceSettings]
    ) -> dict[str, Any]:
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
        return self.unified_generate_batch(
            [prompt], outputs=outputs, max_pieces=max_pieces, options=options, **settings
        )[0]

    @torch.no_grad()
    def unified_generate_batch(
        self,
        prompts: Sequence[Piece | Sequence[Piece]],
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
            prompts: each a list of texts and pictures, or one of them.
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
            pick = self.pieces.picker(o, [generators[i] for i in chosen])
            texts = by([contexts[i] for i in chosen], o.max_new_tokens, pick, *rest)
            for i, text in zip(chosen, texts, strict=True):
                answers[i].append(text)

        turns = max_pieces if outputs is None else len(outputs)
        active, kinds = list(range(len(prompts))), dict[int, str | None]()
        for turn in range(turns):
            if turn == 0:
                kinds = dict(enumerate(self.pieces.begin(contexts, outputs, o, shape)))
            elif outputs is None:
                kinds = {i: self.pieces.next_fitting(contexts[i], o, shape) for i in active}
            else:
                kinds = dict.fromkeys(active, outputs[turn])
            active, last = [i for i in active if kinds[i] is not None], turn == turns - 1
            writing, drawing = ([i for i in active if kinds[i] == kind] for kind in (TEXT, IMAGE))
            if writing:
                write_in(writing, self.pieces.write_pieces, last)
            if drawing and o.think and turn == 0:
                write_in(drawing, self.pieces.think)
            if drawing:
                noises = [generators[i] for i in drawing]
                pictures = self.pieces.draw_pieces([contexts[i] for i in drawing], shape, noises, o, last)
                for i, picture in zip(drawing, pictures, strict=True):
                    answers[i].append(picture)
        return answers

    def _context(self, sample: Sample) -> Context:
        return Context(self.model.config.llm.num_hidden_layers, sample)


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    return generator.manual_seed(generator.seed() if seed is None else seed)
