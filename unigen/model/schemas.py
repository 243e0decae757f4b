"""What the JSON files of a model may say, and whether that fits the stored weights. No PyTorch here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from unigen.schema import Either, Flag, Items, Maybe, NoCode, Number, String, Table, short, whole

_SHARE, _EPSILON = Number(0, 1), Number(1e-12, 0.1)
_WIDTH, _INNER, _LAYERS, _HEADS = whole(4, 1 << 17), whole(1, 1 << 20), whole(1, 1000), whole(1, 1024)
_SIDE, _THETA, _ID = whole(1, 1 << 16), Number(10, 1e10), whole(0, 1 << 24)
ACTIVATIONS = (
    "gelu_pytorch_tanh", "gelu", "gelu_new", "gelu_fast", "quick_gelu", "relu", "silu", "swish", "tanh",
)  # fmt: skip

LLM = Table(
    {},
    {
        "model_type": String(("qwen2",)),
        "architectures": Maybe(Items(String(), 0, 10)),
        "hidden_size": _WIDTH,
        "intermediate_size": _INNER,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": Maybe(_HEADS),
        "head_dim": Maybe(whole(2, 4096)),
        "vocab_size": whole(6, 1 << 24),
        "max_position_embeddings": whole(8, 1 << 30),
        "rms_norm_eps": _EPSILON,
        "rope_theta": _THETA,
        "rope_parameters": Maybe(Table({}, {"rope_type": String(("default",)), "rope_theta": _THETA})),
        "rope_scaling": Maybe(Table({}, {"rope_type": String(("default",)), "type": String(("default",))})),
        "hidden_act": String(("silu",)),
        "tie_word_embeddings": Flag(only=False),
        "use_sliding_window": Flag(only=False),
        "attention_dropout": _SHARE,
        "initializer_range": Number(0, 100),
        "use_cache": Flag(),
        "bos_token_id": Maybe(_ID),
        "eos_token_id": Maybe(Either((Items(_ID, 1, 100), _ID))),
        "pad_token_id": Maybe(_ID),
        "auto_map": NoCode(),
    },
)

VIT = Table(
    {"num_attention_heads": _HEADS},  # no tensor's shape shows it
    {
        "model_type": String(("siglip_vision_model",)),
        "architectures": Maybe(Items(String(), 0, 10)),
        "hidden_size": _WIDTH,
        "intermediate_size": _INNER,
        "num_hidden_layers": whole(2, 1000),
        "num_channels": whole(3, 3),
        "image_size": _SIDE,
        "patch_size": whole(1, 1024),
        "hidden_act": String(ACTIVATIONS),
        "layer_norm_eps": _EPSILON,
        "attention_dropout": _SHARE,
        "auto_map": NoCode(),
    },
)

VAE = Table(
    {},
    {
        "type": String(),
        "ch": whole(1, 4096),
        "ch_mult": Items(whole(1, 64), 1, 8),
        "num_res_blocks": whole(1, 64),
        "z_channels": whole(1, 1 << 16),
        "downsample": whole(1, 256),
        "scale_factor": Number(1e-6, 1e6),
        "shift_factor": Number(-1e6, 1e6),
        "auto_map": NoCode(),
    },
)

_PICTURES = Maybe(Table({"max_size": _SIDE, "min_size": _SIDE}, {"max_pixels": whole(1, 1 << 32)}))

CONFIG = Table(
    {},
    {
        "latent_patch_size": Maybe(whole(1, 64)),
        "max_latent_size": Maybe(whole(1, 1024)),
        "vit_max_num_patch_per_side": Maybe(whole(1, 1024)),
        "connector_act": Maybe(String(ACTIVATIONS)),
        "interpolate_pos": Maybe(Flag()),
        "timestep_shift": Maybe(Number(1e-3, 1e3)),
        "vae_transform": _PICTURES,
        "vit_transform": _PICTURES,
        "vit_edit_transform": _PICTURES,
        "auto_map": NoCode(),
    },
)
"""``config.json``. The nested copies of the other files are for other programs; nothing here reads them."""


def contradictions(llm: Any, vit: Any, constants: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """(File, what is wrong with which key) where values of the configs exclude each other."""
    heads, kv, width = llm.num_attention_heads, llm.num_key_value_heads, llm.hidden_size
    file, given = "llm_config.json", getattr(llm, "head_dim", None)
    if not given and width % heads:
        yield file, f"num_attention_heads is {heads}, which does not divide hidden_size, {width}"
    if heads % kv:
        yield file, f"num_key_value_heads is {kv}, which does not divide num_attention_heads, {heads}"
    if (given or width // heads) % 2:
        key = "head_dim" if given else "num_attention_heads"
        yield file, f"{key} makes heads {given or width // heads} wide; rotary needs an even width"
    if width % 4:
        yield file, f"hidden_size is {width}; the position tables need a multiple of 4"
    file, heads, width = "vit_config.json", vit.num_attention_heads, vit.hidden_size
    if width % heads:
        yield file, f"num_attention_heads is {heads}, which does not divide hidden_size, {width}"
    if vit.patch_size > vit.image_size:
        yield file, f"patch_size is {vit.patch_size}, above image_size, {vit.image_size}"
    for name in ("vae_transform", "vit_transform", "vit_edit_transform"):
        sizes = constants.get(name)
        if sizes and sizes["min_size"] > sizes["max_size"]:
            low, high = sizes["min_size"], sizes["max_size"]
            yield "config.json", f"{name}.min_size is {low}, above {name}.max_size, {high}"


Shapes = Mapping[str, tuple[int, ...]]

_LAYER, _SEEN = "language_model.model.layers.", "vit_model.vision_model."
_HEAD = f"{_LAYER}0.self_attn.q_norm.weight"
_EMBEDDED, _PATCHES = "language_model.model.embed_tokens.weight", f"{_SEEN}embeddings.patch_embedding.weight"
_SIZES: list[tuple[str, str, str, int, Callable[[int, int, Any], int]]] = [
    ("llm", "vocab_size", _EMBEDDED, 0, lambda n, head, part: n),
    ("llm", "hidden_size", _EMBEDDED, 1, lambda n, head, part: n),
    ("llm", "intermediate_size", f"{_LAYER}0.mlp.gate_proj.weight", 0, lambda n, head, part: n),
    ("llm", "head_dim", _HEAD, 0, lambda n, head, part: n),
    ("llm", "num_attention_heads", f"{_LAYER}0.self_attn.q_proj.weight", 0, lambda n, head, part: n * head),
    ("llm", "num_key_value_heads", f"{_LAYER}0.self_attn.k_proj.weight", 0, lambda n, head, part: n * head),
    ("vit", "hidden_size", _PATCHES, 0, lambda n, head, part: n),
    ("vit", "patch_size", _PATCHES, 1, lambda n, head, part: 3 * n * n),
    (
        "vit", "image_size", f"{_SEEN}embeddings.position_embedding.weight", 0,
        lambda n, head, part: (n // part.patch_size) ** 2,
    ),
    ("vit", "intermediate_size", f"{_SEEN}encoder.layers.0.mlp.fc1.weight", 0, lambda n, head, part: n),
]  # fmt: skip
"""File, key, tensor, axis, and that axis's size by the key's value, a head's width and the file's config."""


def misfits(config: Any, shapes: Shapes) -> list[str]:
    """What the configs say and the stored tensors contradict; each names file, key, value and tensor."""
    found = []
    for file, key, name, axis, size in _SIZES:
        part, shape = getattr(config, file), shapes.get(name, ())
        value = getattr(part, key, None)
        head = (shapes.get(_HEAD) or (0,))[0]
        wanted = None if value is None else size(value, head, part)
        if wanted and len(shape) > axis and shape[axis] != wanted:
            found.append(_misfit(f"{file}_config.json", key, value, name, shape))
    for file, layers, stem in (
        ("llm", config.llm.num_hidden_layers, _LAYER),
        ("vit", config.vit.num_hidden_layers, f"{_SEEN}encoder.layers."),
    ):
        numbers = {name[len(stem) :].split(".")[0] for name in shapes if name.startswith(stem)}
        runs = layers - (file == "vit")  # of the ViT's, the last is not stored
        if numbers and len(numbers) != runs:
            found.append(
                f"{file}_config.json: num_hidden_layers is {layers}, but the weights have {len(numbers)}"
                f" layers ({stem}N){' where one less than that is stored' if file == 'vit' else ''}"
            )
    shape = shapes.get("vae2llm.weight", ())
    if len(shape) == 2 and shape[1] != config.patch_dim:
        size = config.latent_patch_size
        found.append(
            f"config.json: latent_patch_size is {size} and vae_config.json: z_channels is"
            f" {config.vae.z_channels}, but vae2llm.weight has shape {list(shape)}"
        )
    return found


def vae_misfits(vae: Any, shapes: Shapes) -> list[str]:
    """As :func:`misfits`, of ``vae_config.json`` and ``ae.safetensors``."""
    found = []
    stem = "encoder.down."
    levels = len({name.split(".")[2] for name in shapes if name.startswith(stem)})
    blocks = len({name.split(".")[4] for name in shapes if name.startswith(f"{stem}0.block.")})
    for key, value, has in (("ch_mult", vae.ch_mult, levels), ("num_res_blocks", vae.num_res_blocks, blocks)):
        wanted = len(value) if key == "ch_mult" else value
        if has and has != wanted:
            said = short(list(value)) if key == "ch_mult" else value
            what = "levels" if key == "ch_mult" else "blocks a level"
            found.append(f"vae_config.json: {key} is {said}, but ae.safetensors has {has} {what} ({stem}N)")
    wide: list[tuple[str, Any, str, int, int]] = [
        ("ch", vae.ch, "encoder.conv_in.weight", 0, vae.ch),
        ("z_channels", vae.z_channels, "decoder.conv_in.weight", 1, vae.z_channels),
    ]
    for i, factor in enumerate(vae.ch_mult):
        name, size = f"{stem}{i}.block.0.conv1.weight", vae.ch * factor
        wide.append(("ch_mult", short(list(vae.ch_mult)), name, 0, size))
    for key, value, name, axis, size in wide:
        shape = shapes.get(name, ())
        if len(shape) == 4 and shape[axis] != size:
            found.append(_misfit("vae_config.json", key, value, name, shape))
    return found[:3]


def _misfit(file: str, key: str, value: Any, name: str, shape: tuple[int, ...]) -> str:
    return f"{file}: {key} is {value}, but {name} has shape {list(shape)}"
