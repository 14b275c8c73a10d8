"""The policy as its callers see it: training, chunks, relative actions, and batches that do not fit."""

import copy
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from policy_fixtures import INSTRUCTIONS, demo_config, make_batch, make_stats, randomize

from dit_policy_ros.policy.configuration import (
    ClipTextConfig,
    ClipVisionConfig,
    ConfigurationError,
    DiffusionConfig,
    DinoV3VisionConfig,
    Feature,
    FlowMatchingConfig,
    NoTextConfig,
    ObservationEncoderConfig,
    ResNetConfig,
    TransformerConfig,
)
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.realtime import ChunkInMotion
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


def spoilt(value):
    state = torch.zeros(2, 1, 7)
    state[1, 0, 3] = value
    return state


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("observation.images.wrist", None, "the batch lacks observation.images.wrist"),
        ("observation.images.wrist", torch.zeros(2, 1, 3, 96, 128, dtype=torch.uint8), r"\(2, 1, 3, 128, 128\)"),
        ("observation.images.wrist", torch.full((2, 1, 3, 128, 128), 255.0), r"must lie in \[0, 1\], got 255 to 255"),
        (
            "observation.images.wrist",
            np.zeros((2, 1, 128, 128, 3), np.uint8),
            r"\(2, 1, 128, 128, 3\), the policy takes",
        ),
        ("observation.images.wrist", torch.zeros(3, 1, 3, 128, 128), r"\(3, 1, 3, 128, 128\), the policy takes \(2, 1"),
        ("observation.images.wrist", torch.full((2, 1, 3, 128, 128), -0.1), r"must lie in \[0, 1\]"),
        ("observation.images.wrist", torch.full((2, 1, 3, 128, 128), torch.nan), r"must lie in \[0, 1\], got nan"),
        ("observation.images.wrist", torch.zeros(2, 1, 3, 128, 128, dtype=torch.bool), "uint8, or .*; got bool"),
        ("observation.images.wrist", torch.zeros(2, 1, 3, 128, 128, dtype=torch.int64), "uint8, or .*; got int64"),
        ("observation.images.wrist", torch.zeros(2, 1, 3, 128, 128, dtype=torch.complex64), "got complex64"),
        ("observation.images.wrist", ["a.png", "b.png"], "observation.images.wrist is no tensor or array of numbers"),
        (
            "observation.images.wrist",
            np.full((2, 1, 3, 128, 128), "a"),
            "is no tensor or array of numbers but a ndarray",
        ),
        ("observation.state", torch.zeros(2, 2, 7), r"\('batch', 1, 7\)"),
        ("observation.state", torch.zeros(2, 7), r"has shape \(2, 7\)"),
        ("observation.state", torch.zeros(2, 1, 7, dtype=torch.int64), "state is int64; .* floating-point"),
        ("observation.state", torch.zeros(2, 1, 7, dtype=torch.bool), "state is bool; .* floating-point"),
        ("observation.state", torch.zeros(2, 1, 7, dtype=torch.complex64), "state is complex64; .* floating-point"),
        ("observation.images.workspace", torch.tensor(3), "workspace is a single number"),
        ("observation.state", None, "the batch lacks observation.state; it has"),
        ("observation.state", spoilt(torch.nan), "not finite: sample 1, step 0, dimension 3 is nan"),
        ("observation.state", spoilt(-torch.inf), "not finite: sample 1, step 0, dimension 3 is -inf"),
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


@pytest.mark.parametrize(
    ("key", "shape"), [("observation.images.wrist", (2, 1, 3, 128, 128)), ("observation.state", (2, 1, 7))]
)
def test_an_episodes_first_observation_is_not_enough_for_two_and_the_error_says_what_to_do(make_policy, key, shape):
    policy = make_policy(n_obs_steps=2)
    batch = observation(policy) | {key: torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"2 observation steps, earliest first. .* repeat its first observation"):
        policy.predict_chunk(batch)
    repeated = {k: v if k == "task" else v[:, :1].expand_as(v) for k, v in observation(policy).items()}
    assert policy.predict_chunk(repeated).shape == (2, 15, 7)


