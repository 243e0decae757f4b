"""Sampling with a sharded model: no process may leave a forward that the others need it for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from unigen.config import UserError
from unigen.model.bagel import Bagel
from unigen.runs.signals import Stopped
from unigen.training.engine import Engine

log = logging.getLogger("unigen")


class Elsewhere(Exception):
    """Another process cannot go on with this prompt."""


class _Unwind(Exception):
    """This process cannot go on with this prompt; what happened is noted, and the others are still to be
    told."""


def expected(error: BaseException) -> bool:
    """Does an error speak for itself, without the lines of code it came from?"""
    return isinstance(error, UserError | torch.OutOfMemoryError | MemoryError | OSError | _Unwind)


class SynchronisedGeneration:
    """Processes that hold a sharded model between them: every layer gathers its parameters from all, so none
    may leave alone.

    They meet before every stack of layers, at every choice of a token and at the end of a prompt, and tell
    each other whether they can go on; rank 0's number is everyone's. A process that fails inside a stack goes
    through the rest of it without computing, and so stays in step. A failure of gathering itself cannot be
    told to anyone: it ends the process, and the launcher the others.
    """

    def __init__(self, engine: Engine, model: Bagel, idle: Callable[[], None]):
        self.engine, self.idle = engine, idle
        self.stacks: list[nn.ModuleList] = [model.language_model.model.layers]
        if model.config.visual_und:
            self.stacks.append(model.vit_model.vision_model.encoder.layers)
        self.failure: BaseException | None = None  # what happened here
        self.stop = False  # did a process want to end the samples altogether?
        self.inside = False  # between the first and the last gathering of a stack

    def meet(self, number: int = 0) -> int:
        """Rank 0's ``number``; raises Elsewhere on all where one has failed."""
        if self.failure is None:
            try:
                self.idle()
            except BaseException as error:
                self.failure = error
        failed = self.failure is not None
        ended = failed and not isinstance(self.failure, Exception)
        failures, ends, first = self.engine.sum([failed, ended, number if self.engine.main else 0])
        self.stop = ends > 0
        if failures:
            raise Elsewhere("another process could not answer; see its warning")
        return int(first)

    def attempt(self, work: Callable[[], None]) -> Exception | None:
        """Runs ``work`` on all processes; why it failed, here or elsewhere, or None. Raises what is no
        Exception on all of them."""
        self.failure = elsewhere = None
        try:
            self.meet()
            work()
            self.meet()
        except Elsewhere as error:
            elsewhere = error
        except BaseException as error:
            if self.inside:
                raise
            self._note(error)
        if self.failure is not None and elsewhere is None:
            with suppress(Elsewhere):
                self.meet()
        failure, self.failure = self.failure, None
        if self.stop:
            raise failure if failure is not None and not isinstance(failure, Exception) else Stopped()
        assert failure is None or isinstance(failure, Exception)
        return failure or elsewhere

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The meetings take place inside the ``with``."""
        self.inside = False
        handles, guarded = [], []
        try:
            for layers in self.stacks:
                handles.append(layers[0].register_forward_pre_hook(lambda *_: self._enter(), prepend=True))
                handles.append(layers[-1].register_forward_hook(lambda *_: self._leave()))
                for layer in layers:
                    if hasattr(layer, "unshard"):  # it is gathered as a whole, before its forward
                        guarded.append((layer, vars(layer).get("forward")))  # of recomputation
                        layer.forward = self._guard(layer.forward)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer, own in guarded:
                del layer.forward
                if own is not None:
                    layer.forward = own

    def _enter(self) -> None:
        self.meet()
        self.inside = True

    def _leave(self) -> None:
        self.inside = False
        if self.failure is not None:
            raise _Unwind

    def _guard(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(x: Any, *rest: Any) -> Any:
            if self.failure is None:
                try:
                    return forward(x, *rest)
                except BaseException as error:
                    self._note(error)
            return x

        return guarded

    def _note(self, error: BaseException) -> None:
        """Remembers an error without its frames, which hold the memory that the others' work may need."""
        if isinstance(error, _Unwind):
            return
        if isinstance(error, Exception) and not expected(error):
            log.warning("While sampling on rank %d:", self.engine.rank, exc_info=error)
        self.failure = error.with_traceback(None)
