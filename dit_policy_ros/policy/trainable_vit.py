"""The CLS token of transformers' CLIP and DINOv3 towers, to be differentiated: the tower's numbers with less work.

Nobody reads the last layer's patch tokens, so there the CLS token alone gets a query, an attention output and an MLP:
7 % of a ViT-B, forward and backward. CLIP's QuickGELU is written as a SiLU, which keeps one tensor for the backward
pass where x * sigmoid(1.702 x) keeps two. Exact but for rounding; the weights and their names are the tower's.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

QUICK = 1.702
"""The slope of QuickGELU (arXiv 1606.08415, section 2)."""


def clip_cls(tower: Any, images: Tensor) -> Tensor:
    """A CLIP tower's CLS token before its last norm: images (N, 3, H, W) -> (N, width)."""
    x = tower.pre_layrnorm(tower.embeddings(images))
    *layers, last = tower.encoder.layers
    for layer in layers:
        x = _clip_layer(layer, x, x.shape[1])
    return _clip_layer(last, x, 1)[:, 0]


def dinov3_cls(tower: Any, images: Tensor) -> Tensor:
    """A DINOv3 tower's CLS token after its last norm: images (N, 3, H, W) -> (N, width)."""
    x, (cos, sin) = tower.embeddings(images), tower.rope_embeddings(images)
    *layers, last = tower.model.layer
    for layer in layers:
        x = layer(x, position_embeddings=(cos, sin))
    return tower.norm(_dinov3_cls_layer(last, x, cos, sin))[:, 0]


def _clip_layer(layer: Any, x: Tensor, tokens: int) -> Tensor:
    """The first tokens of a layer's output: x (N, L, width) -> (N, tokens, width)."""
    attention = layer.self_attn
    normed = layer.layer_norm1(x)
    q, k, v = attention.q_proj(normed[:, :tokens]), attention.k_proj(normed), attention.v_proj(normed)
    x = x[:, :tokens] + attention.out_proj(_attend(attention, q, k, v))
    return x + _clip_mlp(layer.mlp, layer.layer_norm2(x))


def _clip_mlp(mlp: Any, x: Tensor) -> Any:
    if mlp.config.hidden_act != "quick_gelu":
        return mlp(x)
    inner = F.silu(mlp.fc1(x).mul_(QUICK))  # in place: the product does not need its output for the backward pass
    return F.linear(inner, mlp.fc2.weight).div_(QUICK) + mlp.fc2.bias


def _dinov3_cls_layer(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A layer's CLS token: x (N, L, width), cos and sin (P, head width) of the patches -> (N, 1, width)."""
    attention = layer.attention
    normed = layer.norm1(x)
    q, k, v = attention.q_proj(normed[:, :1]), attention.k_proj(normed), attention.v_proj(normed)
    # Of the keys only the patches' are turned, not those of the CLS and the register tokens; nor is the CLS's query.
    k = k.unflatten(-1, (attention.num_heads, -1))
    prefix, patches = k.split([k.shape[1] - len(cos), len(cos)], dim=1)
    first, second = patches.chunk(2, dim=-1)
    turned = patches * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)
    k = torch.cat([prefix, turned], dim=1).flatten(2)
    out = layer.layer_scale1(attention.o_proj(_attend(attention, q, k, v)))
    x = x[:, :1] + layer.drop_path(out)
    return x + layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(x))))


def _attend(attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (N, tokens, width), k and v (N, L, width) -> (N, tokens, width)."""
    q, k, v = (each.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for each in (q, k, v))
    dropout = attention.dropout if attention.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)