def test_training_batches_are_checked_as_well(make_policy):
    policy = make_policy()
    batch = make_batch(policy.config)
    batch["action"][1, 2, 3] = torch.inf
    with pytest.raises(ValueError, match="action is not finite: sample 1, step 2, dimension 3 is inf"):
        policy.loss(batch)
    with pytest.raises(ValueError, match=r"action has shape \(2, 16, 6\), the policy takes \(2, 16, 7\)"):
        policy.loss(batch | {"action": torch.zeros(2, 16, 6)})
    with pytest.raises(ValueError, match="action is int32"):
        policy.loss(batch | {"action": torch.zeros(2, 16, 7, dtype=torch.int32)})


def test_a_long_instruction_is_cut_and_the_log_says_so_once(make_policy, caplog):
    policy = make_policy()
    batch, noise = observation(policy, size=1), torch.randn(1, 16, 7)
    with caplog.at_level(logging.WARNING, logger="dit_policy_ros.policy.text"):
        first, second = (
            policy.predict_chunk(batch | {"task": ["push " * 80 + end]}, noise=noise) for end in ("left", "right")
        )
        policy.predict_chunk(batch | {"task": ["push " * 80 + "left"]}, noise=noise)
    warned = [record.message for record in caplog.records]
    assert len(warned) == 2  # one an instruction, none for the repetition
    assert all("reads 77 tokens" in message for message in warned)
    assert torch.equal(first, second)  # what differs is beyond the 77


def test_two_threads_at_once_get_what_each_would_get_alone(make_policy):
    """Neither may put the policy back into training mode, with its random crops, while the other samples."""
    policy = make_policy(state_noise=0.5)
    batches = [observation(policy, seed=seed) | {"task": [f"push {seed}", "stop"]} for seed in range(8)]
    noise = torch.randn(2, 16, 7)
    expected = [policy.predict_chunk(batch, noise=noise) for batch in batches]
    policy.train()
    with ThreadPoolExecutor(4) as pool:
        chunks = list(pool.map(lambda batch: policy.predict_chunk(batch, noise=noise), batches * 2))
    assert policy.training
    for chunk, alone in zip(chunks, expected * 2, strict=True):
        assert torch.equal(chunk, alone)


def test_the_last_thread_to_leave_restores_training_mode(make_policy):
    policy = make_policy().train()
    batch = observation(policy)
    arrived, leave = threading.Event(), threading.Event()

    def stay(*_):
        if threading.current_thread() is not threading.main_thread():
            arrived.set()
            assert leave.wait(30)

    policy.noise_predictor.register_forward_hook(stay)
    thread = threading.Thread(target=policy.predict_chunk, args=(batch,))
    thread.start()
    assert arrived.wait(30)
    policy.predict_chunk(batch)  # comes and goes while the other is inside
    assert not policy.training
    leave.set()
    thread.join()
    assert policy.training
    twin = copy.deepcopy(policy)  # locks cannot be copied, policies must
    assert twin.predict_chunk(batch).shape == (2, 16, 7)


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
    assert torch.equal(conditioning, encoding)
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
    config = demo_config(tiny_clip)
    config.n_action_steps = 17
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


# -- inputs, each optional


CAMERAS = {f"observation.images.{name}": Feature("VISUAL", (3, 64, 64)) for name in ("workspace", "wrist")}
STATE = {"observation.state": Feature("STATE", (7,))}
ENVIRONMENT = {"observation.environment_state": Feature("ENV", (5,))}


def encoders(tiny_clip, words=True, **vision):
    text = ClipTextConfig(tiny_clip) if words else NoTextConfig()
    return ObservationEncoderConfig(ResNetConfig(film=words, num_keypoints=4, **vision), text)


INPUTS = [STATE, CAMERAS, ENVIRONMENT, ENVIRONMENT | STATE, ENVIRONMENT | CAMERAS, CAMERAS | STATE | ENVIRONMENT]


