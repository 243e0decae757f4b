"""Sampling settings: one default each, one set of names, the older names still taken, every mistake named."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import get_type_hints

import pytest

from unigen.commands.generate.options import GenerateOptions
from unigen.config import Config, SamplingOptions
from unigen.inference.inferencer import InterleaveInferencer
from unigen.inference.options import NAMES, OLD_NAMES, InferenceError, Settings, sampling_options
from unigen.inference.prompts import SAMPLES

# The reference's interleave_inference: names in order, and defaults.
REFERENCE = {
    "think": False, "understanding_output": False, "max_think_token_n": 1000, "do_sample": False,
    "text_temperature": 0.3,
    "cfg_text_scale": 3.0, "cfg_img_scale": 1.5, "cfg_interval": (0.4, 1.0), "timestep_shift": 3.0,
    "num_timesteps": 50,
    "cfg_renorm_min": 0.0, "cfg_renorm_type": "global",
}  # fmt: skip


def test_the_reference_s_signature_comes_first_with_its_defaults():
    parameters = inspect.signature(InterleaveInferencer.interleave_inference).parameters
    names = [name for name, p in parameters.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert names == ["self", "input_lists", *REFERENCE, "image_shapes", "enable_taylorseer"]
    assert {name: parameters[name].default for name in REFERENCE} == REFERENCE


def test_every_entrance_has_the_same_defaults():
    defaults = {f.name: f.default for f in fields(SamplingOptions)}
    assert {f.name: f.default for f in fields(GenerateOptions) if f.name in defaults} == defaults
    for name, value in REFERENCE.items():
        if name != "understanding_output":
            assert defaults[OLD_NAMES.get(name, (name,))[0]] == value
    changed = {name for name in NAMES if getattr(SAMPLES, name) != defaults[name]}
    assert changed == {"max_new_tokens", "num_timesteps"}


def test_keywords_and_checks_are_those_of_the_dataclass():
    hints = get_type_hints(SamplingOptions)
    assert get_type_hints(Settings) == hints and set(hints) == set(NAMES)
    sampling_options()  # the defaults are good


def test_older_names_mean_the_new_ones():
    found = sampling_options(
        max_think_token_n=7, text_temperature=1.0, image_shapes=(32, 48), cfg_interval=[0, 1]
    )
    assert (found.max_new_tokens, found.temperature, found.height, found.width) == (7, 1.0, 32, 48)
    assert found.cfg_interval == (0, 1)
    assert sampling_options(image_shapes=None, enable_taylorseer=False) == SamplingOptions()
    base = SamplingOptions(num_timesteps=9)
    assert sampling_options(base, seed=1) == SamplingOptions(
        num_timesteps=9, seed=1
    ) and base == SamplingOptions(num_timesteps=9)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cfg_txt_scale": 2.0}, "did you mean cfg_text_scale"),
        ({"xyz": 1}, "max_new_tokens"),
        ({"enable_taylorseer": True}, "enable_taylorseer"),
        ({"text_temperature": 1.0, "temperature": 0.5}, "text_temperature"),
        ({"image_shapes": (3,)}, "image_shapes"),
        ({"height": 32}, "height and width"),
        ({"num_timesteps": 1}, "num_timesteps"),
        ({"num_timesteps": 2.5}, "num_timesteps"),
        ({"num_timesteps": True}, "num_timesteps"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"cfg_text_scale": float("nan")}, "cfg_text_scale"),
        ({"cfg_interval": [0.4]}, "cfg_interval"),
        ({"cfg_renorm_type": "local"}, "global, channel"),
        ({"cfg_renorm_min": -1}, "cfg_renorm_min"),
        ({"timestep_shift": 0}, "timestep_shift"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"think": "yes"}, "think"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_its_fix(settings, words):
    with pytest.raises(InferenceError, match=words) as caught:
        sampling_options(**settings)
    assert "Fix:" in str(caught.value)


def test_training_s_own_options_are_no_sampling_settings():
    """Two options of one name in the two dataclasses must be meant: the shift of times, the seed, and what may
    stand in a text."""
    assert {f.name for f in fields(Config)} & set(NAMES) == {"timestep_shift", "seed", "allow_control_tokens"}
