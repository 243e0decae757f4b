"""Speed of a training step beside a plain version of the reference's algorithm.

    python benchmarks/train_step.py [--threads N] [--json]      on a machine that does nothing else
    python benchmarks/train_step.py --small                     seconds; tells only that the script works

Forward and backward, float32, of one packed sequence of 2,872 tokens, two markers a block included: twice a
picture of a caption [40 text, 256 noised], an answer about a picture [256 ViT, 80 trained text] and an edit
[256 clean, 256 ViT, 20 text, 256 noised]. The model has hidden 512 and 8 layers in BAGEL's proportions
(small_bagel.py), ViT included; pictures bring their latents, so no VAE runs; no gradient checkpointing.

plain.py says what the plain version does. Both have the same weights and run one after the other, round by
round; before that, losses and all gradients must be equal within 1e-4. Beside the times stands the machine's
rate of a 2048-cubed float32 product, and the share of it that the step reaches. Counted are the products of
each token with its own expert, forward and backward, and the pairs of tokens that attend.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import in_turn
import plain
import torch
from in_turn import PLAIN, Disagreement, Times, agree
from small_bagel import FULL, SMALL, build_model, training_pack
from torch import Tensor, nn

from unigen.model.bagel import Bagel
from unigen.model.compiling import CompiledLayers
from unigen.model.mask import Tokens, allowed
from unigen.sequence.types import Pack
from unigen.training.step import Counts, joint_loss, loss_sums

Sums = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Step:
    """One way to compute a training step."""

    model: Bagel
    losses: Callable[[], Sums]  # the sums of the text and the image loss, with gradients
    counts: Counts

    def __call__(self) -> list[float]:
        """Forward and backward; the two sums. The gradient is left in the parameters."""
        self.model.zero_grad(set_to_none=True)
        text, image = self.losses()
        joint_loss(text, image, self.counts, 1.0, 1.0).backward()
        return [float(text.detach()), float(image.detach())]

    def outcome(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The two sums [2], and the gradient of every parameter."""
        sums = torch.tensor(self(), dtype=torch.float64)
        return sums, {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


def project_step(model: Bagel, pack: Pack) -> Step:
    """The step as the trainer takes it."""
    return Step(model, lambda: loss_sums(model(pack)), Counts.of([pack]))


def plain_step(model: Bagel, pack: Pack, as_reference: bool = False) -> Step:
    """The step of the plain version, for which the row is laid out once; ``as_reference`` with the
    reference's 3-D masks."""
    row = plain.Row.of(pack, model.config.latent_patch_size)
    row = row.as_reference() if as_reference else row
    return Step(model, lambda: plain.losses(model, row), Counts.of([pack]))


def check(wanted: Step, got: Step) -> dict[str, float]:
    """The largest relative differences of losses, gradient norms and gradients.

    Raises:
        Disagreement: one is above the tolerance, or only one of the two gives a parameter a gradient.
    """
    (losses, grads), (own_losses, own_grads) = wanted.outcome(), got.outcome()
    if grads.keys() != own_grads.keys():
        raise Disagreement(f"only one of the two has gradients of {sorted(grads.keys() ^ own_grads.keys())}")
    norms, own_norms = ({n: g.double().norm() for n, g in by_name.items()} for by_name in (grads, own_grads))
    whole = torch.stack(list(norms.values())).norm()
    for name in [n for n in grads if is_zero(n)]:
        for norm in (norms[name], own_norms[name]):
            if not norm <= 1e-6 * whole:
                raise Disagreement(f"gradient of {name}: its norm is {norm:.1e}, but the gradient is zero")
    names, some = ("text loss", "image loss"), [n for n in grads if not is_zero(n)]
    return {
        "losses": max(agree(n, a, b) for n, a, b in zip(names, own_losses, losses, strict=True)),
        "gradient norms": max(agree(f"gradient norm of {n}", own_norms[n], norms[n]) for n in some),
        "gradients": max(agree(f"gradient of {n}", own_grads[n], grads[n]) for n in some),
    }


def is_zero(name: str) -> bool:
    """Is this gradient rounding alone? The bias of the ViT's keys moves all scores of a query alike."""
    return name.startswith("vit_model.") and name.endswith("k_proj.bias")


def step_flops(model: Bagel, pack: Pack) -> tuple[float, float]:
    """Floating-point operations that a step needs: (matrix products of linear layers, attention).

    A product runs forward, for the gradient of its weights, and for that of its input where it has one.
    Attention counts the pairs that attend: two products forward, four backward.
    """
    products = 0.0

    def count(module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal products
        passes = 1 + module.weight.requires_grad + inputs[0].requires_grad
        products += 2.0 * passes * output.numel() * module.in_features

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        model(pack)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = Tokens.of(pack)
    pairs = float(allowed(tokens.unsqueeze(1), tokens.unsqueeze(0)).sum())
    llm, vit = model.config.llm, model.config.vit
    ways = pairs * llm.num_hidden_layers * llm.hidden_size
    ways += sum(n * n for n in pack.vit_lengths) * (vit.num_hidden_layers - 1) * vit.hidden_size
    return products, 12.0 * ways


REFERENCE = "plain, 3-D masks"  # as the reference runs on a CPU


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Checks and times; the results as JSON values, and as lines to read.

    Raises:
        Disagreement: the variants do not give the same numbers.
    """
    size = SMALL if options.small else FULL
    model = build_model(size).train()
    pack = training_pack(model.config, size)
    steps = {
        PLAIN: plain_step(model, pack),
        REFERENCE: plain_step(model, pack, True),
        "unigen": project_step(model, pack),
    }
    if options.compile:
        compiled = build_model(size).train()
        CompiledLayers(compiled, strict=True)
        steps["unigen, compiled"] = project_step(compiled, pack)
    errors = {name: check(steps[PLAIN], own) for name, own in steps.items() if name != PLAIN}
    products, attention = step_flops(model, pack)
    times = in_turn.time_in_turn(steps, options)
    results = {
        "benchmark": "train_step",
        "small": options.small,
        "machine": in_turn.machine(),
        "tokens": len(pack),
        "errors": errors,
        "product_GFLOP_s": times.rate / 1e9,
        "step_GFLOP": {"products": products / 1e9, "attention": attention / 1e9},
        "share_of_product_rate": {n: (products + attention) / times.median(n) / times.rate for n in steps},
        "times": times.to_dict(),
    }
    return results, lines_of(results, times)


def lines_of(results: dict[str, Any], times: Times) -> list[str]:
    """The results to read."""
    flops, rate = results["step_GFLOP"], results["product_GFLOP_s"]
    work = f"{flops['products']:,.1f} GFLOP of matrix products, {flops['attention']:,.1f} of attention"
    lines = [in_turn.headline(results), f"{results['tokens']:,} tokens; {work}"]
    for name, error in results["errors"].items():
        within = ", ".join(f"{what} within {e:.0e}" for what, e in error.items())
        lines.append(f"equal to the plain version, {name}: {within}")
    lines += ["", in_turn.HEAD, *in_turn.table("step", times), ""]
    for name in [name for name in times.seconds if name not in (PLAIN, REFERENCE)]:
        ratios = in_turn.spread(
            a / b for a, b in zip(times.seconds[REFERENCE], times.seconds[name], strict=True)
        )
        lines.append(
            f"{name} beside {REFERENCE}: {ratios['median']:.2f}x ({ratios['min']:.2f}x to"
            f" {ratios['max']:.2f}x)"
        )
    side = in_turn.product_side(results["small"])
    lines.append(f"{side}-cubed product: {rate:.1f} GFLOP/s; of this rate reach")
    return lines + [f"  {name}: {share:.0%}" for name, share in results["share_of_product_rate"].items()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = in_turn.parser(__doc__)
    parser.add_argument(
        "--compile", action="store_true", help="time compiled layers, too (compiling takes a minute)"
    )
    in_turn.run(measure, parser, arguments)


if __name__ == "__main__":
    main()
