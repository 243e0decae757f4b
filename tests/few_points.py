"""Imported first, in the forks of the tests, too: answers while a model trains are drawn with few points in time,
and what has been imported by then is garbage to nobody, so that no collection looks through it again."""

import gc

import tiny  # noqa: F401  (what most forks need)
from kills import PRELOAD

from unigen.inference.prompts import SAMPLES

SAMPLES.num_timesteps = 4
if __name__ not in PRELOAD:
    PRELOAD += ["pytest", __name__]
gc.freeze()
