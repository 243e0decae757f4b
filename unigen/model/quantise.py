"""Matrices of 4 or 8 bits, by bitsandbytes: NF4 (Dettmers et al. 2023, "QLoRA") and INT8 by rows (Dettmers
et al. 2022, "LLM.int8()", without outliers).

The matrices of the decoder's layers, of both experts, are quantised while they stream in: beside what is
kept, one matrix at a time has its full precision. Embeddings, text head, norms, biases, ViT, connector,
tables and the heads of the flow stay.

On disk they are what bitsandbytes writes (``unigen ckpt export --quantize``)::

    NF4    MODULE.weight [n / 2, 1] U8, .weight.absmax [n / 64] F32 (double: U8, beside .weight.nested_absmax
           and .weight.nested_quant_map), .weight.quant_map [16], .weight.quant_state.bitsandbytes__nf4 (JSON)
    INT8   MODULE.weight [out, in] I8, .SCB [out] F32, .weight_format U8 (0: by rows)

and ``quantization_config`` in ``config.json`` is what transformers writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unigen.config import ConfigError, UserError
from unigen.model.hub import without_hub_kernels
from unigen.model.parts import ADAPTED, is_adapter, is_embedding, is_table, matches
from unigen.model.storage import INT8, NF4, CheckpointFolderError, Quantised, Stored, config_json, few
from unigen.schema import short

KINDS = ("nf4", "int8")
# on a CPU bitsandbytes reads rows of other lengths wrongly
BLOCK = 64  # elements of a row that share a scale in NF4
SCALES = 256  # of them share one, where they are quantised themselves
STATE_BYTES = 256  # of NF4's JSON, filled up with spaces: its length hangs on its numbers
ROUNDS = {"nf4": 0.1, "int8": 0.01}  # of a matrix's norm, about; what quantising changes it by

log = logging.getLogger("unigen")


class QuantiseError(UserError):
    """Quantising cannot work here; the message says why and the fix."""


def need_backend(kind: str | None, device: torch.device | str) -> None:
    """Sees that matrices of a kind (None: of full precision) can be made and multiplied with on a device.

    Raises:
        QuantiseError: bitsandbytes is missing, or cannot do it there.
    """
    if kind is None:
        return
    if kind not in KINDS:
        raise QuantiseError(f"quantize is {kind!r}. Fix: use one of {', '.join(KINDS)}")
    _bitsandbytes(kind)
    layer = _quantised(nn.Linear(BLOCK, BLOCK, bias=False, device="meta"), kind, False, torch.float32)
    try:
        store(layer, torch.ones(BLOCK, BLOCK, device=device))
        with torch.no_grad():
            found = float(layer(torch.ones(1, BLOCK, device=device)).sum())
    except (RuntimeError, NotImplementedError, ValueError, AttributeError, OSError, NameError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise QuantiseError(
            f"{kind} cannot be computed on {device}: bitsandbytes fails there ({why}). Fix: install a"
            " bitsandbytes for this GPU and its CUDA (python -m bitsandbytes says what it finds), or leave"
            " quantize out"
        ) from error
    assert abs(found / BLOCK**2 - 1) < ROUNDS["nf4"], found


def quantise_layers(model: nn.Module, kind: str, double: bool, computes: torch.dtype) -> None:
    """Puts quantised layers, which lie nowhere yet, in the place of the decoder's linear ones.

    Args:
        model: its parameters lie nowhere (meta).
        kind: one of KINDS; :func:`need_backend` has seen that it works.
        double: NF4's scales are quantised, too (0.4 bits fewer an element).
        computes: dtype of the products.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = quantised_names({n: (m.out_features, m.in_features) for n, m in linear.items()}, kind)
    if odd := [name for name in linear if is_quantised(name) and name not in set(names)]:
        log.warning(
            "%d of %d matrices stay as they are: their rows are no multiple of %d long (%s)",
            len(odd), len(odd) + len(names), BLOCK, few(odd, 2),
        )  # fmt: skip
    for name in names:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, _quantised(linear[name], kind, double, computes))
    # how peft tells which of its layers fits
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"  # type: ignore[assignment]


def _quantised(old: nn.Linear, kind: str, double: bool, computes: torch.dtype) -> Any:
    """The layer in the place of a linear one, its matrix nowhere yet."""
    bnb = _bitsandbytes(kind)
    shape, bias = (old.in_features, old.out_features), old.bias is not None
    if kind == "nf4":
        new = bnb.nn.Linear4bit(
            *shape, bias, compute_dtype=computes, compress_statistics=double, quant_type="nf4", device="meta"
        )
        # else bitsandbytes would repack the stored weights in the middle of a run
        new.support_avx512bf16_for_cpu = False
        new.compute_type_is_set = True
    else:
        new = bnb.nn.Linear8bitLt(*shape, bias, has_fp16_weights=False, threshold=0.0, device="meta")
        new.forward = partial(_Frozen.apply, new)  # type: ignore[method-assign]
    new.bias = old.bias
    new.register_forward_pre_hook(_lowered)  # bitsandbytes gives back the dtype that it is given
    return new


