"""The engine against the policy it was made of, over policies and batches drawn at random from what can be configured.

Seeded: every run draws the same cases. What each must show is asserted over all of them, so that a draw which leaves
something out is noticed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from policy_fixtures import demo_config, make_batch, make_stats, randomize

from dit_policy_ros.policy.configuration import (
    ClipTextConfig,
    ClipVisionConfig,
    DiffusionConfig,
    DinoV3VisionConfig,
    Feature,
    FlowMatchingConfig,
    NoTextConfig,
    ObservationEncoderConfig,
    PolicyConfig,
    ResNetConfig,
    TransformerConfig,
)
from dit_policy_ros.policy.engine import PolicyEngine
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.realtime import ChunkInMotion
from dit_policy_ros.policy.sampling import Sampling
from dit_policy_ros.policy.tiny_clip import make_tiny_clip

CASES = 40
BOUND = 1e-5
"""A share of an action's range; some hundred roundings of float32."""
EPSILON_BOUND = 1e-4
"""Where epsilon is predicted, an estimate of the clean actions divides by the signal's share, here at least 0.05 (the
noisiest timestep visited by the "leading" spacing), and the rounding grows by that much; "trailing", with 5e-5, is left
to the clipping, and so not compared."""
TOWER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
PICTURES = [(32, 32), (24, 40), (16, 16)]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    make_tiny_clip(folder)
    return str(folder)


@dataclass
class Case:
    """A policy with random weights, a batch, and how to sample; `shows` names what is in it."""

    policy: MultitaskDiTPolicy
    batch: dict[str, Any]
    sampling: Sampling
    motion: ChunkInMotion | None
    shows: set[str]


def draw_vision(rng: random.Random, pooling: bool) -> Any:
    kind = rng.choice(["clip", "clip", "dinov3", "dinov3", "resnet"])
    separate = rng.random() < 0.5
    if kind == "resnet":
        return ResNetConfig(
            resize_shape=(16, 16),
            film=pooling,
            num_keypoints=4,
            random_shift=0,
            use_separate_encoder_per_camera=separate,
        )
    shared: dict[str, Any] = {
        "resize_shape": (20, 20),
        "crop_shape": (16, 16),
        "use_separate_encoder_per_camera": separate,
        "text_pooling": pooling,
        "text_pooling_heads": 2,
    }
    if kind == "dinov3":
        backbone = TOWER | {"use_gated_mlp": rng.random() < 0.5, "num_register_tokens": 3}
        shared["crop_shape"] = rng.choice([(16, 16), (16, 8)])
        return DinoV3VisionConfig(**shared, backbone_config=backbone)
    backbone = TOWER | {"image_size": 16, "hidden_act": rng.choice(["gelu", "quick_gelu"])}
    return ClipVisionConfig(**shared, backbone_config=backbone, use_post_layernorm=rng.random() < 0.5)


def draw_objective(rng: random.Random) -> DiffusionConfig | FlowMatchingConfig:
    if rng.random() < 0.3:
        return FlowMatchingConfig(
            denoising_steps=3, timestep_scale=rng.choice([1.0, 1000.0]), sampler=rng.choice(["euler", "heun", "rk4"])
        )
    predicted = rng.choice(["sample", "epsilon", "v_prediction"])
    spacing = "leading" if predicted == "epsilon" else rng.choice(["leading", "trailing"])
    return DiffusionConfig(
        denoising_steps=4,
        prediction_type=predicted,
        timestep_spacing=spacing,
        sampler=rng.choice(["ddpm", "ddim", "dpm_solver++"]),
    )


def draw_config(rng: random.Random, clip_folder: str) -> PolicyConfig:
    words = rng.random() < 0.8
    cameras = rng.choice([0, 1, 2, 2, 3])
    inputs = {f"observation.images.c{i}": Feature("VISUAL", (3, *PICTURES[i])) for i in range(cameras)}
    has_state = not cameras or rng.random() < 0.7
    if has_state:
        inputs["observation.state"] = Feature("STATE", (7,))
    if rng.random() < 0.4:
        inputs["observation.environment_state"] = Feature("ENV", (5,))
    rope, learned = rng.choice([(True, False), (False, True), (False, False)])
    vision = draw_vision(rng, words and rng.random() < 0.5)
    return demo_config(
        clip_folder,
        n_obs_steps=rng.choice([1, 2, 3]),
        input_features=inputs,
        action_mode="relative" if has_state and rng.random() < 0.5 else "absolute",
        observation_encoder=ObservationEncoderConfig(vision, ClipTextConfig(clip_folder) if words else NoTextConfig()),
        transformer=TransformerConfig(
            hidden_dim=32,
            num_layers=2,
            num_heads=4,
            timestep_embed_dim=32,
            use_rope=rope,
            use_positional_encoding=learned,
        ),
        objective=draw_objective(rng),
        instruction_dropout=0.1 if words and rng.random() < 0.6 else 0.0,
        max_delay=rng.choice([0, 4]),
    )


