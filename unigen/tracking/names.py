"""What numbers are called in TensorBoard, Weights & Biases and Trackio: in groups, which each of them shows
as a section of its own. ``metrics.jsonl`` keeps the plain names."""

from __future__ import annotations

GROUPED = {
    "loss": "train/loss",
    "text_loss": "train/loss_text",
    "image_loss": "train/loss_image",
    "preserve_loss": "train/loss_preserve",
    "preserve_text_loss": "train/loss_preserve_text",
    "preserve_image_loss": "train/loss_preserve_image",
    "text_tokens": "train/tokens_text",
    "image_tokens": "train/tokens_image",
    "preserve_text_tokens": "train/tokens_preserve_text",
    "preserve_image_tokens": "train/tokens_preserve_image",
    "val_loss": "val/loss",
    "val_text_loss": "val/loss_text",
    "val_image_loss": "val/loss_image",
    "learning_rate": "lr/base",
    "tokens_per_second": "system/tokens_per_second",
    "data_wait": "system/data_wait",
}
"""Name in ``metrics.jsonl`` -> name in a tracker."""
_RATE = "learning_rate_"  # of a part of the model that has its own


def shown_as(name: str) -> str:
    """The name of a number in a tracker: those with a group of their own (``eval/...``, ``probe/...``,
    ``val/...``) keep it, what else is not listed is one of training."""
    if name.startswith(_RATE):
        return f"lr/{name.removeprefix(_RATE)}"
    return GROUPED.get(name) or (name if "/" in name else f"train/{name}")
