"""From the observations buffered to a chunk, without ROS: window -> encode -> denoise.

The node calls this in its inference thread, and nothing here waits for a lock that the moving arm needs. Whatever goes
wrong comes back as a refusal with a verdict and a reason; what becomes of a chunk is the conductor's to decide.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.policy.configuration import STATE, TASK
from dit_policy_ros.policy.engine import PathReport, PolicyEngine
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.realtime import ChunkInMotion
from dit_policy_ros.policy.sampling import AS_CONFIGURED, Sampling
from dit_policy_ros.runtime.chunking import Chunk
from dit_policy_ros.runtime.course import Course
from dit_policy_ros.runtime.frames import FrameFeatures
from dit_policy_ros.runtime.gate import Decision, Verdict
from dit_policy_ros.runtime.joining import Joining, chunk_in_motion
from dit_policy_ros.runtime.messages import MessageError
from dit_policy_ros.runtime.observations import Observation, ObservationBuffer, ObservationError


@dataclass(frozen=True)
class Request:
    """What the next chunk is asked for, with everything that must not change while it is sampled.

    epoch tells one start of the motion from the next; made_ns is when it was asked for; step_duration in s, of this
    chunk's steps; ready_in: s until it will probably be ready; course: what the arm follows meanwhile, if anything;
    keep_rest is False when the instruction has changed, and what the course says after the committed steps is void.
    """

    epoch: int
    sequence: int
    made_ns: int
    instruction: str
    n_action_steps: int
    step_duration: float
    sampling: Sampling = AS_CONFIGURED
    joining: Joining = "replace"
    course: Course | None = None
    keep_rest: bool = True
    ready_in: float = 0.0


@dataclass(frozen=True)
class Sampled:
    """A chunk, or the refusal to sample one.

    steps_committed: rows that the arm was expected to have executed by then. began_cpu is the thread's CPU time (s)
    when the work began, model_cpu what of it encoder and denoising took: the rest is the node's own cost.
    """

    request: Request
    chunk: Chunk | None
    refusal: Decision | None = None
    steps_committed: int = 0
    began_cpu: float = 0.0
    model_cpu: float = 0.0

    def own_cpu(self) -> float:
        """CPU time (s) of this chunk up to now beside encoder and denoising; only in the thread that sampled it."""
        return time.thread_time() - self.began_cpu - self.model_cpu


class ChunkPipeline:
    """Samples chunks of a policy from the observations buffered; for one thread.

    The policy, or an engine made of it, must stay as it is from here on. `now_ns` reads the clock that stamps the
    observations (the node's clock, or a bag's).
    """

    def __init__(
        self,
        policy: MultitaskDiTPolicy | PolicyEngine,
        embodiment: Embodiment,
        observations: ObservationBuffer,
        now_ns: Callable[[], int],
    ) -> None:
        self._engine = policy if isinstance(policy, PolicyEngine) else PolicyEngine(policy)
        self._frames = FrameFeatures(self._engine)
        self._embodiment = embodiment
        self._observations = observations
        self._now_ns = now_ns
        self._model_cpu = 0.0

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
        images: dict[str, Sequence[np.ndarray]] = {
            camera.name: [*rng.integers(0, 256, (n_obs_steps, 3, camera.height, camera.width), dtype=np.uint8)]
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
            self._predict(observation, task, sampling, None)
            seconds = time.perf_counter() - started
        return seconds

    def sample(self, request: Request) -> Sampled:
        """A chunk of the newest moment that every stream has reached."""
        began_cpu, self._model_cpu = time.thread_time(), 0.0
        try:
            observation = self._observations.latest(self._now_ns())
            motion = self._in_motion(observation.stamp_ns, request)
            chunk = self._chunk(observation, request, motion)
        except (ObservationError, MessageError) as error:
            return Sampled(request, None, Decision(Verdict[error.code], str(error)))
        except Exception as error:  # of the model or the device, out of memory among them
            reason = f"sampling failed with {type(error).__name__}: {error}"
            return Sampled(request, None, Decision(Verdict.INFERENCE_FAILED, reason))
        committed = motion.delay if motion is not None else 0
        return Sampled(request, chunk, None, committed, began_cpu, self._model_cpu)

    def encode_ahead(self, task: str, sampling: Sampling) -> None:
        """Encode the pictures that a chunk starting now would see, so that the next one finds most of them done."""
        for frame in self._observations.frames_ahead(self._now_ns()):
            key = f"observation.images.{frame.camera}"
            if key in self._engine.policy.config.cameras:
                for without in (False, True) if self._needs_both(sampling) else (False,):
                    self._frames.of(key, frame.stamp_ns, frame.image, task, without)

    def _needs_both(self, sampling: Sampling) -> bool:
        """Whether each frame is needed without the instruction as well: guidance by the instruction asks for both."""
        policy = self._engine.policy
        return policy.text_modulates_vision and sampling.resolve(policy.config).guidance_scale != 1

    def _in_motion(self, stamp_ns: int, request: Request) -> ChunkInMotion | None:
        if request.joining != "rtc" or request.course is None:
            return None
        return chunk_in_motion(
            request.course,
            stamp_ns,
            request.step_duration,
            self._engine.policy.config,
            # The step that is under way when the chunk comes will run as well: a chunk that has another idea of it
            # would pull the arm there within a fraction of a step.
            request.made_ns + round((request.ready_in + request.step_duration) * 1e9),
            request.n_action_steps,
            request.keep_rest,
        )

    def _chunk(self, observation: Observation, request: Request, motion: ChunkInMotion | None) -> Chunk:
        started = time.perf_counter()
        positions = self._predict(observation, request.instruction, request.sampling, motion)
        return Chunk(
            observation_stamp_ns=observation.stamp_ns,
            sequence=request.sequence,
            joint_names=self._embodiment.action_joints,
            positions=positions,
            step_duration=request.step_duration,
            n_action_steps=request.n_action_steps,
            instruction=request.instruction,
            inference_duration=time.perf_counter() - started,
        )

    def _predict(
        self, observation: Observation, task: str, sampling: Sampling, motion: ChunkInMotion | None
    ) -> np.ndarray:
        """A chunk's actions (steps, A) float64, in units."""
        config = self._engine.policy.config
        frames = self._encode(observation, task, without_instruction=False)
        without = None
        if self._needs_both(sampling):
            without = self._encode(observation, task, without_instruction=True)
        state = torch.from_numpy(observation.state).unsqueeze(0) if STATE in config.input_features else None
        with self._model():
            actions = self._engine.predict_chunk_from(
                state, frames, [task], sampling, motion=motion, frames_without_instruction=without
            )
            return actions[0].cpu().numpy().astype(np.float64)  # also waits for the device

    def _encode(self, observation: Observation, task: str, without_instruction: bool) -> dict[str, list[torch.Tensor]]:
        """{camera key: the feature of each of its frames}, for the policy's cameras among the embodiment's."""
        with self._model():
            return {
                key: [
                    self._frames.of(key, stamp_ns, image, task, without_instruction)
                    for stamp_ns, image in zip(observation.image_stamps_ns[camera], images, strict=True)
                ]
                for camera, images in observation.images.items()
                if (key := f"observation.images.{camera}") in self._engine.policy.config.cameras
            }

    @contextmanager
    def _model(self) -> Iterator[None]:
        began = time.thread_time()
        try:
            yield
        finally:
            self._model_cpu += time.thread_time() - began


def _batch(observation: Observation, task: str) -> dict[str, object]:
    """An observation as a batch of one for the policy."""
    batch: dict[str, object] = {key: torch.as_tensor(value)[None] for key, value in observation.tensors().items()}
    return batch | {TASK: [task]}