def quantised_names(shapes: Mapping[str, tuple[int, ...]], kind: str) -> list[str]:
    """The modules that are quantised, of those whose matrices have these shapes [out, in]."""
    names = [name for name, shape in shapes.items() if len(shape) == 2 and is_quantised(name)]
    return [name for name in names if kind != "nf4" or shapes[name][1] % BLOCK == 0]


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


class _Frozen(torch.autograd.Function):
    """The product with an INT8 matrix, which does not learn, so that its gradient needs no input.
    bitsandbytes' own keeps that all the same, out of reach of recomputing."""

    @staticmethod
    def forward(ctx: Any, layer: Any, x: Tensor) -> Tensor:
        ctx.state, ctx.dtype = layer.state, x.dtype
        return type(layer).forward(layer, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        state, grad = ctx.state, grads[0].to(ctx.dtype)
        # the same numbers in the same order as bitsandbytes
        return None, grad @ state.CB.to(ctx.dtype, copy=True).mul_(state.SCB.unsqueeze(1).mul(1.0 / 127.0))


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


def holds_int8(module: nn.Module | None) -> bool:
    """Is it a layer of 8 bits, or an adapter around one?"""
    return type(module).__name__ == "Linear8bitLt"  # peft's layer has the name of bitsandbytes'


def store(module: nn.Module, value: Tensor) -> None:
    """Quantises a matrix [out, in], on the device it lies on, as the weight of a quantised layer."""
    nf4 = isinstance(module, _bitsandbytes("").nn.Linear4bit)
    double = nf4 and module.weight.compress_statistics
    module.weight = _weight("nf4" if nf4 else "int8", double, value, module)


def _weight(kind: str, double: bool, value: Tensor, module: Any = None) -> Any:
    """bitsandbytes' parameter for a matrix [out, in]."""
    nn = _bitsandbytes(kind).nn
    if kind == "int8":
        return nn.Int8Params(value, requires_grad=False, has_fp16_weights=False)._quantize(value.device)
    return nn.Params4bit(
        value, requires_grad=False, quant_type="nf4", compress_statistics=double, blocksize=BLOCK,
        module=module,
    )._quantize(value.device)  # fmt: skip


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


# ---- on disk


def stored_as(
    kind: str, double: bool, shape: tuple[int, ...]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What follows the module's name in the keys of a quantised matrix [out, in] -> dtype and shape."""
    if kind == "int8":
        scales, layout = (torch.float32, shape[:1]), (torch.uint8, ())
        return {"weight": (torch.int8, shape), INT8: scales, "weight_format": layout}
    numbers = math.prod(shape)
    blocks = numbers // BLOCK
    found = {"weight": (torch.uint8, (numbers // 2, 1)), "weight.quant_map": (torch.float32, (16,))}
    found["weight.absmax"] = (torch.uint8 if double else torch.float32, (blocks,))
    if double:
        found["weight.nested_absmax"] = (torch.float32, (-(-blocks // SCALES),))
        found["weight.nested_quant_map"] = (torch.float32, (256,))
    return found | {NF4: (torch.uint8, (STATE_BYTES,))}


def pieces_of(kind: str, double: bool, value: Tensor) -> dict[str, Tensor]:
    """The tensors of :func:`stored_as` for a matrix [out, in]."""
    weight = _weight(kind, double, value)
    if kind == "int8":
        return {"weight": weight.CB, INT8: weight.SCB, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    state = {f"weight.{key}": piece for key, piece in weight.quant_state.as_dict(packed=True).items()}
    said = bytes(state[NF4].numpy()).ljust(STATE_BYTES)
    return {"weight": weight.data} | state | {NF4: torch.frombuffer(bytearray(said), dtype=torch.uint8)}


def restore_weight(module: Any, entry: Quantised, device: torch.device | str) -> None:
    """The weight of a quantised layer, as it is stored."""
    nn = _bitsandbytes("").nn
    pieces = {key: piece.read() for key, piece in entry.pieces}
    floats = {key: piece for key, piece in pieces.items() if piece.is_floating_point()}
    if odd := [key for key, piece in floats.items() if not piece.isfinite().all()]:
        raise CheckpointFolderError(
            f"{entry.parts[0].file}: {few(odd)} of a quantised matrix holds NaN or infinity. Fix: download or"
            " copy it again"
        )
    codes = pieces.pop("weight").to(device)
    if isinstance(module, nn.Linear4bit):
        state = {key.removeprefix("weight."): piece for key, piece in pieces.items()}
        module.weight = nn.Params4bit.from_prequantized(codes, state, device=device, module=module)
    else:
        held = {"CB": codes, "SCB": pieces[INT8].to(device)}
        module.weight = nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, **held)


def described(kind: str, double: bool, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """``quantization_config`` of a model whose matrices have these shapes, as transformers writes it."""
    from transformers import BitsAndBytesConfig

    linear = [n for n, shape in shapes.items() if len(shape) == 2 and not is_embedding(n) and not is_table(n)]
    left = set(linear) - set(quantised_names(shapes, kind))
    layers = "language_model."
    stay = sorted({name if name.startswith(layers) else name.split(".")[0] for name in left})
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=stay)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=stay,
        )  # fmt: skip
    return config.to_dict()


def bits_of(folder: Path, asked: str | None = None, double: bool = False) -> tuple[str | None, bool]:
    """What the matrices of a folder are quantised to (kind, double), or else are to be.

    Raises:
        ConfigError: double_quant is asked for, and not NF4.
        QuantiseError: another kind is asked for than the folder holds, or it holds one that is not read.
    """
    if not (said := config_json(folder).get("quantization_config")):
        if double and asked != "nf4":
            raise ConfigError(
                "double_quant needs quantize nf4. Fix: --quantize nf4, or leave double_quant out"
            )
        return asked, double
    said = said if isinstance(said, dict) else {"quant_method": said}
    kind = said.get("quant_method", "bitsandbytes")
    if kind == "bitsandbytes":
        kind = "int8" if said.get("load_in_8bit") else said.get("bnb_4bit_quant_type")
    if kind not in KINDS:
        raise QuantiseError(
            f"{folder / 'config.json'}: quantization_config says {short(kind)}, which is not read. Fix: use"
            " the full weights, or bitsandbytes' nf4 or int8"
        )
    held = kind, bool(said.get("bnb_4bit_use_double_quant")) and kind == "nf4"
    if asked not in (None, kind) or double > held[1]:
        other = "double_quant" if asked in (None, kind) else f"quantize {asked}"
        raise QuantiseError(
            f"{folder} holds {told_bits(*held)}, and {other} is asked for. Fix: leave that out, or give the"
            " folder of the full weights"
        )
    return held


def told_bits(kind: str | None, double: bool) -> str | None:
    """What :func:`bits_of` found, in words; None for full weights."""
    return f"{kind} with double_quant" if double else kind


def adopt_bits(config: Any) -> Any:
    """The options of a run, after those that the folder of its model decides where that is quantised."""
    if config.model_path:
        asked = config.quantize
        found = bits_of(Path(config.model_path), asked, config.double_quant)
        config.quantize, config.double_quant = found
        config.quantised_folder = config.model_path if found[0] != asked else ""
    return config


def check_bits(folder: Path, stored: Mapping[str, Stored]) -> None:
    """Raises CheckpointFolderError where the quantised matrices of a folder are not those that its
    ``config.json`` and this program mean, or have other parts."""
    held = {name.removesuffix(".weight"): e for name, e in stored.items() if isinstance(e, Quantised)}
    kind, double = bits_of(folder)
    shapes = matrices(stored)
    wanted = quantised_names(shapes, kind) if kind else []
    odd = sorted(held.keys() ^ set(wanted))
    if not odd and kind:
        for name, entry in held.items():
            mine = stored_as(kind, double, entry.shape)
            found = {key: (piece.dtype, piece.shape) for key, piece in entry.pieces}
            if NF4 in found:  # of any length
                found[NF4] = mine.get(NF4, found[NF4])
            if found | {"weight_format": 0} != mine | {"weight_format": 0}:
                odd.append(name)
    if odd:
        raise CheckpointFolderError(
            f"{folder}: config.json says {kind or 'nothing of quantised matrices'}, and {len(odd)} matrices"
            f" are stored otherwise: {few(odd, 2)}. Fix: take weights and config.json of one export (unigen"
            " ckpt export --quantize), or the full weights"
        )


def matrices(stored: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    """Module -> shape of its weight."""
    return {n.removesuffix(".weight"): e.shape for n, e in stored.items() if n.endswith(".weight")}


def _bitsandbytes(kind: str) -> Any:
    try:
        with without_hub_kernels():
            import bitsandbytes
    except ImportError as error:
        raise QuantiseError(
            f"{kind} needs bitsandbytes ({error}). Fix: pip install 'bitsandbytes>=0.50' (the extra quantize)"
        ) from error
    return bitsandbytes
