"""What the JSON files of a checkpoint may say. No PyTorch here."""

from __future__ import annotations

from pathlib import Path

from unigen.runs.layout import OPTIONS, TRAINER
from unigen.schema import Flag, Items, Maybe, Number, Rule, String, Table, whole

GROUPS = ("ema", "adapter_model", "model", "optimizer")
_STEP, _COUNT, _INDEX = whole(0, 10**15), whole(0, 1 << 40), whole(0, 1 << 50)


def outside(name: str) -> str:
    """What is wrong with a file's name in a manifest; "" where it lies in the checkpoint."""
    parts = Path(name).parts
    fine = parts and not Path(name).is_absolute() and ".." not in parts and "\0" not in name
    return "" if fine else f"names {name!r}, outside of the checkpoint"


_FILE = Table({"size": whole(0, 1 << 60), "sha256": String()})
MANIFEST = Table(
    {
        "step": _STEP,
        "time": Number(0, 1e11),
        "world": whole(1, 1 << 20),
        "groups": Items(String(), 0, 100),
        "states": Items(String(), 0, 100),
        "files": Table(rest=_FILE),
    },
    {"engine": Maybe(String()), "average": Flag()},
)

_GUARDS = Table(
    {},
    {
        "skipped_in_a_row": _COUNT,
        "grad_norms": Items(Number(0, 1e300)),
        "stale_validations": _COUNT,
        "recent": Items(whole(0, 1)),
    },
)
_EVALUATION = Table(
    {}, {"metric": String(), "greater_is_better": Flag(), "batches": _COUNT, "data": String()}
)
_SCALE = Table({"scale": Number(1e-300, 1e300), "good": _COUNT})

STATES: dict[str, Rule] = {
    TRAINER: Table(
        {
            "step": _STEP,
            "epoch": whole(0, 1 << 31),
            "position": _INDEX,
            "waiting": Items(_INDEX),
            "best": Maybe(Number(-1e300, 1e300)),
            "pending": Items(String(("validating", "sampling"))),
            "fingerprint": String(),
            "step_rows": whole(1, 1 << 24),
            "guards": _GUARDS,
            "scale": _SCALE,
        },
        {"total_steps": whole(1, 10**15), "evaluation": _EVALUATION, "preserved": String(), "base": String()},
    ),
    OPTIONS: Table(
        {"gradient_accumulation_steps": whole(1, 1 << 24)},
        {
            "precision": Maybe(String(("auto", "bf16", "fp16", "fp32"))),
            "bf16": Maybe(Flag()),
            "fp16": Maybe(Flag()),
            "compile": Maybe(String(("auto", "on", "off"))),
            "max_image_tokens": whole(1, 1 << 20),
            "train_sources": Maybe(Items(Table())),
        },
    ),
}
"""State -> what a resume needs of it."""
