"""What was predicted of ``gpu.py``'s results before any GPU was seen, with the source of each figure.

Marks of sources: *promise*: the project says so and tests hold it on the CPU. *counted*: bytes, FLOPs or
kernels, counted with the project's modules on fake tensors of full size or in the CPU build. *estimate*:
arithmetic over such counts, with 0.70 PFLOP/s of matrix products, 2.7 TB/s (H100) or 3.9 TB/s (H200) of
memory, 420 and 330 TFLOP/s of attention forward and backward; it passes when the measured value is at most a
quarter worse. *published*: others measured it, on the card and the versions that are named.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

MARGIN = 0.25  # by which an estimate may be too good
COUNTED = 0.1  # by which counted bytes may be off, either way


@dataclass(frozen=True)
class Prediction:
    """The range that a result should lie in."""

    least: float | None
    most: float | None
    source: str
    card: str = ""  # part of the card's name, "" for any device
    said: str = ""  # the figure itself, where the range is wider
    share: float | None = None  # the range is so wide around a formula's value

    def words(self) -> str:
        """The range as a text."""
        ends = [
            f"≥ {self.least:.4g}" if self.least is not None else "",
            f"≤ {self.most:.4g}" if self.most is not None else "",
        ]
        limits = " and ".join(end for end in ends if end)
        return (f"{self.said} ({limits})" if self.said else limits) + (
            f" on {self.card}" if self.card else ""
        )

    def holds(self, value: float) -> bool:
        """Does the value lie in the range? NaN does not."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


def most(value: float, source: str, card: str = "") -> Prediction:
    return Prediction(None, value, source, card)


def least(value: float, source: str, card: str = "") -> Prediction:
    return Prediction(value, None, source, card)


def slowest(value: float, source: str, card: str = "") -> Prediction:
    """An estimate of a time."""
    return Prediction(None, value * (1 + MARGIN), f"estimate: {source}", card, f"{value:g}")


def speed(value: float, source: str, card: str = "") -> Prediction:
    """An estimate of a rate."""
    return Prediction(value * (1 - MARGIN), None, f"estimate: {source}", card, f"{value:g}")


def formula(source: str) -> Prediction:
    """Bytes that a formula gives; see :func:`step_peaks`."""
    return Prediction(None, None, f"counted: {source}", share=COUNTED)


EQUAL = "promise: stopped and resumed is not stopped, to the digit"
RESULT_OF_FLEX = "rounding of the dtype; the same comparison holds on the CPU"
MEMORY = "activations, gradients, weights, moments: step_peaks below"
BASE = (
    "drawing only, full recompute, 16,384 tokens: products 1.13 s, other kernels 0.74 (H200 0.51), attention"
    " 0.36"
)
COMPILED = f"{BASE}; less 0.41 s of other kernels"

TABLE: list[tuple[str, Prediction]] = [
    # part/name (a pattern); several cards have several lines
    ("env/copy", least(2.7, "what the estimates below assume", "H100")),
    ("env/copy", least(3.9, "what the estimates below assume", "H200")),
    ("env/product: gate, up", least(700, "what the estimates below assume", "H100")),
    ("env/product: gate, up", least(700, "what the estimates below assume", "H200")),
    ("env/product: float32", Prediction(40, 70, "estimate: 50 to 60, no tensor core", "H100")),
    ("env/product: float32", Prediction(40, 70, "estimate: 50 to 60, no tensor core", "H200")),
    ("env/product: float32, TF32", least(200, "estimate: several times float32", "H100")),
    ("env/product: float32, TF32", least(200, "estimate: several times float32", "H200")),
    ("flex/bfloat16 *: error", most(2e-2, RESULT_OF_FLEX)),
    ("flex/float32 *: error", most(1e-4, RESULT_OF_FLEX)),
    ("flex/*: compilations", most(2, "counted: one for all lengths, one more for a first one of up to 128")),
    (
        "flex/fell back to other attention",
        most(0, "promise: with a C compiler and Triton, heads of 16 and more need not"),
    ),
    ("flex/attention *: forward", speed(420, "attention, bfloat16, width 128", "H100")),
    ("flex/attention *: forward", speed(420, "attention, bfloat16, width 128", "H200")),
    ("flex/attention *: forward and backward", speed(350, "4 FLOPs at 420 and 10 at 330 TFLOP/s", "H100")),
    ("flex/attention *: forward and backward", speed(350, "4 FLOPs at 420 and 10 at 330 TFLOP/s", "H200")),
    (
        "agree/reference: *",
        most(1.0, "promise: float32 within the reference's tolerances (tools/compare_reference.py)"),
    ),
    ("agree/bfloat16: losses", most(2e-2, "rounding of bfloat16")),
    ("agree/bfloat16: gradients", most(5e-2, "rounding of bfloat16")),
    ("train/first documented command", most(0, "promise: exit code 0 (docs/training.md)")),
    ("train/first documented command: loss", most(1.0, "promise: the loss falls (last over first)")),
    ("train/*: resumed", most(0, EQUAL)),
    ("layers/drawing, draws only, full recompute: 28 layers, reference's MFU", speed(0.36, BASE, "H100")),
    ("layers/drawing, draws only, full recompute: 28 layers, reference's MFU", speed(0.40, BASE, "H200")),
    (
        "layers/drawing, draws only, full recompute, compiled: 28 layers, reference's MFU",
        speed(0.44, COMPILED, "H100"),
    ),
    (
        "layers/drawing, draws only, full recompute, compiled: 28 layers, reference's MFU",
        speed(0.48, COMPILED, "H200"),
    ),
    ("layers/*, peak", formula(MEMORY)),
    (
        "infer/decode",
        slowest(15, "weights 5.1 ms, the rest launches; 12 to 15 ms before launches were saved", "H100"),
    ),
    (
        "infer/decode",
        slowest(15, "weights 3.6 ms, the rest launches; 12 to 15 ms before launches were saved", "H200"),
    ),
    ("infer/kernels a token", most(1749, "counted: in the CPU build, before launches were saved", "NVIDIA")),
    (
        "infer/Euler step, text guidance",
        slowest(0.27, "60 TFLOP a context; three contexts take 0.4 s", "H100"),
    ),
    (
        "infer/Euler step, text and image guidance",
        slowest(0.4, "60 TFLOP a context; three contexts take 0.4 s", "H100"),
    ),
    (
        "infer/VAE encodes 1024 x 1024: peak",
        Prediction(None, 3.0, "counted: 2.6 KB a pixel in float32, 2.7 GB"),
    ),
    ("adapters/*: peak", formula("unigen/training/memory_plan.py")),
    ("full/*: peak *", formula(MEMORY)),
    ("full/step: reference's MFU", speed(0.40, BASE, "H200")),
    ("full/step: reference's MFU", speed(0.36, BASE, "H100")),
    ("full/compiled step: reference's MFU", speed(0.44, COMPILED, "H100")),
    ("full/compiled step: reference's MFU", speed(0.48, COMPILED, "H200")),
    ("vit/a new size costs", most(0.1, "no plans: varlen attention; cuDNN would take 0.95 s", "NVIDIA")),
    (
        "vit/cuDNN, a new shape costs",
        Prediction(None, None, "published: 0.4 s forward (sglang #4650; FunASR #3704, B200, torch 2.11)"),
    ),
    ("kernels/share of attention", most(0.25, "estimate: 0.36 of 2.3 s", "H100")),
    ("kernels/share of other kernels", most(0.40, "estimate: 0.74 of 2.3 s", "H100")),
    ("kernels/share of products", least(0.40, "estimate: 1.13 of 2.3 s", "H100")),
    ("small/*: exit code", most(0, "promise: unigen generate works")),
]


