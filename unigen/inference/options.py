"""Sampling settings from keywords: one set of names, the reference's too, every value checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from numbers import Integral, Real
from typing import Any, Literal, TypedDict

from unigen.config import SamplingOptions, UserError, nearest
from unigen.model.flow import RENORM_TYPES


class InferenceError(UserError):
    """A request cannot be answered; the message says why and the fix."""


class Renamed(TypedDict, total=False):
    """The settings that the reference calls otherwise, as keywords for editors and type checkers."""

    max_new_tokens: int
    temperature: float
    height: int | None
    width: int | None


class Settings(Renamed, total=False):
    """All fields of :class:`SamplingOptions` as keywords."""

    think: bool
    do_sample: bool
    num_timesteps: int
    timestep_shift: float
    cfg_text_scale: float
    cfg_img_scale: float
    cfg_interval: tuple[float, float]
    cfg_renorm_min: float
    cfg_renorm_type: Literal["global", "channel", "text_channel"]
    seed: int | None


NAMES = tuple(f.name for f in fields(SamplingOptions))
# The reference's names -> ours. A shape is (height, width).
OLD_NAMES: dict[str, tuple[str, ...]] = {
    "max_think_token_n": ("max_new_tokens",),
    "text_temperature": ("temperature",),
    "image_shapes": ("height", "width"),
}


def sampling_options(base: SamplingOptions | None = None, /, **settings: Any) -> SamplingOptions:
    """``base`` (default: :class:`SamplingOptions`) with ``settings``, whose names may be the reference's.

    Raises:
        InferenceError: a name is unknown or given twice, or a value cannot work.
    """
    if settings.pop("enable_taylorseer", False):
        raise InferenceError("enable_taylorseer is true, and there is no TaylorSeer here. Fix: leave it out")
    for old, new in OLD_NAMES.items():
        if old in settings:
            _rename(settings, old, new)
    for name in settings:
        if name not in NAMES:
            near = nearest(name, list(NAMES))
            words = f"did you mean {near}?" if near else f"settings are {', '.join(NAMES)}"
            raise InferenceError(f"unknown sampling setting {name!r}; {words} Fix: see SamplingOptions")
    if isinstance(settings.get("cfg_interval"), list):  # of YAML, JSON or the reference
        settings["cfg_interval"] = tuple(settings["cfg_interval"])
    return check_sampling(replace(base or SamplingOptions(), **settings))


def _rename(settings: dict[str, Any], old: str, new: Sequence[str]) -> None:
    twice = [name for name in new if name in settings]
    if twice:
        raise InferenceError(
            f"{old} is the older name of {' and '.join(new)}, and both are given. Fix: keep {twice[0]}"
        )
    value = settings.pop(old)
    values = (value,) if len(new) == 1 else (None,) * len(new) if value is None else tuple(value)
    if len(values) != len(new):
        raise InferenceError(f"{old} is {value!r}. Fix: give ({', '.join(new)})")
    settings.update(zip(new, values))


# ---- values


def _whole(low: int, optional: bool = False) -> Callable[[Any], bool]:
    def good(value: Any) -> bool:
        return (optional and value is None) or (
            isinstance(value, Integral) and not isinstance(value, bool) and low <= value < 2**63
        )

    return good


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


# Setting -> (is its value good?, what it should be).
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "think": (_flag, "true or false"),
    "max_new_tokens": (_whole(1), "a whole number above 0"),
    "do_sample": (_flag, "true or false"),
    "temperature": (lambda v: _number(v) and v >= 0, "a number of at least 0"),
    "height": (_whole(1, optional=True), "pixels, a whole number above 0"),
    "width": (_whole(1, optional=True), "pixels, a whole number above 0"),
    "num_timesteps": (_whole(2), "a whole number of at least 2 (one Euler step)"),
    "timestep_shift": (lambda v: _number(v) and v > 0, "a number above 0"),
    "cfg_text_scale": (_number, "a number"),
    "cfg_img_scale": (_number, "a number"),
    "cfg_interval": (
        lambda v: isinstance(v, list | tuple) and len(v) == 2 and all(map(_number, v)),
        "a list of two numbers",
    ),
    "cfg_renorm_min": (lambda v: _number(v) and v >= 0, "a number of at least 0"),
    "cfg_renorm_type": (lambda v: v in RENORM_TYPES, f"one of {', '.join(RENORM_TYPES)}"),
    "seed": (_whole(0, optional=True), "a whole number of at least 0"),
}


def wrong_value(name: str, value: Any) -> str | None:
    """What the setting should be where ``value`` cannot be it; None where it can."""
    good, words = _VALUES[name]
    return None if good(value) else words


def check_sampling(options: SamplingOptions) -> SamplingOptions:
    """Returns ``options``.

    Raises:
        InferenceError: a value cannot work, or two do not go together; says which, why, and the fix.
    """
    for name in NAMES:
        value = getattr(options, name)
        if words := wrong_value(name, value):
            raise InferenceError(f"{name} is {value!r}. Fix: {words}")
    if options.do_sample and not options.temperature > 0:
        raise InferenceError(
            f"temperature is {options.temperature}; sampling takes one above 0. Fix: do_sample=False takes"
            " the likeliest token"
        )
    if (options.height is None) != (options.width is None):
        raise InferenceError("height and width go together. Fix: give both, or neither")
    return options
