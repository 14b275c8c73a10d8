"""A vision transformer for inference: the same arithmetic as transformers' CLIP and DINOv3 towers, less of it.

Of the last layer only the CLS token is read, so it alone gets a query, an attention output and an MLP there (about
7 % of a ViT-B). Queries, keys and values are one product. CLIP's QuickGELU, x sigmoid(1.702 x), becomes the SiLU of
1.702 x when 1.702 is put into the weights before it and taken out of those behind it; DINOv3's layer scales go into
the weights before them, and so does attention's scale (a power of two for the usual head width of 64, so that this
rounds nothing). All of it is exact but for rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fast_transformer import pair_up, rotate_pairs
from .packed_linear import Activation, FrozenLinear

QUICK = 1.702
"""The slope of QuickGELU (arXiv 1606.08415, section 2)."""

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "swish",
    "swish": "swish",
    "relu": "relu",
}


class Unsupported(ValueError):
    """A tower that has no fast form here; the plain one is to be used."""


@dataclass(frozen=True)
class Norm:
    """A LayerNorm's numbers, float32."""

    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, module: nn.LayerNorm) -> "Norm":
        """From a module."""
        return cls(module.weight.detach().float(), module.bias.detach().float(), module.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., width) -> the same."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Projection:
    """Weight (outputs, inputs) and bias (outputs,) on their way from a tower's layer into a FrozenLinear."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, module: nn.Linear) -> "Projection":
        """From a linear layer; a missing bias is zero."""
        bias = module.weight.new_zeros(module.out_features) if module.bias is None else module.bias
        return cls(module.weight.detach(), bias.detach())

    def scaled(self, factor: Tensor | float) -> "Projection":
        """The layer whose outputs are `factor` (a number, or one an output) times this one's."""
        rows = factor[:, None] if isinstance(factor, Tensor) else factor
        return Projection(self.weight * rows, self.bias * factor)


