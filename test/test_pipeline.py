"""One chunk from messages to trajectories, with a real (untrained) policy, and what is refused on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from policy_fixtures import INSTRUCTIONS, demo_config, make_stats

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.policy.configuration import ClipVisionConfig, DinoV3VisionConfig, ObservationEncoderConfig
from dit_policy_ros.policy.engine import PolicyEngine
from dit_policy_ros.policy.fast_vision import FastViT
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.tiny_clip import make_tiny_clip
from dit_policy_ros.runtime.conductor import Conductor
from dit_policy_ros.runtime.decisions import Outcome, Settings
from dit_policy_ros.runtime.frames import FrameFeatures
from dit_policy_ros.runtime.gate import Gate, Verdict
from dit_policy_ros.runtime.observations import ObservationBuffer
from dit_policy_ros.runtime.pipeline import ChunkPipeline, Request

TEXT = (Path(__file__).parents[1] / "config/embodiments/sim_arm.yaml").read_text()
NOW_NS = 1_000_000_000_000
HOME = [0.0, -0.4, 0.0, -2.8, 0.0, 2.4, 0.8]


@pytest.fixture(scope="module")
def make_policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], MultitaskDiTPolicy]:
    clip = tmp_path_factory.mktemp("clip")
    make_tiny_clip(clip)

    def make(reach: float) -> MultitaskDiTPolicy:
        """Untrained: its steps are random within `reach` rad of the measured joints."""
        config = demo_config(str(clip), n_obs_steps=2, tasks=INSTRUCTIONS)
        stats = make_stats(config)
        stats["action"] = {"min": [-reach] * 7, "max": [reach] * 7, "mean": [0.0] * 7, "std": [reach] * 7}
        torch.manual_seed(0)
        return MultitaskDiTPolicy(config, stats)

    return make


def request(**changes: object) -> Request:
    return Request(1, 7, NOW_NS, INSTRUCTIONS[0], 8, 0.1, **changes)


def run(policy: MultitaskDiTPolicy, embodiment: Embodiment, late_s: float = 0.0) -> Outcome:
    """A chunk from a quarter of a second of a resting arm's messages; sampling takes `late_s`."""
    buffer = ObservationBuffer(embodiment, policy.config.n_obs_steps)
    joints = embodiment.state.joints
    for age_ms in range(250, -1, -10):
        stamp_ns = NOW_NS - age_ms * 1_000_000
        header = SimpleNamespace(stamp=SimpleNamespace(sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9))
        state = SimpleNamespace(header=header, name=joints, position=HOME, velocity=[0.0] * 7)
        buffer.add(embodiment.state.topic, stamp_ns, state)
        for camera in embodiment.cameras:
            size = {"height": camera.height, "width": camera.width, "step": 3 * camera.width}
            data = bytes(3 * camera.width * camera.height)
            buffer.add(camera.topic, stamp_ns, SimpleNamespace(header=header, encoding="rgb8", data=data, **size))
    conductor = Conductor(embodiment, Gate(embodiment), buffer)
    conductor.instruct(INSTRUCTIONS[0])
    conductor.start(NOW_NS)
    settings = Settings(n_action_steps=8, inference_timeout=2.0)
    directive = conductor.tick(NOW_NS, settings)
    assert directive.request is not None
    sampled = ChunkPipeline(policy, embodiment, buffer, lambda: NOW_NS).sample(directive.request)
    late_ns = round(late_s * 1e9)
    for passed_ns in range(0, late_ns + 1, 10_000_000):
        conductor.tick(NOW_NS + passed_ns, settings)
    outcome = conductor.deliver(sampled, NOW_NS + late_ns)
    assert outcome is not None
    return outcome


@pytest.fixture(scope="module")
def embodiment() -> Embodiment:
    return Embodiment.from_yaml(TEXT.replace("transport: compressed", "transport: raw"), "test")


def test_an_accepted_chunk_starts_at_the_arm_and_is_timed_from_now(make_policy, embodiment) -> None:
    outcome = run(make_policy(0.001), embodiment, late_s=0.12)
    assert outcome.decision.verdict is Verdict.ACCEPTED, outcome.decision
    trajectory = outcome.trajectory
    assert trajectory is not None
    assert trajectory.joint_names == embodiment.action_joints
    np.testing.assert_allclose(trajectory.positions[0], HOME, atol=0.005)
    # The arm has rested since the observation, so the first step is still to come: a step from now.
    assert outcome.steps_dropped == 0
    assert trajectory.times[0] == pytest.approx(0.1)
    assert len(trajectory.times) == 16 - 2 + 1