@pytest.mark.parametrize("inputs", INPUTS, ids=lambda inputs: "+".join(key[12:15] for key in inputs))
@pytest.mark.parametrize("words", [True, False])
def test_a_step_is_state_environment_cameras_words_as_far_as_there_are_any(tiny_clip, make_policy, inputs, words):
    policy = make_policy(
        n_obs_steps=2,
        input_features=inputs,
        action_mode="absolute",
        observation_encoder=encoders(tiny_clip, words),
    )
    batch = make_batch(policy.config)
    if not words:
        del batch["task"]
    text = policy.text_features(batch.get("task"))
    parts = []
    for key in ("observation.state", "observation.environment_state"):
        if key in inputs:
            low, high = (torch.tensor(policy.stats[key][name]) for name in ("min", "max"))
            parts.append((batch[key] - low) / (high - low) * 2 - 1)
    for key in CAMERAS:
        if key in inputs:
            parts.append(torch.stack([policy.encode_frame(key, batch[key][:, i], text) for i in range(2)], dim=1))
    if words:
        parts.append(text.unsqueeze(1).expand(2, 2, -1))
    expected = torch.cat(parts, dim=-1).flatten(1)
    actual = policy.encode(batch)
    assert actual.shape == (2, policy.observation_encoder.conditioning_dim)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert policy.predict_chunk(batch).shape == (2, 15, 7)
    policy.train().loss(batch).backward()


def test_frames_encoded_when_they_came_give_the_same_conditioning(make_policy):
    policy = make_policy(n_obs_steps=2)
    batch = make_batch(policy.config)
    text = policy.text_features(batch["task"])
    frames = {
        key: torch.stack([policy.encode_frame(key, batch[key][:, step], text) for step in range(2)], dim=1)
        for key in policy.config.cameras
    }
    actual = policy.assemble(batch["observation.state"], frames, text)
    torch.testing.assert_close(actual, policy.encode(batch), atol=1e-5, rtol=0)
    assert actual.std() > 0.01


