"""From noise to actions: what a sampler is asked for (`Sampling`), and the samplers themselves (`Plan`).

A plan is a sampler with its number of steps, all its coefficients worked out when it is made. Its loop, `run`, calls
`predict(x (B, T, A), call) -> (B, T, A)`, the transformer with the conditioning and the timestep
`plan.timesteps[call]` filled in, and never waits for the device, so that the whole of it fits one CUDA graph.

| objective | sampler | network calls a step | source |
|---|---|---|---|
| diffusion | `ddpm` | 1, random | arXiv 2006.11239, eq. 6 and 7 |
| | `ddim` | 1 | arXiv 2010.02502, eq. 12 with sigma = 0 |
| | `dpm_solver++` | 1 | arXiv 2211.01095, algorithm 2 (2M), the last step of first order |
| flow matching | `euler` | 1 | |
| | `heun` | 2, in the last 1 | explicit trapezoid, the last step by Euler's method, as in diffusers |
| | `rk4` | 4 | the classical Runge-Kutta method |
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .batch import as_tensor
from .configuration import ObjectiveConfig, PolicyConfig
from .objectives import Diffusion, FlowMatching

Predict = Callable[[Tensor, int], Tensor]
"""(x (B, T, A), number of the call) -> the transformer's output (B, T, A)."""

Joining = Literal["guided", "guided_cheap", "prefix"]
JoiningChoice = Literal["auto", "guided", "guided_cheap", "prefix"]


@dataclass(frozen=True)
class Sampling:
    """How a chunk is sampled; None: as the policy's configuration says.

    `denoising_steps` are steps of the sampler: `heun` calls the network twice in each but the last, `rk4` four times.
    `guidance_scale` s is that of classifier-free guidance: prediction without the instruction + s * (with - without).
    `candidates` chunks are sampled in one batch and the best is kept (candidates.py); how much a step's distance from
    the chunk in motion counts falls by `coherence_decay` a step.

    `joining` says how a chunk is made to agree with the one in motion, if there is one (realtime.py): "guided" by its
    gradient through the network, "guided_cheap" without the network's Jacobian, "prefix" by giving its committed steps
    clean; "auto" takes the best of those that the policy and the chunk in motion allow (`realtime.choose_joining`).
    None: the chunk in motion only serves to choose among the candidates. `max_joining_weight` bounds the weight of that
    pull (beta in arXiv 2506.07339); it has nothing to do with `guidance_scale`, which is about the instruction.
    """

    sampler: str | None = None
    denoising_steps: int | None = None
    guidance_scale: float | None = None
    candidates: int = 1
    coherence_decay: float = 0.9
    joining: JoiningChoice | None = "auto"
    max_joining_weight: float = 5.0

    def resolve(self, config: PolicyConfig) -> "ResolvedSampling":
        """The same with nothing left open. Raises ValueError naming every choice the policy cannot follow."""
        objective = config.objective
        resolved = ResolvedSampling(
            sampler=getattr(objective, "sampler", "") if self.sampler is None else self.sampler,
            denoising_steps=_as_int(
                objective.denoising_steps if self.denoising_steps is None else self.denoising_steps
            ),
            guidance_scale=config.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            candidates=_as_int(self.candidates),
            coherence_decay=self.coherence_decay,
            joining=self.joining,
            max_joining_weight=self.max_joining_weight,
        )
        problems = [*_sampler_problems(objective, resolved.sampler, resolved.denoising_steps), *resolved.problems()]
        if resolved.guidance_scale != 1 and config.instruction_dropout == 0:
            problems.append(
                f"guidance_scale {resolved.guidance_scale} needs a policy trained with instruction_dropout above 0: "
                "this one does not know what it would do without the instruction; use 1"
            )
        if problems:
            raise ValueError("the policy cannot be sampled like that:\n  - " + "\n  - ".join(problems))
        return resolved


AS_CONFIGURED = Sampling()