def test_two_groups_get_their_own_joints(make_policy) -> None:
    text = TEXT.replace("transport: compressed", "transport: raw")
    head, tail = text.split("      panda_joint5: {", 1)
    second = "  wrist:\n    topic: wrist_controller/joint_trajectory\n    interface: trajectory\n    joints:\n"
    second += "      panda_joint5: {"
    embodiment = Embodiment.from_yaml(head + second + tail, "two groups")
    outcome = run(make_policy(0.001), embodiment)
    arm, wrist = (outcome.trajectory.select(tuple(group.joints)) for group in embodiment.action_groups)
    assert arm.joint_names == embodiment.action_joints[:4]
    assert wrist.joint_names == embodiment.action_joints[4:]
    assert outcome.chunk is not None
    np.testing.assert_array_equal(np.hstack([arm.positions, wrist.positions]), outcome.chunk.positions)


@pytest.mark.parametrize(
    ("reach", "verdicts"),
    [
        (0.5, {Verdict.VELOCITY_LIMIT, Verdict.ACCELERATION_LIMIT, Verdict.POSITION_LIMIT}),
        (50.0, {Verdict.POSITION_LIMIT}),
        (float("nan"), {Verdict.NOT_FINITE}),
    ],
)
def test_an_unsafe_chunk_carries_no_trajectory(make_policy, embodiment, reach: float, verdicts: set[Verdict]) -> None:
    policy = make_policy(1.0 if np.isnan(reach) else reach)
    if np.isnan(reach):
        torch.nn.init.constant_(policy.noise_predictor.output_proj.bias, float("nan"))
    outcome = run(policy, embodiment)
    assert outcome.decision.verdict in verdicts, outcome.decision
    assert outcome.decision.reason
    assert outcome.trajectory is None
    assert not outcome.sent
    assert outcome.chunk is not None  # it is still told, for debugging


def test_a_chunk_that_comes_too_late_is_refused(make_policy, embodiment) -> None:
    outcome = run(make_policy(0.001), embodiment, late_s=1.2)
    assert outcome.decision.verdict in (Verdict.TOO_OLD, Verdict.INPUT_STALE), outcome.decision
    assert outcome.trajectory is None
    assert not outcome.sent


def test_a_failure_of_the_model_is_an_outcome_not_an_exception(make_policy, embodiment) -> None:
    policy = make_policy(0.001)
    policy.noise_predictor.output_proj = torch.nn.Linear(3, 3)  # as a device error would, deep inside
    outcome = run(policy, embodiment)
    assert outcome.decision.verdict is Verdict.INFERENCE_FAILED
    assert "RuntimeError" in outcome.decision.reason
    assert outcome.trajectory is None
    assert not outcome.sent


