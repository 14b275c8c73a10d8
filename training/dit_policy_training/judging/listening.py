"""What a policy attends to: its prediction asked again with another instruction, without a camera, without the state.

The loss does not tell: a policy that ignores the words, and pushes whichever block is nearest, reaches almost the same.
So the same moments are asked with the same noise and one thing altered. What the policy attends to must change the
prediction. How much is much is told by the policy itself: by what other noise alone changes, and by how far off the
prediction is as it is.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from dit_policy_ros.policy.configuration import ENVIRONMENT_STATE, STATE, TASK, NoTextConfig
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.sampling import AS_CONFIGURED, Sampling
from dit_policy_training.data.frames import Frames
from dit_policy_training.data.windows import Windows
from dit_policy_training.judging.predictions import Change, Predictions, mean_over, predict

GREY = 127  # of a blanked picture
MOST_INSTRUCTIONS = 3  # other instructions that each moment is asked with

AS_RECORDED, OTHER_NOISE, ALL_CAMERAS, NO_STATE = "as recorded", "other noise", "all cameras blank", "state blank"
OTHER_INSTRUCTION, NO_INSTRUCTION = "another instruction", "no instruction"


@dataclass(frozen=True)
class Answer:
    """Means over moments, steps and actions, in units: |predicted - recorded|, and how far the prediction moved.

    `change_share` is `change` with each action as a share of its range, so that a gripper's metres and an arm's radians
    count alike; `times_noise` is it, relative to that of other noise.
    """

    asked: str
    error: float
    change: float
    change_share: float
    times_noise: float
    words: Mapping[str, str] = field(default_factory=dict)  # asked with, by the moment's own, where others were


@dataclass(frozen=True)
class Way:
    """One way to ask."""

    asked: str
    change: Change | None = None
    sampling: Sampling = AS_CONFIGURED
    seed: int = 0  # added to the seed of the noise
    moves_origin: bool = False  # whether the state that relative actions are relative to is altered
    mean_of: tuple[str, ...] = ()  # the instructions whose mean feature takes the place of each sample's words
    words: Mapping[str, str] = field(default_factory=dict)  # other words, by the recorded ones


def listen(
    policy: MultitaskDiTPolicy,
    windows: Windows,
    frames: Frames,
    rows: np.ndarray,
    *,
    seed: int = 0,
    batch_size: int = 64,
    advance: Callable[[int], None] | None = None,
) -> tuple[list[Answer], Predictions]:
    """The answers at these rows (N,), "as recorded" and "other noise" first, and the predictions as recorded."""
    usual: Predictions | None = None
    noise = 0.0
    answers: list[Answer] = []
    for way in ways(policy, windows):
        with _words_replaced(policy, way.mean_of):
            found = predict(
                policy,
                windows,
                frames,
                rows,
                sampling=way.sampling,
                seed=seed + way.seed,
                batch_size=batch_size,
                change=way.change,
                advance=advance,
            )
        if way.moves_origin:
            found = _with_recorded_origin(found, policy, windows)
        usual = found if usual is None else usual
        answer = _answer(way.asked, found, usual, action_range(windows))
        noise = answer.change_share if way.asked == OTHER_NOISE else noise
        words = {task: way.words[task] for task in dict.fromkeys(found.tasks) if task in way.words}
        times = answer.change_share / noise if noise > 0 else float("inf")
        answers.append(replace(answer, times_noise=times, words=words))
    assert usual is not None
    return [replace(answers[0], times_noise=0.0), *answers[1:]], usual


def ways(policy: MultitaskDiTPolicy, windows: Windows) -> Iterator[Way]:
    """All that this policy can be asked with."""
    config, table = policy.config, windows.table
    yield Way(AS_RECORDED)
    yield Way(OTHER_NOISE, seed=1)
    if not isinstance(config.observation_encoder.text, NoTextConfig):
        known = list(dict.fromkeys([*table.tasks, *config.tasks]))
        count = min(len(known) - 1, MOST_INSTRUCTIONS)
        for number in range(1, count + 1):  # spread over all, whatever their order
            shift = round(number * (len(known) - 1) / count)
            words = {task: known[(place + shift) % len(known)] for place, task in enumerate(known)}
            yield Way(f"{OTHER_INSTRUCTION} ({number})", _with_words(words), words=words)
        if config.instruction_dropout > 0:
            yield Way(NO_INSTRUCTION, sampling=Sampling(guidance_scale=0.0))
        elif len(known) > 1:
            yield Way(NO_INSTRUCTION, mean_of=tuple(known))
    cameras = policy.observation_encoder.cameras
    for key in cameras:
        yield Way(camera_blank(key), _blanked(key))
    if len(cameras) > 1:
        yield Way(ALL_CAMERAS, _blanked(*cameras))
    if STATE in config.input_features:
        yield Way(NO_STATE, _averaged(STATE, table.state), moves_origin=True)
    if ENVIRONMENT_STATE in config.input_features and table.environment_state is not None:
        yield Way("environment state blank", _averaged(ENVIRONMENT_STATE, table.environment_state))


@contextmanager
def _words_replaced(policy: MultitaskDiTPolicy, known: tuple[str, ...]) -> Iterator[None]:
    """Every instruction's feature is the mean of the known ones': a policy that has not learned to act without words
    would be led anywhere by a text that is none.
    """
    encoder = policy.observation_encoder.text_encoder
    if not known or encoder is None:
        yield
        return
    with torch.inference_mode(), policy.evaluating():
        mean = encoder(known).mean(dim=0, keepdim=True)
    handle = encoder.register_forward_hook(lambda module, given, features: mean.expand_as(features))
    try:
        yield
    finally:
        handle.remove()


def camera_blank(key: str) -> str:
    """What asking without a camera is called."""
    return f"{key.removeprefix('observation.images.')} blank"


def action_range(windows: Windows) -> np.ndarray:
    """(A,) how far each action goes in the dataset; NaN for one that never changes."""
    reach = np.ptp(windows.table.action.astype(np.float64), axis=0)
    return np.where(reach > 0, reach, np.nan)


def _with_words(words: Mapping[str, str]) -> Change:
    return lambda batch: {**batch, TASK: [words[task] for task in batch[TASK]]}


def _blanked(*keys: str) -> Change:
    return lambda batch: {**batch, **{key: torch.full_like(batch[key], GREY) for key in keys}}


def _averaged(key: str, values: np.ndarray) -> Change:
    mean = torch.from_numpy(values.mean(axis=0, dtype=np.float64)).float()
    return lambda batch: {**batch, key: mean.expand_as(batch[key]).clone()}


def _with_recorded_origin(found: Predictions, policy: MultitaskDiTPolicy, windows: Windows) -> Predictions:
    """What was predicted relative to the average state, relative to the recorded one: as far as it goes, no further."""
    indices = policy.config.action_state_indices
    if policy.config.action_mode == "absolute" or indices is None:
        return found
    state = windows.table.state[:, indices].astype(np.float64)
    moved = state[found.rows] - state.mean(axis=0)
    return replace(found, samples=(found.samples + moved[:, None, None]).astype(np.float32))


def _answer(asked: str, found: Predictions, usual: Predictions, reach: np.ndarray) -> Answer:
    apart = np.abs(found.predicted.astype(np.float64) - usual.predicted)
    apart = np.where(found.is_pad[:, :, None], np.nan, apart)
    everything = (0, 1, 2)
    share = float(mean_over(apart / reach, everything))
    return Answer(asked, found.error, float(mean_over(apart, everything)), share, 0.0)