def draw(seed: int, clip_folder: str) -> Case:
    """A random case; the same for the same seed."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    config = draw_config(rng, clip_folder)
    policy = MultitaskDiTPolicy(config, make_stats(config)).eval()
    randomize(policy.noise_predictor)
    with torch.no_grad():  # actions within their range: what clipping cuts cannot differ
        policy.noise_predictor.output_proj.weight.mul_(0.3)
        if policy.observation_encoder.null_text is not None:
            policy.observation_encoder.null_text.normal_()
    size = rng.choice([1, 2, 3])
    batch = make_batch(config, size)
    joining = rng.choice([None, "guided", "guided_cheap"] + ["prefix"] * 2 * (config.max_delay > 0))
    candidates = rng.choice([1, 3])
    motion = None
    if joining is not None:
        rows = rng.choice([1, size])
        actions = (policy.action_origin(batch) + 0.05 * torch.randn(1, 9, 7)).expand(size, -1, -1)[:rows]
        past = (actions[:, :1] - 0.01).expand(-1, config.n_obs_steps - 1, -1)
        motion = ChunkInMotion(actions, delay=rng.choice([0, 1, 3]), execution_horizon=6, past=past)
    scale = 2.0 if config.instruction_dropout > 0 and rng.random() < 0.7 else None
    sampling = Sampling(guidance_scale=scale, candidates=candidates, joining=joining)
    return Case(policy, batch, sampling, motion, shows(config, sampling, motion))


def shows(config: PolicyConfig, sampling: Sampling, motion: ChunkInMotion | None) -> set[str]:
    """What of the things that have code of their own in the engine a case has."""
    vision, objective = config.observation_encoder.vision, config.objective
    cameras = len(config.cameras)
    pools = cameras > 0 and vision.is_modulated_by_text
    found = {
        f"{type(vision).__name__}, {'separate' if vision.use_separate_encoder_per_camera else 'shared'}": cameras > 1,
        "rope": config.transformer.use_rope,
        "learned positions": config.transformer.use_positional_encoding,
        "no positions": not (config.transformer.use_rope or config.transformer.use_positional_encoding),
        f"cameras, {config.n_obs_steps} steps": cameras > 0,
        "environment state": config.environment_state_dim > 0,
        "no camera": cameras == 0,
        "no words": isinstance(config.observation_encoder.text, NoTextConfig),
        f"{objective.sampler}, {sampling.candidates} candidates": True,
        getattr(objective, "prediction_type", "flow"): True,
        "words pool, guided by them": pools and sampling.guidance_scale is not None,
        "guided by words": sampling.guidance_scale is not None,
        f"joining {sampling.joining}": motion is not None and motion.delay > 0,
        "prefix, guided by words": sampling.joining == "prefix" and sampling.guidance_scale is not None,
    }
    return {name for name, there in found.items() if there}


def share(case: Case, got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference as a share of its action's range."""
    return float(((got - expected).abs() * case.policy.action_normalizer.inverse_scale / 2).max())


def bound_of(case: Case) -> float:
    return EPSILON_BOUND if "epsilon" in case.shows else BOUND


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("seed", range(CASES))
def test_the_engine_acts_as_the_policy(clip_folder: str, seed: int) -> None:
    case = draw(seed, clip_folder)
    policy, batch = case.policy, case.batch
    engine = PolicyEngine(policy)
    arguments: dict[str, Any] = {"sampling": case.sampling, "motion": case.motion}
    expected = policy.predict_candidates(batch, generator=seeded(), **arguments)
    got = engine.fast.predict_candidates(batch, generator=seeded(), **arguments)
    assert share(case, got, expected) < bound_of(case), sorted(case.shows)
    assert expected.std() > 1e-3  # the comparison is of something


@pytest.mark.parametrize("seed", range(CASES))
def test_a_chunk_from_frames_is_the_policys(clip_folder: str, seed: int) -> None:
    case = draw(seed, clip_folder)
    policy, batch = case.policy, case.batch
    engine, steps = PolicyEngine(policy), range(policy.config.n_obs_steps)
    tasks = batch["task"]

    def frames(without: bool) -> dict[str, list[torch.Tensor]]:
        return {
            key: [engine.encode_frame(key, batch[key][:, step], tasks, without) for step in steps]
            for key in policy.config.cameras
        }

    with_null = case.sampling.guidance_scale is not None and policy.text_modulates_vision
    sampling = Sampling(guidance_scale=case.sampling.guidance_scale)
    got = engine.predict_chunk_from(
        batch.get("observation.state"),
        frames(False),
        tasks,
        sampling,
        generator=seeded(),
        environment_state=batch.get("observation.environment_state"),
        frames_without_instruction=frames(True) if with_null else None,
    )
    expected = policy.predict_chunk(batch, sampling, generator=seeded())
    assert share(case, got, expected) < bound_of(case), sorted(case.shows)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("seed", range(0, CASES, 5))
def test_verification_turns_nothing_off_that_is_right(clip_folder: str, seed: int, precision: Any) -> None:
    case = draw(seed, clip_folder)
    reports = PolicyEngine(case.policy, precision).verify(case.batch)
    assert not any(report.failed for report in reports), ([str(report) for report in reports], sorted(case.shows))


def test_the_cases_show_everything(clip_folder: str) -> None:
    """Every kind that has code of its own is among the cases."""
    seen = set().union(*(draw(seed, clip_folder).shows for seed in range(CASES)))
    expected = {
        *(f"{kind}, {own}" for kind in ("ClipVisionConfig", "DinoV3VisionConfig") for own in ("separate", "shared")),
        *("rope", "learned positions", "no positions", "environment state", "no camera", "no words"),
        *(f"cameras, {steps} steps" for steps in (1, 2, 3)),
        *("ddpm, 3 candidates", "sample", "v_prediction", "epsilon", "flow"),
        *("guided by words", "words pool, guided by them", "prefix, guided by words"),
        *(f"joining {joining}" for joining in ("prefix", "guided", "guided_cheap")),
    }
    assert expected <= seen, expected - seen
