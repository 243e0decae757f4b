"""Matrices of 4 or 8 bits, by bitsandbytes: NF4 (Dettmers et al. 2023, "QLoRA") and INT8 by rows (Dettmers
et al. 2022, "LLM.int8()", without outliers).

The matrices of the decoder's layers, of both experts, are quantised while they stream in: beside what is
kept, one matrix at a time has its full precision. Embeddings, text head, norms, biases, ViT, connector,
tables and the heads of the flow stay.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from unigen.config import UserError
from unigen.model.hub import without_hub_kernels
from unigen.model.parts import ADAPTED, is_adapter, matches
from unigen.model.storage import few

KINDS = ("nf4", "int8")
# on a CPU bitsandbytes reads rows of other lengths wrongly
BLOCK = 64  # elements of a row that share a scale in NF4

log = logging.getLogger("unigen")


class QuantiseError(UserError):
    """Quantising cannot work here; the message says why and the fix."""


def quantise_layers(model: nn.Module, kind: str, double: bool, computes: torch.dtype) -> None:
    """Puts quantised layers, which lie nowhere yet, in the place of the decoder's linear ones.

    Args:
        model: its parameters lie nowhere (meta).
        kind: one of KINDS.
        double: NF4's scales are quantised, too (0.4 bits fewer an element).
        computes: dtype of the products.

    Raises:
        QuantiseError: bitsandbytes is missing.
    """
    if kind not in KINDS:
        raise QuantiseError(f"quantize is {kind!r}. Fix: use one of {', '.join(KINDS)}")
    bnb = _bitsandbytes(kind)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = [name for name in linear if is_quantised(name)]
    if kind == "nf4":
        odd = [name for name in names if linear[name].in_features % BLOCK]
        if odd:
            log.warning(
                "%d of %d matrices stay as they are: their rows are no multiple of %d long (%s)",
                len(odd), len(names), BLOCK, few(odd, 2),
            )  # fmt: skip
        names = [name for name in names if name not in odd]
    for name in names:
        old = linear[name]
        shape, bias = (old.in_features, old.out_features), old.bias is not None
        if kind == "nf4":
            new = bnb.nn.Linear4bit(
                *shape, bias, compute_dtype=computes, compress_statistics=double, quant_type="nf4",
                device="meta"
            )  # fmt: skip
            # else bitsandbytes would repack the stored weights in the middle of a run
            new.support_avx512bf16_for_cpu = False
            new.compute_type_is_set = True
        else:
            new = bnb.nn.Linear8bitLt(*shape, bias, has_fp16_weights=False, threshold=0.0, device="meta")
        new.bias = old.bias
        new.register_forward_pre_hook(_lowered)  # bitsandbytes gives back the dtype that it is given
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, new)
    # how peft tells which of its layers fits
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"  # type: ignore[assignment]


@contextlib.contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Inside, glibc gives large blocks pages of their own, which go back when they do.

    Quantising frees a matrix and keeps a small one. On the heap the small one comes to lie in the hole, the
    next matrix behind that, and so on: in some runs the whole checkpoint was in memory in the end.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt  # of glibc; others have none
    except (OSError, AttributeError, TypeError):
        yield
        return
    mmap_threshold = -3
    mallopt(mmap_threshold, 4 << 20)
    try:
        yield
    finally:
        mallopt(mmap_threshold, 32 << 20)  # as far as glibc itself lets it grow


def _lowered(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Under autocast the input in the dtype of products, as PyTorch's linear layers take it."""
    x, *rest = args
    kind = x.device.type
    return (x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x, *rest)


def is_quantised(name: str) -> bool:
    """Is it one of the linear modules that are quantised?"""
    return not is_adapter(f"{name}.") and matches(name.removesuffix(".base_layer"), "both", ADAPTED)


def holds_quantised(module: nn.Module) -> bool:
    """Is ``module.weight`` quantised, or going to be?"""
    # peft's layers around them have such names, too
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt") and not hasattr(module, "base_layer")


def store(module: nn.Module, value: Tensor) -> None:
    """Quantises a matrix [out, in], on the device it lies on, as the weight of a quantised layer."""
    bnb = _bitsandbytes("")
    if isinstance(module, bnb.nn.Linear4bit):
        weight = bnb.nn.Params4bit(
            value, requires_grad=False, quant_type="nf4",
            compress_statistics=module.weight.compress_statistics,
            blocksize=BLOCK, module=module,
        )._quantize(value.device)  # fmt: skip
    else:
        weight = bnb.nn.Int8Params(value, requires_grad=False, has_fp16_weights=False)._quantize(value.device)
    module.weight = weight


def dequantised(module: Any) -> Tensor:
    """The matrix [out, in] float32 that a quantised layer computes with."""
    import bitsandbytes.functional as F

    weight = module.weight
    if type(module).__name__ == "Linear4bit":
        return F.dequantize_4bit(weight.data, weight.quant_state).float()
    state = module.state
    codes, scales = (weight.CB, weight.SCB) if weight.SCB is not None else (state.CB, state.SCB)
    return codes.float() * (scales.float() / 127)[:, None]


def count(p: Tensor) -> int:
    """Elements of a parameter before it was quantised."""
    state = getattr(p, "quant_state", None)
    return state.shape.numel() if state is not None else p.numel()


def _bitsandbytes(kind: str) -> Any:
    try:
        with without_hub_kernels():
            import bitsandbytes
    except ImportError as error:
        raise QuantiseError(
            f"--quantize {kind} needs bitsandbytes ({error}). Fix: pip install 'bitsandbytes>=0.50'"
        ) from error
    return bitsandbytes
