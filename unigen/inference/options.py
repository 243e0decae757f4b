"""Sampling settings from keywords: one set of names, the reference's too, every value checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Literal, NamedTuple, TypedDict

from unigen.config import ConfigError, SamplingOptions, UserError, nearest
from unigen.messages import listed
from unigen.values import shown


class InferenceError(UserError):
    """A request cannot be answered; the message says why and the fix."""


class Guidance(NamedTuple):
    """What the contexts that guidance compares with hold of thinking; default as the reference's inferencer.

    Args:
        thought: is in the no-image context too.
        system: the no-text context of a picture that was thought about holds the system prompt (and what else
            comes before the last text). Otherwise it is empty, and its positions go on behind all that.
    """

    thought: bool = False
    system: bool = True


class Renamed(TypedDict, total=False):
    """The settings that the reference calls otherwise or lacks, as keywords for editors and type checkers."""

    max_new_tokens: int
    temperature: float
    height: int | None
    width: int | None
    allow_control_tokens: bool


class _Common(Renamed, total=False):
    """The settings whose names and types are the reference's."""

    think: bool
    do_sample: bool
    num_timesteps: int
    timestep_shift: float
    cfg_text_scale: float
    cfg_img_scale: float
    cfg_renorm_min: float
    seed: int | None


class Settings(_Common, total=False):
    """All fields of :class:`SamplingOptions` as keywords."""

    cfg_interval: tuple[float, float]
    cfg_renorm_type: Literal["global", "channel", "text_channel"]


class ReferenceSettings(_Common, total=False):
    """The keywords of ``InterleaveInferencer.interleave_inference``, whose names are the reference's."""

    understanding_output: bool
    max_think_token_n: int
    text_temperature: float
    cfg_interval: Sequence[float]
    cfg_renorm_type: str
    image_shapes: Sequence[int] | None
    enable_taylorseer: bool
    initial_noise: Any
    trace: Any


NAMES = tuple(f.name for f in fields(SamplingOptions))
MIN_TEMPERATURE = 0.001  # below, a logit divided by it is infinite
_OF_TEXTS = ("max_new_tokens", "do_sample", "temperature")
_OF_GUIDANCE = ("cfg_img_scale", "cfg_interval", "cfg_renorm_min", "cfg_renorm_type")
_OF_PICTURES = ("height", "width", "num_timesteps", "timestep_shift", "cfg_text_scale", *_OF_GUIDANCE)
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
    return check_sampling(base or SamplingOptions(), **settings)


def _rename(settings: dict[str, Any], old: str, new: Sequence[str]) -> None:
    twice = [name for name in new if name in settings]
    if twice:
        raise InferenceError(
            f"{old} is the older name of {listed(new)}, and both are given. Fix: keep {twice[0]}"
        )
    value = settings.pop(old)
    values = (value,) if len(new) == 1 else (None,) * len(new) if value is None else value
    if not isinstance(values, list | tuple) or len(values) != len(new):
        raise InferenceError(f"{old} is {shown(value)}. Fix: give ({', '.join(new)})")
    settings.update(zip(new, values))


def check_sampling(options: SamplingOptions, **settings: Any) -> SamplingOptions:
    """``options`` with ``settings``, every value read and all of them together.

    Raises:
        InferenceError: a value cannot work, or two do not go together; says which, why, and the fix.
    """
    if not isinstance(options, SamplingOptions):
        raise InferenceError(f"options is {shown(options)}. Fix: unigen.config.SamplingOptions(...)")
    try:
        o = replace(options, **settings)
    except ConfigError as error:
        raise InferenceError(str(error)) from None
    if o.do_sample and o.temperature < MIN_TEMPERATURE:
        raise InferenceError(
            f"temperature is {o.temperature}; sampling takes one of at least {MIN_TEMPERATURE}. Fix:"
            " do_sample=False takes the likeliest token"
        )
    if (o.height is None) != (o.width is None):
        raise InferenceError("height and width go together, and one is missing. Fix: give both, or neither")
    if o.cfg_interval[0] >= o.cfg_interval[1]:
        raise InferenceError(
            f"cfg_interval is {o.cfg_interval}, in which no time lies. Fix: the lower first; cfg_text_scale 1"
            " turns guidance off"
        )
    return o


def idle_settings(options: SamplingOptions, usual: SamplingOptions, writes: bool, draws: bool) -> list[str]:
    """The settings that were changed from ``usual`` and that nothing reads, where the answer has texts
    (``writes``; a thought is one) or pictures (``draws``)."""
    idle = list(_OF_TEXTS if not writes else () if options.do_sample else ("temperature",))
    idle += _OF_PICTURES if not draws else _OF_GUIDANCE if options.cfg_text_scale <= 1 else ()
    return [name for name in idle if getattr(options, name) != getattr(usual, name)]
