"""The diffusion transformer for inference: what does not depend on the noisy actions leaves the denoising loop.

adaLN's input is [timestep embedding, conditioning] and SiLU works element by element, so

    Linear(silu([t, c])) = W_t silu(t) + (W_c silu(c) + b).

The first term, of all layers, is a table over the sampler's timesteps, made once a plan; the second is made once a
chunk. With them the weights read in a denoising step of the default model fall from 399 MB to 76 MB. The rest is the
same arithmetic in fewer passes: adaLN's "1 +" is in the table, its scale and shift are the LayerNorm's own weight and
bias, gates are fused with the residual sum, and RoPE turns adjacent pairs as complex numbers, for which the rows of
the query and key weights are reordered (dot products do not mind).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .packed_linear import FrozenLinear
from .transformer import DiffusionTransformer

EPSILON = 1e-6
"""Of the blocks' LayerNorms."""


def pair_up(heads: int, dim: int, device: torch.device | None = None) -> Tensor:
    """The order of rows, (heads * dim,), that puts each head's row i + dim/2 right behind its row i."""
    within = torch.arange(dim, device=device).view(2, dim // 2).T.flatten()
    return (torch.arange(heads, device=device)[:, None] * dim + within).flatten()


def rotate_pairs(x: Tensor, turns: Tensor) -> Tensor:
    """Turns adjacent pairs of x (..., dim), float32, by unit complex numbers `turns`, which broadcast to (..., dim/2).

    With the rows reordered by `pair_up` this is the "rotate half" of RoPE (arXiv 2104.09864, eq. 15).
    """
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2)


@dataclass(frozen=True)
class Modulation:
    """What adaLN does to one layer: six tensors (batch or 1, steps or 1, hidden); the scales include their "1 +"."""

    shift_attention: Tensor
    scale_attention: Tensor
    gate_attention: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


