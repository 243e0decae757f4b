"""A GPU that is not there: PyTorch compiles for it, and what would be loaded onto it is kept instead.

Functions are traced on CPU tensors (autograd refuses tensors of a device that does not exist). Their forward
and backward graphs are then moved to "cuda", and PyTorch's own Inductor and Triton lower, compile and load
the kernels as they would on the real card: same configurations, same refusals ("out of resource: shared
memory"). Nothing is launched. What PyTorch decides while it traces, by device, is decided for a CPU.

All that reaches into the internals of PyTorch and Triton is in this file. Tried on torch 2.11.0 with triton
3.6.0, and on torch 2.13.0 with triton 3.7.1, both in builds for CUDA 13.0:

    torch._dynamo.device_interface.register_interface_for_device  what Inductor asks about the card
    torch.cuda.get_device_properties, get_device_capability       the same, asked elsewhere
    triton.backends.backends["nvidia"].driver                     what Triton asks, and where it loads kernels
    torch._inductor.compile_fx.compile_fx(inner_compile=...)      between tracing and lowering
    torch._functorch.config.force_non_lazy_backward_lowering      backward graphs are lowered at once
    torch.nn.attention.flex_attention._validate_device,
    torch.nn.attention.flex_attention._apply_kernel_options       refuse gradients on CPU tensors
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch


@dataclass(frozen=True)
class Card:
    """What compilation depends on, from NVIDIA's tables of compute capabilities."""

    example: str
    capability: tuple[int, int]
    shared: int  # bytes of shared memory a block may ask for
    multiprocessors: int
    threads: int  # of a multiprocessor
    tensor_cores: str  # opcode of the products of matrices in its machine code


CARDS = {
    "sm_90": Card("H100, H200", (9, 0), 232_448, 132, 2048, "HGMMA"),
    "sm_89": Card("RTX 4090, L4, L40S", (8, 9), 101_376, 128, 1536, "HMMA"),
    "sm_120": Card("RTX 5090", (12, 0), 101_376, 170, 1536, "HMMA"),
}
INSTRUCTION = {"HGMMA": "wgmma", "HMMA": "mma.sync"}
"""What PTX calls the machine code's instructions."""


@dataclass(frozen=True)
class Binary:
    """One compiled configuration of a kernel, as the driver would have loaded it."""

    kernel: str
    code: bytes
    shared: int  # bytes a block
    registers: int  # of a thread
    spill: int  # bytes of a thread's local memory, where what finds no register goes


@dataclass
class Graph:
    """One lowered graph."""

    direction: str  # forward, backward, or inference: a forward that keeps nothing for a backward
    kernels: dict[str, list[Binary]]  # configurations of each that fit; PyTorch picks when it first runs


class Launched(Exception):
    """A compiled function was about to launch its kernels."""


class PretendedGPU:
    """The card of this process; there can be one, since PyTorch remembers what it was told."""

    def __init__(self, card: Card):
        self.card = card
        self.loaded: list[Binary] = []
        self.graphs: list[Graph] = []
        self.properties = SimpleNamespace(
            name=card.example, major=card.capability[0], minor=card.capability[1], gcnArchName="",
            multi_processor_count=card.multiprocessors, warp_size=32, regs_per_multiprocessor=65536,
            max_threads_per_block=1024, max_threads_per_multi_processor=card.threads,
            shared_memory_per_block=49152, shared_memory_per_block_optin=card.shared,
        )  # fmt: skip
        _answer_triton(self)
        _answer_inductor(self)
        _take_over_lowering(self)

    def compile(self, function: Callable[..., Any], *arguments: Any) -> list[Graph]:
        """What calling ``function`` compiles: nothing where it was compiled before. Errors pass through."""
        self.graphs = []
        with _flex_attention_on_cpu(), contextlib.suppress(Launched):
            function(*arguments)
            raise AssertionError("the function came back without reaching a compiled part")
        return self.graphs

    def lower(self, lower: Callable[..., Any], graph: torch.fx.GraphModule, inputs: Any, **options: Any):
        """In place of Inductor's ``compile_fx_inner``: the same, and a function that launches nothing."""
        direction = "inference" if options.get("is_inference") else "forward"
        if options.get("is_backward"):
            direction = "backward"
        self.loaded = []
        properties, capability = (lambda *_: self.properties), (lambda *_: self.card.capability)
        with (
            mock.patch.object(torch.cuda, "get_device_properties", properties),
            mock.patch.object(torch.cuda, "get_device_capability", capability),
        ):
            _move(graph)
            lower(graph, [_moved(x) for x in inputs], **options)
        kernels: dict[str, list[Binary]] = {}
        for binary in self.loaded:
            kernels.setdefault(binary.kernel, []).append(binary)
        self.graphs.append(Graph(direction, kernels))

        def launch(*_: Any, **__: Any) -> None:
            raise Launched

        launch._boxed_call = True  # type: ignore[attr-defined]
        return launch


# ---- reading machine code


def resources(report: str) -> tuple[int, int]:
    """Registers, and bytes of stack, of a thread, from ``cuobjdump -res-usage``."""
    found = re.findall(r"\bREG:(\d+)\s+STACK:(\d+)", report)
    if len(found) != 1:
        raise ValueError(f"cuobjdump names {len(found)} functions, not one: {report!r}")
    return int(found[0][0]), int(found[0][1])


