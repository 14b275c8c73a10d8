"""Real-time chunking: a new chunk that agrees with the one in motion while it was computed.

By the time a chunk arrives, the robot has executed `delay` more steps of the chunk before it. Those steps are
committed: the new chunk must contain them, and go on from them. Three ways:

- "guided": each estimate of the clean chunk is pulled towards the chunk in motion Y, fully on the committed steps and
  ever less on the steps after them (`overlap_weights`). Works with any policy (arXiv 2506.07339); the backward pass
  through the network doubles a call's time.
- "guided_cheap": the same without the network's part of the Jacobian; no backward pass, no knowledge of how the
  steps hang together.
- "prefix": the committed steps are given to the network clean, with a timestep that says so. Exact and free, but needs
  a policy trained with `max_delay` (arXiv 2512.05964).

"auto" takes the prefix where it can be had and "guided_cheap" elsewhere (`choose_joining`).

Guidance, for both objectives. On the way from noise to actions x = a clean + s epsilon (flow matching: a = t,
s = 1 - t; diffusion: a^2 = alpha_bar, s^2 = 1 - alpha_bar). Pseudoinverse guidance (PiGDM, Song et al., ICLR 2023,
eq. 7 and 8; in arXiv 2506.07339 eq. 2 to 4) takes clean | x for a Gaussian around the network's estimate c(x) with
variance r^2 = s^2 / (a^2 + s^2), the posterior's if clean is standard normal. Then

    d log p(Y | x) / dx = J^T W (Y - c) / r^2,    J = dc / dx,

is added to the score. By Tweedie's formula c = (x + s^2 score) / a, so the guided estimate is

    c' = c + s^2 / (a r^2) J^T W (Y - c) = c + (a^2 + s^2) / a J^T W (Y - c).

Flow matching: c = x + (1 - t) v, so that v' = v + (1 - t) / (t r^2) J^T W (Y - c), with the weight bounded by
`max_joining_weight` (eq. 2 of the paper: it is infinite at t = 0). Diffusion: a^2 + s^2 = 1, so that
c' = c + 1/a J^T W (Y - c), its weight 1/a bounded likewise; the network's output is changed to the one that says c', so
that every sampler goes on from it, and clips it as any estimate. If clean is standard normal then J = a (flow matching:
a / (a^2 + s^2)) and c' = Y wherever W = 1 and the bound is not met. Two things differ for diffusion because an estimate
divides by a, 5e-5 at the noisiest timestep of the cosine schedule, and the network's errors with it: where a step has a
weight c is the clipped estimate, and the change c' - c is kept at most `max_joining_weight` times as long as W (Y - c).
A true posterior never asks for more than twice that, if the data's covariance is at most 1: J is
a / s^2 Cov(clean | x), where Cov(clean | x) is at most 1 and at most s^2 / a^2. Without the two, DDIM's chunks were
thrown 0.2 rad and more.

Without the network's Jacobian, flow matching's J is the identity, that of c = x + (1 - t) v at a fixed v. The same for
diffusion would be 1/a, hence a weight of 1/a^2, up to 4e8 (0 where the network predicts the clean actions): there
J = a, the standard normal's, is taken instead.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .batch import as_tensor
from .configuration import PolicyConfig
from .flow_plan import FlowPlan
from .plan import Plan, Predict
from .sampling import Joining, JoiningChoice, is_whole


@dataclass(frozen=True)
class ChunkInMotion:
    """The chunk being executed, as far as it is not past.

    actions (B or 1, N, A), a tensor or an array, absolute, in units: row 0 belongs to the newest observation's time.
    The first `delay` rows will have been executed when the new chunk arrives. past (B or 1, n_obs_steps - 1, A), needed
    by a prefix where n_obs_steps exceeds 1: the actions of the earlier observations' times, earliest first. Raises
    ValueError for actions or a past that are no numbers.

    `execution_horizon` is s of arXiv 2506.07339: how many steps pass between this inference and the next. The last s
    steps of the new chunk lie behind all that the old one says, and are free. It is a fact of this call, and may
    change with the load; the configuration's `n_action_steps` is a choice made at training, how many steps of a chunk
    are executed if no new one comes in between. Where inference starts every n_action_steps, they are the same.
    """

    actions: Tensor
    delay: int
    execution_horizon: int
    past: Tensor | None = None

    def __post_init__(self) -> None:
        """Takes arrays and NumPy's integers for what they are."""
        object.__setattr__(self, "actions", as_tensor("the chunk in motion's actions", self.actions))
        if self.past is not None:
            object.__setattr__(self, "past", as_tensor("the chunk in motion's past", self.past))
        for name in ("delay", "execution_horizon"):
            if is_whole(number := getattr(self, name)):
                object.__setattr__(self, name, int(number))

    def problems(self, config: PolicyConfig, batch: int) -> list[str]:
        """What does not fit a policy and a batch of that size, a sentence each."""
        found = _shape_problems("actions", self.actions, batch, None, config.action_dim)
        if self.past is not None:
            found += _shape_problems("past", self.past, batch, config.n_obs_steps - 1, config.action_dim)
        if found:
            return found
        steps, rows, delay = config.max_action_steps, self.actions.shape[1], self.delay
        if not is_whole(delay) or not is_whole(self.execution_horizon):
            return [
                f"delay and execution_horizon are whole numbers of steps, got {delay!r} and {self.execution_horizon!r}"
            ]
        if rows > steps:
            found.append(f"actions has {rows} rows, a chunk has {steps} from the newest observation on")
        if not 0 <= delay <= rows:
            found.append(f"delay must be 0 to {rows}, the number of rows of actions; got {delay}")
        if not 1 <= self.execution_horizon <= steps - delay:
            found.append(
                f"execution_horizon must be 1 to {steps - delay} (the chunk's {steps} steps without the delay's "
                f"{delay}), got {self.execution_horizon}"
            )
        return found


