"""The options of ``unigen ckpt``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from unigen.values import Options, PathText, Positive


@dataclass
class CkptOptions(Options):
    """List, verify and export the checkpoints of a run.

    Args:
        paths: What to do, and with what: ls RUN; verify CHECKPOINT_OR_RUN ...; export CHECKPOINT NEW_FOLDER.
        json: With ls and verify, print one JSON document.
        weights: With export: ema, the average (the weights themselves where the run kept none), or raw, those
            that train.
        dtype: With export: dtype of the tensors. as_stored is exact: float32 for what trained, the rest as
            the run found it; bfloat16 is half the size, rounded.
        max_shard_gb: With export: split the weights into files of at most so many gigabytes (10^9 bytes),
            with an index. Default: one file, as published.
        merge: With export: of a checkpoint of adapters, the model that they and their base are together.
            Without it the adapter alone is written, as peft does.
        format: With export: of a checkpoint of adapters, peft is what is written without merge; vllm-omni
            names the matrices as vLLM-Omni registers them, and says where it would not bind one.
        base: With export --merge: folder of the base. Default: the one that the adapter names.
        quantize: With export: hold the decoder's matrices in 4 bits (nf4) or 8 bits (int8), as bitsandbytes
            stores them. The folder of a model that no run wrote can be exported, too.
        double_quant: With export --quantize nf4: quantise its scales, too; 0.4 bits fewer a number.
        overwrite: With export: replace an earlier export, and nothing else.
        verify: With export: first read and check every byte that will be exported; --no_verify saves that
            time.
    """

    paths: list[PathText] = field(default_factory=list)
    json: bool = False
    weights: Literal["ema", "raw"] = "ema"
    dtype: Literal["as_stored", "bfloat16", "float32"] = "as_stored"
    max_shard_gb: Positive | None = None
    merge: bool = False
    format: Literal["peft", "vllm-omni"] | None = None
    base: PathText | None = None
    quantize: Literal["nf4", "int8"] | None = None
    double_quant: bool = False
    overwrite: bool = False
    verify: bool = True
