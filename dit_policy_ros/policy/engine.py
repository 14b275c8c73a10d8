"""The engine: a policy made ready to run, as fast as this machine allows, and checked against the plain policy.

Encoding a frame and sampling a chunk are separate calls, so that a frame is encoded once, when it arrives, and its
feature serves all the chunks that see it.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

TOLERANCES: dict[str, float] = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 6e-3}
"""The largest difference from the plain policy's actions that a fast path may make, as a share of each action's range.

In fp32 only the order of additions differs: measured are some 1e-6, and a hundred times that is still below what an
encoder resolves. A product in fp16 rounds by 2^-11 and in bf16 by 2^-8 of its size, and a chunk sums the errors of all
layers and steps; a defect (a wrong table, a missing norm) is larger than any of these.
"""

VERIFICATION_SEED = 0


@dataclass(frozen=True)
class PathReport:
    """What came of a fast path: whether it is in use, and how far the actions with it are from the plain policy's.

    `difference` is the largest of any action, in that action's units; `share` the largest one as a share of its
    action's range, which must not exceed `tolerance`. Both are None if the path could not be tried. `reason` says why
    it is or is not in use; `failed` that it should have worked and did not, while a part that has no fast form at all
    (a convolutional encoder) is in order.
    """

    name: str
    used: bool
    difference: float | None
    share: float | None
    tolerance: float
    reason: str
    failed: bool = False

    def __str__(self) -> str:
        return f"{'in use' if self.used else 'not in use, the plain path is'}: {self.reason}"


class PolicyEngine:
    """The fast inference form of a policy, with the policy's own interface; any number of threads may call it.

    It is made of the policy's weights as they are: after a change of them, make another. The policy is put into
    evaluation mode and stays usable. Weights of the ViTs and of the transformer's blocks are kept a second time, laid
    out for the processor: about 420 MB for the default policy in fp32, 360 MB in bf16 or fp16 (with the modulation's).

    precision "bf16" and "fp16" do the matrix products of ViTs and transformer in that type; norms, softmax, residuals,
    the timestep embedding and the sampler's state stay fp32. `compile` puts the transformer through torch.compile
    (minutes at first use). `cuda_graphs` (CUDA only) replays the denoising loop and a frame's ViT as one graph each.

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
        with self._lock:
            text = None
            if self.policy.text_modulates_vision:
                text = self.fast.text_features(tasks, without_instruction)
            return self.fast.encode_frame(camera_key, images, text)

    def predict_chunk(
        self,
        batch: Mapping[str, Any],
        sampling: Sampling = AS_CONFIGURED,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        motion: ChunkInMotion | None = None,
    ) -> Tensor:
        """As the policy's `predict_chunk`: actions (B, horizon - n_obs_steps + 1, A), absolute, in units.

        Guidance by the chunk in motion with the network's Jacobian (`joining="guided"`) differentiates the network and
        so runs the plain transformer.
        """
        with self._lock, torch.inference_mode():
            return self.fast.predict_chunk(batch, sampling, noise, generator, motion)

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
        batch: dict[str, Any] = {FRAMES: {key: _stacked(each) for key, each in frames.items()}}
        if frames_without_instruction is not None:
            without = {key: _stacked(each) for key, each in frames_without_instruction.items()}
            batch[FRAMES_WITHOUT_INSTRUCTION] = without
        for key, value in ((STATE, state), (ENVIRONMENT_STATE, environment_state), (TASK, tasks)):
            if value is not None:
                batch[key] = value
        return self.predict_chunk(batch, sampling, noise, generator, motion)

    def verify(
        self,
        batch: Mapping[str, Any],
        sampling: Sampling = AS_CONFIGURED,
    ) -> list[PathReport]:
        """Runs each fast path once against the plain policy on a batch, from the same noise, and turns off what fails.

        The paths are added one after the other, so each report's difference is that of all in use up to there, and the
        last one's that of the engine. A path fails by an exception, by a value that is not finite, or by a difference
        above TOLERANCES[precision]. Raises what the plain policy itself raises.
        """
        tolerance = TOLERANCES[self.precision]
        with self._lock:
            paths = self._paths
            paths.in_use = set()
            reference = self._chunk(batch, sampling)
            reports = [
                PathReport(name, False, None, None, tolerance, why, failed=name in paths.broken)
                for name, why in paths.why_not.items()
            ]
            for name in paths.available:
                reports.append(self._try(name, batch, sampling, reference, tolerance))
            paths.graphs.clear()  # captured with the paths of that moment
        for report in reports:
            logger.log(logging.WARNING if report.failed else logging.INFO, "fast path %s is %s", report.name, report)
        return reports

    def _try(
        self, name: str, batch: Mapping[str, Any], sampling: Sampling, reference: Tensor, tolerance: float
    ) -> PathReport:
        in_use = self._paths.in_use
        if name == COMPILE and TRANSFORMER not in in_use:
            return PathReport(name, False, None, None, tolerance, "it compiles the fast transformer, not in use", True)
        in_use.add(name)
        self._paths.verifying = True
        started = time.perf_counter()
        try:
            actions = self._chunk(batch, sampling)
        except Exception as error:  # of a private operator, a compiler, a capture: there is a plain path for all
            in_use.discard(name)
            self._paths.graphs.clear()
            why = f"it failed with {type(error).__name__}: {error}"
            return PathReport(name, False, None, None, tolerance, why, failed=True)
        finally:
            self._paths.verifying = False
        seconds = time.perf_counter() - started
        difference = float((actions - reference).abs().max())
        share = self._share(actions - reference)
        fits = share <= tolerance  # false for NaN
        if not fits:
            in_use.discard(name)
        reason = (
            f"the actions differ by {difference:.2g} (units), {share:.2g} of an action's range, "
            f"{'allowed' if fits else 'more than the allowed'} {tolerance:.2g}"
        )
        if name in (COMPILE, CUDA_GRAPH):
            reason += f"; the first chunk, with compilation or capture, took {seconds:.1f} s"
        return PathReport(name, fits, difference, share, tolerance, reason, failed=not fits)

    def _chunk(self, batch: Mapping[str, Any], sampling: Sampling) -> Tensor:
        generator = torch.Generator().manual_seed(VERIFICATION_SEED)
        # cuDNN's convolutions round to TF32 by default, which the ViT's fast form does not.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.predict_chunk(batch, sampling, generator=generator)

    def _share(self, difference: Tensor) -> float:
        """The largest difference (B, T, A) as a share of its action's range, which is twice the normaliser's scale."""
        return float((difference.abs() * self.policy.action_normalizer.inverse_scale / 2).max())


def _stacked(features: Sequence[Tensor] | Tensor) -> Tensor:
    """n_obs_steps features (B, F) -> (B, n_obs_steps, F)."""
    return features if isinstance(features, Tensor) else torch.stack(list(features), dim=1)
