"""The diffusion transformer: from noisy actions, a timestep and the observation's conditioning to the denoising target.

DiT (Peebles and Xie, arXiv 2212.09748) over the steps of an action chunk. The observation enters only through
adaLN-Zero: each block's scales, shifts and gates are linear in [timestep embedding, conditioning]. Tensor
names are those of LeRobot's `multi_task_dit`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration import TransformerConfig


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift of adaLN: x * (1 + scale) + shift, broadcast over the steps."""
    return x * (1 + scale) + shift


class SinusoidalEmbedding(nn.Module):
    """Sines, then cosines, of a timestep at dim/2 frequencies from 1 to 1/10000 ("Attention is all you need", 3.5)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, timestep: Tensor) -> Tensor:
        """(...,) -> (..., dim)."""
        half = self.dim // 2
        step = -math.log(10000) / (half - 1)
        frequencies = torch.exp(torch.arange(half, device=timestep.device) * step)
        angles = timestep[..., None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def rope_tables(horizon: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embedding (arXiv 2104.09864, eq. 15), each (horizon, head_dim)."""
    # On the CPU whatever the default device is, so that the last bit does not depend on it.
    frequencies = 1.0 / (base ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim))
    angles = torch.outer(torch.arange(horizon, device="cpu").float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i + d/2}) of x (B, heads, T, d) by their step's angles ("rotate half")."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class RotaryAttention(nn.Module):
    """Multi-head self-attention whose queries and keys carry their step as a rotation."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig, horizon: int):
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.qkv_proj = nn.Linear(config.hidden_dim, 3 * config.hidden_dim)
        self.out_proj = nn.Linear(config.hidden_dim, config.hidden_dim)
        self._table = (horizon, config.hidden_dim // config.num_heads, config.rope_base)
        self.reset_buffers("cpu")

    def reset_buffers(self, device: torch.device | str) -> None:
        """Makes the tables that are not in the state_dict anew, on a device."""
        for name, table in zip(("cos", "sin"), rope_tables(*self._table), strict=True):
            self.register_buffer(name, table.to(device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden), T at most the horizon."""
        batch, steps, hidden = x.shape
        qkv = self.qkv_proj(x).view(batch, steps, 3, self.num_heads, hidden // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = (rotate(each, self.cos[:steps], self.sin[:steps]) for each in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(out.transpose(1, 2).reshape(batch, steps, hidden))


class TransformerBlock(nn.Module):
    """One DiT block with adaLN-Zero: at initialisation its gates are zero and it is the identity."""

    def __init__(self, config: TransformerConfig, horizon: int, features_dim: int):
        super().__init__()
        hidden = config.hidden_dim
        self.use_rope = config.use_rope
        if config.use_rope:
            self.attn = RotaryAttention(config, horizon)
        else:
            self.multihead_attn = nn.MultiheadAttention(
                hidden, config.num_heads, dropout=config.dropout, batch_first=True
            )
        self.norm1 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.GELU(approximate="tanh"), nn.Linear(4 * hidden, hidden)
        )
        modulation = nn.Linear(features_dim, 6 * hidden)
        nn.init.zeros_(modulation.weight)
        nn.init.zeros_(modulation.bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)

    def forward(self, x: Tensor, time: Tensor, conditioning: Tensor) -> Tensor:
        """x (B, T, hidden), time (B, 1 or T, time_dim), conditioning (B / k, 1, C) -> (B, T, hidden)."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulation(time, conditioning).chunk(
            6, dim=-1
        )
        x = x + gate_msa * self.attend(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))

    def modulation(self, time: Tensor, conditioning: Tensor) -> Tensor:
        """adaLN's output, (B, 1 or T, 6 * hidden), for time (B, 1 or T, time_dim) and conditioning (B / k, 1, C)."""
        if time.shape[:2] == conditioning.shape[:2]:
            return self.adaLN_modulation(torch.cat([time, conditioning], dim=-1))
        # The layer is linear in silu(time) and silu(conditioning), and the second, most of its columns, is the
        # same for all steps and all k chunks of an observation: one row of it is enough.
        linear: Any = self.adaLN_modulation[1]
        of_time, of_conditioning = linear.weight.split([time.shape[-1], conditioning.shape[-1]], dim=1)
        part = F.linear(F.silu(conditioning), of_conditioning, linear.bias).unsqueeze(1)
        return (F.linear(F.silu(time), of_time).unflatten(0, (len(part), -1)) + part).flatten(0, 1)

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention over the steps, (B, T, hidden) -> (B, T, hidden)."""
        if self.use_rope:
            return self.attn(x)
        return self.multihead_attn(x, x, x, need_weights=False)[0]


class DiffusionTransformer(nn.Module):
    """Predicts the objective's target (noise, clean actions or velocity) for a noisy chunk."""

    def __init__(self, config: TransformerConfig, action_dim: int, horizon: int, conditioning_dim: int):
        super().__init__()
        time_dim = config.timestep_embed_dim
        self.time_mlp = nn.Sequential(
            SinusoidalEmbedding(time_dim),
            nn.Linear(time_dim, 2 * time_dim),
            nn.GELU(),
            nn.Linear(2 * time_dim, time_dim),
            nn.GELU(),
        )
        self.input_proj = nn.Linear(action_dim, config.hidden_dim)
        self.pos_embedding = (
            nn.Parameter(0.02 * torch.randn(1, horizon, config.hidden_dim)) if config.use_positional_encoding else None
        )
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(config, horizon, time_dim + conditioning_dim) for _ in range(config.num_layers)
        )
        self.output_proj = nn.Linear(config.hidden_dim, action_dim)

    def forward(self, x: Tensor, timestep: Tensor, conditioning: Tensor) -> Tensor:
        """x (B, horizon, A) noisy, timestep (B,) or (B, horizon), conditioning (B / k, C) -> (B, horizon, A).

        Each row of the conditioning is that of k chunks, which stand together; k is 1 but for `noise_draws`.
        A timestep for each step is for chunks of which some steps are clean (training-time real-time chunking,
        arXiv 2512.05964).
        """
        time = self.time_mlp(timestep if timestep.dim() == 2 else timestep.unsqueeze(1))
        conditioning = conditioning.unsqueeze(1)
        hidden = self.input_proj(x)
        if self.pos_embedding is not None:
            hidden = hidden + self.pos_embedding
        for block in self.transformer_blocks:
            hidden = block(hidden, time, conditioning)
        return self.output_proj(hidden)