def test_parts_that_do_not_fit_are_refused(make_policy):
    policy = make_policy()
    batch = observation(policy)
    text, state = policy.text_features(batch["task"]), batch["observation.state"]
    frames = {key: torch.zeros(2, 1, 64) for key in policy.config.cameras}
    wrist = "observation.images.wrist"
    for arguments, message in (
        ((None, frames, text), r"made of .*'observation.state', 'text'\], got"),
        ((state, {}, text), "made of .*wrist"),
        ((state, frames, None), "made of .*'text'"),
        ((state, frames, text, torch.zeros(2, 1, 5)), "got .*environment_state"),
        ((state, frames | {wrist: torch.zeros(2, 2, 64)}, text), r"the feature of .*wrist has shape \(2, 2, 64\)"),
        ((state, frames, text[:1]), r"feature of the instruction has shape \(1, 128\), the policy takes \(2, 128\)"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.assemble(*arguments)
    with pytest.raises(ValueError, match=r"no camera observation.images.left; it has"):
        policy.encode_frame("observation.images.left", batch[wrist][:, 0], text)
    with pytest.raises(ValueError, match="needs `text`"):
        policy.encode_frame(wrist, batch[wrist][:, 0], None)
    for images in (batch[wrist], batch[wrist][:, 0, :1]):
        with pytest.raises(ValueError, match=r"the policy takes \('batch', 3, 128, 128\)$"):
            policy.encode_frame(wrist, images, text)


def test_a_policy_without_words_takes_only_the_instructions_it_was_trained_on(tiny_clip, make_policy):
    """It would do what it knows, whatever it is told."""
    changes = {"observation_encoder": encoders(tiny_clip, words=False)}
    batch = observation(make_policy())
    for tasks, accepted in (([], True), (INSTRUCTIONS[:1], False), (INSTRUCTIONS, True)):
        policy = make_policy(tasks=tasks, **changes)
        assert policy.text_features(None) is None
        assert policy.text_modulates_vision is False
        policy.predict_chunk({key: value for key, value in batch.items() if key != "task"})
        with pytest.raises(ValueError, match="has not learned to act without an instruction"):
            policy.text_features(None, without_instruction=True)
        if accepted:
            policy.predict_chunk(batch)
        else:
            with pytest.raises(
                ValueError, match=r"reads no instructions and knows only .*red.*; it cannot do 'push the gr"
            ):
                policy.predict_chunk(batch)


def test_whether_words_modulate_vision(tiny_clip, make_policy):
    assert make_policy().text_modulates_vision
    assert not make_policy(input_features=STATE).text_modulates_vision
    plain = ObservationEncoderConfig(ResNetConfig(film=False), ClipTextConfig(tiny_clip))
    policy = make_policy(observation_encoder=plain)
    assert not policy.text_modulates_vision
    image = observation(policy)["observation.images.wrist"][:, 0]
    assert policy.encode_frame("observation.images.wrist", image, None).shape == (2, 64)


# -- classifier-free guidance


def test_without_instruction_the_words_are_a_learned_vector_everywhere(make_policy):
    policy = make_policy(instruction_dropout=0.25)
    batch = observation(policy)
    with torch.no_grad():
        policy.observation_encoder.null_text.copy_(torch.linspace(-1, 1, 128))
    other = batch | {"task": [INSTRUCTIONS[2], INSTRUCTIONS[2]]}
    assert not torch.equal(policy.encode(batch), policy.encode(other))
    without = policy.encode(batch, without_instruction=True)
    assert torch.equal(without, policy.encode(other, without_instruction=True))
    assert torch.equal(without[:, -128:], policy.observation_encoder.null_text.expand(2, -1))
    assert not torch.allclose(without[:, 7:-128], policy.encode(batch)[:, 7:-128])  # FiLM hears nothing either
    mixed = policy.encode(batch, without_instruction=torch.tensor([True, False]))
    torch.testing.assert_close(mixed[0], without[0])
    torch.testing.assert_close(mixed[1], policy.encode(batch)[1])
    with pytest.raises(ValueError, match=r"has not learned to act without an instruction: .* instruction_dropout"):
        make_policy().encode(batch, without_instruction=True)
    assert "observation_encoder.null_text" not in make_policy().state_dict()


@pytest.mark.parametrize("film", [True, False])
def test_guidance_extrapolates_and_encodes_pictures_again_only_if_words_modulate_them(make_policy, tiny_clip, film):
    vision = ResNetConfig(film=film, num_keypoints=4)
    policy = make_policy(
        instruction_dropout=0.25,
        n_obs_steps=2,
        observation_encoder=ObservationEncoderConfig(vision, ClipTextConfig(tiny_clip)),
    )
    with torch.no_grad():
        policy.observation_encoder.null_text.copy_(torch.linspace(-1, 1, 128))
    batch, noise = observation(policy), torch.randn(2, 16, 7)
    with torch.no_grad():
        conditioning, without = policy.encode(batch), policy.encode(batch, without_instruction=True)
        expected = policy.sample(conditioning, Sampling(guidance_scale=2.0), noise, unconditional=without)
    encoded = []
    policy.observation_encoder.vision_encoders[0].register_forward_hook(lambda *_: encoded.append(1))
    actions = policy.predict_chunk(batch, Sampling(guidance_scale=2.0), noise)
    expected = policy.action_normalizer.undo(expected[:, 1:]) + policy.action_origin(batch)
    torch.testing.assert_close(actions, expected, atol=1e-6, rtol=1e-6)
    assert len(encoded) == (4 if film else 2)  # two cameras
    unguided = policy.predict_chunk(batch, noise=noise)
    assert (actions - unguided).abs().max() > 1e-3


def test_training_drops_the_instruction_of_a_share_of_the_samples(make_policy):
    policy = make_policy(instruction_dropout=0.25, input_features=STATE)
    batch = make_batch(policy.config, 400)
    seen = []
    policy.noise_predictor.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2][:, -128:]))
    policy.train().loss(batch).backward()
    dropped = (seen[0] == policy.observation_encoder.null_text).all(dim=1)
    assert len(dropped) == 400  # for all noise_draws of a sample at once
    assert 0.18 < dropped.float().mean() < 0.32  # +- 3 standard deviations
    assert policy.observation_encoder.null_text.grad.abs().sum() > 0
    policy.eval().loss(batch)
    assert not (seen[1] == policy.observation_encoder.null_text).all(dim=1).any()