def judged(
    part: str, name: str, measured: Any, card: str, value: float | None = None
) -> tuple[str, bool | None]:
    """What was predicted, as a text, and whether it holds: None where nothing was predicted for this device.

    Args:
        part, name: of the result.
        measured: a number; other results are not judged.
        card: the device's name.
        value: what a formula gives, where the prediction is one.
    """
    known = [prediction for pattern, prediction in TABLE if fnmatchcase(f"{part}/{name}", pattern)]
    fitting = [prediction for prediction in known if prediction.card in card]
    if not known:
        return "", None
    prediction = (fitting or known)[0]
    if prediction.share is not None and value is not None:
        wide = prediction.share * value
        prediction = replace(prediction, least=value - wide, most=value + wide, said=f"{value:.4g}")
    text = "; ".join(part for part in (prediction.words(), prediction.source) if part)
    judgeable = (
        isinstance(measured, int | float) and fitting and (prediction.least, prediction.most) != (None, None)
    )
    return text, prediction.holds(measured) if judgeable else None


# ---- memory


@dataclass(frozen=True)
class Held:
    """Bytes and parameters of a model that trains."""

    weights: float  # bytes of all parameters
    trained: float  # parameters that train
    trained_layer: float  # matrices of one decoder layer that train, parameters
    moments: float  # bytes of the optimiser's moments


def token_bytes(llm: Any, policy: str, und: float) -> float:
    """Bytes a token and layer that stay for the backward pass, under bfloat16 autocast.

    ``und`` is the share of understanding tokens.
    """
    hidden, inner, heads, kv_heads = (
        llm.hidden_size,
        llm.intermediate_size,
        llm.num_attention_heads,
        llm.num_key_value_heads,
    )
    width = hidden // heads
    q, kv = heads * width, kv_heads * width
    return {
        "none": 26 * hidden + 10 * (q + kv) + 8 * inner + 8 * heads + 4 * kv_heads + 8 + 8 * width,
        "selective": (
            4 * hidden + 4 * q + 4 * kv + 4 * heads + 2 * q + 2 * hidden + 2 * inner + 2 * hidden * und
        ),
        "full": 4 * hidden,
    }[policy]


def step_peaks(llm: Any, policy: str, tokens: int, und: int, held: Held) -> tuple[float, float]:
    """Bytes at the peak of a step's first micro-batch, and of a later one, whose forward finds gradients
    there.

    Autocast keeps no copies of weights; the pictures' latents are there; the ViT is frozen and sees nothing.
    """
    kept = llm.num_hidden_layers * token_bytes(llm, policy, und / tokens)
    forward = tokens * (kept + 8 * llm.intermediate_size + 6 * llm.hidden_size)
    backward = (
        tokens * (kept + token_bytes(llm, "none", und / tokens) + 4 * llm.intermediate_size)
        + 2 * held.trained_layer
    )
    gradients = 4 * held.trained
    fixed = held.weights + held.moments
    return fixed + max(forward, gradients + backward), fixed + gradients + max(forward, backward)
