"""The engine acts as the policy it was made of, checks itself against it, and falls back on it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_fixtures import INSTRUCTIONS, demo_config, make_batch, make_stats, randomize

from dit_policy_ros.policy.checkpoint import load_checkpoint
from dit_policy_ros.policy.configuration import (
    ClipTextConfig,
    ClipVisionConfig,
    DiffusionConfig,
    DinoV3VisionConfig,
    Feature,
    FlowMatchingConfig,
    NoTextConfig,
    ObservationEncoderConfig,
    ResNetConfig,
    TransformerConfig,
)
from dit_policy_ros.policy.engine import TOLERANCES, PathReport, PolicyEngine
from dit_policy_ros.policy.fast_policy import FastPaths
from dit_policy_ros.policy.fast_transformer import FastTransformer
from dit_policy_ros.policy.fast_vision import FastViT
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.realtime import ChunkInMotion
from dit_policy_ros.policy.sampling import Sampling
from dit_policy_ros.policy.tiny_clip import make_tiny_clip

VIT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device; none is here")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    make_tiny_clip(folder)
    return str(folder)


def make_policy(clip_folder: str, pooling: bool = False, device: str = "cpu", **changes: Any) -> MultitaskDiTPolicy:
    """Two cameras through a tiny CLIP, two observation steps, relative actions; it knows guidance and prefixes."""
    vision = ClipVisionConfig(
        resize_shape=(20, 20),
        crop_shape=(16, 16),
        backbone_config=VIT,
        text_pooling=pooling,
        text_pooling_heads=2,
    )
    settings: dict[str, Any] = {
        "n_obs_steps": 2,
        "observation_encoder": ObservationEncoderConfig(vision, ClipTextConfig(clip_folder)),
        "transformer": TransformerConfig(hidden_dim=32, num_layers=2, num_heads=4, timestep_embed_dim=32),
        "objective": DiffusionConfig(denoising_steps=4, prediction_type="sample"),
        "instruction_dropout": 0.1,
        "max_delay": 4,
    }
    config = demo_config(clip_folder, **(settings | changes))
    policy = MultitaskDiTPolicy(config, make_stats(config)).to(device)
    randomize(policy.noise_predictor)
    if policy.observation_encoder.null_text is not None:
        torch.nn.init.normal_(policy.observation_encoder.null_text)
    return policy.eval()


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def largest_share(policy: MultitaskDiTPolicy, got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference as a share of its action's range."""
    return float(((got - expected).abs() * policy.action_normalizer.inverse_scale / 2).max())


EXACT = 1e-5
"""A share of an action's range: some hundred roundings of float32, and a tenth of what the engine allows itself."""

MOTION_STEPS = 12
CASES = {
    "as configured": (Sampling(), False),
    "ddpm": (Sampling(sampler="ddpm"), False),
    "dpm_solver++": (Sampling(sampler="dpm_solver++", denoising_steps=6), False),
    "guided by the words": (Sampling(guidance_scale=2.0), False),
    "candidates": (Sampling(candidates=3, guidance_scale=1.5), True),
    "prefix": (Sampling(joining="prefix"), True),
    "prefix, guided by the words": (Sampling(joining="prefix", guidance_scale=2.0), True),
    "guided by the chunk in motion": (Sampling(joining="guided"), True),
    "cheaply guided": (Sampling(joining="guided_cheap"), True),
}