# -- training-time action conditioning


@pytest.mark.parametrize(
    ("objective", "clean"),
    [(FlowMatchingConfig(timestep_scale=1000.0), 1000.0), (DiffusionConfig(prediction_type="v_prediction"), -1.0)],
)
def test_committed_steps_are_given_clean_and_not_learnt(make_policy, objective, clean):
    policy = make_policy(objective=objective, n_obs_steps=3, max_delay=4, input_features=STATE, action_mode="absolute")
    batch = make_batch(policy.config, 300)
    batch["action_is_pad"][:, 12:] = True
    actions = policy.action_normalizer(batch["action"])
    seen = []
    policy.noise_predictor.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output)))
    policy.observation_encoder.text_encoder.pooled(batch["task"][:3])
    loss = policy.loss(batch)
    ((noisy, timestep, _, prediction),) = seen
    assert timestep.shape == (300, 16)
    committed = timestep == clean
    assert torch.equal(committed, (noisy == actions).all(dim=-1))
    lengths = committed.sum(dim=1)
    assert torch.equal(committed, torch.arange(16) < lengths.unsqueeze(1))  # from the first step on
    # No delay commits nothing; any other the two past steps as well.
    counts = torch.bincount(lengths, minlength=7)
    assert counts[[1, 2]].sum() == 0
    assert counts.sum() == 300 == counts[:7].sum()
    assert (counts[[0, 3, 4, 5, 6]] > 35).all()  # uniform: 60 +- 7 each
    assert (timestep.masked_fill(committed, torch.nan).nan_to_num(0).amax(1)[:, None] == timestep)[~committed].all()

    learnt = ~committed & (torch.arange(16) < 12)
    assert torch.autograd.grad(loss, prediction)[0].abs().amax(dim=-1).gt(0).equal(learnt)


def test_without_delay_the_chunk_has_one_timestep(make_policy):
    policy = make_policy()
    seen = []
    policy.noise_predictor.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1].shape))
    policy.loss(make_batch(policy.config))
    assert seen == [(4,)]


# -- built without weights


TINY_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY_TOWER |= {"patch_size": 16, "image_size": 64}
SQUARE = {"resize_shape": (64, 64), "crop_shape": (64, 64)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": DiffusionConfig(), "instruction_dropout": 0.1, "input_features": STATE | ENVIRONMENT | CAMERAS},
        {"transformer": TransformerConfig(hidden_dim=32, num_heads=4, use_rope=False, use_positional_encoding=True)},
        {"vision": ClipVisionConfig(backbone_config=TINY_TOWER, use_separate_encoder_per_camera=True, **SQUARE)},
        {"vision": DinoV3VisionConfig(backbone_config=TINY_TOWER, text_pooling=True, **SQUARE)},
    ],
)
def test_a_policy_built_without_weights_gets_its_tables_bit_for_bit(tiny_clip, changes):
    changes = dict(changes)
    vision = changes.pop("vision", ResNetConfig())
    config = demo_config(
        tiny_clip, observation_encoder=ObservationEncoderConfig(vision, ClipTextConfig(tiny_clip)), **changes
    )
    built = MultitaskDiTPolicy(config, make_stats(config)).eval()
    tower = built.observation_encoder.text_encoder
    config.observation_encoder.text.model_config = tower.text_encoder.config.to_dict()
    with torch.device("meta"):
        empty = MultitaskDiTPolicy(config, make_stats(config), tower.tokenizer).eval()
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(built.state_dict(), assign=True)
    for _ in range(2):
        empty.reset_buffers("cpu")
        expected, actual = dict(built.named_buffers()), dict(empty.named_buffers())
        assert actual.keys() == expected.keys()
        for name, table in expected.items():
            assert torch.equal(actual[name], table), name
            assert actual[name].dtype == table.dtype, name
            actual[name].zero_()  # so that the second round has something to do
    empty.reset_buffers("cpu")
    batch, noise = observation(built), torch.randn(2, 16, 7)
    assert torch.equal(empty.predict_chunk(batch, noise=noise), built.predict_chunk(batch, noise=noise))


