"""What can be said of PyTorch's compiler: its settings, and which errors are its own."""

from __future__ import annotations

import torch


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
    home = type(error).__module__
    return home.startswith(("torch._dynamo", "torch._inductor", "triton")) or isinstance(
        error, ImportError | FileNotFoundError
    )


def reason_of(error: BaseException) -> str:
    """An error in one line; of what a compiler reports, the cause."""
    error = getattr(error, "inner_exception", None) or error
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
