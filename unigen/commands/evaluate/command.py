"""``unigen evaluate``."""

from __future__ import annotations

from unigen.commands.evaluate.options import EvaluateOptions

__all__ = ["EvaluateOptions", "evaluate"]


def evaluate(options: EvaluateOptions) -> int:
    """0; 1 where a library, or what an option gives, could not be used for its metric, or one of ``metrics``
    has no value.

    Raises:
        UserError: an option cannot work, the data, the checkpoint or a tool cannot be read, or the folder
            holds other answers.
    """
    if options.layout is not None:
        from unigen.commands.evaluate.folders import run_folders

        return run_folders(options)
    from unigen.commands.evaluate.work import run

    return run(options)