@dataclass(frozen=True)
class ResolvedSampling:
    """`Sampling` for one policy, every choice made and valid. Fields as there."""

    sampler: str
    denoising_steps: int
    guidance_scale: float
    candidates: int
    coherence_decay: float
    joining: JoiningChoice | None
    max_joining_weight: float

    def problems(self) -> list[str]:
        """What is wrong whatever the policy, a sentence each."""
        found = []
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            found.append(f"guidance_scale must be at least 0 and finite, got {self.guidance_scale}")
        if not is_whole(self.candidates) or self.candidates < 1:
            found.append(f"candidates must be a whole number of at least 1, got {self.candidates}")
        if not 0 < self.coherence_decay <= 1:
            found.append(f"coherence_decay must be above 0 and at most 1, got {self.coherence_decay}")
        choices = get_args(JoiningChoice)
        if self.joining is not None and self.joining not in choices:
            found.append(f"joining must be one of {', '.join(choices)}, or None; got {self.joining!r}")
        if not (math.isfinite(self.max_joining_weight) and self.max_joining_weight > 0):
            found.append(f"max_joining_weight must be positive and finite, got {self.max_joining_weight}")
        return found


def samplers_of(objective: ObjectiveConfig) -> tuple[str, ...]:
    """The samplers an objective may be used with."""
    # get_type_hints would evaluate every annotation anew, 0.1 ms for each chunk.
    return get_args({each.name: each.type for each in fields(objective)}["sampler"])


def _sampler_problems(objective: ObjectiveConfig, sampler: str, steps: int) -> list[str]:
    found = []
    choices = samplers_of(objective)
    if sampler not in choices:
        name = objective.get_choice_name(type(objective))
        found.append(f"sampler must be one of {', '.join(choices)} (the policy's objective is {name}), got {sampler!r}")
    if not is_whole(steps) or not 1 <= steps <= objective.max_denoising_steps:
        found.append(f"denoising_steps must be 1 to {objective.max_denoising_steps}, got {steps}")
    return found


def is_whole(number: object) -> bool:
    """Whether it is an integer, Python's or NumPy's; True and False are none."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def _as_int(number: int) -> int:
    return int(number) if is_whole(number) else number  # what is no whole number is refused, by its own name


def draw_noise(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise of like's dtype on its device, whichever device the generator lives on."""
    device = like.device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=like.dtype).to(like.device)


def check_noise(noise: Any, shape: tuple[int, ...]) -> Tensor:
    """The noise a caller gives, a tensor or array, as a tensor.

    Raises ValueError if its shape, dtype or values cannot be meant.
    """
    noise = as_tensor("noise", noise)
    if tuple(noise.shape) != shape:
        raise ValueError(f"noise must have the shape {shape} (batch, horizon, actions), got {tuple(noise.shape)}")
    if not noise.is_floating_point():
        raise ValueError(f"noise must be floating point, standard normal, got {noise.dtype}")
    if not noise.isfinite().all():
        raise ValueError(f"noise must be finite, got {int((~noise.isfinite()).sum())} values that are not")
    return noise


def draw_step_noise(plan: "Plan", x: Tensor, generator: torch.Generator | None) -> Tensor | None:
    """What `plan.run` wants as step_noise for x (B, T, A): (steps, B, T, A), one draw a step in order, or None."""
    if not plan.draws_noise:
        return None
    return torch.stack([draw_noise(x.shape, x, generator) for _ in range(plan.steps)])


@dataclass(frozen=True)
class Level:
    """How noisy x is at one network call, x = signal * clean + noise * epsilon, and what the output says of clean.

    The estimate of the clean actions is (of_x * x + of_out * out) / over. Dividing last, as diffusers does, keeps the
    rounding at the noisiest timestep (over = 5e-5) the same as there.
    """

    signal: float
    noise: float
    of_x: float
    of_out: float
    over: float = 1.0

    def clean(self, x: Tensor, out: Tensor) -> Tensor:
        """The estimate of the clean actions (B, T, A) from x and the network's output."""
        return (_combination((self.of_x, x), (self.of_out, out))) / self.over


