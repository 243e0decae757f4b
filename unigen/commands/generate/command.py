"""``unigen generate``."""

from __future__ import annotations

from unigen.commands.generate.options import GenerateOptions
from unigen.config import ConfigError


def generate(options: GenerateOptions) -> None:
    """``unigen generate``: one prompt, or those of a file.

    Raises:
        UserError: an option cannot work, or what it names cannot be read or written.
    """
    o = options
    if o.prompts_file is None:
        for name in ("layout", "image_root", "samples", "num_images", "shard"):
            if getattr(o, name) is not None:
                raise ConfigError(f"{name} is given without prompts_file. Fix: --prompts_file FILE")
        if o.batch_size != 1:
            raise ConfigError("batch_size is given without prompts_file. Fix: --prompts_file FILE")
        from unigen.commands.generate.one import write_one

        return write_one(o)
    for name, idle in (("prompt", o.prompt), ("image", o.image), ("mode", o.mode != "auto")):
        if idle:
            raise ConfigError(f"{name} is given beside prompts_file. Fix: leave one of them out")
    from unigen.commands.generate.many import write_many

    return write_many(o)
