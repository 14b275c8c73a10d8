"""The engine: a policy made ready to run, as fast as this machine allows, and checked against the plain policy.

Encoding a frame and sampling a chunk are separate calls, so that a frame is encoded once, when it arrives, and its
feature serves all the chunks that see it.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .configuration import ENVIRONMENT_STATE, STATE, TASK
from .fast_policy import COMPILE, CUDA_GRAPH, FRAMES, FRAMES_WITHOUT_INSTRUCTION, TRANSFORMER, FastPaths, FastPolicy
from .modeling import MultitaskDiTPolicy
from .realtime import ChunkInMotion
from .sampling import AS_CONFIGURED, Sampling

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]

_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

TOLERANCES: dict[str, float] = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 6e-3}
"""The largest difference from the plain policy's actions that a fast path may make, as a share of each action's range.

In fp32 only the order of additions differs: measured are some 1e-6, and a hundred times that is still below what an
encoder resolves. A product in fp16 rounds by 2^-11 and in bf16 by 2^-8 of its size, and a chunk sums the errors of all
layers and steps: in bf16 measured are 4e-3 at most with the demo's policies, 9e-3 with DDIM in 5 steps. That is as much
as some defects make (a table off by one timestep: 1e-2 to 3e-2), so a half precision is told from a wrong formula by
checking the same paths in fp32 as well.
"""

FEATURE_TOLERANCES: dict[str, float] = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""The largest difference of a camera's frame features from the plain ones, as a share of their length.

Actions alone say little of vision: a policy may hardly look at a picture unlike those of its training.
"""

VERIFICATION_SEEDS = (0, 1, 2)

VERIFICATION_GUIDANCE = 2.0
"""The guidance_scale tried for a policy that may be asked for one."""


@dataclass(frozen=True)
class PathReport:
    """What came of a fast path: whether it is in use, and how far the actions with it are from the plain policy's.

    `difference` is the largest of any action, in that action's units; `share` the largest one as a share of its
    action's range, which must not exceed `tolerance`. Both are None if the path could not be tried. `reason` says why
    it is or is not in use; `failed` that it should have worked and did not, while a part that has no fast form at all
    (a convolutional encoder) is in order. `feature_share` is the largest difference of a camera's frame features as a
    share of their length; None without cameras.
    """

    name: str
    used: bool
    difference: float | None
    share: float | None
    tolerance: float
    reason: str
    failed: bool = False
    feature_share: float | None = None

    def __str__(self) -> str:
        return f"{'in use' if self.used else 'not in use, the plain path is'}: {self.reason}"


@dataclass(frozen=True)
class _Trial:
    """A chunk that is sampled by the plain and by a fast path."""

    seed: int
    sampling: Sampling
    motion: ChunkInMotion | None = None


@dataclass(frozen=True)
class _Outputs:
    """What is compared: the chunks of all trials, (B, candidates, T, A) each, and {camera: features (B, F)}."""

    chunks: list[Tensor]
    features: dict[str, Tensor]