def tensor_core_counts(listing: str) -> Counter[str]:
    """How many instructions for tensor cores are in a listing of ``nvdisasm``, by opcode."""
    return Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?(\w*MMA)\b", listing, re.MULTILINE))


def disassembled(code: bytes) -> str:
    """The listing of a binary."""
    return _tool("nvdisasm", code)


def _tool(name: str, code: bytes, *options: str) -> str:
    """What one of the programs that come with Triton prints about a binary."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code)
        command = [getattr(triton.knobs.nvidia, name).path, *options, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ---- who asks about the card


def _answer_triton(gpu: PretendedGPU) -> None:
    import triton.backends
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import GPUDriver

    class Utilities:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            counts = {"multiprocessor_count": gpu.card.multiprocessors, "warpSize": 32}
            return {"max_shared_mem": gpu.card.shared, **counts}

        @staticmethod
        def load_binary(kernel: str, code: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
            """Module, function, registers, spilled words, most threads. Triton has judged ``shared``."""
            registers, spill = resources(_tool("cuobjdump", code, "-res-usage"))
            gpu.loaded.append(Binary(kernel, code, shared, registers, spill))
            return 1, 1, registers, spill // 4, 1024

    class Driver(GPUDriver):
        utils = Utilities

        def __init__(self) -> None:
            pass  # the real one asks the driver of a card

        @staticmethod
        def is_active() -> bool:
            return True

        def map_python_to_cpp_type(self, kind: str) -> str:
            return kind

        def get_current_target(self) -> GPUTarget:
            major, minor = gpu.card.capability
            return GPUTarget("cuda", 10 * major + minor, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_current_device(self) -> int:
            return 0

        def get_benchmarker(self) -> Any:
            raise AssertionError("kernels are not timed here")

        def launcher_cls(self, *_: Any) -> None:
            return None

    nvidia = triton.backends.backends["nvidia"]
    triton.backends.backends["nvidia"] = dataclasses.replace(nvidia, driver=Driver)


def _answer_inductor(gpu: PretendedGPU) -> None:
    from torch._dynamo import device_interface

    def always(value: Any) -> Any:
        return staticmethod(lambda *_, **__: value)

    class Interface(device_interface.CudaInterface):
        class Worker(device_interface.CudaInterface.Worker):
            get_device_properties = always(gpu.properties)
            current_device = always(0)

        is_available = always(True)
        device_count = always(1)
        current_device = exchange_device = maybe_exchange_device = get_raw_stream = always(0)
        get_device_properties = always(gpu.properties)
        get_compute_capability = always(10 * gpu.card.capability[0] + gpu.card.capability[1])
        is_bf16_supported = is_triton_capable = always(True)
        raise_if_triton_unavailable = synchronize = always(None)

    device_interface.get_interface_for_device("cpu")  # registers the real ones first
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, Interface)


# ---- between tracing and lowering


def _take_over_lowering(gpu: PretendedGPU) -> None:
    import torch._functorch.config
    import torch._inductor.compile_fx as inductor
    import torch._inductor.config as config

    torch._functorch.config.force_non_lazy_backward_lowering = True
    config.compile_threads = 1  # kernels are compiled in this process, where the card is pretended
    # A graph from a cache would load nothing. Triton's cache of kernels stays: it loads what it finds.
    config.fx_graph_cache = config.fx_graph_remote_cache = False
    torch._functorch.config.enable_autograd_cache = False
    config.use_static_triton_launcher = False  # it loads kernels past Triton
    whole, lower = inductor.compile_fx, inductor.compile_fx_inner

    def compile_fx(*arguments: Any, **options: Any) -> Any:
        options["inner_compile"] = lambda graph, inputs, **more: gpu.lower(lower, graph, inputs, **more)
        return whole(*arguments, **options)

    inductor.compile_fx = compile_fx


def _move(graph: torch.fx.GraphModule) -> None:
    """Moves a traced graph, and the graphs inside it, to the card."""
    from torch.utils._pytree import tree_map

    for module in graph.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if "val" in node.meta:
                    node.meta["val"] = tree_map(_moved, node.meta["val"])
                node.args, node.kwargs = tree_map(_moved, node.args), tree_map(_moved, node.kwargs)
            module.recompile()


def _moved(value: Any) -> Any:
    from torch._guards import detect_fake_mode

    if isinstance(value, torch.device) and value.type == "cpu":
        return torch.device("cuda", 0)
    if isinstance(value, torch.Tensor):
        mode = getattr(value, "fake_mode", None) or detect_fake_mode()
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")
    return value


@contextlib.contextmanager
def _flex_attention_on_cpu() -> Iterator[None]:
    """While tracing, flex attention takes CPU tensors for tensors of a GPU."""
    import torch.nn.attention.flex_attention as flex

    options_of = flex._apply_kernel_options

    def options(*arguments: Any, **more: Any) -> Any:
        found = options_of(*arguments, **more)
        found["OUTPUT_LOGSUMEXP"] = torch.is_grad_enabled()  # as its code says of GPUs
        return found

    with (
        mock.patch.object(flex, "_validate_device", lambda *_: None),
        mock.patch.object(flex, "_apply_kernel_options", options),
    ):
        yield
