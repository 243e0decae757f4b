"""``tools/compile_for_gpu.py``, as far as a CPU build of PyTorch goes; ``make gpu-compile`` runs it whole."""

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
import torch

from unigen.sequence.blockmask import BLOCK, padded

TOOLS = Path(__file__).parents[1] / "tools"

RESOURCES = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function triton_tem_fused_flex_attention_0:
  REG:167 STACK:232 SHARED:1024 LOCAL:0 CONSTANT[0]:672 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
LISTING = """
        .section .text.HGMMA_in_a_name,"ax",@progbits
        /*0a60*/              @!PT LDS RZ, [RZ] ;
        /*15a0*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], RZ, !UPT ;
        /*1640*/              @!P0 HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], R88 ;
        /*1650*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*1660*/                   HFMA2.MMA R1, -RZ, RZ, 0, 0 ;
        /*1670*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
"""


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("compile_for_gpu")
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def gpu(tool):
    return importlib.import_module("pretended_gpu")


def test_registers_and_spills_are_read(gpu):
    assert gpu.resources(RESOURCES) == (167, 232)


@pytest.mark.parametrize("report", ["", "Resource usage:\n", RESOURCES + RESOURCES])
def test_a_report_of_another_form_is_an_error(report, gpu):
    with pytest.raises(ValueError, match="cuobjdump"):
        gpu.resources(report)


def test_instructions_of_tensor_cores_are_counted_by_their_opcode(gpu):
    assert gpu.tensor_core_counts(LISTING) == {"HGMMA": 2, "HMMA": 1}


@pytest.mark.parametrize(
    ("shared", "spill", "opcode", "wanted", "complains"),
    [
        (232_448, 8, "HGMMA", ("HGMMA",), ""),
        (232_449, 8, "HGMMA", ("HGMMA",), "232449"),
        (0, 9, "HGMMA", ("HGMMA",), "spills 9"),
        (0, 0, "HMMA", ("HGMMA",), "mma.sync, not wgmma"),
        (0, 0, "HMMA", ("HGMMA", "HMMA"), ""),
        (0, 0, "", ("HGMMA",), "no tensor cores"),
        (0, 0, "", (), ""),
    ],
)
def test_a_kernel_is_judged(shared, spill, opcode, wanted, complains, tool, gpu):
    kernel = gpu.Binary("triton_tem_fused_flex_attention_0", b"", shared, 255, spill)
    found = tool.complaint(gpu.CARDS["sm_90"], kernel, 8, opcode, wanted)
    assert complains in found and bool(found) == bool(complains)


def test_the_configuration_that_spills_least_counts(tool, gpu):
    numbers = ((16, 64), (32, 0), (8, 8))  # shared, spill
    configurations = [gpu.Binary("triton_red_0", b"", shared, 30, spill) for shared, spill in numbers]
    line = tool.judged(tool.Case("sm_89", "bagel-7b", "before"), "forward", 300, configurations)
    assert (line.spill_bytes, line.shared_bytes, line.configurations, line.failure) == (0, 32, 3, "")


def test_spills_are_written_down_for_what_is_compiled(tool, gpu):
    assert tool.SPILLS
    for (model, part, direction, card), most in tool.SPILLS.items():
        assert model in tool.MODELS and card in gpu.CARDS and most > 0
        assert part in ("flex", "before", "after") and direction in ("forward", "backward", "inference")


def test_what_training_refuses_is_not_compiled(tool, gpu):
    pairs = [(model, card) for model in tool.MODELS for card in gpu.CARDS]
    refused = {(model, card) for model, card in pairs if tool.is_refused(tool.MODELS[model], gpu.CARDS[card])}
    assert refused == {("bagel-7b-float32", "sm_89"), ("bagel-7b-float32", "sm_120")}


