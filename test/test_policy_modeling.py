"""The policy as its callers see it: training, chunks, relative actions, and batches that do not fit."""

import copy

import numpy as np
import pytest
import torch
from policy_fixtures import INSTRUCTIONS, demo_config, make_batch, make_stats, randomize

from dit_policy_ros.policy.configuration import (
    ConfigurationError,
    DiffusionConfig,
    FlowMatchingConfig,
    TransformerConfig,
)
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.sampling import Sampling
from dit_policy_ros.policy.tiny_clip import make_tiny_clip


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_clip")
    make_tiny_clip(folder)
    return str(folder)


@pytest.fixture
def make_policy(tiny_clip):
    def make(**changes):
        config = demo_config(tiny_clip, **changes)
        torch.manual_seed(0)
        policy = MultitaskDiTPolicy(config, make_stats(config)).eval()
        randomize(policy.noise_predictor)
        return policy

    return make


def observation(policy, size=2, seed=0):
    batch = make_batch(policy.config, size, seed)
    return {key: value for key, value in batch.items() if not key.startswith("action")}


OBJECTIVES = [
    FlowMatchingConfig(denoising_steps=3),
    DiffusionConfig(denoising_steps=3),
    DiffusionConfig(denoising_steps=3, sampler="ddpm", prediction_type="sample"),
]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("n_obs_steps", [1, 2])
def test_chunk_starts_at_the_newest_observation(make_policy, objective, n_obs_steps):
    policy = make_policy(objective=objective, n_obs_steps=n_obs_steps, action_mode="absolute")
    noise = torch.randn(2, 16, 7)
    batch = observation(policy)
    chunk = policy.predict_chunk(batch, noise=noise, generator=torch.Generator().manual_seed(1))
    assert chunk.shape == (2, 17 - n_obs_steps, 7)
    assert chunk.dtype == torch.float32
    normalised = policy.sample(policy.encode(batch), noise=noise, generator=torch.Generator().manual_seed(1))
    low, high = (torch.tensor(make_stats(policy.config)["action"][name]) for name in ("min", "max"))
    expected = (normalised[:, n_obs_steps - 1 :] + 1) / 2 * (high - low) + low
    torch.testing.assert_close(chunk, expected.detach(), atol=1e-4, rtol=0)


def test_relative_actions_start_from_the_newest_joints(make_policy):
    """The same network output, shifted by the joints that the actions drive, found through their indices."""
    indices = [6, 5, 4, 3, 2, 1, 0]
    changes = {"n_obs_steps": 2, "action_state_indices": indices}
    relative, absolute = make_policy(**changes), make_policy(**changes, action_mode="absolute")
    batch, noise = observation(relative), torch.randn(2, 16, 7)
    joints = batch["observation.state"][:, 1:, indices]
    difference = relative.predict_chunk(batch, noise=noise) - absolute.predict_chunk(batch, noise=noise)
    torch.testing.assert_close(difference, joints.expand(2, 15, 7), atol=1e-5, rtol=0)


