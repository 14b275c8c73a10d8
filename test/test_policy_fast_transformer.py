"""The fast transformer gives what the plain one gives, for every kind of position, batch, prefix and precision."""

from __future__ import annotations

import pytest
import torch
from policy_fixtures import randomize

from dit_policy_ros.policy.configuration import TransformerConfig
from dit_policy_ros.policy.fast_transformer import FastTransformer, pair_up, rotate_pairs
from dit_policy_ros.policy.packed_linear import FrozenLinear, can_pack
from dit_policy_ros.policy.transformer import DiffusionTransformer, rope_tables, rotate

HORIZON, ACTIONS, CONDITIONING, HEADS = 12, 5, 23, 4
POSITIONS = {"rope": (True, False), "learned": (False, True), "none": (False, False)}


def make(position: str) -> DiffusionTransformer:
    rope, learned = POSITIONS[position]
    config = TransformerConfig(
        hidden_dim=32, num_layers=3, num_heads=HEADS, use_rope=rope, use_positional_encoding=learned
    )
    network = DiffusionTransformer(config, ACTIONS, HORIZON, CONDITIONING).eval()
    randomize(network)
    return network


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("position", POSITIONS)
@torch.inference_mode()
def test_predicts_what_the_plain_one_does(position: str, batch: int, packed: bool) -> None:
    network = make(position)
    fast = FastTransformer(network, HEADS, torch.float32, packed)
    timesteps = torch.tensor([0.0, 3.0, 50.0, 99.0])
    x, conditioning = torch.randn(batch, HORIZON, ACTIONS), torch.randn(batch, CONDITIONING)
    table, part = fast.table(timesteps), fast.conditioning_part(conditioning)
    for call, timestep in enumerate(timesteps):
        expected = network(x, timestep.expand(batch), conditioning)
        got = fast(x, part[:, :, None] + table[:, call, None, None])
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
        assert expected.std() > 0.05  # the comparison is of something


@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_each_step_may_have_its_own_timestep(batch: int) -> None:
    network = make("rope")
    fast = FastTransformer(network, HEADS, torch.float32)
    x, conditioning = torch.randn(batch, HORIZON, ACTIONS), torch.randn(batch, CONDITIONING)
    known = torch.arange(HORIZON) < 4
    timestep = torch.where(known, -1.0, 60.0)
    table = fast.table(torch.tensor([60.0, -1.0]))
    rows = torch.where(known[:, None], table[:, 1, None, None], table[:, 0, None, None])
    got = fast(x, fast.conditioning_part(conditioning)[:, :, None] + rows)
    expected = network(x, timestep.expand(batch, -1), conditioning)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    assert (expected - network(x, torch.full((batch,), 60.0), conditioning)).abs().max() > 0.01


@pytest.mark.parametrize(("precision", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@torch.inference_mode()
def test_a_half_precision_errs_by_its_rounding(precision: torch.dtype, bound: float) -> None:
    network = make("rope")
    fast = FastTransformer(network, HEADS, precision)
    x, conditioning = torch.randn(1, HORIZON, ACTIONS), torch.randn(1, CONDITIONING)
    table = fast.table(torch.tensor([50.0]))
    got = fast(x, fast.conditioning_part(conditioning)[:, :, None] + table[:, :1, None])
    expected = network(x, torch.tensor([50.0]), conditioning)
    assert got.dtype == torch.float32
    assert 0 < (got - expected).abs().max() / expected.abs().max() < bound


def test_turning_pairs_as_complex_numbers_is_rotate_half() -> None:
    dim = 8
    cos, sin = rope_tables(HORIZON, dim, 10000.0)
    q, k = torch.randn(2, HEADS, HORIZON, dim), torch.randn(2, HEADS, HORIZON, dim)
    expected = rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(-1, -2)
    order = pair_up(1, dim)
    turns = torch.complex(cos[:, : dim // 2], sin[:, : dim // 2])
    got = rotate_pairs(q[..., order], turns) @ rotate_pairs(k[..., order], turns).transpose(-1, -2)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": torch.nn.GELU(),
    "gelu_tanh": torch.nn.GELU(approximate="tanh"),
    "swish": torch.nn.SiLU(),
    "relu": torch.nn.ReLU(),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.inference_mode()
def test_a_frozen_linear_is_a_linear(activation: str, packed: bool) -> None:
    linear = torch.nn.Linear(24, 40)
    frozen = FrozenLinear(linear.weight, linear.bias, torch.float32, activation, packed)
    assert frozen.packed == (packed and can_pack(torch.device("cpu"), torch.float32))
    for rows in (1, 7, 130):  # a layout chosen for some number of rows must serve all
        x = torch.randn(2, rows, 24)
        torch.testing.assert_close(frozen(x), ACTIVATIONS[activation](linear(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_adding_to_a_residual_keeps_its_type(dtype: torch.dtype, packed: bool) -> None:
    linear = torch.nn.Linear(24, 40)
    frozen = FrozenLinear(linear.weight, linear.bias, dtype, packed=packed)
    x, residual = torch.randn(2, 3, 24), torch.randn(2, 3, 40)
    before = residual.clone()
    got = frozen.add_to(residual, x)
    assert got.dtype == torch.float32
    assert torch.equal(residual, before)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(got, residual + linear(x), atol=tolerance, rtol=0)