def _shape_problems(name: str, value: Tensor, batch: int, rows: int | None, width: int) -> list[str]:
    shape = tuple(value.shape)
    if len(shape) != 3 or shape[0] not in (1, batch) or shape[2] != width or rows not in (None, shape[1]):
        wanted = (f"{batch} or 1" if batch != 1 else 1, "N" if rows is None else rows, width)
        return [f"{name} has shape {shape}, the policy and the batch need {wanted}".replace("'", "")]
    if not value.is_floating_point():
        return [f"{name} must be floating point, in units, got {value.dtype}"]
    if not value.isfinite().all():
        sample, row, index = (~value.isfinite()).nonzero()[0].tolist()
        return [f"{name} is not finite: {value[sample, row, index]} in sample {sample}, row {row}, dimension {index}"]
    return []


@dataclass(frozen=True)
class JoinTarget:
    """The chunk in motion in the model's space: what the new chunk, its past rows included, should agree with.

    actions (B, horizon, A), normalised, zero where nothing is known; weights: W of each row, on the host; the first
    `prefix_steps` rows are known and committed. `joining` is how, "auto" decided; None: not at all.
    """

    actions: Tensor
    weights: tuple[float, ...]
    prefix_steps: int
    joining: Joining | None

    @property
    def prefix(self) -> Tensor | None:
        """The committed rows (B, prefix_steps, A), or None where there are none."""
        return self.actions[:, : self.prefix_steps] if self.prefix_steps else None

    def repeat(self, candidates: int) -> "JoinTarget":
        """The same for so many candidates of each observation, (B * candidates, horizon, A)."""
        return replace(self, actions=self.actions.repeat_interleave(candidates, dim=0))


@contextmanager
def differentiable() -> Iterator[None]:
    """Where tensors may be made that autograd can use, even if the caller is in inference mode; no gradients yet."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def overlap_weights(steps: int, delay: int, execution_horizon: int) -> list[float]:
    """W of a chunk's steps (arXiv 2506.07339, eq. 5): 1 while committed, falling to 0 where the last s steps begin."""
    overlap = steps - execution_horizon
    weights = []
    for i in range(steps):
        share = (overlap - i) / (overlap - delay + 1)
        decaying = share * math.expm1(share) / math.expm1(1)
        weights.append(1.0 if i < delay else decaying if i < overlap else 0.0)
    return weights


def choose_joining(choice: JoiningChoice | None, motion: ChunkInMotion, config: PolicyConfig) -> Joining | None:
    """How to join, "auto" decided by what `make bench-joining` measured (docs/policy.md, outputs/bench/joining.json).

    A prefix holds the committed steps exactly and goes on from them best (seam 14 mrad, guided_cheap 21, guided 36,
    not joined 52), at no cost: taken if the policy was trained with at least this delay and the past is known where a
    chunk begins with it. Else guided_cheap, which for every objective held the committed steps better than guided (4
    mrad against 30) in half the time.
    """
    if choice != "auto":
        return choice
    trained = 0 < config.max_delay >= motion.delay
    return "prefix" if trained and (config.n_obs_steps == 1 or motion.past is not None) else "guided_cheap"