def test_every_length_is_packed_whole(tool):
    packs = [tool.packed(tokens) for tokens in tool.LENGTHS]
    assert [len(pack) for pack in packs] == list(tool.LENGTHS)
    for pack in packs:
        assert pack.mask_rule.shape[1] == padded(pack.n_und) + padded(len(pack) - pack.n_und)
    blocks = [pack.mask_blocks.shape[0] for pack in packs]
    assert min(blocks) == 1 and max(blocks) >= 16384 // BLOCK
    assert any(pack.n_und == len(pack) for pack in packs) and any(pack.n_und < len(pack) for pack in packs)


class Pretended:
    """In place of a pretended card: every call compiles what it is told."""

    def __init__(self, graphs):
        self.graphs = graphs

    def compile(self, function):
        if isinstance(self.graphs, Exception):
            raise self.graphs
        return self.graphs


@pytest.mark.parametrize(
    ("kernels", "failure"),
    [
        (ValueError("out of resource: shared memory"), "ValueError: out of resource"),
        ({"triton_red_0": 16}, "no kernel of attention"),
        ({"triton_tem_0": 101_377}, "101377 bytes of shared memory"),
        ({"triton_tem_0": 101_376}, ""),
    ],
)
def test_what_does_not_compile_or_compiles_no_attention_fails(kernels, failure, tool, gpu, monkeypatch):
    graphs = kernels
    if not isinstance(kernels, Exception):
        binaries = {name: [gpu.Binary(name, b"", shared, 20, spill=0)] for name, shared in kernels.items()}
        graphs = [gpu.Graph("forward", binaries)]
    monkeypatch.setattr(tool, "disassembled", lambda code: LISTING.replace("HGMMA", "HMMA"))
    calls = iter([(300, True, lambda: None)])
    lines = list(tool.compile_calls(Pretended(graphs), tool.Case("sm_89", "bagel-7b", "flex"), calls))
    found = [line.failure for line in lines if line.failure]
    assert len(found) == bool(failure) and all(failure in text for text in found)
    assert all(line.tokens == 300 and line.card == "sm_89" for line in lines) and lines


CASE = ("sm_90", "bagel-7b", "flex", "forward", 300)
LINE = (*CASE, "triton_tem_0", 1, 167, 0, 0, 132_608, 232_448, "wgmma", 24)


@pytest.mark.parametrize(
    ("failures", "ended", "status"),
    [([""], 0, 0), (["", "spills"], 0, 1), ([""], 1, 1), ([], 0, 1)],
    ids=["all pass", "one fails", "a process dies", "nothing was compiled"],
)
def test_the_exit_status_says_whether_all_passed(failures, ended, status, tool, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(tool, "version", lambda package: "3.7.1")
    lines = [tool.Line(*LINE, failure) for failure in failures]
    monkeypatch.setattr(tool, "in_a_process", lambda card, options: (lines, ended))
    assert tool.main(["--cards", "sm_90"]) == status
    assert ("all passed" in capsys.readouterr().out) == (status == 0)


def test_the_table_shows_attention_alone_and_the_rest_together(tool):
    line = tool.Line(*LINE, "")
    other = tool.Line(*CASE, "triton_red_0", 1, 20, 0, 0, 8, 232_448, "", 0, "")
    worse = dataclasses.replace(other, registers=40, failure="spills")
    head, attention, rest = tool.table([line, other, worse])
    assert "24 wgmma" in attention and attention.endswith("pass")
    assert rest.split()[4:7] == ["others", "2", "40"] and rest.endswith("FAILED")
    assert head.index("kernel") == attention.index("triton_tem_0") == rest.index("others")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is a build for CUDA")
def test_a_build_without_cuda_is_refused_with_the_fix(tool, capsys):
    assert tool.main([]) == 2
    assert "make gpu-compile" in capsys.readouterr().err


def test_unknown_cards_are_refused(tool):
    with pytest.raises(SystemExit) as ended:
        tool.main(["--cards", "sm_42"])
    assert ended.value.code == 2