def motion_for(policy: MultitaskDiTPolicy) -> ChunkInMotion:
    actions = torch.linspace(-0.1, 0.1, MOTION_STEPS)[None, :, None].expand(1, -1, policy.config.action_dim).clone()
    return ChunkInMotion(actions, delay=3, execution_horizon=8, past=actions[:, :1] - 0.01)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("pooling", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_it_acts_as_the_policy(clip_folder: str, case: str, pooling: bool, batch_size: int) -> None:
    sampling, moving = CASES[case]
    policy = make_policy(clip_folder, pooling)
    engine = PolicyEngine(policy)
    assert engine.paths_in_use == {"vision", "transformer"}
    batch = make_batch(policy.config, batch_size)
    motion = motion_for(policy) if moving else None
    expected = policy.predict_chunk(batch, sampling, generator=seeded(), motion=motion)
    got = engine.predict_chunk(batch, sampling, generator=seeded(), motion=motion)
    assert largest_share(policy, got, expected) < EXACT
    assert not torch.equal(got, expected)  # otherwise the fast paths did not run


@pytest.mark.parametrize(("joining", "plain_calls"), [("guided", 4), ("guided_cheap", 0), ("prefix", 0)])
def test_only_what_is_differentiated_runs_the_plain_transformer(
    clip_folder: str, monkeypatch: pytest.MonkeyPatch, joining: Any, plain_calls: int
) -> None:
    policy = make_policy(clip_folder)
    batch, calls = make_batch(policy.config, 1), []
    forward = policy.noise_predictor.forward
    monkeypatch.setattr(policy.noise_predictor, "forward", lambda *inputs: calls.append(1) or forward(*inputs))
    PolicyEngine(policy).predict_chunk(batch, Sampling(joining=joining), motion=motion_for(policy))
    assert len(calls) == plain_calls


@pytest.mark.parametrize("sampler", ["euler", "heun", "rk4"])
def test_it_acts_as_a_flow_policy(clip_folder: str, sampler: str) -> None:
    policy = make_policy(clip_folder, objective=FlowMatchingConfig(denoising_steps=3, timestep_scale=1000.0))
    batch = make_batch(policy.config, 2)
    sampling = Sampling(sampler=sampler)
    expected = policy.predict_chunk(batch, sampling, generator=seeded())
    got = PolicyEngine(policy).predict_chunk(batch, sampling, generator=seeded())
    assert largest_share(policy, got, expected) < EXACT


@pytest.mark.parametrize("pooling", [False, True])
def test_frames_encoded_as_they_arrive_give_the_same_chunk(clip_folder: str, pooling: bool) -> None:
    policy = make_policy(clip_folder, pooling)
    engine = PolicyEngine(policy)
    batch = make_batch(policy.config, 1)
    task, state, sampling = batch["task"], batch["observation.state"], Sampling(guidance_scale=2.0)

    def encoded(without: bool) -> dict[str, list[torch.Tensor]]:
        return {
            key: [engine.encode_frame(key, batch[key][:, step], task, without) for step in range(2)]
            for key in policy.config.cameras
        }

    frames, without = encoded(False), encoded(True) if pooling else None
    got = engine.predict_chunk_from(
        state, frames, task, sampling, generator=seeded(), frames_without_instruction=without
    )
    expected = policy.predict_chunk(batch, sampling, generator=seeded())
    assert largest_share(policy, got, expected) < EXACT
    if pooling:
        with pytest.raises(ValueError, match="without the instruction"):
            engine.predict_chunk_from(state, frames, task, sampling)
    with pytest.raises(ValueError, match="is made of"):
        engine.predict_chunk_from(state, {}, task)


def test_two_threads_get_what_one_after_the_other_gets(clip_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = PolicyEngine(make_policy(clip_folder))
    encode, inside, seen = engine.fast.encode, [], []

    def counting(*arguments: Any) -> torch.Tensor:
        inside.append(1)
        time.sleep(0.002)  # gives another thread the time to come in, if it can
        seen.append(len(inside))
        inside.pop()
        return encode(*arguments)

    monkeypatch.setattr(engine.fast, "encode", counting)
    batches = [make_batch(engine.policy.config, 1, seed) for seed in range(8)]
    expected = [engine.predict_chunk(batch, generator=seeded(i)) for i, batch in enumerate(batches)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(engine.predict_chunk, batch, generator=seeded(i)) for i, batch in enumerate(batches)]
        for job, chunk in zip(jobs, expected, strict=True):
            assert torch.equal(job.result(), chunk)
    assert set(seen) == {1}


def report_of(reports: list[PathReport], name: str) -> PathReport:
    (found,) = [report for report in reports if report.name == name]
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_verification_measures_each_path_in_action_units(clip_folder: str, precision: Any) -> None:
    policy = make_policy(clip_folder)
    engine = PolicyEngine(policy, precision)
    batch = make_batch(policy.config, 1)
    reports = engine.verify(batch)
    assert [report.name for report in reports] == ["vision", "transformer"]
    motion = engine._motion(policy.predict_chunk(batch, generator=seeded(0)))
    assert motion.delay == policy.config.max_delay
    asked = [(Sampling(), None), (Sampling(joining="prefix"), motion), (Sampling(guidance_scale=2.0), None)]
    differences = []
    for seed, (sampling, moving) in enumerate(asked):
        plain = policy.predict_chunk(batch, sampling, generator=seeded(seed), motion=moving)
        fast = engine.predict_chunk(batch, sampling, generator=seeded(seed), motion=moving)
        differences.append(float((fast - plain).abs().max()))
    for report in reports:
        assert report.used, report
        assert report.share is not None
        assert 0 < report.share <= report.tolerance == TOLERANCES[precision]
    # The last report is that of all paths together.
    assert reports[-1].difference == pytest.approx(max(differences), rel=1e-3)
    assert (report_of(reports, "vision").share or 0) > (1e-4 if precision == "bf16" else 0)


def test_a_wrong_table_is_found_and_the_plain_transformer_used(
    clip_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FastTransformer.table
    monkeypatch.setattr(FastTransformer, "table", lambda self, timesteps: right(self, timesteps + 20))
    policy = make_policy(clip_folder)
    engine = PolicyEngine(policy)
    batch = make_batch(policy.config, 1)
    report = report_of(engine.verify(batch), "transformer")
    assert not report.used
    assert report.share is not None
    assert report.share > report.tolerance
    assert "more than the allowed" in str(report)
    assert "plain path" in str(report)
    assert engine.paths_in_use == {"vision"}
    expected = policy.predict_chunk(batch, generator=seeded())
    got = engine.predict_chunk(batch, generator=seeded())
    assert largest_share(policy, got, expected) < EXACT


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_path_that_gives_no_number_is_not_used(
    clip_folder: str, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(FastTransformer, "__call__", lambda self, x, modulation: torch.full_like(x, value))
    policy = make_policy(clip_folder, objective=DiffusionConfig(clip_range=None, prediction_type="sample"))
    assert not report_of(PolicyEngine(policy).verify(make_batch(policy.config, 1)), "transformer").used


def test_a_path_that_fails_is_not_used(clip_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FastTransformer, x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(FastTransformer, "__call__", fail)
    policy = make_policy(clip_folder)
    engine = PolicyEngine(policy)
    report = report_of(engine.verify(make_batch(policy.config, 1)), "transformer")
    assert (report.used, report.failed, report.difference) == (False, True, None)
    assert "no such kernel" in report.reason


def test_a_path_that_cannot_be_built_is_reported(clip_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FastPaths, *arguments: object, **keywords: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FastPaths, "_make_transformer", fail)
    policy = make_policy(clip_folder)
    engine = PolicyEngine(policy)
    batch = make_batch(policy.config, 1)
    assert "out of memory" in report_of(engine.verify(batch), "transformer").reason
    torch.testing.assert_close(
        engine.predict_chunk(batch, generator=seeded()), policy.predict_chunk(batch, generator=seeded())
    )


def test_a_resnet_has_no_fast_form_and_says_so(clip_folder: str) -> None:
    config = demo_config(clip_folder)
    policy = MultitaskDiTPolicy(config, make_stats(config))
    randomize(policy.noise_predictor)
    engine = PolicyEngine(policy)
    batch = make_batch(config, 1)
    report = report_of(engine.verify(batch), "vision")
    assert not report.used
    assert not report.failed
    assert "ResNet" in report.reason
    assert engine.paths_in_use == {"transformer"}
    assert not policy.training  # an engine's policy is in evaluation mode


def test_a_policy_without_words_or_cameras_runs(clip_folder: str) -> None:
    config = demo_config(
        clip_folder,
        n_obs_steps=2,
        input_features={"observation.state": Feature("STATE", (7,))},
        observation_encoder=ObservationEncoderConfig(ResNetConfig(film=False), NoTextConfig()),
    )
    policy = MultitaskDiTPolicy(config, make_stats(config))
    randomize(policy.noise_predictor)
    engine = PolicyEngine(policy)
    state = torch.randn(1, 2, 7)
    expected = policy.predict_chunk({"observation.state": state}, generator=seeded())
    got = engine.predict_chunk_from(state, {}, None, generator=seeded())
    assert largest_share(policy, got, expected) < EXACT


def test_an_unknown_precision_is_refused(clip_folder: str) -> None:
    policy = make_policy(clip_folder)
    with pytest.raises(ValueError, match="fp32, bf16, fp16, got 'int8'"):
        PolicyEngine(policy, "int8")  # type: ignore[arg-type]


def test_weights_and_tables_are_made_once(clip_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk in steady operation computes no table, and its text feature comes from the cache."""
    engine = PolicyEngine(make_policy(clip_folder))
    batch = make_batch(engine.policy.config, 1) | {"task": [INSTRUCTIONS[0]]}
    expected = engine.predict_chunk(batch, generator=seeded())

    def forbidden(*arguments: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(FastTransformer, "table", forbidden)
    monkeypatch.setattr(engine.policy.observation_encoder.text_encoder, "forward", forbidden)
    assert torch.equal(engine.predict_chunk(batch, generator=seeded()), expected)


@needs_cuda
@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith("motion")])
def test_a_graph_replays_what_was_captured(clip_folder: str, case: str) -> None:
    sampling, moving = CASES[case]
    policy = make_policy(clip_folder, device="cuda")
    with_graphs, without = PolicyEngine(policy), PolicyEngine(policy, cuda_graphs=False)
    assert "cuda_graph" in with_graphs.paths_in_use
    for seed in range(3):  # captured, then replayed with other inputs
        batch = make_batch(policy.config, 1, seed)
        motion = motion_for(policy) if moving else None
        expected = without.predict_chunk(batch, sampling, generator=seeded(seed), motion=motion)
        got = with_graphs.predict_chunk(batch, sampling, generator=seeded(seed), motion=motion)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_path_holds_on_cuda(clip_folder: str, precision: Any) -> None:
    policy = make_policy(clip_folder, device="cuda")
    reports = PolicyEngine(policy, precision).verify(make_batch(policy.config, 1))
    assert [report.name for report in reports] == ["vision", "transformer", "cuda_graph"]
    assert all(report.used for report in reports), [str(report) for report in reports]


def test_the_paths_of_a_checkpoint_hold(clip_folder: str) -> None:
    """The demo's checkpoint, trained: what the tolerances are about."""
    folder = Path(__file__).parents[1] / "checkpoints/demo"
    if not folder.exists():
        pytest.skip("checkpoints/demo is not here; make demo-train makes it")
    policy = load_checkpoint(folder)
    batch = make_batch(policy.config, 1)
    for precision in ("fp32", "bf16"):
        assert report_of(PolicyEngine(policy, precision).verify(batch), "transformer").used


def test_a_capture_that_fails_while_it_runs_ends_the_graphs_not_the_chunk(
    clip_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without CUDA every capture fails, which is what this needs."""
    policy = make_policy(clip_folder)
    engine = PolicyEngine(policy)
    batch = make_batch(policy.config, 1)
    if torch.cuda.is_available():
        pytest.skip("on this machine a capture works")
    engine.verify(batch)
    engine._reports.append(PathReport("cuda_graph", True, 0.0, 0.0, EXACT, "as if it had been captured"))
    engine.fast.paths.in_use.add("cuda_graph")
    got = engine.predict_chunk(batch, generator=seeded())
    assert largest_share(policy, got, policy.predict_chunk(batch, generator=seeded())) < EXACT
    assert engine.paths_in_use == {"vision", "transformer"}
    assert "cuda_graph is not in use any more" in caplog.text
    report = report_of(engine.reports, "cuda_graph")
    assert (report.used, report.failed) == (False, True)
    assert "failed in use" in str(report)
    engine.verify(batch)
    assert [each.failed for each in engine.reports] == [False, False]


def test_training_mode_does_not_reach_the_engine(clip_folder: str) -> None:
    """The modules are shared: random crops, dropout and state noise must stay out of a running engine."""
    policy = make_policy(clip_folder, state_noise=0.5)
    engine, batch = PolicyEngine(policy), make_batch(policy.config, 1)
    picture = batch["observation.images.wrist"][:, 0]
    chunk = engine.predict_chunk(batch, generator=seeded())
    feature = engine.encode_frame("observation.images.wrist", picture)
    policy.train()
    for _ in range(3):
        assert torch.equal(engine.predict_chunk(batch, generator=seeded()), chunk)
        assert torch.equal(engine.encode_frame("observation.images.wrist", picture), feature)
    assert policy.training
    assert policy.observation_encoder.preprocessors[0].training
    assert not engine.fast.training


@pytest.mark.parametrize("first", ["policy", "engine"])
def test_the_last_to_leave_restores_the_modes_found(clip_folder: str, first: str) -> None:
    policy = make_policy(clip_folder)
    engine = PolicyEngine(policy)
    policy.train()
    before = {name: module.training for name, module in policy.named_modules()}
    of_policy, of_engine = policy.evaluating(), engine.fast.evaluating()
    of_policy.__enter__()
    of_engine.__enter__()
    order = (of_policy, of_engine) if first == "policy" else (of_engine, of_policy)
    order[0].__exit__(None, None, None)
    assert not any(module.training for module in policy.modules())
    order[1].__exit__(None, None, None)
    assert {name: module.training for name, module in policy.named_modules()} == before
    assert not engine.fast.training


@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.parametrize("tasks", [None, "push", ["a", "b"], []])
def test_a_frame_is_encoded_for_one_task_a_picture(clip_folder: str, tasks: Any, pictures: int) -> None:
    policy = make_policy(clip_folder, pooling=True)
    engine = PolicyEngine(policy)
    images = torch.zeros(pictures, 3, 128, 128, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"wrist.*list of {pictures} tasks"):
        engine.encode_frame("observation.images.wrist", images, tasks)
    for each in (policy, engine.fast):
        with pytest.raises(ValueError, match=r"words for observation.images.wrist.*\(2, 32\)"):
            each.encode_frame("observation.images.wrist", images, torch.zeros(2, 32))


@pytest.mark.parametrize(
    ("tasks", "wrong"), [(["push", ""], r"task\D*1"), (["push", ["it"]], r"task\D*1"), ([3, "a"], r"task\D*0")]
)
def test_the_task_that_is_wrong_is_named(clip_folder: str, tasks: list[Any], wrong: str) -> None:
    policy = make_policy(clip_folder)
    batch = make_batch(policy.config, 2) | {"task": tasks}
    for each in (policy, PolicyEngine(policy)):
        with pytest.raises(ValueError, match=wrong):
            each.predict_chunk(batch)


def test_a_verification_that_cannot_be_done_changes_nothing(clip_folder: str) -> None:
    engine = PolicyEngine(make_policy(clip_folder))
    batch = make_batch(engine.policy.config, 1)
    reports = engine.verify(batch)
    with pytest.raises(ValueError, match="workspace"):
        engine.verify({key: value for key, value in batch.items() if "workspace" not in key})
    assert engine.paths_in_use == {"vision", "transformer"}
    assert engine.reports == reports


def off_by_one(self: FastTransformer, timesteps: torch.Tensor, right: Any = FastTransformer.table) -> torch.Tensor:
    return right(self, timesteps + 1)


def too_small(self: FastTransformer, c: torch.Tensor, right: Any = FastTransformer.conditioning_part) -> torch.Tensor:
    return right(self, 0.99 * c)


def unpositioned(self: FastViT, pixels: torch.Tensor) -> None:
    return None


DEFECTS = {
    "table": (FastTransformer, "table", off_by_one, "transformer"),
    "conditioning": (FastTransformer, "conditioning_part", too_small, "transformer"),
    "positions": (FastViT, "_turns_for", unpositioned, "vision"),
}


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_defect_smaller_than_bf16_resolves_is_found(
    clip_folder: str, monkeypatch: pytest.MonkeyPatch, precision: Any, defect: str
) -> None:
    where, name, wrong, path = DEFECTS[defect]
    vision = DinoV3VisionConfig(resize_shape=(20, 20), crop_shape=(16, 16), backbone_config=VIT)
    policy = make_policy(clip_folder, observation_encoder=ObservationEncoderConfig(vision, ClipTextConfig(clip_folder)))
    batch = make_batch(policy.config, 1)
    assert all(report.used for report in PolicyEngine(policy, precision).verify(batch))
    monkeypatch.setattr(where, name, wrong)
    report = report_of(PolicyEngine(policy, precision).verify(batch), path)
    assert not report.used
    assert report.failed
    assert ("fp32 is wrong" in report.reason) == (precision == "bf16")


def test_frames_that_do_not_fit_are_named(clip_folder: str) -> None:
    policy = make_policy(clip_folder)
    engine, batch = PolicyEngine(policy), make_batch(policy.config, 1)
    state, task, key = batch["observation.state"], batch["task"], "observation.images.wrist"
    frames = {
        camera: [engine.encode_frame(camera, batch[camera][:, step]) for step in range(2)]
        for camera in policy.config.cameras
    }
    good = frames[key]
    for bad, message in [
        ([], "0, "),
        (good[:1], "1, "),
        (None, "0, "),
        ([good[0], None], "NoneType"),
        ([good[0], torch.cat([good[1], good[1]])], r"\(2, 24\)"),
        ([each[:, 1:] for each in good], r"shape \(1, 2, 23\)"),
        ([each.double() for each in good], "float64"),
        ([good[0], good[1] / 0], "not finite"),
    ]:
        with pytest.raises(ValueError, match=f"{key}.*{message}.*2 features .batch, 24. float32"):
            engine.predict_chunk_from(state, frames | {key: bad}, task)
    twice = {camera: [torch.cat([each, each]) for each in features] for camera, features in frames.items()}
    with pytest.raises(ValueError, match=r"different sizes: .*observation.state': 1.*wrist': 2"):
        engine.predict_chunk_from(state, twice, task * 2)
    none = {camera: [each[:0] for each in features] for camera, features in frames.items()}
    with pytest.raises(ValueError, match="empty batch"):
        engine.predict_chunk_from(state[:0], none, [])


def test_weights_changed_in_place_are_not_used_silently(clip_folder: str) -> None:
    policy = make_policy(clip_folder)
    engine, batch = PolicyEngine(policy), make_batch(policy.config, 1)
    engine.predict_chunk(batch)
    policy.load_state_dict(policy.state_dict())
    with pytest.raises(RuntimeError, match="make another"):
        engine.predict_chunk(batch)
    with pytest.raises(RuntimeError, match="make another"):
        engine.encode_frame("observation.images.wrist", batch["observation.images.wrist"][:, 0])


def test_a_weaker_policy_serves_the_engine_as_the_policy(clip_folder: str) -> None:
    policy, weaker = make_policy(clip_folder), make_policy(clip_folder)
    randomize(weaker.noise_predictor, seed=1)
    batch, sampling = make_batch(policy.config, 3), Sampling(candidates=6)
    expected = policy.predict_chunk(batch, sampling, generator=seeded(), weaker=weaker)
    got = PolicyEngine(policy).predict_chunk(batch, sampling, generator=seeded(), weaker=weaker)
    assert largest_share(policy, got, expected) < EXACT
    assert largest_share(policy, policy.predict_chunk(batch, sampling, generator=seeded()), expected) > 0.01


def test_a_compiled_transformer_acts_as_the_policy(clip_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by dynamo and run by its "eager" backend: what inductor makes of it is not tested, only benchmarked."""
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="eager"))
    policy = make_policy(clip_folder)
    engine, batch = PolicyEngine(policy, compile=True), make_batch(policy.config, 1)
    assert engine.paths_in_use == {"vision", "transformer", "compile"}
    assert all(report.used for report in engine.verify(batch))
    calls: list[int] = []
    compiled = engine.fast.paths.compiled
    assert compiled is not None
    engine.fast.paths.compiled = lambda *inputs: calls.append(1) or compiled(*inputs)  # type: ignore[func-returns-value]
    expected = policy.predict_chunk(batch, generator=seeded())
    assert largest_share(policy, engine.predict_chunk(batch, generator=seeded()), expected) < EXACT
    assert len(calls) == 4


def test_a_policy_built_in_inference_mode_says_what_it_cannot_do(clip_folder: str) -> None:
    with torch.inference_mode():
        policy = make_policy(clip_folder)
    batch, motion = make_batch(policy.config, 1), motion_for(policy)
    for each in (policy, PolicyEngine(policy)):
        each.predict_chunk(batch, Sampling(joining="guided_cheap"), motion=motion)
        with pytest.raises(ValueError, match=r"built in torch.inference_mode"):
            each.predict_chunk(batch, Sampling(joining="guided"), motion=motion)


def test_an_empty_batch_is_refused(clip_folder: str) -> None:
    policy = make_policy(clip_folder)
    empty = {key: value[:0] for key, value in make_batch(policy.config, 1).items()}
    for each in (policy, PolicyEngine(policy)):
        with pytest.raises(ValueError, match="the batch is empty"):
            each.predict_chunk(empty)


def test_states_of_another_batch_are_named(clip_folder: str) -> None:
    config = make_policy(clip_folder).config
    inputs = config.input_features | {"observation.environment_state": Feature("ENV", (5,))}
    policy = make_policy(clip_folder, input_features=inputs)
    batch = make_batch(config, 2)
    with pytest.raises(ValueError, match=r"different sizes: .*'observation.environment_state': 3"):
        policy.predict_chunk(batch | {"observation.environment_state": torch.zeros(3, 2, 5)})
