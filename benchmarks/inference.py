"""Speed of answers beside a plain version of the reference's algorithm.

    python benchmarks/inference.py [--threads N] [--json]       on a machine that does nothing else
    python benchmarks/inference.py --small                      seconds; tells only that the script works

Four requests to InterleaveInferencer, float32, prompt included:

- text: 64 tokens after a prompt of 200, the likeliest token each time;
- 4 texts: four such requests at once (the plain version takes one after another, as the reference does);
- picture: 256 latent tokens in 10 steps from a prompt of 40 words, every step guided (text 3.0, picture 1.5);
- edit: the same with a picture of 256 latent and 256 ViT tokens before the prompt.

The model has hidden 512 and 8 layers in BAGEL's proportions (small_bagel.py); its latents are unshuffled
pixels, so no VAE runs. Its weights are random, and no text ends early. plain.py says what the plain version
does. Both have the same weights and run one after the other, round by round; before that, tokens must be
equal, and latents equal within 1e-4. The kernels of a decoded token are the operators that PyTorch
dispatches, views apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import in_turn
import plain
import small_bagel
from in_turn import PLAIN, Disagreement
from small_bagel import FULL, SMALL, SPECIAL, Size, WordIds, build_model, words
from torch import Tensor

from unigen.inference.inferencer import InterleaveInferencer
from unigen.model.bagel import Bagel

GUIDANCE = {
    "cfg_text_scale": 3.0,
    "cfg_img_scale": 1.5,
    "cfg_interval": (0.0, 1.0),
    "cfg_renorm_type": "global",
    "cfg_renorm_min": 0.0,
    "timestep_shift": 3.0,
}
AT_ONCE = 4


@dataclass(frozen=True)
class Request:
    """What is asked. Answers are a list of texts (token ids), or a picture's latent tokens [M, patch_dim]."""

    plain: Callable[[Bagel], Any]
    unigen: Callable[[InterleaveInferencer], Any]


def text_request(size: Size, new_tokens: int | None = None) -> Request:
    """A prompt that is answered in text."""
    prompt, count = words(size, size.question, seed=1), new_tokens or size.new_tokens

    def unigen(inferencer: InterleaveInferencer) -> list[list[int]]:
        trace: dict[str, list[Tensor]] = {}
        options = {"understanding_output": True, "max_think_token_n": count}
        inferencer.interleave_inference([prompt], trace=trace, **options)
        return [trace["tokens"][0].tolist()[1:]]

    return Request(lambda model: [plain.answer(model, SPECIAL, WordIds().encode(prompt), count)[1:]], unigen)


def texts_request(size: Size) -> Request:
    """Several prompts that are answered in text at once; the plain version takes them one after another."""
    prompts = [words(size, size.question, seed=1 + i) for i in range(AT_ONCE)]

    def unigen(inferencer: InterleaveInferencer) -> list[list[int]]:
        options = {"outputs": ["text"], "max_new_tokens": size.new_tokens}
        answers = inferencer.unified_generate_batch([[p] for p in prompts], **options)
        return [WordIds().encode(text) for (text,) in answers]

    def one_by_one(model: Bagel) -> list[list[int]]:
        return [plain.answer(model, SPECIAL, WordIds().encode(p), size.new_tokens)[1:] for p in prompts]

    return Request(one_by_one, unigen)


def picture_request(size: Size, edit: bool) -> Request:
    """A prompt that is answered with a picture; with ``edit`` a picture comes first."""
    prompt, side = words(size, size.prompt, seed=7), size.side * small_bagel.LATENT_STRIDE
    before = small_bagel.picture(size) if edit else None
    guidance = (GUIDANCE[name] for name in ("timestep_shift", "cfg_text_scale", "cfg_img_scale"))
    start = small_bagel.noise(small_bagel.model_config(size), size)
    how = plain.Guided(start, (size.side, size.side), size.steps, *guidance)
    asked = [before, prompt] if edit else [prompt]
    options = {**GUIDANCE, "image_shapes": (side, side), "num_timesteps": size.steps + 1}

    def unigen(inferencer: InterleaveInferencer) -> Tensor:
        trace: dict[str, list[Tensor]] = {}
        inferencer.interleave_inference(asked, initial_noise=start, trace=trace, **options)
        return trace["latent"][0]

    def one_branch_after_another(model: Bagel) -> Tensor:
        return plain.draw(model, SPECIAL, WordIds().encode(prompt), before, how)

    return Request(one_branch_after_another, unigen)


