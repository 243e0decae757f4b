"""The names in a run's folder, made and parsed here alone.

RUN/
  config.json          the options
  train.log            all that the run said
  metrics.jsonl        a line for every step and every validation
  bad_steps.jsonl      steps that were left out, with their records
  bad_records.jsonl    records that were left out
  step_N/              a checkpoint: weights, optimiser, trainer.json, training_config.json, manifest.json
  best/                the weights of the best validation
  probe.json           losses and answers of the model that the run began with
  samples/step_N/      answers to the prompts: index.json and pictures
  samples.png          their pictures as a grid: prompts by steps
  ranks/               rank_N.json, the heartbeat of a process; rank_N.stack.txt and hang.txt after a hang
  tensorboard/, wandb/, wandb_run_id, trackio_run_id     of the trackers
  old-N/               an earlier run, set aside
  .starting/           ranks/ of a run that is not yet known to work: nothing else has changed
  .lock                held by the process that trains
  .old.new/            an earlier run that is being set aside
  .NAME.partial-PID    NAME being written, and .NAME.old-PID while it is replaced (see files.py)
"""

from __future__ import annotations

import re

from unigen.files import leftover
from unigen.model.run_options import RUN_OPTIONS

CONFIG = "config.json"
METRICS = "metrics.jsonl"
LOG = "train.log"
BAD_STEPS = "bad_steps.jsonl"
BAD_RECORDS = "bad_records.jsonl"
BEST = "best"
SAMPLES = "samples"
PROBE = "probe.json"
RANKS = "ranks"
TENSORBOARD = "tensorboard"
WANDB = "wandb"
LOCK = ".lock"
HANG = "hang.txt"  # in ranks: who held up the run
SETTING_ASIDE = ".old.new"
STARTING = ".starting"
STARTING_RANKS = f"{STARTING}/{RANKS}"

# in a checkpoint
MANIFEST = "manifest.json"
TRAINER = "trainer"  # states: what a resume needs, and the options
OPTIONS = RUN_OPTIONS.removesuffix(".json")

SAMPLES_GRID = "samples.png"
SAMPLES_INDEX = "index.json"  # in samples/step_N

_STEP = re.compile(r"step_([0-9]{1,15})")
_EARLIER = re.compile(r"old-[0-9]+")
_RANK = re.compile(r"rank_([0-9]{1,7})(\.json|\.stack\.txt)")


def step_name(step: int) -> str:
    """The folder of a checkpoint, or of samples, after ``step`` steps."""
    return f"step_{step}"


def step_of(name: str) -> int | None:
    """N of ``step_N``; None for another name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def is_checkpoint(name: str) -> bool:
    return name == BEST or step_of(name) is not None


def is_samples(name: str) -> bool:
    """Is it the folder of a step's samples, or what a kill left of one?"""
    return step_of(name.removeprefix(".").partition(".")[0]) is not None


def unfinished(name: str) -> tuple[str, str] | None:
    """The checkpoint, and whether it is ``partial`` or ``old``, that a hidden folder was to become or was."""
    found = leftover(name)
    return found if found and is_checkpoint(found[0]) else None


def state_file(state: str) -> str:
    return f"{state}.json"


def earlier_name(number: int) -> str:
    return f"old-{number}"


def is_earlier(name: str) -> bool:
    return _EARLIER.fullmatch(name) is not None


def heartbeat_file(rank: int) -> str:
    """The heartbeat of a process, in ``ranks``."""
    return f"rank_{rank}.json"


def stack_file(rank: int) -> str:
    """The stack of a process that hung, in ``ranks``."""
    return f"rank_{rank}.stack.txt"


def rank_of(name: str) -> int | None:
    """The rank that a heartbeat or a stack is of; None for another name."""
    match = _RANK.fullmatch(name)
    return int(match[1]) if match else None


def is_of_ranks(name: str) -> bool:
    """Is it a file of ``ranks``, or what a kill left of one?"""
    return name == HANG or rank_of(name.removeprefix(".").removesuffix(".partial")) is not None


def run_id_file(tracker: str) -> str:
    """The file with the id that a tracker gave the run."""
    return f"{tracker}_run_id"


# What a run leaves in its folder beside its checkpoints; heartbeats are removed by those who write them.
_RUN_IDS = (run_id_file(WANDB), run_id_file("trackio"))
FILES = (METRICS, PROBE, SAMPLES_GRID, LOG, BAD_STEPS, BAD_RECORDS, CONFIG, *_RUN_IDS)
FOLDERS = (BEST, SAMPLES, TENSORBOARD, WANDB)