def test_a_table_that_is_unknown_is_not_left_empty(tiny_clip):
    config = demo_config(tiny_clip)
    policy = MultitaskDiTPolicy(config, make_stats(config))
    policy.observation_encoder.text_encoder.text_encoder.register_buffer("cosines", torch.ones(3), persistent=False)
    with pytest.raises(NotImplementedError, match=r"has a table .*cosines that is unknown here"):
        policy.reset_buffers("cpu")


def test_pooling_by_words_learns_at_the_full_rate(tiny_clip, make_policy):
    vision = DinoV3VisionConfig(backbone_config=TINY_TOWER, text_pooling=True, lr_multiplier=0.1, **SQUARE)
    policy = make_policy(observation_encoder=ObservationEncoderConfig(vision, ClipTextConfig(tiny_clip)))
    groups = {group["name"]: {id(p) for p in group["params"]} for group in policy.parameter_groups(1.0)}
    encoder = policy.observation_encoder.vision_encoders[0]
    assert {id(p) for p in encoder.text_pooling.parameters()} <= groups["policy"]
    assert {id(p) for p in encoder.model.parameters() if p.requires_grad} == groups["vision"]


@pytest.mark.parametrize(
    "objective",
    [
        FlowMatchingConfig(denoising_steps=5, noise_draws=8, timestep_sampling="uniform", timestep_scale=100.0),
        DiffusionConfig(denoising_steps=5, noise_draws=8, prediction_type="v_prediction"),
    ],
)
def test_training_with_delays_learns_to_go_on_from_what_is_committed(tiny_clip, objective):
    """The same observation is followed by either of two motions: only the committed steps tell which is in motion."""
    config = demo_config(
        tiny_clip,
        n_obs_steps=2,
        horizon=8,
        n_action_steps=4,
        max_delay=3,
        action_mode="absolute",
        input_features=STATE,
        observation_encoder=encoders(tiny_clip, words=False),
        transformer=TransformerConfig(hidden_dim=64, num_layers=2, num_heads=4, dropout=0.0),
        objective=objective,
    )
    torch.manual_seed(0)
    policy = MultitaskDiTPolicy(config, make_stats(config))
    batch = make_batch(config, 8)
    batch["observation.state"] = torch.zeros(8, 2, 7)
    sign = torch.tensor([-1.0, 1.0]).repeat(4).view(8, 1, 1)
    batch["action"] = policy.action_normalizer.undo(0.5 * sign.expand(8, 8, 7))
    optimizer = torch.optim.AdamW(policy.parameter_groups(3e-3))
    policy.train()
    for _ in range(80):
        optimizer.zero_grad()
        policy.loss(batch).backward()
        optimizer.step()

    def follow(delay):
        motion = ChunkInMotion(batch["action"][:, 1:], delay, execution_horizon=4, past=batch["action"][:, :1])
        generator = torch.Generator().manual_seed(0)
        chunk = policy.predict_chunk(batch, Sampling(joining="prefix"), motion=motion, generator=generator)
        return policy.action_normalizer(chunk)[:, delay:].mean(dim=(1, 2))

    for delay in (1, 3):
        torch.testing.assert_close(follow(delay), 0.5 * sign.flatten(), atol=0.15, rtol=0)
    free = follow(0)  # nothing is committed: either motion, whichever is in motion
    assert (free.sign() != sign.flatten().sign()).any()