class PolicyEngine:
    """The fast inference form of a policy, with the policy's own interface; any number of threads may call it.

    It is made of the policy's weights as they are: after a change of them, make another. A change in place (an
    optimizer's step, load_state_dict) is noticed and refused with a RuntimeError; one through `.data` or another
    device is not. The policy is put into evaluation mode and stays usable, also for training. Weights of the ViTs and
    of the transformer's blocks are kept a second time, laid out for the processor: about 420 MB for the default policy
    in fp32, 360 MB in bf16 or fp16 (with the modulation's).

    precision "bf16" and "fp16" do the matrix products of ViTs and transformer in that type; norms, softmax, residuals,
    the timestep embedding and the sampler's state stay fp32. `compile` puts the transformer through torch.compile:
    minutes at first use, and again for each new shape of a batch, of which torch allows eight (its recompile_limit)
    before it gives up compiling; the weights are then not laid out for the processor, even if `verify` refuses what was
    compiled. `cuda_graphs` (CUDA only) replays the denoising loop and a frame's ViT as one graph each.

    `fast` is the policy with the fast paths, for one thread and without the lock.

    Call `verify` once before relying on it: until then every path that could be built is in use unchecked.
    """

    def __init__(
        self,
        policy: MultitaskDiTPolicy,
        precision: Precision = "fp32",
        compile: bool = False,
        cuda_graphs: bool = True,
    ):
        if precision not in _DTYPES:
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
        self.policy = policy.eval()
        self.precision = precision
        self._lock = RLock()
        self._reports: list[PathReport] = []
        # An inference tensor counts no changes.
        self._weights = [weight for weight in policy.parameters() if not weight.is_inference()]
        self._versions = [weight._version for weight in self._weights]
        self._paths = FastPaths(policy, _DTYPES[precision], compile, cuda_graphs)
        self.fast = FastPolicy(policy, self._paths)

    @property
    def paths_in_use(self) -> frozenset[str]:
        """Names of the fast paths in use."""
        return frozenset(self._paths.in_use)

    @property
    def bytes(self) -> int:
        """Memory of the copied weights, beside the policy's own."""
        return self._paths.bytes

    @property
    def reports(self) -> list[PathReport]:
        """What `verify` found, and which of the paths have failed since."""
        lost = self._paths.lost
        return [
            replace(report, used=False, failed=True, reason=f"it failed in use with {lost[report.name]}")
            if report.used and report.name in lost
            else report
            for report in self._reports
        ]

    @torch.inference_mode()
    def encode_frame(
        self,
        camera_key: str,
        images: Any,
        tasks: Sequence[str] | None = None,
        without_instruction: bool = False,
    ) -> Tensor:
        """One frame's feature (B, image_dim) from images (B, 3, H, W), uint8 or float in [0, 1].

        Where the words modulate vision (`policy.text_modulates_vision`) it holds for the `tasks` given, one a picture.
        Raises ValueError as `policy.encode_frame` does.
        """
        with self._lock, self.fast.evaluating():
            self._check_weights()
            text = None
            if self.policy.text_modulates_vision:
                text = self.fast.text_features(_one_a_picture(camera_key, images, tasks), without_instruction)
            return self.fast.encode_frame(camera_key, images, text)

    def predict_chunk(
        self,
        batch: Mapping[str, Any],
        sampling: Sampling = AS_CONFIGURED,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        motion: ChunkInMotion | None = None,
        weaker: MultitaskDiTPolicy | None = None,
    ) -> Tensor:
        """As the policy's `predict_chunk`: actions (B, horizon - n_obs_steps + 1, A), absolute, in units.

        Guidance by the chunk in motion with the network's Jacobian (`joining="guided"`) differentiates the network and
        so runs the plain transformer; without it ("guided_cheap") it runs the fast one, but in no CUDA graph, whose
        constants would be those of one delay.
        """
        with self._lock, torch.inference_mode():
            self._check_weights()
            return self.fast.predict_chunk(batch, sampling, noise, generator, motion, weaker)

    def predict_chunk_from(
        self,
        state: Any | None,
        frames: Mapping[str, Sequence[Tensor]],
        tasks: Sequence[str] | None,
        sampling: Sampling = AS_CONFIGURED,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        motion: ChunkInMotion | None = None,
        environment_state: Any | None = None,
        frames_without_instruction: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> Tensor:
        """`predict_chunk` from frames encoded earlier.

        frames: {camera key: n_obs_steps features (B, image_dim), earliest first}; state and environment_state
        (B, n_obs, S) in units. frames_without_instruction are needed for guidance by the instruction if the words
        modulate vision. Raises ValueError for a part that is missing or does not fit.
        """
        batch: dict[str, Any] = {FRAMES: {key: self._window(key, each) for key, each in frames.items()}}
        if frames_without_instruction is not None:
            without = {key: self._window(key, each) for key, each in frames_without_instruction.items()}
            batch[FRAMES_WITHOUT_INSTRUCTION] = without
        for key, value in ((STATE, state), (ENVIRONMENT_STATE, environment_state), (TASK, tasks)):
            if value is not None:
                batch[key] = value
        return self.predict_chunk(batch, sampling, noise, generator, motion)

    def _window(self, camera_key: str, features: Sequence[Tensor] | Tensor) -> Tensor:
        """A camera's n_obs_steps features (B, F), or all of them (B, n_obs_steps, F), as the latter; checked."""
        steps, width = self.policy.config.n_obs_steps, self.policy.observation_encoder.image_dim
        wanted = f"{steps} features (batch, {width}) float32, finite, as encode_frame gives them"
        problem = None
        if not isinstance(features, Tensor):
            given = [each if isinstance(each, Tensor) else type(each).__name__ for each in features or ()]
            shapes = [tuple(each.shape) if isinstance(each, Tensor) else each for each in given]
            if len(shapes) != steps or len(set(shapes)) != 1 or isinstance(shapes[0], str):
                raise ValueError(f"the frames of {camera_key} are {len(shapes)}, {shapes}; expected {wanted}")
            features = torch.stack([each for each in given if isinstance(each, Tensor)], dim=1)
        if features.dim() != 3 or features.shape[1:] != (steps, width):
            problem = f"have shape {tuple(features.shape)} (batch, frames, feature)"
        elif features.dtype != torch.float32:
            problem = f"are {features.dtype}"
        elif not features.isfinite().all():
            problem = "are not finite"
        if problem is not None:
            raise ValueError(f"the frames of {camera_key} {problem}; expected {wanted}")
        return features.to(self.policy.device)

    def _check_weights(self) -> None:
        if self._versions != [weight._version for weight in self._weights]:
            raise RuntimeError(
                "the policy's weights have been changed since this engine was made of them, and it holds copies; make "
                "another PolicyEngine"
            )

    def verify(
        self,
        batch: Mapping[str, Any],
        sampling: Sampling = AS_CONFIGURED,
    ) -> list[PathReport]:
        """Runs each fast path against the plain policy on a batch, from the same noise, and turns off what fails.

        Compared are the features of each camera's first frame, and chunks from several seeds: one as `sampling` says,
        one with a prefix and one guided by the instruction if the policy was trained for these. In bf16 and fp16 the
        same paths are checked in fp32 as well, with a copy of the weights that is dropped afterwards: that finds a
        wrong formula or a wrong weight, whose effect may be as small as the rounding of a half precision. (If there is
        no memory for it the report says so.) It cannot find what these inputs do not show, so give pictures of noise
        and a state off the centre, nor a defect of the half-precision form alone that is smaller than its tolerance.

        The paths are added one after the other, so each report's difference is that of all in use up to there, and the
        last one's that of the engine. A path fails by an exception, by a value that is not finite, or by a difference
        above TOLERANCES or FEATURE_TOLERANCES. Raises what the plain policy itself raises, and then changes nothing.
        """
        with self._lock:
            paths = self._paths
            before, paths.in_use = paths.in_use, set()
            try:
                trials = self._trials(batch, sampling)
                reference = self._outputs(batch, trials)
            except BaseException:
                paths.in_use = before
                raise
            exact = self._in_fp32(batch, trials, reference)
            self._reports = self._compare(batch, trials, reference, exact)
            paths.lost.clear()
        for report in self._reports:
            logger.log(logging.WARNING if report.failed else logging.INFO, "fast path %s is %s", report.name, report)
        return self.reports

    def _trials(self, batch: Mapping[str, Any], sampling: Sampling) -> list[_Trial]:
        """A chunk a seed; the second and the third with what the policy may also be asked for, if anything."""
        config = self.policy.config
        first, second, third = (_Trial(seed, sampling) for seed in VERIFICATION_SEEDS)
        if config.max_delay > 0:
            motion = self._motion(self._chunk(batch, first)[:, 0])
            second = replace(second, sampling=replace(sampling, joining="prefix"), motion=motion)
        if config.instruction_dropout > 0 and sampling.resolve(config).guidance_scale == 1:
            third = replace(third, sampling=replace(sampling, guidance_scale=VERIFICATION_GUIDANCE))
        return [first, second, third]

    def _motion(self, chunk: Tensor) -> ChunkInMotion:
        """A chunk (B, T, A) as if it were in motion, with the longest prefix the policy knows."""
        config = self.policy.config
        delay = min(config.max_delay, config.max_action_steps - 1)
        past = chunk[:, :1].expand(-1, config.n_obs_steps - 1, -1)
        return ChunkInMotion(chunk, delay, execution_horizon=1, past=past)

    def _in_fp32(self, batch: Mapping[str, Any], trials: list[_Trial], reference: _Outputs) -> Mapping[str, PathReport]:
        """The same paths' reports in fp32, by name, for an engine of another precision."""
        if self.precision == "fp32":
            return {}
        engine = PolicyEngine(self.policy, "fp32", cuda_graphs=False)
        engine._paths.in_use = set()
        return {report.name: report for report in engine._compare(batch, trials, reference, {})}

    def _compare(
        self,
        batch: Mapping[str, Any],
        trials: list[_Trial],
        reference: _Outputs,
        exact: Mapping[str, PathReport],
    ) -> list[PathReport]:
        paths = self._paths
        reports = [
            self._untried(name, why) if name in paths.broken else replace(self._untried(name, why), failed=False)
            for name, why in paths.why_not.items()
        ]
        for name in paths.available:
            in_fp32 = exact.get(name)
            if in_fp32 is not None and in_fp32.failed and in_fp32.share is not None:
                reports.append(self._untried(name, f"the same path in fp32 is wrong: {in_fp32.reason}"))
                continue
            report = self._try(name, batch, trials, reference)
            if in_fp32 is not None and in_fp32.share is None:
                report = replace(report, reason=f"{report.reason}; it could not be checked in fp32: {in_fp32.reason}")
            reports.append(report)
        paths.graphs.clear()  # captured with the paths of that moment
        return reports

    def _try(self, name: str, batch: Mapping[str, Any], trials: list[_Trial], reference: _Outputs) -> PathReport:
        in_use = self._paths.in_use
        if name == COMPILE and TRANSFORMER not in in_use:
            return self._untried(name, "it compiles the fast transformer, not in use")
        in_use.add(name)
        self._paths.verifying = True
        started = time.perf_counter()
        try:
            got = self._outputs(batch, trials)
        except Exception as error:  # of a private operator, a compiler, a capture: there is a plain path for all
            in_use.discard(name)
            self._paths.graphs.clear()
            return self._untried(name, f"it failed with {type(error).__name__}: {error}")
        finally:
            self._paths.verifying = False
        seconds = time.perf_counter() - started
        report = self._judged(name, got, reference)
        if not report.used:
            in_use.discard(name)
        if name in (COMPILE, CUDA_GRAPH):
            return replace(report, reason=f"{report.reason}; with compilation or capture it took {seconds:.1f} s")
        return report

    def _untried(self, name: str, why: str) -> PathReport:
        return PathReport(name, False, None, None, TOLERANCES[self.precision], why, failed=True)

    def _judged(self, name: str, got: _Outputs, reference: _Outputs) -> PathReport:
        tolerance, of_features = TOLERANCES[self.precision], FEATURE_TOLERANCES[self.precision]
        differences = torch.stack([mine - plain for mine, plain in zip(got.chunks, reference.chunks, strict=True)])
        difference, share = float(differences.abs().max()), self._share(differences)
        seen = _feature_share(got.features, reference.features)
        fits = share <= tolerance and (seen is None or seen <= of_features)  # false for NaN
        reason = f"the actions differ by {difference:.2g} (units), {_verdict(share, "an action's range", tolerance)}"
        if seen is not None:
            reason += f"; the features of frames by {_verdict(seen, 'their length', of_features)}"
        return PathReport(name, fits, difference, share, tolerance, reason, not fits, seen)

    @torch.inference_mode()
    def _outputs(self, batch: Mapping[str, Any], trials: list[_Trial]) -> _Outputs:
        chunks = [self._chunk(batch, trial) for trial in trials]
        with _without_tf32():
            features = {
                key: self.encode_frame(key, torch.as_tensor(batch[key])[:, 0], batch.get(TASK))
                for key in self.policy.config.cameras
            }
        return _Outputs(chunks, features)

    @torch.inference_mode()
    def _chunk(self, batch: Mapping[str, Any], trial: _Trial) -> Tensor:
        generator = torch.Generator().manual_seed(trial.seed)
        with _without_tf32():
            return self.fast.predict_candidates(batch, trial.sampling, generator=generator, motion=trial.motion)

    def _share(self, difference: Tensor) -> float:
        """The largest difference (..., A) as a share of its action's range, which is twice the normaliser's scale."""
        return float((difference.abs() * self.policy.action_normalizer.inverse_scale / 2).max())


def _without_tf32() -> AbstractContextManager[None]:
    """cuDNN's convolutions round to TF32 by default, which the ViT's fast form does not."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def _feature_share(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float | None:
    """The largest distance of a feature (B, F) as a share of the expected one's length, None without any."""
    shares = [(got[key] - plain).norm(dim=-1) / plain.norm(dim=-1) for key, plain in expected.items()]
    return float(torch.cat(shares).max()) if shares else None


def _verdict(share: float, of_what: str, tolerance: float) -> str:
    return f"{share:.2g} of {of_what}, {'allowed' if share <= tolerance else 'more than the allowed'} {tolerance:.2g}"


def _one_a_picture(camera_key: str, images: Any, tasks: Sequence[str] | None) -> Sequence[str]:
    count = len(images)
    if tasks is None or isinstance(tasks, str) or len(tasks) != count:
        raise ValueError(
            f"the words modulate what this policy sees: encode_frame({camera_key!r}) of {count} pictures needs a list "
            f"of {count} tasks, one a picture; got {tasks!r}"
        )
    return tasks
