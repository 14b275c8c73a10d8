"""The diffusion transformer's timesteps of its own for each step; that it is LeRobot's is in test_policy_parity."""

import pytest
import torch
from policy_fixtures import randomize
from torch import nn

from dit_policy_ros.policy.configuration import TransformerConfig
from dit_policy_ros.policy.transformer import DiffusionTransformer

POSITIONS = [(True, False), (False, True), (False, False)]


def make(rope=True, learned=False):
    config = TransformerConfig(
        hidden_dim=32, num_layers=2, num_heads=4, use_rope=rope, use_positional_encoding=learned, timestep_embed_dim=16
    )
    torch.manual_seed(0)
    transformer = DiffusionTransformer(config, 5, 8, 23).eval()
    randomize(transformer)
    return transformer


@pytest.mark.parametrize(("rope", "learned"), POSITIONS)
def test_equal_timesteps_of_all_steps_are_the_timestep_of_the_chunk(rope, learned):
    transformer = make(rope, learned)
    x, conditioning, timestep = torch.randn(3, 8, 5), torch.randn(3, 23), torch.tensor([0.0, 7.0, 99.0])
    expected = transformer(x, timestep, conditioning)
    actual = transformer(x, timestep.unsqueeze(1).expand(3, 8), conditioning)
    assert expected.std() > 0.01
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_each_step_is_modulated_by_its_own_timestep():
    """One block, against its layers applied step by step to [that step's timestep embedding, conditioning]."""
    transformer = make()
    block = transformer.transformer_blocks[0]
    x, conditioning, timestep = torch.randn(2, 8, 32), torch.randn(2, 23), 100 * torch.rand(2, 8)
    norm = nn.LayerNorm(32, elementwise_affine=False, eps=1e-6)

    def modulation(step):
        features = torch.cat([transformer.time_mlp(timestep[:, step]), conditioning], dim=-1)
        return block.adaLN_modulation(features).chunk(6, dim=-1)

    def by_step(values, first, apply):
        return torch.stack([apply(values[:, i], *modulation(i)[first : first + 3]) for i in range(8)], dim=1)

    attended = block.attend(by_step(x, 0, lambda value, shift, scale, gate: norm(value) * (1 + scale) + shift))
    middle = x + by_step(attended, 0, lambda value, shift, scale, gate: gate * value)
    moved = by_step(middle, 3, lambda value, shift, scale, gate: norm(value) * (1 + scale) + shift)
    expected = middle + by_step(block.mlp(moved), 3, lambda value, shift, scale, gate: gate * value)
    actual = block(x, transformer.time_mlp(timestep), conditioning.unsqueeze(1))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_a_steps_own_timestep_matters_where_it_stands():
    transformer = make()
    x, conditioning = torch.randn(1, 8, 5), torch.randn(1, 23)
    timesteps = torch.full((1, 8), 50.0)
    for step in range(8):
        changed = timesteps.clone()
        changed[0, step] = -1.0
        difference = (transformer(x, changed, conditioning) - transformer(x, timesteps, conditioning)).abs()[0].amax(1)
        assert difference.argmax() == step


def test_gradients_reach_both_parts_of_the_modulation():
    transformer = make()
    conditioning = torch.randn(2, 23, requires_grad=True)
    transformer(torch.randn(2, 8, 5), 100 * torch.rand(2, 8), conditioning).square().sum().backward()
    weight = transformer.transformer_blocks[0].adaLN_modulation[1].weight
    assert (weight.grad.abs().amax(dim=0) > 0).all()
    assert (conditioning.grad.abs() > 0).all()


@pytest.mark.parametrize("of_steps", [False, True])
def test_chunks_that_share_a_conditioning_are_as_if_each_had_it(of_steps):
    """Outputs and every gradient, the conditioning's among them."""
    transformer = make()
    x, timestep = torch.randn(6, 8, 5), 100 * torch.rand(6, 8)
    timestep = timestep if of_steps else timestep[:, 0]
    found = []
    for repeated in (True, False):
        transformer.zero_grad()
        torch.manual_seed(1)
        conditioning = torch.randn(2, 23, requires_grad=True)
        given = conditioning.repeat_interleave(3, dim=0) if repeated else conditioning
        output = transformer(x, timestep, given)
        output.square().mean().backward()
        found.append([output.detach(), conditioning.grad, *(p.grad.clone() for p in transformer.parameters())])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert found[0][0].std() > 0.01
    assert found[0][1].abs().max() > 1e-3
