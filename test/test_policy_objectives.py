"""Objectives: noisy actions, targets and what the transformer is told of time, against diffusers and closed forms."""

import pytest
import torch
from diffusers import DDPMScheduler

from dit_policy_ros.policy.configuration import DiffusionConfig, FlowMatchingConfig
from dit_policy_ros.policy.objectives import make_objective
from dit_policy_ros.policy.transformer import SinusoidalEmbedding


@pytest.fixture
def actions():
    return torch.randn(5, 4, 3), torch.randn(5, 4, 3)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_diffusion_is_that_of_diffusers(actions, kind):
    clean, noise = actions
    timestep = torch.tensor([0, 1, 50, 98, 99])
    scheduler = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    targets = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, timestep)}
    noisy, target = make_objective(DiffusionConfig(prediction_type=kind)).corrupt(clean, noise, timestep)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, timestep), atol=1e-5, rtol=0)
    torch.testing.assert_close(target, targets[kind], atol=1e-5, rtol=0)


def test_velocity_and_noisy_actions_give_the_clean_ones_back(actions):
    """a x - s v = a (a clean + s noise) - s (a noise - s clean) = clean."""
    clean, noise = actions
    objective = make_objective(DiffusionConfig(prediction_type="v_prediction"))
    timestep = torch.tensor([0, 20, 40, 60, 99])
    noisy, velocity = objective.corrupt(clean, noise, timestep)
    alpha_bar = objective.alphas_cumprod[timestep].view(-1, 1, 1)
    torch.testing.assert_close(alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * velocity, clean, atol=1e-5, rtol=0)


def test_flow_goes_straight_from_noise_to_data(actions):
    clean, noise = actions
    objective = make_objective(FlowMatchingConfig())
    assert torch.equal(objective.corrupt(clean, noise, torch.zeros(5))[0], noise)
    noisy, velocity = objective.corrupt(clean, noise, torch.full((5,), 0.25))
    torch.testing.assert_close(noisy + 0.75 * velocity, clean)


def test_time_is_scaled_for_the_embedding_only(actions):
    """LeRobot's checkpoints were told t in [0, 1]; a scale of 1000 moves every dimension of the embedding."""
    clean, noise = actions
    t = torch.rand(5)
    plain, scaled = (make_objective(FlowMatchingConfig(timestep_scale=scale)) for scale in (1.0, 1000.0))
    assert torch.equal(plain.embedding_timestep(t), t)
    assert torch.equal(scaled.embedding_timestep(t), 1000 * t)
    for ours, theirs in zip(plain.corrupt(clean, noise, t), scaled.corrupt(clean, noise, t), strict=True):
        assert torch.equal(ours, theirs)
    embedding = SinusoidalEmbedding(256)
    ends = torch.linspace(0, 1, 101)
    moved = [(embedding(each.embedding_timestep(ends)).std(dim=0) > 0.1).sum().item() for each in (plain, scaled)]
    assert moved[0] < 50
    assert moved[1] > 200


def test_a_clean_step_is_told_apart_from_every_timestep():
    assert make_objective(DiffusionConfig()).clean_timestep == -1.0
    assert make_objective(FlowMatchingConfig(timestep_scale=1000.0)).clean_timestep == 1000.0
    timestep = make_objective(DiffusionConfig()).draw_timesteps(4, torch.device("cpu"))
    assert make_objective(DiffusionConfig()).embedding_timestep(timestep).dtype == torch.float32