def join_target(
    motion: ChunkInMotion,
    config: PolicyConfig,
    batch: int,
    normalize: Callable[[Tensor], Tensor],
    choice: JoiningChoice | None,
) -> JoinTarget:
    """The chunk in motion for a batch, as the choice of joining needs it.

    normalize maps actions (B, N, A) in units to the model's space. Raises ValueError naming all that does not fit.
    """
    problems = motion.problems(config, batch)
    if choice == "prefix":
        problems += _prefix_problems(motion, config)
    if problems:
        raise ValueError("the chunk in motion does not fit:\n  - " + "\n  - ".join(problems))
    past_steps = config.n_obs_steps - 1
    known = normalize(motion.actions.expand(batch, -1, -1))
    rows = known.shape[1]
    actions = known.new_zeros(batch, config.horizon, config.action_dim)
    actions[:, past_steps : past_steps + rows] = known
    if motion.past is not None:
        actions[:, :past_steps] = normalize(motion.past.expand(batch, -1, -1))
    weights = overlap_weights(config.max_action_steps, motion.delay, motion.execution_horizon)
    weights = [0.0] * past_steps + weights[:rows] + [0.0] * (config.max_action_steps - rows)
    prefix_steps = past_steps + motion.delay if motion.delay else 0
    return JoinTarget(actions, tuple(weights), prefix_steps, choose_joining(choice, motion, config))


def _prefix_problems(motion: ChunkInMotion, config: PolicyConfig) -> list[str]:
    found = []
    if config.max_delay == 0:
        found.append("joining by prefix needs a policy trained with max_delay above 0; use joining 'auto'")
    elif is_whole(motion.delay) and motion.delay > config.max_delay:
        found.append(
            f"joining by prefix: delay {motion.delay} exceeds max_delay {config.max_delay}, the longest prefix the "
            "policy was trained with; use joining 'auto', or train with a larger max_delay"
        )
    if config.n_obs_steps > 1 and motion.past is None:
        found.append(
            f"joining by prefix needs `past`, the {config.n_obs_steps - 1} actions before the newest observation: this "
            f"policy's chunks begin with them (n_obs_steps {config.n_obs_steps})"
        )
    return found


def guided(predict: Predict, plan: Plan, target: JoinTarget, max_weight: float, cheap: bool) -> Predict:
    """A network whose outputs lead to chunks that agree with the target; see the module's docstring.

    If no row has a weight it is the network itself. Unless cheap it differentiates predict: make its tensors, and call
    it, where `differentiable`.
    """
    if not any(target.weights):
        return predict
    wanted = target.actions
    weights = wanted.new_tensor(target.weights).view(1, -1, 1)

    def guided_predict(x: Tensor, call: int) -> Tensor:
        level = plan.levels[call]
        with torch.set_grad_enabled(not cheap):
            x = x if cheap else x.detach().requires_grad_()
            out = predict(x, call)
            estimate = level.clean(x, out)
        clean = plan.clip(estimate.detach())
        pull = weights * (wanted - clean)
        if isinstance(plan, FlowPlan):
            change = pull if cheap else torch.autograd.grad(estimate, x, pull)[0]
            return torch.add(out.detach(), change, alpha=flow_weight(level.signal, max_weight))
        weight = min(max_weight, 1 / level.signal)
        if cheap:
            change = weight * level.signal * pull
        else:
            change = bounded(weight * torch.autograd.grad(estimate, x, pull)[0], pull, max_weight)
        change = change + weights * (clean - estimate.detach())
        return torch.add(out.detach(), change, alpha=level.over / level.of_out)

    return guided_predict


def flow_weight(t: float, max_weight: float) -> float:
    """(1 - t) / (t r^2) with r^2 = (1 - t)^2 / (t^2 + (1 - t)^2), infinite at both ends, or max_weight if less."""
    return min(max_weight, (t**2 + (1 - t) ** 2) / (t * (1 - t))) if 0 < t < 1 else max_weight


def bounded(change: Tensor, pull: Tensor, factor: float) -> Tensor:
    """change (B, T, A), shortened where it is more than factor times as long as pull."""
    length, longest = change.flatten(1).norm(dim=1), factor * pull.flatten(1).norm(dim=1)
    return change * torch.where(length > longest, longest / length, 1.0).view(-1, 1, 1)
