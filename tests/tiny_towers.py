"""Folders of tiny encoders as transformers writes them: random weights, real files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

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
    transformers.PreTrainedTokenizerFast(
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
    _write(
        transformers.BertModel(
            transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **LAYERS)
        ),
        folder,
    )
    _write_tokenizer(folder, 16)
    return folder


def write_clip(folder: Path) -> Path:
    text = {"vocab_size": len(WORDS), "max_position_embeddings": 12, "eos_token_id": 3, **LAYERS}
    vision = {"image_size": 32, "patch_size": 8, **LAYERS}
    _write(
        transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        ),
        folder,
    )
    _write_tokenizer(folder, 12)
    return folder


def write_siglip(folder: Path) -> Path:
    text = {"vocab_size": len(WORDS), "max_position_embeddings": 12, "projection_size": 32, **LAYERS}
    vision = {"image_size": 32, "patch_size": 8, **LAYERS}
    _write(
        transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)), folder
    )
    _write_tokenizer(folder, 12)
    return folder


def write_dinov2(folder: Path) -> Path:
    layers = {**LAYERS, "mlp_ratio": 2}
    layers.pop("intermediate_size")
    return _write(
        transformers.Dinov2Model(transformers.Dinov2Config(image_size=28, patch_size=7, **layers)), folder
    )


# ---- detectors: they know these things, in this order

THINGS = {0: "cat", 1: "dog", 2: "mouse", 3: "bench"}
_SIZE = {"shortest_edge": 48, "longest_edge": 80}


def _write_size(folder: Path, size: dict[str, int], **more: object) -> Path:
    said = {"size": size, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], **more}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


def write_detr(folder: Path, always: int | None = None) -> Path:
    """A DETR of two queries; ``always``: both of them are that thing in every picture, for sure."""
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=2, id2label=THINGS,
        label2id={name: number for number, name in THINGS.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DetrForObjectDetection(config)
    if always is not None:
        with torch.no_grad():
            head = model.class_labels_classifier
            head.weight.zero_()
            head.bias.copy_(torch.tensor([20.0 * (number == always) for number in range(5)]))
    model.save_pretrained(folder)
    return _write_size(folder, _SIZE)


def write_mask2former(folder: Path) -> Path:
    swin = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=5,
        id2label=THINGS, label2id={name: number for number, name in THINGS.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return _write_size(folder, _SIZE, size_divisor=32)


def write_owlvit(folder: Path) -> Path:
    text = {"vocab_size": len(WORDS), "max_position_embeddings": 12, **LAYERS}
    vision = {"image_size": 32, "patch_size": 8, **LAYERS}
    torch.manual_seed(0)
    config = transformers.OwlViTConfig(text_config=text, vision_config=vision, projection_dim=32)
    transformers.OwlViTForObjectDetection(config).save_pretrained(folder)
    _write_tokenizer(folder, 12)
    return _write_size(folder, {"height": 32, "width": 32})
