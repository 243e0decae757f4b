"""Folders of tiny encoders as transformers writes them: random weights, real files."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "the",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "red",
    "blue",
    "square",
    "circle",
    "house",
    "day",
    "night",
    "猫",
    "狗",
    "坐",
    "在",
    "垫",
    "子",
    "上",
]
LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def _write_tokenizer(folder: Path, length: int) -> None:
    inner = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=length,
    ).save_pretrained(folder)  # fmt: skip


def _write(model: torch.nn.Module, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            one = "norm" in name and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + one)
    model.save_pretrained(folder)
    return folder


def write_bert(folder: Path) -> Path:
    _write(BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **LAYERS)), folder)
    _write_tokenizer(folder, 16)
    return folder


def write_clip(folder: Path) -> Path:
    text = {"vocab_size": len(WORDS), "max_position_embeddings": 12, "eos_token_id": 3, **LAYERS}
    vision = {"image_size": 32, "patch_size": 8, **LAYERS}
    _write(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)), folder)
    _write_tokenizer(folder, 12)
    return folder


def write_siglip(folder: Path) -> Path:
    text = {"vocab_size": len(WORDS), "max_position_embeddings": 12, "projection_size": 32, **LAYERS}
    vision = {"image_size": 32, "patch_size": 8, **LAYERS}
    _write(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), folder)
    _write_tokenizer(folder, 12)
    return folder


def write_dinov2(folder: Path) -> Path:
    layers = {**LAYERS, "mlp_ratio": 2}
    layers.pop("intermediate_size")
    return _write(Dinov2Model(Dinov2Config(image_size=28, patch_size=7, **layers)), folder)
