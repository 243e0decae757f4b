#!/usr/bin/env python
"""Compares Unigen with the reference implementation, number for number.

    python tools/compare_reference.py FOLDER

FOLDER is laid out like ``tests/golden`` (its README says what each file holds). One line a case: the largest
error and pass or fail; the exit status is non-zero when any case fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file
from torch import Tensor

from unigen.inference.inferencer import InterleaveInferencer
from unigen.model.bagel import Bagel, StateReader
from unigen.model.config import CONSTANTS
from unigen.model.mask import Tokens, allowed
from unigen.model.weights import load_bagel
from unigen.sequence.images import open_image
from unigen.sequence.pack import pack_blocks
from unigen.sequence.tokens import SpecialIds, Tokenizer
from unigen.sequence.transform import ImageTransform
from unigen.sequence.types import Block, Kind, Pack

HIDDEN, GRADIENT = 1e-4, 1e-3  # tolerances in float32, relative to the largest value
Result = tuple[str, float, float]  # case, error, tolerance


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compare Unigen with the reference's numbers.",
        epilog="example: python tools/compare_reference.py tests/golden",
    )
    parser.add_argument("folder", type=Path, help="a folder laid out like tests/golden")
    parser.add_argument("--device", default="cpu", help="where the model runs: cpu (default) or cuda")
    options = parser.parse_args(argv)
    folder = options.folder
    if not (folder / "model").is_dir():
        parser.error(f"{folder} has no folder model/; give a folder laid out like tests/golden")
    torch.set_grad_enabled(True)
    failed = 0
    for case, error, tolerance in run(folder, options.device):
        good = error <= tolerance  # a NaN is not
        failed += not good
        print(
            f"{'pass' if good else 'FAIL'}  {case:<44} largest error {error:.2e}  tolerance {tolerance:.0e}",
            flush=True,
        )
    print(f"{failed} failed" if failed else "all passed")
    return 1 if failed else 0


def run(folder: Path, device: str = "cpu") -> Iterator[Result]:
    """Every case of the folder, computed on ``device``."""
    meta = read(folder / "meta.json")
    constants = {name: meta[name] for name in CONSTANTS if name in meta}
    model = load_bagel(folder / "model", device, torch.float32, constants=constants)
    special = special_ids(meta, Tokenizer.load(folder / "model"))
    if (folder / "state_dict_shapes.json").exists():
        yield compare_shapes(folder, model)
    if (folder / "image_resize.json").exists():
        yield compare_resize(folder)
    if (folder / "vae.safetensors").exists():
        yield from compare_vae(folder, model)
    for name, case in (
        read(folder / "train_cases.json").items() if (folder / "train_cases.json").exists() else ()
    ):
        yield from compare_training(
            folder, name, case, model, Tokenizer(Tokenizer.load(folder / "model").tokenizer, special)
        )
    if (folder / "inference_cases.json").exists():
        yield from compare_inference(folder, model, special)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def special_ids(meta: dict[str, Any], tokenizer: Tokenizer) -> SpecialIds:
    """The ids the reference used; the tokenizer's own where the folder does not say."""
    ids, own = meta.get("special_token_ids", {}), tokenizer.special
    return SpecialIds(
        ids.get("bos_token_id", own.text_start),
        ids.get("eos_token_id", own.text_end),
        ids.get("start_of_image", own.image_start),
        ids.get("end_of_image", own.image_end),
        own.end,
    )


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest reference value; infinite where shapes differ."""
    if tuple(ours.shape) != tuple(theirs.shape):
        return float("inf")
    if theirs.numel() == 0:
        return 0.0
    ours, theirs = ours.detach().double().cpu(), theirs.double()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def unequal(ours: Tensor, theirs: Tensor) -> float:
    """How many entries differ."""
    if tuple(ours.shape) != tuple(theirs.shape):
        return float("inf")
    return float((ours.cpu().to(theirs.dtype) != theirs).sum())


# ---- weights, pictures


def compare_shapes(folder: Path, model: Bagel) -> Result:
    theirs = {name: tuple(shape) for name, shape in read(folder / "state_dict_shapes.json").items()}
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return "state dict: keys and shapes", float(len(set(theirs.items()) ^ set(ours.items()))), 0


def compare_resize(folder: Path) -> Result:
    wrong = 0
    cases = read(folder / "image_resize.json")
    for c in cases:
        transform = ImageTransform(c["max_size"], c["min_size"], c["stride"], max_pixels=c["max_pixels"])
        wrong += transform.size(c["width"], c["height"], c["img_num"]) != tuple(c["out"])
    return f"image resize: {len(cases)} sizes", float(wrong), 0


def compare_vae(folder: Path, model: Bagel) -> Iterator[Result]:
    theirs = load_file(folder / "vae.safetensors")
    with torch.no_grad():
        yield (
            "VAE: posterior mean",
            relative(model.codec.encode(theirs["image"].to(model.device)), theirs["latent_mean"]),
            HIDDEN,
        )
        yield (
            "VAE: decoding",
            relative(model.codec.decode(theirs["latent_mean"].to(model.device)), theirs["decoded"]),
            HIDDEN,
        )


# ---- training


def compare_training(
    folder: Path, name: str, case: dict[str, Any], model: Bagel, tokenizer: Tokenizer
) -> Iterator[Result]:
    theirs = load_file(folder / f"train_{name}.safetensors")
    pack = pack_blocks(
        reference_blocks(case, theirs, model, tokenizer), tokenizer.special, model.config.geometry
    )
    wrong = packing_differences(pack, case, theirs)
    bad = [key for key, count in wrong.items() if count]
    yield (
        f"{name}: packing, {len(wrong)} fields" + (f" (wrong: {', '.join(bad)})" if bad else ""),
        float(sum(wrong.values())),
        0,
    )

    model.zero_grad(set_to_none=True)
    pack = pack.to(model.device)
    output = model(pack, reader=StateReader.of_all(pack))
    order = pack.index.argsort()
    ce = output.ce[pack.index[pack.label >= 0].argsort()]
    yield f"{name}: hidden states", relative(output.read[order], theirs["out.last_hidden_state"]), HIDDEN
    if "out.ce" in theirs:
        yield f"{name}: text cross-entropy", relative(ce, theirs["out.ce"]), HIDDEN
    if "out.mse" in theirs:
        yield f"{name}: image squared error", relative(output.mse, theirs["out.mse"]), HIDDEN
    loss = sum((x.mean() for x in (output.ce, output.mse) if x.numel()), torch.zeros((), device=model.device))
    yield f"{name}: loss", relative(loss.reshape(1), theirs["out.loss"].reshape(1)), HIDDEN
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    for key in sorted(k for k in theirs if k.startswith("grad.")):
        gradient = gradients[key.removeprefix("grad.")]
        yield (
            f"{name}: gradient {key.removeprefix('grad.language_model.model.').removeprefix('grad.')}",
            relative(gradient, theirs[key]),
            GRADIENT,
        )
    norms = case.get("grad_norms", {})
    if norms:
        largest = max((v for v in norms.values() if v), default=1.0)
        worst = 0.0
        for key, norm in norms.items():
            ours = 0.0 if gradients.get(key) is None else float(gradients[key].double().norm())
            # Beside its own size, a norm is compared at the scale of float32's rounding in the largest one.
            worst = max(worst, abs(ours - (norm or 0.0)) / max(norm or 0.0, 1e-4 * largest))
        extra = [
            k for k, g in gradients.items() if k not in norms and g is not None and float(g.abs().max()) > 0
        ]
        yield f"{name}: {len(norms)} gradient norms", worst if not extra else float("inf"), GRADIENT


def reference_blocks(
    case: dict[str, Any], theirs: dict[str, Tensor], model: Bagel, tokenizer: Tokenizer
) -> list[list[Block]]:
    """The samples of a case as blocks, with the reference's latents, patches, noise and times."""
    geometry = model.config.geometry
    picture, patch_at, latent_at, samples = 0, 0, 0, []
    for s, sample in enumerate(case["samples"]):
        blocks = []
        for i, item in enumerate(sample):
            label = item.get("special_token_label")
            if item["kind"] == "text":
                ids = tokenizer.encode(item["text"])
                blocks.append(
                    Block(Kind.TEXT, len(ids), i, loss=bool(item["loss"]), closing_label=label, ids=ids)
                )
                continue
            height, width = item["size_hw"]
            vit = item["kind"] == "vit"
            stride = geometry.vit_patch if vit else geometry.latent_stride
            grid = (height // stride, width // stride)
            n = grid[0] * grid[1]
            kind = Kind.VIT if vit else Kind.NOISED if item["loss"] else Kind.CLEAN
            block = Block(kind, n, s * 1000 + i, grid, bool(item["loss"]), label)
            if vit:
                block.patches = theirs["in.packed_vit_tokens"][patch_at : patch_at + n]
                patch_at += n
            else:
                block.latent = theirs["in.padded_latent"][picture]
                block.noise = theirs["in.noise"][latent_at : latent_at + n]
                block.u = float(theirs["in.packed_timesteps"][latent_at])
                picture, latent_at = picture + 1, latent_at + n
            blocks.append(block)
        samples.append(blocks)
    return samples


def packing_differences(pack: Pack, case: dict[str, Any], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Field -> how many of its entries differ from the reference's packed input."""
    order = pack.index.argsort()
    kind, label = pack.kind[order], pack.label[order]
    text, vae = (kind == Kind.TEXT), (kind == Kind.CLEAN) | (kind == Kind.NOISED)
    place = lambda mask: mask.nonzero().squeeze(1)  # noqa: E731
    vae_order = pack.index[pack.n_und :].argsort()
    ours: dict[str, Tensor] = {
        "packed_text_ids": pack.ids[order][text],
        "packed_text_indexes": place(text),
        "packed_position_ids": pack.position[order],
        "packed_vit_token_indexes": place(kind == Kind.VIT),
        "packed_vit_position_ids": pack.vit_position,
        "vit_token_seqlens": torch.tensor(pack.vit_lengths),
        "packed_vae_token_indexes": place(vae),
        "packed_latent_position_ids": pack.vae_position[vae_order],
        "packed_timesteps": pack.u[vae_order],
        "ce_loss_indexes": place(label >= 0),
        "packed_label_ids": label[label >= 0],
        "mse_loss_indexes": place(kind == Kind.NOISED),
    }
    wrong = {}
    for name, value in ours.items():
        expected = theirs.get(f"in.{name}")
        wrong[name] = float(value.numel()) if expected is None else unequal(value, expected)
    lengths = torch.bincount(pack.sample, minlength=pack.n_samples)
    wrong["sample_lens"] = unequal(lengths, torch.tensor(case["sample_lens"]))
    if case.get("patchified_vae_latent_shapes"):
        wrong["latent shapes"] = unequal(
            torch.tensor(pack.vae_grid), torch.tensor(case["patchified_vae_latent_shapes"])
        )
    tokens = Tokens.of(pack).at(order)
    dense = allowed(tokens.unsqueeze(1), tokens.unsqueeze(0))
    start, inside = 0, torch.zeros_like(dense)
    for i, n in enumerate(lengths.tolist()):
        part = dense[start : start + n, start : start + n]
        inside[start : start + n, start : start + n] = True
        if f"in.allowed_attention.{i}" in theirs:
            wrong[f"mask {i}"] = unequal(part, theirs[f"in.allowed_attention.{i}"])
        start += n
    wrong["mask between samples"] = float((dense & ~inside).sum())
    return wrong


# ---- inference


def compare_inference(folder: Path, model: Bagel, special: SpecialIds) -> Iterator[Result]:
    cases, theirs = read(folder / "inference_cases.json"), load_file(folder / "inference.safetensors")
    transform: Callable[[str], ImageTransform] = lambda name: ImageTransform(**rename(cases[name]))  # noqa: E731
    inferencer = InterleaveInferencer(
        model,
        tokenizer=Tokenizer(Tokenizer.load(folder / "model").tokenizer, special),
        vae_transform=transform("vae_transform"),
        vit_transform=transform("vit_transform"),
        think_prompts=read(folder / "think_prompts.json") or None,
    )
    for job, case in cases["jobs"].items():
        inputs = [open_image(folder / item) if (folder / item).is_file() else item for item in case["inputs"]]
        trace: dict[str, list[Tensor]] = {"tokens": [], "latent": [], "image": []}
        noise = theirs.get(f"{job}.init_noise")
        output = inferencer.interleave_inference(inputs, initial_noise=noise, trace=trace, **case["kwargs"])
        if f"{job}.tokens" in theirs:
            ids = trace["tokens"][0] if trace["tokens"] else torch.zeros(0)
            yield f"{job}: tokens", unequal(ids, theirs[f"{job}.tokens"]), 0
        texts = [piece for piece in output if isinstance(piece, str)]
        if case.get("text") is not None:
            yield f"{job}: text", float(texts != case["text"]), 0
        if f"{job}.final_latent" in theirs:
            yield f"{job}: final latent", relative(trace["latent"][0], theirs[f"{job}.final_latent"]), HIDDEN
        if f"{job}.image" in theirs:
            image = theirs[f"{job}.image"]
            # The picture is floored to whole numbers: rounding can move a value across one of them.
            ours = trace["image"][0]
            error = (
                float("inf") if ours.shape != image.shape else float((ours.int() - image.int()).abs().max())
            )
            yield f"{job}: picture, largest difference of 255", error, 1


def rename(options: dict[str, Any]) -> dict[str, Any]:
    """The reference's names of a transform's options, and the short ones, to ours."""
    names = {"max_image_size": "max_size", "min_image_size": "min_size", "image_stride": "stride"}
    return {names.get(key, key): value for key, value in options.items()}


if __name__ == "__main__":
    sys.exit(main())
