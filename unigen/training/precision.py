"""The precision a run computes in: decided once, from the options and from what the device can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from unigen.config import Config, ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Bytes of shared memory that a block of flex attention takes in float32 with heads of width 65 to 128,
# forward. (Compiled with PyTorch 2.11 and 2.13 for compute capability 8.9; with TF32 134,656. Heads of width
# 64 take 83,968, which every card that has bf16 has.)
FLOAT32_BLOCK = 149_504


@dataclass(frozen=True)
class DeviceFacts:
    """What the choice of a precision needs to know of a device."""

    kind: str  # "cpu", "cuda"
    name: str = ""
    has_bf16: bool = False  # in hardware
    shared_memory: int | None = None  # bytes that a block of a kernel may take; None where nobody says

    @classmethod
    def of(cls, device: torch.device) -> DeviceFacts:
        if device.type != "cuda":
            return cls(device.type)
        with torch.cuda.device(device):
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        properties = torch.cuda.get_device_properties(device)
        room = getattr(properties, "shared_memory_per_block_optin", None)
        return cls("cuda", properties.name, has_bf16, room)


@dataclass(frozen=True)
class Precision:
    """What matrix products are computed in, and why in that."""

    name: str  # of DTYPES
    why: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]

    def __str__(self) -> str:
        return f"Precision: {self.name} ({self.why})"


def choose_precision(config: Config, device: DeviceFacts) -> Precision:
    """The precision of a run: the one asked for, else bf16 on a GPU that has it, else float32.

    Raises:
        ConfigError: the options contradict each other.
    """
    asked = config.asked_precision()
    gpu = device.kind == "cuda"
    if asked == "auto":
        name, why = "bf16" if gpu and device.has_bf16 else "fp32", f"auto: the device is {device.kind}"
        if gpu:
            why = f"auto: {device.name} {'has it' if device.has_bf16 else 'has no bf16'}"
    else:
        name, why = asked, "asked for"
        if name == "bf16" and gpu and not device.has_bf16:
            why += f"; {device.name} only emulates it, --precision fp16 is faster"
    return Precision(name, why + ("; TF32 where the GPU has it" if gpu and name == "fp32" else ""))


def check_head_width(precision: Precision, width: int, device: DeviceFacts) -> None:
    """Raises ConfigError where the training attention's float32 kernel does not fit the GPU; ``width`` is
    that of a head."""
    room, asked = device.shared_memory, precision.name == "fp32" and device.kind == "cuda" and width > 64
    if asked and room is not None and room < FLOAT32_BLOCK:
        raise ConfigError(
            f"precision is fp32, but attention in float32 with heads of width {width} needs {FLOAT32_BLOCK:,}"
            f" bytes of shared memory a block, and {device.name} has {room:,}. Fix:"
            f" {'--precision bf16' if device.has_bf16 else '--precision fp16'}, or --device cpu"
        )


def stored_precision(options: Mapping[str, Any]) -> str:
    """The precision of a run from the options in its checkpoint, which older ones hold as two switches."""
    older = (name for name in ("bf16", "fp16") if options.get(name))
    return options.get("precision") or next(older, "fp32")
