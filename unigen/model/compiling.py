"""PyTorch's compiler: its settings, which errors are its own, and the parts of a layer before and after
attention, compiled from outside of the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from unigen.config import UserError
from unigen.printing import first_line

log = logging.getLogger("unigen")


def dynamo_settings() -> None:
    """At its limit of versions Dynamo would go on uncompiled, and flex attention then fills the memory:
    better an error."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)


def is_compile_failure(error: BaseException) -> bool:
    """Did compiling itself fail (no compiler, no Triton, an operation it does not know)? Not: too many
    versions, no memory."""
    if type(error).__name__ in ("FailOnRecompileLimitHit", "OutOfMemoryError"):
        return False
    ours = type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton"))
    return ours or isinstance(error, ImportError | FileNotFoundError)


def reason_of(error: BaseException) -> str:
    """An error in one line; of what a compiler reports, the cause."""
    error = getattr(error, "inner_exception", None) or error
    return f"{type(error).__name__}: {first_line(error)}"


class CompileError(UserError):
    """Compiling was asked for and does not work here; the message says why and the fix."""


class CompiledLayers:
    """The decoder layers of a model whose two parts are compiled while they train.

    Compiled parts take halves of any length and are shared by all layers. Outside of training (``eval()``)
    and for less than two tokens the parts run as they are: few tokens come in too many kinds. A failure to
    compile is an error where ``strict``; otherwise the layers go on as they are, which is said once.
    """

    def __init__(self, model: Any, strict: bool = False):
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