class FastBlock:
    """One transformer block; made of the weights of a TransformerBlock."""

    def __init__(self, block: Any, num_heads: int, dtype: torch.dtype, packed: bool):
        self.num_heads = num_heads
        attention = block.attn if block.use_rope else block.multihead_attn
        out = attention.out_proj
        self.turns: Tensor | None = None
        if block.use_rope:
            weight, bias = block.attn.qkv_proj.weight.detach(), block.attn.qkv_proj.bias.detach()
            hidden = weight.shape[1]
            dim = hidden // num_heads
            order = pair_up(2 * num_heads, dim, weight.device)
            order = torch.cat([order, torch.arange(2 * hidden, 3 * hidden, device=weight.device)])
            weight, bias = weight[order], bias[order]
            half = dim // 2
            turns = torch.complex(block.attn.cos[:, :half].float(), block.attn.sin[:, :half].float())
            self.turns = turns[:, None, None]
        else:
            weight, bias = block.multihead_attn.in_proj_weight, block.multihead_attn.in_proj_bias
        self.qkv = FrozenLinear(weight, bias, dtype, packed=packed)
        self.out = FrozenLinear(out.weight, out.bias, dtype, packed=packed)
        up, down = block.mlp[0], block.mlp[2]
        self.up = FrozenLinear(up.weight, up.bias, dtype, "gelu_tanh", packed=packed)
        self.down = FrozenLinear(down.weight, down.bias, dtype, packed=packed)

    def __call__(self, x: Tensor, modulation: Modulation) -> Tensor:
        """x (B, T, hidden) float32 -> the same."""
        attended = self.attend(_norm(x, modulation.scale_attention, modulation.shift_attention))
        x = torch.addcmul(x, modulation.gate_attention, attended)
        transformed = self.down(self.up(_norm(x, modulation.scale_mlp, modulation.shift_mlp)))
        return torch.addcmul(x, modulation.gate_mlp, transformed.to(x.dtype))

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention over the steps, (B, T, hidden) float32 -> the same; scores and softmax are float32."""
        batch, steps, hidden = x.shape
        qkv = self.qkv(x).float().view(batch, steps, 3, self.num_heads, hidden // self.num_heads)
        q, k, v = qkv.unbind(2)
        if self.turns is not None:
            q, k = rotate_pairs(qkv[:, :, :2], self.turns[:steps]).unbind(2)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out(out.transpose(1, 2).reshape(batch, steps, hidden)).float()


class FastTransformer:
    """A DiffusionTransformer's fast form: tables for a plan, one product a chunk, then cheap steps.

    The weights of the blocks are copied in `dtype`; norms, softmax, residuals, the timestep embedding and both ends
    stay float32. Made of the weights as they are: after a change of the network's, make another.
    """

    @torch.no_grad()
    def __init__(self, network: DiffusionTransformer, num_heads: int, dtype: torch.dtype, packed: bool = True):
        self.network = network
        last: Any = network.time_mlp[-2]
        self.time_dim: int = last.out_features
        self.position = None if network.pos_embedding is None else network.pos_embedding.detach()
        blocks: list[Any] = list(network.transformer_blocks)
        self.blocks = [FastBlock(block, num_heads, dtype, packed) for block in blocks]
        modulations = [block.adaLN_modulation[1] for block in blocks]
        # In fp32 the columns of the module's own weights are read where they are; a copy would be 300 MB.
        self.of_time = [linear.weight.detach()[:, : self.time_dim] for linear in modulations]
        self.of_conditioning = [linear.weight.detach()[:, self.time_dim :] for linear in modulations]
        self.dtype = dtype
        self.narrow_of_conditioning: list[FrozenLinear] = []
        if dtype != torch.float32:
            self.narrow_of_conditioning = [
                FrozenLinear(weight, None, dtype, packed=packed) for weight in self.of_conditioning
            ]
        self.biases = [linear.bias.detach() for linear in modulations]

    @property
    def bytes(self) -> int:
        """Memory of the copies, beside the policy's own weights."""
        linears = [linear for block in self.blocks for linear in (block.qkv, block.out, block.up, block.down)]
        return sum(linear.bytes for linear in [*linears, *self.narrow_of_conditioning])

    def table(self, timesteps: Tensor) -> Tensor:
        """The timesteps' part of adaLN, (layers, timesteps, 6 * hidden) float32, for timesteps (n,) float32."""
        embedded = F.silu(self.network.time_mlp(timesteps))
        table = torch.stack([F.linear(embedded, weight) for weight in self.of_time])
        scales = table.view(*table.shape[:2], 6, -1)[:, :, (1, 4)]
        table.view(*table.shape[:2], 6, -1)[:, :, (1, 4)] = scales + 1
        return table

    def conditioning_part(self, conditioning: Tensor) -> Tensor:
        """The conditioning's part of adaLN, (layers, B, 6 * hidden) float32, for a conditioning (B, C)."""
        features = F.silu(conditioning)
        if self.narrow_of_conditioning:
            narrow = zip(self.narrow_of_conditioning, self.biases, strict=True)
            return torch.stack([linear(features).float() + bias for linear, bias in narrow])
        wide = zip(self.of_conditioning, self.biases, strict=True)
        return torch.stack([F.linear(features, weight, bias) for weight, bias in wide])

    def __call__(self, x: Tensor, modulation: Tensor) -> Tensor:
        """The prediction (B, T, A) for x (B, T, A), both float32.

        modulation (layers, B or 1, T or 1, 6 * hidden) is the sum of the two parts.
        """
        hidden = self.network.input_proj(x)
        if self.position is not None:
            hidden = hidden + self.position[:, : hidden.shape[1]]
        for block, row in zip(self.blocks, modulation.unbind(0), strict=True):
            hidden = block(hidden, Modulation(*row.chunk(6, dim=-1)))
        return self.network.output_proj(hidden)


def _norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm, then times scale plus shift, (batch or 1, steps or 1, hidden)."""
    width = (x.shape[-1],)
    if scale.numel() == width[0]:
        return F.layer_norm(x, width, scale.flatten(), shift.flatten(), EPSILON)
    return torch.addcmul(shift, F.layer_norm(x, width, eps=EPSILON), scale)