def requests(size: Size) -> dict[str, Request]:
    return {
        "text": text_request(size),
        f"{AT_ONCE} texts": texts_request(size),
        "picture": picture_request(size, edit=False),
        "edit": picture_request(size, edit=True),
    }


def check(name: str, wanted: Any, got: Any, size: Size) -> float:
    """The largest difference of two pictures, relative to the largest value; 0 for equal texts.

    Raises:
        Disagreement: they are not equal, or a text is not as long as was asked.
    """
    if isinstance(wanted, Tensor):
        return in_turn.agree(f"{name}: latents", got, wanted)
    for i, (own, tokens) in enumerate(zip(got, wanted, strict=True)):
        if own != tokens:
            at = next(
                (at for at, pair in enumerate(zip(own, tokens)) if pair[0] != pair[1]),
                min(len(own), len(tokens)),
            )
            raise Disagreement(f"{name}: text {i} differs from its token {at} on")
        if len(own) != size.new_tokens - 1:
            raise Disagreement(f"{name}: text {i} has {len(own)} tokens, not {size.new_tokens - 1}")
    return 0.0


def token_kernels(run: Callable[[Request], object], size: Size, few: int = 2, many: int = 6) -> float:
    """Kernels of a decoded token: what a longer answer runs more than a shorter one."""
    counts = [in_turn.kernels(lambda n=n: run(text_request(size, n))) for n in (few, many)]
    return (counts[1] - counts[0]) / (many - few)


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Checks and times; the results as JSON values, and as lines to read.

    Raises:
        Disagreement: the variants do not give the same answers.
    """
    size = SMALL if options.small else FULL
    model = build_model(size)
    inferencer = InterleaveInferencer(model, tokenizer=WordIds())
    ways: dict[str, Callable[[Request], Any]] = {
        PLAIN: lambda r: r.plain(model),
        "unigen": lambda r: r.unigen(inferencer),
    }
    asked = requests(size)
    errors: dict[str, dict[str, float]] = {}
    for name, request in asked.items():
        wanted = ways[PLAIN](request)
        errors[name] = {w: check(name, wanted, run(request), size) for w, run in ways.items() if w != PLAIN}
    kernels = {way: token_kernels(run, size) for way, run in ways.items()}
    results: dict[str, Any] = {
        "benchmark": "inference",
        "small": options.small,
        "machine": in_turn.machine(),
        "layers": size.layers,
        "errors": errors,
        "kernels_a_token": kernels,
        "times": {},
    }
    lines = [in_turn.headline(results)]
    for name, error in errors.items():
        for way, e in error.items():
            how = f"within {e:.0e}" if e else "exactly"
            lines.append(f"equal to the plain version, {way}: {name} {how}")
    for way, count in kernels.items():
        lines.append(f"kernels of a decoded token, {way}: {count:,.1f} ({count / size.layers:.1f} a layer)")
    lines += ["", in_turn.HEAD]
    for name, request in asked.items():
        asking = {way: lambda r=request, run=run: run(r) for way, run in ways.items()}
        times = in_turn.time_in_turn(asking, options)
        results["times"][name] = times.to_dict()
        lines += in_turn.table(name, times)
    return results, lines


def main(arguments: Sequence[str] | None = None) -> None:
    in_turn.run(measure, in_turn.parser(__doc__), arguments)


if __name__ == "__main__":
    main()
