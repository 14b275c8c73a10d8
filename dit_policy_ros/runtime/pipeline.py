"""One chunk from end to end, without ROS: window -> policy -> drop what has elapsed -> gate -> trajectories.

The node calls this in its inference thread. Whatever goes wrong comes back as an Outcome with a verdict and a reason;
only an accepted outcome carries trajectories, so there is nothing to publish when a check failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.policy.configuration import STATE, TASK
from dit_policy_ros.policy.engine import PathReport, PolicyEngine
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.sampling import AS_CONFIGURED, Sampling
from dit_policy_ros.runtime.chunking import Chunk, drop_elapsed
from dit_policy_ros.runtime.frames import FrameFeatures
from dit_policy_ros.runtime.gate import Decision, Gate, Verdict
from dit_policy_ros.runtime.messages import MessageError
from dit_policy_ros.runtime.observations import Observation, ObservationBuffer, ObservationError
from dit_policy_ros.runtime.trajectory import Point, Trajectory


@dataclass(frozen=True)
class Request:
    """What the next chunk is asked for: its number, the instruction, and the live parameters as they are now."""

    sequence: int
    instruction: str
    n_action_steps: int
    sampling: Sampling = AS_CONFIGURED


@dataclass(frozen=True)
class Outcome:
    """What came of a request. `trajectories` (by action group) is empty unless the decision is ACCEPTED."""

    request: Request
    decision: Decision
    chunk: Chunk | None = None
    steps_dropped: int = 0
    trajectories: Mapping[str, Trajectory] = field(default_factory=dict)


class ChunkPipeline:
    """Samples chunks of a policy from the observations buffered, and lets only safe ones through.

    The policy, or an engine made of it, must stay as it is from here on. `now_ns` reads the clock that stamps the
    observations (the node's clock, or a bag's).
    """

    def __init__(
        self,
        policy: MultitaskDiTPolicy | PolicyEngine,
        embodiment: Embodiment,
        observations: ObservationBuffer,
        gate: Gate,
        now_ns: Callable[[], int],
    ) -> None:
        self._engine = policy if isinstance(policy, PolicyEngine) else PolicyEngine(policy)
        self._frames = FrameFeatures(self._engine)
        self._embodiment = embodiment
        self._observations = observations
        self._gate = gate
        self._now_ns = now_ns

    @property
    def path_reports(self) -> list[PathReport]:
        """What the last warm_up found of the engine's fast paths, and which of them have failed since."""
        return self._engine.reports

    def warm_up(self, chunks: int, sampling: Sampling = AS_CONFIGURED) -> float:
        """Sample `chunks` chunks of noise for pictures and an arm anywhere; returns the last one's duration in seconds.

        The first samples allocate, compile and fill caches; done here, none of that falls on the moving arm. Before
        them the engine's fast paths are checked against the plain policy, with the result in `path_reports`. The noise
        is the same at every start; a picture of one colour would look the same mirrored or with its patches exchanged.
        """
        n_obs_steps = self._engine.policy.config.n_obs_steps
        rng = np.random.default_rng(0)
        images = {
            camera.name: rng.integers(0, 256, (n_obs_steps, 3, camera.height, camera.width), dtype=np.uint8)
            for camera in self._embodiment.cameras
        }
        state = rng.normal(size=(n_obs_steps, len(self._embodiment.state.joints))).astype(np.float32)
        tasks = self._engine.policy.config.tasks or ["warm up"]
        seconds = 0.0
        for number in range(-1, chunks):
            stamps = {camera: tuple(n_obs_steps * number + step for step in range(n_obs_steps)) for camera in images}
            observation = Observation(n_obs_steps * (number + 1) - 1, images, state, {}, stamps)
            task = tasks[number % len(tasks)]
            if number < 0:
                self._engine.verify(_batch(observation, task), sampling)
                continue
            started = time.perf_counter()
            self._predict(observation, task, sampling)
            seconds = time.perf_counter() - started
        return seconds

    def next_chunk(self, request: Request) -> Outcome:
        """Sample, time and check one chunk of the newest moment that every stream has reached."""
        try:
            observation = self._observations.latest(self._now_ns())
            chunk = self._sample(observation, request)
        except (ObservationError, MessageError) as error:
            return Outcome(request, Decision(Verdict[error.code], str(error)))
        except Exception as error:  # of the model or the device, out of memory among them
            reason = f"sampling failed with {type(error).__name__}: {error}"
            return Outcome(request, Decision(Verdict.INFERENCE_FAILED, reason))
        return self._admit(chunk, request)

    def _sample(self, observation: Observation, request: Request) -> Chunk:
        started = time.perf_counter()
        positions = self._predict(observation, request.instruction, request.sampling)
        return Chunk(
            observation_stamp_ns=observation.stamp_ns,
            sequence=request.sequence,
            joint_names=self._embodiment.action_joints,
            positions=positions,
            step_duration=1.0 / self._embodiment.fps,
            n_action_steps=request.n_action_steps,
            instruction=request.instruction,
            inference_duration=time.perf_counter() - started,
        )

    def _predict(self, observation: Observation, task: str, sampling: Sampling) -> np.ndarray:
        """A chunk's actions (steps, A) float64, in units."""
        config = self._engine.policy.config
        frames = self._encode(observation, task, without_instruction=False)
        without = None
        if self._engine.policy.text_modulates_vision and sampling.resolve(config).guidance_scale != 1:
            without = self._encode(observation, task, without_instruction=True)
        state = torch.from_numpy(observation.state).unsqueeze(0) if STATE in config.input_features else None
        actions = self._engine.predict_chunk_from(state, frames, [task], sampling, frames_without_instruction=without)
        return actions[0].cpu().numpy().astype(np.float64)  # also waits for the device

    def _encode(self, observation: Observation, task: str, without_instruction: bool) -> dict[str, list[torch.Tensor]]:
        """{camera key: the feature of each of its frames}, for the policy's cameras among the embodiment's."""
        return {
            key: [
                self._frames.of(key, stamp_ns, image, task, without_instruction)
                for stamp_ns, image in zip(observation.image_stamps_ns[camera], images, strict=True)
            ]
            for camera, images in observation.images.items()
            if (key := f"observation.images.{camera}") in self._engine.policy.config.cameras
        }

    def _admit(self, chunk: Chunk, request: Request) -> Outcome:
        now_ns = self._now_ns()
        outcome = Outcome(request, Decision(Verdict.ACCEPTED, ""), chunk)
        try:
            position, velocity = self._observations.measured(chunk.joint_names, now_ns)
        except (ObservationError, MessageError) as error:
            return replace(outcome, decision=Decision(Verdict[error.code], str(error)))
        positions, times, dropped = drop_elapsed(chunk, now_ns)
        start = Point(now_ns, position, velocity)
        admission = self._gate.admit(
            positions, times, chunk.joint_names, [start], position, chunk.observation_stamp_ns, now_ns
        )
        trajectories = {}
        if admission.trajectory is not None:
            for group in self._embodiment.action_groups:
                trajectories[group.name] = admission.trajectory.select(tuple(group.joints))
        return replace(outcome, decision=admission.decision, steps_dropped=dropped, trajectories=trajectories)


def _batch(observation: Observation, task: str) -> dict[str, object]:
    """An observation as a batch of one for the policy."""
    batch: dict[str, object] = {key: torch.as_tensor(value)[None] for key, value in observation.tensors().items()}
    return batch | {TASK: [task]}
