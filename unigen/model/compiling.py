"""Compiling the parts of a layer before and after attention, from outside of the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from unigen.config import UserError
from unigen.model.bagel import Bagel
from unigen.model.compiler import dynamo_settings, is_compile_failure, reason_of

log = logging.getLogger("unigen")


class CompileError(UserError):
    """Compiling was asked for and does not work here; the message says why and the fix."""


class CompiledLayers:
    """The decoder layers of a model whose two parts are compiled while they train.

    Compiled parts take halves of any length and are shared by all layers. Outside of training (``eval()``)
    and for less than two tokens the parts run as they are: few tokens come in too many kinds.

    Args:
        strict: a failure to compile is an error; otherwise the layers go on as they are, which is said once.
    """

    def __init__(self, model: Bagel, strict: bool = False):
        self.strict = strict
        self.on = True
        dynamo_settings()
        for layer in model.language_model.model.layers:
            for name in ("before", "after"):
                setattr(layer, name, self._part(layer, getattr(layer, name)))

    def _part(self, layer: torch.nn.Module, part: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(part, dynamic=True, fullgraph=True)

        def run(x: torch.Tensor, *rest: Any) -> Any:
            if not self.on or not layer.training or len(x) < 2:
                return part(x, *rest)
            try:
                return compiled(x, *rest)
            except Exception as error:
                if not is_compile_failure(error):
                    raise
                self._give_up(error)
                return part(x, *rest)

        return run

    def _give_up(self, error: Exception) -> None:
        if self.strict:
            raise CompileError(
                f"the layers cannot be compiled here ({reason_of(error)}). Fix: --compile off, or install a"
                " C++ compiler (on a GPU Triton and Python's headers, too)"
            ) from error
        self.on = False
        log.warning("The layers are not compiled, which is slower (%s)", reason_of(error))