def test_relative_training_does_not_see_where_the_arm_is(make_policy):
    """Targets moved together with the joints they are relative to give the same loss, but for the state's encoding."""
    policy = make_policy()
    batch = make_batch(policy.config, 4)
    moved = batch | {"action": batch["action"] + 0.3, "observation.state": batch["observation.state"] + 0.3}
    policy.encode = lambda *_: torch.zeros(4, policy.observation_encoder.conditioning_dim)
    losses = []
    for each in (batch, moved, batch | {"action": moved["action"]}):
        torch.manual_seed(3)
        losses.append(policy.loss(each).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != pytest.approx(losses[2], rel=1e-2)


def test_a_call_leaves_no_trace(make_policy):
    policy = make_policy().train()
    batch = observation(policy)
    before = copy.deepcopy(batch)
    chunk = policy.predict_chunk(batch)
    assert policy.training
    assert policy.noise_predictor.training
    assert not policy.observation_encoder.text_encoder.text_encoder.training
    assert chunk.is_inference()
    assert batch.keys() == before.keys()
    for key, value in batch.items():
        assert value == before[key] if key == "task" else torch.equal(value, before[key])
    with pytest.raises(ValueError, match="denoising_steps"):
        policy.predict_chunk(batch, Sampling(denoising_steps=0))
    assert policy.training


def test_chunks_are_reproducible_by_noise_or_generator(make_policy):
    policy = make_policy(objective=DiffusionConfig(denoising_steps=4, sampler="ddpm"))
    batch = observation(policy)

    def chunk(seed, **arguments):
        return policy.predict_chunk(batch, generator=torch.Generator().manual_seed(seed), **arguments)

    assert torch.equal(chunk(1), chunk(1))
    assert not torch.equal(chunk(1), chunk(2))
    noise = torch.randn(2, 16, 7)
    assert torch.equal(chunk(1, noise=noise), chunk(1, noise=noise))
    assert not torch.equal(chunk(1, noise=noise), chunk(2, noise=noise))  # DDPM draws noise at each step
    assert policy.predict_chunk(batch).shape == (2, 16, 7)


def test_denoising_steps_may_change_with_each_call(make_policy):
    policy = make_policy(objective=DiffusionConfig())
    calls = []
    policy.noise_predictor.register_forward_hook(lambda *_: calls.append(1))
    for steps in (1, 7, 100):
        calls.clear()
        policy.predict_chunk(observation(policy), Sampling(denoising_steps=steps))
        assert len(calls) == steps
    for steps in (0, -1, 101):
        with pytest.raises(ValueError, match=f"denoising_steps must be 1 to 100, got {steps}"):
            policy.predict_chunk(observation(policy), Sampling(denoising_steps=steps))
    with pytest.raises(ValueError, match=r"noise must have the shape \(2, 16, 7\)"):
        policy.predict_chunk(observation(policy), noise=torch.randn(1, 16, 7))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("observation.images.wrist", None, "the batch lacks observation.images.wrist"),
        ("observation.images.wrist", torch.zeros(2, 1, 3, 96, 128, dtype=torch.uint8), r"\(2, 1, 3, 128, 128\)"),
        ("observation.images.wrist", torch.full((2, 1, 3, 128, 128), 255.0), r"must lie in \[0, 1\], got 255 to 255"),
        ("observation.state", torch.zeros(2, 2, 7), r"\('batch', 1, 7\)"),
        ("observation.state", torch.zeros(2, 7), r"has shape \(2, 7\)"),
        ("task", None, "must be a list of 2 instructions"),
        ("task", "push", "must be a list of 2 instructions"),
        ("task", ["push"], "must be a list of 2 instructions"),
        ("task", ["push", ""], "task 1 of the batch is ''"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(make_policy, key, value, message):
    policy = make_policy()
    batch = observation(policy)
    del batch[key]
    if value is not None:
        batch[key] = value
    with pytest.raises(ValueError, match=message):
        policy.predict_chunk(batch)


def test_arrays_do_as_well_as_tensors(make_policy):
    policy = make_policy()
    batch, noise = observation(policy), torch.randn(2, 16, 7)
    arrays = {key: value if key == "task" else np.asarray(value) for key, value in batch.items()}
    arrays["observation.state"] = arrays["observation.state"].astype(np.float64)
    assert torch.equal(policy.predict_chunk(arrays, noise=noise), policy.predict_chunk(batch, noise=noise))


def test_padding_is_not_learnt(tiny_clip):
    config = demo_config(tiny_clip)
    # As initialised, blocks are the identity: what stands in the padding cannot reach the other steps by attention.
    policy = MultitaskDiTPolicy(config, make_stats(config)).eval()
    batch = make_batch(config, 4)
    batch["action_is_pad"][:, 10:] = True
    spoilt = batch | {"action": batch["action"].clone()}
    spoilt["action"][:, 10:] += 3.0

    def loss(batch):
        torch.manual_seed(2)
        return policy.loss(batch).item()

    assert loss(spoilt) == pytest.approx(loss(batch), rel=1e-6)
    with pytest.raises(ValueError, match="lacks action_is_pad"):
        policy.loss({key: value for key, value in batch.items() if key != "action_is_pad"})
    config.do_mask_loss_for_padding = False
    assert loss(spoilt) != pytest.approx(loss(batch), rel=1e-2)


def test_noise_draws_encode_once_and_denoise_several(make_policy):
    policy = make_policy(objective=FlowMatchingConfig(noise_draws=3))
    seen = []
    policy.noise_predictor.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    encoded = []
    encode = policy.encode
    policy.encode = lambda *arguments: encoded.append(encode(*arguments)) or encoded[-1]
    policy.loss(make_batch(policy.config, 2))
    (noisy, timestep, conditioning), (encoding,) = seen[0], encoded
    assert noisy.shape == (6, 16, 7)
    assert torch.equal(conditioning, encoding[[0, 0, 0, 1, 1, 1]])
    assert len(set(timestep.tolist())) == 6
    assert not torch.equal(noisy[0], noisy[1])


def test_training_mode_augments_and_evaluation_mode_does_not(make_policy):
    policy = make_policy(state_noise=0.05)
    batch = make_batch(policy.config)
    assert torch.equal(policy.encode(batch), policy.encode(batch))
    policy.train()
    first, second = (policy.encode(batch).detach() for _ in range(2))
    state = (first - second)[:, :7]
    assert 0.01 < state.std() < 0.3
    assert not torch.equal(first[:, 7:], second[:, 7:])  # shifted pictures


def test_parameter_groups_hold_everything_trained_once(make_policy):
    policy = make_policy()
    policy.config.observation_encoder.vision.lr_multiplier = 0.25
    groups = {group["name"]: group for group in policy.parameter_groups(1e-3)}
    assert {name: group["lr"] for name, group in groups.items()} == {"policy": 1e-3, "vision": 2.5e-4}
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    grouped = {group: {names[id(p)] for p in groups[group]["params"]} for group in groups}
    assert all(".vision_encoders." in name for name in grouped["vision"])
    frozen = {name for name in names.values() if ".text_encoder.text_encoder." in name}
    assert frozen
    assert grouped["policy"] == set(names.values()) - grouped["vision"] - frozen


def test_a_contradictory_configuration_builds_nothing(tiny_clip):
    config = demo_config(tiny_clip, n_action_steps=17)
    with pytest.raises(ConfigurationError, match="n_action_steps 17"):
        MultitaskDiTPolicy(config, make_stats(config))


def test_training_learns_to_follow_the_words(tiny_clip):
    """The same picture and joints, three instructions, three different motions: only the words tell them apart."""
    config = demo_config(
        tiny_clip,
        horizon=4,
        n_action_steps=4,
        transformer=TransformerConfig(hidden_dim=64, num_layers=2, num_heads=4, dropout=0.0),
        objective=FlowMatchingConfig(denoising_steps=5, noise_draws=16, timestep_sampling="uniform"),
    )
    torch.manual_seed(0)
    policy = MultitaskDiTPolicy(config, make_stats(config))
    batch = make_batch(config, 3)
    for key in (*config.cameras, "observation.state"):
        batch[key] = batch[key][:1].expand_as(batch[key])
    low, high = (torch.tensor(policy.stats["action"][name]) for name in ("min", "max"))
    targets = torch.tensor([-0.5, 0.0, 0.5])
    batch["action"] = batch["observation.state"] + (targets.view(3, 1, 1).expand(3, 4, 7) + 1) / 2 * (high - low) + low
    assert batch["task"] == INSTRUCTIONS

    optimizer = torch.optim.AdamW(policy.parameter_groups(3e-3))
    policy.train()
    for _ in range(80):
        optimizer.zero_grad()
        policy.loss(batch).backward()
        optimizer.step()
    chunk = policy.predict_chunk(batch, generator=torch.Generator().manual_seed(0)) - batch["observation.state"]
    actual = ((chunk - low) / (high - low) * 2 - 1).mean(dim=(1, 2))
    torch.testing.assert_close(actual, targets, atol=0.15, rtol=0)