@dataclass(frozen=True, eq=False)
class Plan(ABC):
    """A sampler with its number of steps, ready to run.

    `timesteps` (calls,) float32, on the plan's device, is what the transformer's timestep embedding is given at each
    network call; `clean_timestep` is that of a step which is known already. `levels` has an entry a call.
    """

    sampler: str
    steps: int
    timesteps: Tensor
    clean_timestep: float
    levels: tuple[Level, ...]

    @property
    def calls(self) -> int:
        """How often a chunk calls the network."""
        return len(self.levels)

    @property
    def draws_noise(self) -> bool:
        """Whether `run` wants step_noise."""
        return self.sampler == "ddpm"

    def clip(self, clean: Tensor) -> Tensor:
        """An estimate of the clean actions within the range the plan keeps to."""
        return clean

    def step_noise_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The shape of step_noise for x of shape (B, T, A), or None."""
        return (self.steps, *shape) if self.draws_noise else None

    def run(
        self, predict: Predict, x: Tensor, step_noise: Tensor | None = None, prefix: Tensor | None = None
    ) -> Tensor:
        """Noise x (B, T, A) -> normalised actions (B, T, A).

        step_noise as `draw_step_noise` gives it. prefix (B, P, A), normalised: the first P steps are known; the network
        sees them at every call, and they are returned as they are. Raises ValueError for step_noise of another shape.
        """
        wanted = self.step_noise_shape(x.shape)
        if (None if step_noise is None else tuple(step_noise.shape)) != wanted:
            raise ValueError(
                f"{self.sampler} in {self.steps} steps wants step_noise of shape {wanted}; draw_step_noise"
            )
        if prefix is None:
            return self._loop(predict, x, step_noise)
        return hold(self._loop(lambda x, call: predict(hold(x, prefix), call), x, step_noise), prefix)

    @abstractmethod
    def _loop(self, predict: Predict, x: Tensor, step_noise: Tensor | None) -> Tensor:
        """The sampler's loop, of `self.calls` calls."""


def hold(x: Tensor, prefix: Tensor) -> Tensor:
    """x (B, T, A) with its first P steps replaced by prefix (B, P, A)."""
    return torch.cat([prefix, x[:, prefix.shape[1] :]], dim=1)


