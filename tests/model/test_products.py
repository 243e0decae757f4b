"""Products of linear layers by oneDNN are PyTorch's own, and only float32 on a CPU goes there."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import pytest
import tiny_model as tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unigen.model import products
from unigen.model.layers import Linear

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN"
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that oneDNN got."""
    found, genuine = [], products.product

    def counted(x: Tensor, *rest: Tensor) -> Tensor:
        found.append(tuple(x.shape))
        return genuine(x, *rest)

    monkeypatch.setattr(products, "product", counted)
    return found


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outcome(function, x: Tensor, weight: Tensor, bias: Tensor | None, learn: tuple[bool, ...], grad: Tensor):
    """The result, and the gradients of what learns."""
    parts = [t if t is None else t.detach().requires_grad_(on) for t, on in zip((x, weight, bias), learn)]
    y = function(*parts)
    learning = [t for t in parts if t is not None and t.requires_grad]
    return [y.detach(), *(torch.autograd.grad(y, learning, grad) if learning else [])]


@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    learn=st.tuples(*[st.booleans()] * 3),
    with_bias=st.booleans(),
    across=st.booleans(),
    same=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_values_and_gradients_are_those_of_pytorch(
    shape: list[int],
    inputs: int,
    outputs: int,
    learn: tuple[bool, ...],
    with_bias: bool,
    across: bool,
    same: bool,
):
    """Also of inputs that lie across, and for gradients that are one number everywhere (of a sum)."""
    x, weight = numbers(*shape, inputs, seed=1), numbers(outputs, inputs, seed=2)
    if across:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
        weight = weight.t().contiguous().t()
    bias = numbers(outputs, seed=3) if with_bias else None
    grad = torch.ones(()).expand(*shape, outputs) if same else numbers(*shape, outputs, seed=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "FEW_ROWS", 0)
        patch.setattr(products, "WORTH", 0)
        patch.setattr(products, "AVX512_IS_LEFT", True)
        found = outcome(products.linear, x, weight, bias, learn, grad)
    doubled = [t if t is None else t.double() for t in (x, weight, bias)]
    exact = outcome(F.linear, *doubled, learn, grad.double())
    longest = max(math.prod(shape), inputs, outputs)  # of the sums
    for got, wanted in zip(found, exact, strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=2e-6 * longest**0.5)


@pytest.mark.parametrize(("what", "kept"), [("weight", 1), ("x", 1), ("both", 2), ("bias", 0)])
def test_what_no_gradient_needs_is_not_kept(by_onednn: None, what: str, kept: int):
    """A frozen matrix (under an adapter) needs no input, an input that learns nothing no matrix."""
    x, layer = numbers(5, 8), Linear(8, 4)
    x.requires_grad_(what in ("x", "both"))
    layer.weight.requires_grad_(what in ("weight", "both"))
    layer.bias.requires_grad_(what == "bias")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert len(saved) == kept


def test_only_float32_outside_of_autocast_goes_there(by_onednn: None, calls: list[tuple[int, ...]]):
    layer = Linear(8, 4)
    layer(numbers(3, 8))
    assert calls == [(3, 8)]
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(numbers(3, 8)).dtype == torch.bfloat16
    layer.double()(numbers(3, 8).double())
    layer.bfloat16()(numbers(3, 8).bfloat16())
    with torch.backends.mkldnn.flags(enabled=False):
        layer.float()(numbers(3, 8))
    layer(numbers(0, 8))
    assert layer.to("meta")(torch.empty(3, 8, device="meta")).shape == (3, 4)
    assert calls == [(3, 8)]


@pytest.mark.parametrize("left", [True, False])
def test_which_products_go_there(monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, ...]], left: bool):
    """Of few rows those with a large matrix; of more, where MKL leaves AVX-512, those with a smaller one."""
    monkeypatch.setattr(products, "AVX512_IS_LEFT", left)
    large, small, tiny_one = Linear(512, 256), Linear(128, 256), Linear(128, 255)
    with torch.no_grad():
        for layer in (large, small, tiny_one):
            for rows in (1, 64, 65):
                layer(numbers(rows, layer.in_features))
    large(numbers(1, 512))
    many = [(65, 512), (65, 128), (1, 512)]
    assert calls == ([(1, 512), (64, 512), *many] if left else [(1, 512), (64, 512)])


def test_memory_does_not_grow_with_every_new_number_of_rows():
    """In a process of its own: what has its place in memory now is measured."""
    code = (
        "import torch\nfrom pathlib import Path\nfrom unigen.model import products\n"
        "def resident(): return int(Path('/proc/self/statm').read_text().split()[1]) * 4096\n"
        "weight, x = torch.zeros(256, 256), torch.zeros(900, 256)\n"
        "for rows in range(100, 200): products.product(x[:rows], weight)\n"
        "before = resident()\n"
        "for rows in range(200, 900): products.product(x[:rows], weight)\n"
        "print((resident() - before) / 2**20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 120  # MiB; with the default capacity 470


@pytest.mark.parametrize(("capability", "vendor"), [("AVX2", "AuthenticAMD"), ("AVX512", "GenuineIntel")])
def test_mkl_keeps_what_it_computes_as_fast(monkeypatch: pytest.MonkeyPatch, capability: str, vendor: str):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "vendor", lambda: vendor)
    assert not products.avx512_is_left()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(products, "vendor", lambda: "AuthenticAMD")
    assert products.avx512_is_left()


def test_every_matrix_of_the_model_goes_there(by_onednn: None, calls: list[tuple[int, ...]]):
    model = tiny.build().train()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert all(isinstance(module, Linear) for module in linear)
    ran = []

    def note(module: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:
        if y.numel():
            ran.append(tuple(inputs[0].shape))

    for module in linear:
        module.register_forward_hook(note)
    r = random.Random(1)
    model(tiny.row([tiny.sample(r) for _ in range(4)], model))
    assert ran and calls == ran
