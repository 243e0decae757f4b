"""``unigen train``."""

from __future__ import annotations

from unigen.config import Config


def train(config: Config) -> int:
    """``unigen train``: 0, or 75 where a signal stopped it.

    Raises:
        ConfigError: an option cannot work; raised before PyTorch is imported.
    """
    config.resolve()
    from unigen.runs.signals import EXIT_STOPPED
    from unigen.training.trainer import UnifiedTrainer

    trainer = UnifiedTrainer(config)
    trainer.train()
    return EXIT_STOPPED if trainer.stopped else 0