def token_timesteps(plan: Plan, call: int, batch: int, horizon: int, prefix_steps: int) -> Tensor:
    """The timestep of each step of a chunk whose first steps are a prefix, (B, T) float32."""
    known = torch.arange(horizon, device=plan.timesteps.device) < prefix_steps
    return torch.where(known, plan.clean_timestep, plan.timesteps[call]).expand(batch, horizon)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598, eq. 6 in terms of s = 1 + w): beyond what the instruction changes."""
    return unconditional + scale * (conditional - unconditional)


def _combination(*terms: tuple[float, Tensor | None]) -> Tensor:
    """The sum of factor * tensor over the terms whose factor is not zero (their tensor is then not None)."""
    total: Tensor | None = None
    for factor, tensor in terms:
        if factor == 0:
            continue
        assert tensor is not None
        if total is None:
            total = tensor if factor == 1 else factor * tensor
        else:
            total = torch.add(total, tensor, alpha=factor)
    assert total is not None
    return total


# --- diffusion ---


def diffusion_timesteps(num_train_timesteps: int, steps: int, spacing: str) -> list[int]:
    """The timesteps a sampler visits, noisiest first (arXiv 2305.08891, table 2).

    "trailing" starts at num_train_timesteps - 1; "leading" ends at 0 and misses the noisiest ones.
    """
    if spacing == "leading":
        return [i * (num_train_timesteps // steps) for i in reversed(range(steps))]
    return [round(num_train_timesteps - i * num_train_timesteps / steps) - 1 for i in range(steps)]


@dataclass(frozen=True)
class Update:
    """One step of a diffusion sampler: the factors whose sum is the next, less noisy x.

    `clean` is the (clipped) estimate of the clean actions, `previous` that of the step before.
    """

    x: float = 0.0
    out: float = 0.0
    clean: float = 0.0
    previous: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True, eq=False)
class DiffusionPlan(Plan):
    """DDPM, DDIM or DPM-Solver++: an estimate of the clean actions, then a step towards it."""

    updates: tuple[Update, ...]
    clip_range: float | None

    def clip(self, clean: Tensor) -> Tensor:
        """An estimate of the clean actions within +-clip_range."""
        return clean if self.clip_range is None else clean.clamp(-self.clip_range, self.clip_range)

    def _loop(self, predict: Predict, x: Tensor, step_noise: Tensor | None) -> Tensor:
        previous: Tensor | None = None
        for call, (level, update) in enumerate(zip(self.levels, self.updates, strict=True)):
            out = predict(x, call)
            clean = self.clip(level.clean(x, out))  # as in diffusers, `update.out` stays that of the unclipped estimate
            noise = None if step_noise is None else step_noise[call]
            x = _combination(
                (update.x, x),
                (update.out, out),
                (update.clean, clean),
                (update.previous, previous),
                (update.noise, noise),
            )
            previous = clean
        return x


def diffusion_level(alpha_bar: float, prediction_type: str) -> Level:
    """What the output says at the signal share alpha_bar, by what it predicts (arXiv 2202.00512, appendix D, for v)."""
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    if prediction_type == "epsilon":
        return Level(signal, noise, of_x=1.0, of_out=-noise, over=signal)
    if prediction_type == "sample":
        return Level(signal, noise, of_x=0.0, of_out=1.0)
    return Level(signal, noise, of_x=signal, of_out=-noise)


def ddpm_update(alpha_bar: float, alpha_bar_next: float) -> Update:
    """A draw of the posterior q(x_s | x_t, x_0 = clean) (arXiv 2006.11239, eq. 6 and 7).

    alpha_bar and alpha_bar_next are the signal shares at t and at the less noisy s.
    """
    alpha = alpha_bar / alpha_bar_next
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha)
    return Update(
        x=math.sqrt(alpha) * (1 - alpha_bar_next) / (1 - alpha_bar),
        clean=math.sqrt(alpha_bar_next) * (1 - alpha) / (1 - alpha_bar),
        noise=math.sqrt(variance),
    )


def ddim_update(level: Level, alpha_bar_next: float, prediction_type: str) -> Update:
    """Along the estimates of the clean actions and of epsilon, no randomness (arXiv 2010.02502, eq. 12, sigma = 0)."""
    of_x, of_out = {
        "epsilon": (0.0, 1.0),
        "sample": (1 / level.noise, -level.signal / level.noise),
        "v_prediction": (level.noise, level.signal),
    }[prediction_type]
    noise = math.sqrt(1 - alpha_bar_next)
    return Update(x=noise * of_x, out=noise * of_out, clean=math.sqrt(alpha_bar_next))


def dpm_solver_update(level: Level, alpha_bar_next: float, level_before: Level | None) -> Update:
    """DPM-Solver++ (2M) (arXiv 2211.01095, algorithm 2): a line through the last two estimates of the clean actions.

    Of first order (the same as DDIM's) at the first step, and at the last, where log(signal / noise) is infinite.
    """
    if alpha_bar_next == 1:
        return Update(clean=1.0)
    signal, noise = math.sqrt(alpha_bar_next), math.sqrt(1 - alpha_bar_next)
    step = math.log(signal / noise) - math.log(level.signal / level.noise)
    towards = -signal * math.expm1(-step)
    if level_before is None:
        return Update(x=noise / level.noise, clean=towards)
    step_before = math.log(level.signal / level.noise) - math.log(level_before.signal / level_before.noise)
    slope = step / (2 * step_before)
    return Update(x=noise / level.noise, clean=towards * (1 + slope), previous=-towards * slope)


def _diffusion_plan(objective: Diffusion, sampler: str, steps: int, device: torch.device) -> DiffusionPlan:
    config = objective.config
    visited = diffusion_timesteps(config.num_train_timesteps, steps, config.timestep_spacing)
    shares = [*objective.alphas_cumprod[visited].tolist(), 1.0]
    levels = tuple(diffusion_level(share, config.prediction_type) for share in shares[:-1])
    updates = []
    for i, (alpha_bar, alpha_bar_next) in enumerate(pairwise(shares)):
        if sampler == "ddpm":
            updates.append(ddpm_update(alpha_bar, alpha_bar_next))
        elif sampler == "ddim":
            updates.append(ddim_update(levels[i], alpha_bar_next, config.prediction_type))
        else:
            updates.append(dpm_solver_update(levels[i], alpha_bar_next, levels[i - 1] if i else None))
    return DiffusionPlan(
        sampler,
        steps,
        timesteps=torch.tensor(visited, dtype=torch.float32, device=device),
        clean_timestep=objective.clean_timestep,
        levels=levels,
        updates=tuple(updates),
        clip_range=config.clip_range,
    )


# --- flow matching ---


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method whose every stage starts from the one before it.

    Stage i is taken at `times[i]` of the step, from x + `times[i]` * step * (velocity of stage i - 1); the step is the
    mean of the velocities by `weights`.
    """

    times: tuple[float, ...]
    weights: tuple[float, ...]


EULER = Tableau((0.0,), (1.0,))
HEUN = Tableau((0.0, 1.0), (1 / 2, 1 / 2))
RK4 = Tableau((0.0, 1 / 2, 1 / 2, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


def tableaus(sampler: str, steps: int) -> tuple[Tableau, ...]:
    """The method of each step.

    Heun's last step is Euler's: its second stage would ask the network at t = 1, where it is not trained and its
    velocity says little. RK4 does ask there, as LeRobot's: with few steps its last stage spoils the chunk.
    """
    if sampler == "heun":
        return (HEUN,) * (steps - 1) + (EULER,)
    return ({"euler": EULER, "rk4": RK4}[sampler],) * steps


@dataclass(frozen=True, eq=False)
class FlowPlan(Plan):
    """The velocity integrated from noise at t = 0 to actions at t = 1 in equal steps."""

    tableaus: tuple[Tableau, ...]

    def _loop(self, predict: Predict, x: Tensor, step_noise: Tensor | None) -> Tensor:
        call = 0
        for tableau in self.tableaus:
            velocities: list[Tensor] = []
            for time in tableau.times:
                at = torch.add(x, velocities[-1], alpha=time / self.steps) if velocities else x
                velocities.append(predict(at, call))
                call += 1
            weights = (weight / self.steps for weight in tableau.weights)
            x = _combination((1.0, x), *zip(weights, velocities, strict=True))
        return x


def _flow_plan(objective: FlowMatching, sampler: str, steps: int, device: torch.device) -> FlowPlan:
    methods = tableaus(sampler, steps)
    times = [(i + time) / steps for i, method in enumerate(methods) for time in method.times]
    return FlowPlan(
        sampler,
        steps,
        timesteps=objective.embedding_timestep(torch.tensor(times, dtype=torch.float32, device=device)),
        clean_timestep=objective.clean_timestep,
        levels=tuple(Level(signal=t, noise=1 - t, of_x=1.0, of_out=1 - t) for t in times),
        tableaus=methods,
    )


def make_plan(objective: Diffusion | FlowMatching, sampler: str, steps: int, device: torch.device | str) -> Plan:
    """The plan of a sampler of the objective with that many steps. Raises ValueError, naming the choices.

    The objective keeps its plans: to make one takes up to a millisecond and, of tables on a GPU, waits for the device.
    """
    problems = _sampler_problems(objective.config, sampler, steps)
    if problems:
        raise ValueError("; ".join(problems))
    device = torch.device(device)
    key = (sampler, int(steps), device, *vars(objective.config).values())
    return objective.plans.get(key, lambda: _new_plan(objective, sampler, int(steps), device))


@torch.inference_mode(False)  # a plan outlives its first caller, whose mode its tensors must not inherit
def _new_plan(objective: Diffusion | FlowMatching, sampler: str, steps: int, device: torch.device) -> Plan:
    if isinstance(objective, Diffusion):
        return _diffusion_plan(objective, sampler, steps, device)
    return _flow_plan(objective, sampler, steps, device)
