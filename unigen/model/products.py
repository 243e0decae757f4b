"""The products of linear layers: PyTorch's own, or oneDNN's where a CPU computes these in less time.

PyTorch gives products of float32 on x86 to MKL, which does not use AVX-512 on other processors than Intel's,
and reads the weights at a third of the memory's speed for a few rows. oneDNN, which PyTorch has too and
which ``torch.compile`` chooses, does both; on an AMD EPYC of the fifth generation its products take less than
half the time (``benchmarks/RESULTS.md``).
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS, LARGE = 64, 1 << 17
"""On any CPU a product of at most so many rows with a matrix of at least so many numbers goes to oneDNN,
where nothing learns. (MKL is done with a smaller one before a second thread has begun.)"""

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def avx512_is_left() -> bool:
    """Has this processor AVX-512 that MKL does not use?"""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and vendor() == "AuthenticAMD"


def vendor() -> str:
    """Who made the processor; "" where the system does not say."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        return ""


AVX512_IS_LEFT = avx512_is_left()
WORTH = 1 << 15
"""A matrix has at least so many numbers where oneDNN is faster for more rows, although each new number of
rows costs it some 0.3 ms once."""

for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # PyTorch and oneDNN each have one
    os.environ.setdefault(_cache, "64")
"""So many products are kept, compiled for their number of rows, some 0.5 MB each: more than a layer has.
Sequences have ever new lengths, and the 1,024 that are the default would fill a GB."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: ``x`` [..., inputs], ``weight`` [outputs, inputs], ``bias`` [outputs] -> [...,
    outputs]."""
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Product.apply(x, weight, bias)
    return product(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`linear` by oneDNN, without gradients."""
    if torch.compiler.is_compiling():
        return _compiled(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.custom_op("unigen::product", mutates_args=())
def _compiled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product as an operation of its own: ``torch.compile`` takes oneDNN's for constant weights alone."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@_compiled.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


OPERATIONS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.unigen.product.default}
"""What :func:`linear` runs on the rows of a packed sequence."""
if ONEDNN:
    OPERATIONS.add(torch.ops.mkldnn._linear_pointwise.default)


class _Product(torch.autograd.Function):
    """The product with its gradients (which are products, too) by oneDNN.

    What it saves is known behind its forward pass alone: gradient checkpointing, which ends with what is
    saved last, repeats the last product of a part of a layer, too.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)  # what is frozen needs no x
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        of_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        of_weight = product(rows.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Does oneDNN take this product?"""
    if not (x.is_cpu and x.dtype == weight.dtype == torch.float32) or torch.is_autocast_enabled("cpu"):
        return False
    traced = torch.compiler.is_compiling()
    if not ONEDNN or not (traced or torch.backends.mkldnn.enabled) or x.numel() == 0:
        return False
    # The number of rows is not looked at while a compiler traces: few would be a version of their own.
    few = not traced and x.numel() <= FEW_ROWS * x.shape[-1]
    if AVX512_IS_LEFT:
        return weight.numel() >= (LARGE if few else WORTH)
    return few and weight.numel() >= LARGE and not torch.is_grad_enabled()
