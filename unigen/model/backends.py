"""PyTorch's switches for the whole process: which attention kernels, TF32, how a GPU's memory grows; and
autocast.

They stand here alone. Training engines and inferencers set them when they are made; on a CPU they change
nothing.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from unigen.values import ConfigError, Device, read_value

# What PyTorch reads the settings of the GPU's allocator from; the second and third are older names it still
# knows.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

_lock = threading.Lock()
_inside = 0  # how many `repeated_shapes` are entered, over all threads
_outside = False  # cuDNN attention as it was before the first of them


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of ``auto``, ``cpu``, ``cuda`` (the GPU ``local_rank``) or ``cuda:N``.

    Raises:
        ConfigError: there is no such device.
    """
    read_value(Device, name, "device", " (--device ...)")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"device is {name}, but no GPU is visible. Fix: --device cpu, or check the driver")
    number, count = (int(name[5:]) if name[4:5] == ":" else local_rank), torch.cuda.device_count()
    if ":" in name and number >= count:
        raise ConfigError(f"device is {name}, but {count} GPUs are visible. Fix: count them from cuda:0")
    return torch.device("cuda", number)


def prefer_flash() -> None:
    """Turns cuDNN attention off.

    With the cuDNN that PyTorch 2.11 and later bring, ``scaled_dot_product_attention`` takes it first on an
    H100, and it builds a plan whenever it meets new shapes (0.4 s each, by reports of others): with every
    decoded token, with every new size of a picture in the ViT.
    """
    global _outside
    with _lock:
        _outside = False
        if not _inside:
            torch.backends.cuda.enable_cudnn_sdp(False)


@contextlib.contextmanager
def repeated_shapes() -> Iterator[None]:
    """Lets attention use cuDNN inside, where a few shapes come many times (drawing). A decorator, too.

    Several threads may be inside; the last to leave restores what was there before the first.
    """
    global _inside, _outside
    with _lock:
        if not _inside:
            _outside = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(True)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                torch.backends.cuda.enable_cudnn_sdp(_outside)


def use_tf32() -> None:
    """Lets float32 matrix products on a GPU use TF32, without which they use no tensor core. An earlier
    choice stays."""
    if torch.get_float32_matmul_precision() == "highest":
        torch.set_float32_matmul_precision("high")


def use_expandable_segments() -> None:
    """Lets the memory that PyTorch takes from a GPU grow in place, since the lengths of packed sequences
    vary.

    To be called before CUDA is initialised, which reads it; settings of the user's own stay as they are.
    """
    if sys.platform == "linux" and torch.version.hip is None and not torch.cuda.is_initialized():
        if not any(name in os.environ for name in ALLOCATOR):
            os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def autocast(device: torch.device, dtype: torch.dtype, *, cache: bool) -> AbstractContextManager[None]:
    """Computes matrix products in ``dtype`` inside; float32 changes nothing.

    ``cache`` keeps the lowered copy of every weight that learns until the context ends: it pays where weights
    are used again and again (decoding), and only takes memory where each is used once (the training forward:
    2 bytes a parameter).
    """
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=cache)
