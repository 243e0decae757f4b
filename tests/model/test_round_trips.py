"""What a forward asks the device for: on a GPU every answer that Python waits for stops the queue of
kernels."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import tiny_model as tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unigen.config import SamplingOptions
from unigen.inference.sampler import Canvas, draw, extend, feed_tokens
from unigen.model.kv_cache import Cache
from unigen.sequence.types import Kind

WAITS = {"_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select", "is_nonzero"}
NO_KERNEL = {
    "view",
    "t",
    "transpose",
    "slice",
    "unsqueeze",
    "select",
    "expand",
    "as_strided",
    "detach",
    "_unsafe_view",
    "alias",
    "unbind",
}
NO_KERNEL |= {"split", "split_with_sizes", "squeeze", "permute", "_reshape_alias"}


class Calls(TorchDispatchMode):
    """Counts the operations of PyTorch by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> set[str]:
        return WAITS & self.names.keys()

    @property
    def kernels(self) -> int:
        return sum(n for name, n in self.names.items() if name not in NO_KERNEL)


@pytest.fixture(scope="module")
def model():
    return tiny.build()


def context(model, n: int) -> Cache:
    cache = Cache(model.config.llm.num_hidden_layers)
    extend(model, tiny.SPECIAL, [cache], [tiny.text(random.Random(0), n)])
    return cache


@pytest.mark.parametrize("contexts", [1, 3])
def test_a_decoded_token_waits_for_nothing_and_sorts_nothing(model, contexts):
    caches = [context(model, n) for n in range(3, 3 + contexts)]
    feed_tokens(model, caches, [7] * contexts)
    with Calls() as calls:
        feed_tokens(model, caches, [7] * contexts)
    assert not calls.waits and not {"sort", "argsort", "index_select"} & calls.names.keys()


def test_a_decoded_token_takes_few_kernels(model):
    """46 a layer on a CPU, of which 20 are the parts of its RMS norms (one kernel each on a GPU); it was
    62."""
    counts = {}
    for layers in (3, 5):
        other = model
        if layers == 5:
            config = tiny.config()
            config.llm.num_hidden_layers = 5
            other = type(model)(config).eval()
        cache = context(other, 5)
        feed_tokens(other, [cache], [7])
        with Calls() as calls:
            feed_tokens(other, [cache], [7])
        counts[layers] = calls.kernels
    assert (counts[5] - counts[3]) / 2 <= 46


def test_training_waits_for_nothing(model):
    r = random.Random(3)
    pack = tiny.row(
        [tiny.sample(r) for _ in range(3)]
        + [[tiny.text(r, 5, loss=True), tiny.image(r, Kind.NOISED, 1, (2, 2))]],
        model,
    )
    with Calls() as calls:
        out = model(pack)
        (out.ce.sum() + out.mse.sum()).backward()
    assert not calls.waits


def test_a_step_of_drawing_waits_for_nothing(model):
    full, none = context(model, 4), Cache(model.config.llm.num_hidden_layers)
    canvas = Canvas(
        full,
        none,
        full,
        (3, 3),
        torch.randn(9, model.config.patch_dim, generator=torch.Generator().manual_seed(0)),
    )
    with Calls() as calls:
        draw(model, tiny.SPECIAL, [canvas], SamplingOptions(num_timesteps=4, cfg_interval=(0.0, 1.0)))
    assert not calls.waits
