"""A conversation as the model continues it: its caches, those guidance compares with, and what enters
them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from unigen.config import DataOptions
from unigen.inference.options import Guidance, InferenceError
from unigen.inference.pictures import blocks_as_trained
from unigen.inference.sampler import extend
from unigen.model.bagel import Bagel
from unigen.model.kv_cache import Cache
from unigen.sequence.plan import Planner, Transforms
from unigen.sequence.tokens import Tokenizer
from unigen.sequence.types import Block, Image, Kind, Sample, Text


class Context:
    """One conversation: the full context, and the two that guidance compares with.

    The no-text context is the one that stood before the last text (or after the last image, if that came
    later); the no-image context has only the texts. As long as those are all there is, it is the full context
    itself.
    """

    def __init__(self, n_layers: int, pieces: Sample | None = None):
        self.n_layers = n_layers
        self.pieces: Sample = pieces or []
        self.thought: int | None = None  # the number of the piece that only the full context holds
        self.reset(drawing=False)

    def reset(self, drawing: bool) -> None:
        """Empties the caches; with ``drawing``, pictures will enter through the VAE too and guidance
        works."""
        self.full, self.no_text = Cache(self.n_layers), Cache(self.n_layers)
        self.no_image = self.full
        self.drawing = drawing
        self.last: Tensor | None = None  # hidden state [D] of the last closing token
        self.shape: tuple[int, int] | None = None  # height, width of the last picture

    def forget(self) -> None:
        """Empties the no-text context; its positions go on from where they are."""
        position, self.no_text = self.no_text.position, Cache(self.n_layers)
        self.no_text.position = position

    def part(self) -> None:
        """From here on the full context holds what the no-image one does not."""
        if self.drawing and self.no_image is self.full:
            self.no_image = self.full.snapshot()


class ContextBuilder:
    """Puts texts and pictures into contexts.

    Args:
        model: reads them.
        tokenizer: of the model.
        transforms: how pictures are resized, as in training.

    ``guidance`` says where thoughts enter, for all contexts that are built from then on.
    """

    guidance = Guidance()

    def __init__(self, model: Bagel, tokenizer: Tokenizer, transforms: Transforms):
        self.model, self.tokenizer, config = model, tokenizer, model.config
        self.planner = Planner(
            tokenizer,
            config.geometry,
            transforms,
            # which tokens may stand in a text is asked where records are read
            DataOptions(
                visual_gen=config.visual_gen, visual_und=config.visual_und, allow_control_tokens=True
            ),
            config.llm.max_position_embeddings,
        )

    def replay(self, contexts: Sequence[Context], drawing: bool) -> None:
        """Builds the caches anew from the pieces so far."""
        for context in contexts:
            context.reset(drawing)
        for turn in range(max((len(c.pieces) for c in contexts), default=0)):
            at = [(c, c.pieces[turn]) for c in contexts if turn < len(c.pieces)]
            for thought in (False, True):
                texts = [(c, p.text) for c, p in at if isinstance(p, Text) and (c.thought == turn) == thought]
                if texts:
                    self.add_text([c for c, _ in texts], [text for _, text in texts], only_full=thought)
            images = [c for c, piece in at if isinstance(piece, Image)]
            if images:
                self.check_sees(drawing)
                self.add_image(images, [self.shown(c, turn) for c in images])

    def add_text(self, contexts: Sequence[Context], texts: Sequence[str], only_full: bool = False) -> None:
        """Appends a text to each context; ``only_full`` says that it is a thought, which those that guidance
        compares with hold as far as ``guidance`` says."""
        blocks = [Block(Kind.TEXT, len(ids), ids=ids) for ids in map(self.tokenizer.encode, texts)]
        for context in contexts:
            if not only_full:
                context.no_text = context.full.snapshot()
                continue
            if not self.guidance.thought:
                context.part()
            if not self.guidance.system:
                context.forget()
        self._extend(contexts, blocks)
        if self.guidance.thought or not only_full:
            self.extend_no_image(contexts, blocks)

    def add_image(self, contexts: Sequence[Context], shown: Sequence[Sequence[Block]]) -> None:
        """Appends a picture to each context; ``shown`` are its blocks: CLEAN where the context draws, then
        VIT."""
        stride = self.model.config.latent_stride
        for context in contexts:
            context.part()
        for kind in (Kind.CLEAN, Kind.VIT):
            pairs = zip(contexts, shown, strict=True)
            if here := [(c, block) for c, blocks in pairs for block in blocks if block.kind == kind]:
                self._extend([c for c, _ in here], [block for _, block in here])
        for context, blocks in zip(contexts, shown, strict=True):
            context.no_text = context.full.snapshot()
            for block in blocks:
                if block.kind == Kind.CLEAN and block.grid is not None:
                    context.shape = (block.grid[0] * stride, block.grid[1] * stride)

    def shown(self, context: Context, number: int) -> list[Block]:
        """The blocks of the context's piece ``number``, a picture, as in training."""
        return blocks_as_trained(self.planner, context.pieces, number, context.drawing)

    def extend_no_image(self, contexts: Sequence[Context], texts: Sequence[Block]) -> None:
        """Appends texts to the no-image contexts that are no longer the full ones."""
        apart = [
            (c.no_image, block) for c, block in zip(contexts, texts, strict=True) if c.no_image is not c.full
        ]
        if apart:
            caches, blocks = zip(*apart)
            extend(self.model, self.tokenizer.special, caches, blocks)

    def check_sees(self, drawing: bool) -> None:
        """Raises InferenceError where the model cannot look at a picture."""
        if not self.model.config.visual_und and not drawing:
            raise InferenceError(
                "this model was loaded with visual_und=False and sees pictures only where it is asked to"
                " draw. Fix: load it with visual_und=True, or ask for a picture"
            )

    def _extend(self, contexts: Sequence[Context], blocks: Sequence[Block]) -> None:
        hidden = extend(self.model, self.tokenizer.special, [context.full for context in contexts], blocks)
        for context, last in zip(contexts, hidden, strict=True):
            context.last = last