@dataclass(frozen=True)
class LayerWeights:
    """One layer of a tower in common terms. `gate` multiplies `up` after the activation (gated MLPs)."""

    norm1: Norm
    q: Projection
    k: Projection
    v: Projection
    out: Projection
    norm2: Norm
    up: Projection
    down: Projection
    activation: Activation
    gate: Projection | None = None


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with queries that are scaled already, (N, heads, queries or tokens, head width) each."""
    if q.device.type != "cpu" or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)
    # PyTorch's fused kernel does not use the processor's half-precision products; two batched ones are twice as fast.
    heads = q.shape[:2]
    q, k, v = (each.flatten(0, 1) for each in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2))
    return torch.bmm(scores.softmax(dim=-1), v).unflatten(0, heads)


class _Layer:
    """One layer over all tokens, or (`cls_only`) over the CLS token, with all tokens' keys and values."""

    def __init__(
        self, weights: LayerWeights, heads: int, rotary: bool, make: Callable[..., FrozenLinear], cls_only: bool
    ):
        self.heads = heads
        self.norm1, self.norm2 = weights.norm1, weights.norm2
        width = weights.q.weight.shape[0] // heads
        q, k, v = weights.q.scaled(width**-0.5), weights.k, weights.v
        if rotary:
            order = pair_up(heads, width, q.weight.device)
            q, k = (Projection(each.weight[order], each.bias[order]) for each in (q, k))
        parts = (k, v) if cls_only else (q, k, v)
        joined = Projection(torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))
        self.joined = make(joined.weight, joined.bias)
        self.query = make(q.weight, q.bias) if cls_only else None
        self.out = make(weights.out.weight, weights.out.bias)
        self.gate = None
        if weights.gate is None:
            self.up = make(weights.up.weight, weights.up.bias, activation=weights.activation)
        else:
            self.up = make(weights.up.weight, weights.up.bias)
            self.gate = make(weights.gate.weight, weights.gate.bias, activation=weights.activation)
        self.down = make(weights.down.weight, weights.down.bias)

    @property
    def linears(self) -> list[FrozenLinear]:
        """All of its products."""
        found = (self.joined, self.query, self.out, self.up, self.gate, self.down)
        return [linear for linear in found if linear is not None]

    def __call__(self, x: Tensor, turns: Tensor | None) -> Tensor:
        """x (N, tokens, width) float32 -> the same, or (N, 1, width) for the CLS token only.

        turns (tokens, 1, head width / 2) are the positions' rotations, if the tower has such.
        """
        normed = self.norm1(x)
        joined = self.joined(normed).unflatten(-1, (-1, self.heads, normed.shape[-1] // self.heads))
        if self.query is not None:
            x = x[:, :1].contiguous()
            q = self.query(normed[:, :1]).unflatten(-1, (self.heads, -1))
            k, v = joined.unbind(2)
        else:
            q, k, v = joined.unbind(2)
        if turns is not None:
            q, k = (rotate_pairs(each.float(), turns[: each.shape[1]]).to(v.dtype) for each in (q, k))
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = self.out.add_to(x, out.transpose(1, 2).flatten(2))
        normed = self.norm2(x)
        inner = self.up(normed)
        if self.gate is not None:
            inner = inner * self.gate(normed)
        return self.down.add_to(x, inner)


class FastViT:
    """A CLIP or DINOv3 tower's CLS token and, if somebody reads them, its patch tokens.

    Matrix products are in `dtype`; norms, residuals and the sums in softmax are float32. `norm_cls` says whether the
    tower's last norm is applied to the CLS token, `norm_patches` whether to the patch tokens; `patches` whether these
    are wanted at all. Raises Unsupported for other towers.
    """

    @torch.no_grad()
    def __init__(
        self,
        tower: nn.Module,
        dtype: torch.dtype,
        norm_cls: bool,
        norm_patches: bool = False,
        patches: bool = False,
        packed: bool = True,
    ):
        def make(weight: Tensor, bias: Tensor, activation: Activation = "none") -> FrozenLinear:
            return FrozenLinear(weight, bias, dtype, activation, packed)

        front = _front_of(tower)
        config: Any = tower.config
        self.patches = patches
        self.patch_size: int = config.patch_size
        self.prefix, self.position, self.pre_norm = front.prefix, front.position, front.pre_norm
        self._rotary = front.rotary
        self._turns: dict[tuple[int, int], Tensor] = {}
        kernel = front.patch_embedding.weight.detach().flatten(1)
        bias = front.patch_embedding.bias
        self.embed = FrozenLinear(kernel, kernel.new_zeros(len(kernel)) if bias is None else bias, dtype, packed=packed)
        last = len(front.layers) - 1
        self.layers = [
            _Layer(weights, config.num_attention_heads, front.rotary is not None, make, index == last and not patches)
            for index, weights in enumerate(front.layers)
        ]
        self.cls_norm = Norm.of(front.last_norm) if norm_cls else None
        self.patch_norm = Norm.of(front.last_norm) if norm_patches else None

    @property
    def bytes(self) -> int:
        """Memory of the copied weights."""
        return self.embed.bytes + sum(linear.bytes for layer in self.layers for linear in layer.linears)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Preprocessed pictures (N, 3, H, W) -> CLS token, then the patch tokens if wanted, (N, 1 or 1 + P, width)."""
        tokens = self.embed(self._cut(pixels)).float()
        if self.position is not None:
            tokens = tokens + self.position
        x = torch.cat([self.prefix.expand(len(tokens), -1, -1), tokens], dim=1)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        turns = self._turns_for(pixels)
        for layer in self.layers:
            x = layer(x, turns)
        cls = x[:, :1] if self.cls_norm is None else self.cls_norm(x[:, :1])
        if not self.patches:
            return cls
        patches = x[:, len(self.prefix) :]
        return torch.cat([cls, patches if self.patch_norm is None else self.patch_norm(patches)], dim=1)

    def _cut(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, P, 3 * size * size): the patches' pixels in the order of the convolution's weights."""
        count, channels, height, width = pixels.shape
        size = self.patch_size
        rows, columns = height // size, width // size
        # As the convolution does, leave out what does not fill a patch.
        pixels = pixels[..., : rows * size, : columns * size].reshape(count, channels, rows, size, columns, size)
        return pixels.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * size * size)

    def _turns_for(self, pixels: Tensor) -> Tensor | None:
        """The tokens' rotations (tokens, 1, head width / 2) in pictures of this shape; the prefix is not turned."""
        if self._rotary is None:
            return None
        shape = (pixels.shape[-2], pixels.shape[-1])
        if shape not in self._turns:
            cos, sin = self._rotary(pixels[:1])
            half = cos.shape[-1] // 2
            turns = torch.complex(cos[:, :half].float(), sin[:, :half].float())
            self._turns[shape] = torch.cat([turns.new_ones(len(self.prefix), half), turns])[:, None]
        return self._turns[shape]


@dataclass(frozen=True)
class _Front:
    """What differs between the towers: the tokens' beginning, the layers in common terms, the last norm.

    prefix (tokens before the patches, width); position (P, width) or None; rotary(pixels) gives the patches' cosines
    and sines, or is None.
    """

    prefix: Tensor
    position: Tensor | None
    pre_norm: Norm | None
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None
    patch_embedding: nn.Conv2d
    layers: list[LayerWeights]
    last_norm: nn.LayerNorm


def _front_of(tower: Any) -> _Front:
    kind = tower.config.model_type
    if kind not in ("clip_vision_model", "dinov3_vit"):
        raise Unsupported(f"there is no fast form of a {kind}, only of clip_vision_model and dinov3_vit")
    embeddings = tower.embeddings
    if kind == "clip_vision_model":
        position = embeddings.position_embedding.weight.detach()
        return _Front(
            prefix=(embeddings.class_embedding.detach() + position[0])[None],
            position=position[1:],
            pre_norm=Norm.of(tower.pre_layrnorm),
            rotary=None,
            patch_embedding=embeddings.patch_embedding,
            layers=[_clip_layer(layer) for layer in tower.encoder.layers],
            last_norm=tower.post_layernorm,
        )
    prefix = torch.cat([embeddings.cls_token, embeddings.register_tokens], dim=1)[0].detach()
    return _Front(
        prefix=prefix,
        position=None,
        pre_norm=None,
        rotary=tower.rope_embeddings,
        patch_embedding=embeddings.patch_embeddings,
        layers=[_dino_layer(layer) for layer in tower.model.layer],
        last_norm=tower.norm,
    )


def _clip_layer(layer: Any) -> LayerWeights:
    attention, mlp, act = layer.self_attn, layer.mlp, layer.mlp.config.hidden_act
    up, down = Projection.of(mlp.fc1), Projection.of(mlp.fc2)
    if act == "quick_gelu":
        up, down, act = up.scaled(QUICK), Projection(down.weight / QUICK, down.bias), "silu"
    return LayerWeights(
        norm1=Norm.of(layer.layer_norm1),
        q=Projection.of(attention.q_proj),
        k=Projection.of(attention.k_proj),
        v=Projection.of(attention.v_proj),
        out=Projection.of(attention.out_proj),
        norm2=Norm.of(layer.layer_norm2),
        up=up,
        down=down,
        activation=_activation(act),
    )


def _dino_layer(layer: Any) -> LayerWeights:
    attention, mlp = layer.attention, layer.mlp
    gate = getattr(mlp, "gate_proj", None)
    return LayerWeights(
        norm1=Norm.of(layer.norm1),
        q=Projection.of(attention.q_proj),
        k=Projection.of(attention.k_proj),
        v=Projection.of(attention.v_proj),
        out=Projection.of(attention.o_proj).scaled(layer.layer_scale1.lambda1.detach()),
        norm2=Norm.of(layer.norm2),
        up=Projection.of(mlp.up_proj),
        down=Projection.of(mlp.down_proj).scaled(layer.layer_scale2.lambda1.detach()),
        activation=_activation(mlp.config.hidden_act),
        gate=None if gate is None else Projection.of(gate),
    )


def _activation(name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise Unsupported(f"there is no fast form of the activation {name}, only of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]
