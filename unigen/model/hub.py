"""Libraries are imported without asking a hub for code.

On CPUs with AVX512-BF16 bitsandbytes, which peft imports where it is installed, fetches compiled kernels
from a hub at its import; without the package ``kernels`` it logs that this failed. Neither serves anything
here.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_KERNELS = "kernels"
_LOGGERS = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.backends.mps.ops")


@contextmanager
def without_hub_kernels() -> Iterator[None]:
    """Inside, the package that fetches compiled code from a hub cannot be imported, and nobody complains."""
    missing = object()
    held = sys.modules.get(_KERNELS, missing)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    sys.modules[_KERNELS] = None  # type: ignore[assignment]  (an import of it fails)
    for logger in loggers:
        logger.addFilter(_tells_something_else)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_tells_something_else)
        if held is missing:
            del sys.modules[_KERNELS]
        else:
            sys.modules[_KERNELS] = held  # type: ignore[assignment]


def _tells_something_else(record: logging.LogRecord) -> bool:
    return _KERNELS not in record.getMessage()