def test_a_frame_is_encoded_once_for_each_instruction(make_policy, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = PolicyEngine(make_policy(0.001))  # its convolutions are modulated by the words
    frames, encode = FrameFeatures(engine), engine.encode_frame
    encoded: list[tuple[str, int]] = []

    def counting(key: str, image: torch.Tensor, tasks: list[str], without: bool) -> torch.Tensor:
        encoded.append((tasks[0], int(image[0, 0, 0, 0])))
        return encode(key, image, tasks, without)

    monkeypatch.setattr(engine, "encode_frame", counting)
    image = np.full((3, 128, 128), 7, np.uint8)
    key, (red, green) = "observation.images.wrist", INSTRUCTIONS[:2]
    first = frames.of(key, 100, image, red, False)
    assert frames.of(key, 100, image.copy(), red, False) is first
    assert not torch.equal(frames.of(key, 100, image, green, False), first)
    # A simulator that starts again gives the same stamp another picture.
    assert not torch.equal(frames.of(key, 100, image * np.linspace(0, 1, 128).astype(np.uint8), red, False), first)
    assert encoded == [(red, 7), (green, 7), (red, 0)]
    for stamp in range(1000, 1100):
        frames.of(key, stamp, image, red, False)
    assert len(frames) == 16  # bounded
    frames.of(key, 100, image, red, False)
    assert len(encoded) == 3 + 100 + 1


def test_warm_up_reports_the_fast_paths(make_policy, embodiment) -> None:
    policy = make_policy(0.001)
    torch.nn.init.normal_(policy.noise_predictor.transformer_blocks[0].adaLN_modulation[1].weight, std=0.1)
    pipeline = ChunkPipeline(policy, embodiment, ObservationBuffer(embodiment, 2), lambda: NOW_NS)
    assert pipeline.warm_up(1) > 0
    assert {report.name: report.used for report in pipeline.path_reports} == {"vision": False, "transformer": True}


def mirrored(self: FastViT, pixels: torch.Tensor) -> torch.Tensor:
    return CUT(self, pixels.flip(-1))


def transposed(self: FastViT, pixels: torch.Tensor) -> torch.Tensor:
    return CUT(self, pixels.transpose(-1, -2))


def unpositioned(self: FastViT, pixels: torch.Tensor) -> None:
    return None


CUT = FastViT._cut
TOWER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
VISION = {
    "clip": ClipVisionConfig(resize_shape=(20, 20), crop_shape=(16, 16), backbone_config=TOWER | {"image_size": 16}),
    "dinov3": DinoV3VisionConfig(resize_shape=(20, 20), crop_shape=(16, 16), backbone_config=TOWER),
}


@pytest.mark.parametrize(
    ("kind", "defect"),
    [
        ("clip", None),
        ("clip", ("_cut", mirrored)),
        ("clip", ("_cut", transposed)),
        ("dinov3", None),
        ("dinov3", ("_cut", mirrored)),
        ("dinov3", ("_turns_for", unpositioned)),
    ],
)
def test_warm_up_finds_a_vision_that_mixes_up_places(
    make_policy, embodiment, monkeypatch: pytest.MonkeyPatch, kind: str, defect: tuple[str, object] | None
) -> None:
    old = make_policy(0.001)
    text = old.config.observation_encoder.text
    config = replace(old.config, observation_encoder=ObservationEncoderConfig(VISION[kind], text))
    torch.manual_seed(0)
    policy = MultitaskDiTPolicy(config, old.stats)  # adaLN-Zero: its actions do not show what it sees
    if defect is not None:
        monkeypatch.setattr(FastViT, *defect)
    pipeline = ChunkPipeline(policy, embodiment, ObservationBuffer(embodiment, 2), lambda: NOW_NS)
    pipeline.warm_up(0)
    (report,) = [report for report in pipeline.path_reports if report.name == "vision"]
    assert report.used == (defect is None), report


def test_a_chunk_is_the_policys_for_the_window(make_policy, embodiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames in the right order, each under its camera, with the state and the words of the request."""
    policy = make_policy(0.001)
    torch.nn.init.normal_(policy.noise_predictor.transformer_blocks[0].adaLN_modulation[1].weight, std=0.1)
    buffer = ObservationBuffer(embodiment, 2)
    rng = np.random.default_rng(0)
    for age_ms in (150, 100, 50, 0):
        stamp_ns = NOW_NS - age_ms * 1_000_000
        header = SimpleNamespace(stamp=SimpleNamespace(sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9))
        position = [value + age_ms / 1000 for value in HOME]
        state = SimpleNamespace(header=header, name=embodiment.state.joints, position=position, velocity=[0.0] * 7)
        buffer.add(embodiment.state.topic, stamp_ns, state)
        for camera in embodiment.cameras:
            size = {"height": camera.height, "width": camera.width, "step": 3 * camera.width}
            data = rng.integers(0, 256, 3 * camera.width * camera.height, dtype=np.uint8).tobytes()
            buffer.add(camera.topic, stamp_ns, SimpleNamespace(header=header, encoding="rgb8", data=data, **size))
    pipeline = ChunkPipeline(policy, embodiment, buffer, lambda: NOW_NS)
    torch.manual_seed(5)
    sampled = pipeline.sample(replace(request(), instruction=INSTRUCTIONS[2]))
    window = buffer.latest(NOW_NS).tensors()
    batch = {key: torch.from_numpy(value)[None] for key, value in window.items()} | {"task": [INSTRUCTIONS[2]]}
    torch.manual_seed(5)
    expected = policy.predict_chunk(batch)[0].numpy()
    assert sampled.chunk is not None, sampled.refusal
    np.testing.assert_allclose(sampled.chunk.positions, expected, atol=1e-6)


def test_what_is_encoded_ahead_is_not_encoded_again(make_policy, embodiment, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = PolicyEngine(make_policy(0.001))
    buffer = ObservationBuffer(embodiment, 2)
    for age_ms in (150, 100, 50, 0):
        stamp_ns = NOW_NS - age_ms * 1_000_000
        header = SimpleNamespace(stamp=SimpleNamespace(sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9))
        state = SimpleNamespace(header=header, name=embodiment.state.joints, position=HOME, velocity=[])
        buffer.add(embodiment.state.topic, stamp_ns, state)
        for camera in embodiment.cameras:
            size = {"height": camera.height, "width": camera.width, "step": 3 * camera.width}
            data = bytes(3 * camera.width * camera.height)
            buffer.add(camera.topic, stamp_ns, SimpleNamespace(header=header, encoding="rgb8", data=data, **size))
    pipeline = ChunkPipeline(engine, embodiment, buffer, lambda: NOW_NS)
    encoded, encode = [], engine.encode_frame
    monkeypatch.setattr(engine, "encode_frame", lambda *given: encoded.append(given[0]) or encode(*given))
    pipeline.encode_ahead(INSTRUCTIONS[0], request().sampling)
    assert len(encoded) == 2 * 2, "two cameras, two observation steps"
    assert pipeline.sample(request()).chunk is not None
    assert len(encoded) == 2 * 2
    assert pipeline.sample(replace(request(), instruction=INSTRUCTIONS[1])).chunk is not None
    assert len(encoded) == 4 * 2, "another instruction makes the cameras see otherwise"
