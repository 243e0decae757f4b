"""SigLIP with pictures of any size (NaViT): patches of many pictures in one sequence, full attention
inside each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from unigen.model.attention import Attention, picture_attention
from unigen.model.layers import Linear, embedding
from unigen.sequence.grid import to_unit


class VitAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        """``x`` [N, width] -> [N, width], before ``out_proj``."""
        q, k, v = (f(x).unflatten(1, (self.heads, -1)) for f in (self.q_proj, self.k_proj, self.v_proj))
        return attention((q,), (k,), (v,))[0].flatten(1)


class VitMLP(nn.Module):
    def __init__(self, width: int, inner: int, activation: nn.Module):
        super().__init__()
        self.fc1 = Linear(width, inner)
        self.activation = activation
        self.fc2 = Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class VitLayer(nn.Module):
    def __init__(self, config, activation: nn.Module):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VitAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VitMLP(config.hidden_size, config.intermediate_size, activation)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        """``x`` [N, width] -> [N, width]."""
        return self.after(x, self.self_attn(self.layer_norm1(x), attention))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output [N, width] from its input ``x`` and what attention gave, ``y``."""
        x = x + self.self_attn.out_proj(y)
        return x + self.mlp(self.layer_norm2(x))


class VitEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        side = config.image_size // config.patch_size
        self.patch_embedding = Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = embedding(side * side, config.hidden_size)

    def forward(self, patches: Tensor, position: Tensor) -> Tensor:
        return self.patch_embedding(patches) + self.position_embedding(position)


class VitEncoder(nn.Module):
    def __init__(self, config, activation: nn.Module):
        super().__init__()
        # The last layer of the config is not run (and not in the checkpoint): features come from the one
        # before.
        self.layers = nn.ModuleList(VitLayer(config, activation) for _ in range(config.num_hidden_layers - 1))


class VitTransformer(nn.Module):
    def __init__(self, config, activation: nn.Module):
        super().__init__()
        self.embeddings = VitEmbeddings(config)
        self.encoder = VitEncoder(config, activation)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class VisionModel(nn.Module):
    """Patches -> features, under the names of the published checkpoint."""

    def __init__(self, config, activation: nn.Module):
        super().__init__()
        self.vision_model = VitTransformer(config, activation)

    def forward(self, patches: Tensor, position: Tensor, lengths: Sequence[int]) -> Tensor:
        """``patches`` [N, patch * patch * 3] (uint8, or float in [-1, 1]) of pictures with ``lengths``
        patches, ``position`` [N] -> [N, width]."""
        vit = self.vision_model
        x = vit.embeddings(to_unit(patches).to(vit.embeddings.patch_embedding.weight.dtype), position)
        attention = picture_attention(lengths, x, vit.encoder.layers[0].self_attn.heads)
        for layer in vit.encoder.layers:
            x = layer(x, attention)
        return vit.post_layernorm(x)
