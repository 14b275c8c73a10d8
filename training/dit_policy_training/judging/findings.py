"""What a diagnosis means in words, and which options change it.

Each threshold is stated beside its reason. Other noise and the policy's own error are the yardsticks, since no fixed
number of radians would do for an arm, a gripper and a drone.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dit_policy_ros.policy.configuration import NoTextConfig, PolicyConfig, ResNetConfig
from dit_policy_training.judging.diagnosis import Diagnosis
from dit_policy_training.judging.instructions import Task
from dit_policy_training.judging.listening import ALL_CAMERAS, NO_STATE, OTHER_INSTRUCTION, Answer, camera_blank

HEARD_NOISE = 0.5  # what changes the prediction by less than half of what other noise does is lost in that
HEARD_WELL = 1.0  # below, the choice of the noise decides more of what it does than the choice of the words
HEARD_ERROR = 0.25  # and by less than a quarter of its own error, it cannot be what the policy acts by
WORSE = 1.1  # wrong words must cost: less than a tenth more error is within what another choice of moments gives
LEANING = 0.25  # cameras that change a quarter of what the state does: the joints alone tell it what comes next
# Of the recorded way: below, a task takes 1.7 times as long, if it is ever done. A policy that knows the way goes
# nearly all of it (the demo's 0.94); one that takes the mean of two ways at right angles 0.7, of opposite ones nothing.
SHORT = 0.6
STUCK = 0.2  # at one moving moment in five no motion: every chunk of a second may end the task there
MORE_IDLE = 0.1  # beyond the data's own idleness, so that a task of waiting is not held against the policy
IDLE_DATA = 0.2  # a fifth of the frames without motion: one in five samples teaches to stay
LEARNED = 0.8  # of the error of a robot that does not move; above, the policy knows hardly more than its state
HARDER = 2.0  # times the other tasks' median error
RARE = 0.25  # of the mean number of frames a task
FEW_EPISODES = 20  # a task: below, pictures and poses vary too little to tell what matters (the demo's needs 50)
FEW_MOMENTS = 5  # of a task, too few to judge by
ALIKE = 0.995  # a cosine above leaves the words a tenth of the vectors' length (sqrt(2 (1 - 0.995)))


@dataclass(frozen=True)
class Finding:
    """Something found: a problem, which explains failures, or a note, which may be as it should."""

    kind: str
    severity: Literal["problem", "note"]
    found: str
    advice: str


def findings(diagnosis: Diagnosis, config: PolicyConfig) -> list[Finding]:
    """All that stands out, problems first; an empty list is a clean bill."""
    found = [
        *_not_learned(diagnosis),
        *_idling(diagnosis),
        *_falling_short(diagnosis),
        *_words(diagnosis, config),
        *_cameras(diagnosis, config),
        *_state(diagnosis, config),
        *_tasks(diagnosis),
        *_texts(diagnosis),
    ]
    return sorted(found, key=lambda finding: finding.severity != "problem")


def _not_learned(diagnosis: Diagnosis) -> Iterator[Finding]:
    still = diagnosis.standing_still
    if still is not None and diagnosis.error > LEARNED * still:
        yield Finding(
            "not_learned",
            "problem",
            f"its actions are off by {_told(diagnosis, diagnosis.error)}, those of a robot that does not move by "
            f"{_told(diagnosis, still)}: it has learned little",
            "look at the run's curves.png: a loss that still falls wants more --train_steps, one that is flat from the "
            "start another --optimizer.lr; if it is far better on the episodes it was trained on, more episodes",
        )


def _idling(diagnosis: Diagnosis) -> Iterator[Finding]:
    idle = diagnosis.idling
    if _idles(diagnosis):
        yield Finding(
            "idles",
            "problem",
            f"at {idle.stuck:.0%} of the moments where the recorded robot moves the predicted one does not "
            f"({idle.predicted:.0%} of all moments against {idle.recorded:.0%} in the data), most of all in "
            f"{_worst_tenth(diagnosis)}; the data has {idle.idle_frames} idle frames "
            f"({idle.idle_frames_share:.0%}), {idle.idle_starts} episodes begin idle, for "
            f"{idle.idle_start_seconds:.1f} s",
            "thin idle frames by --idle_weight=0.1, or leave them out when converting; a longer --policy.horizon and "
            "--policy.n_action_steps carry over a pause; more episodes that set out from where it stops",
        )
    elif idle.idle_frames_share > IDLE_DATA:
        yield Finding(
            "idle_data",
            "note",
            f"{idle.idle_frames_share:.0%} of the data's frames ({idle.idle_frames}) are idle; {idle.idle_starts} "
            f"episodes begin so, for {idle.idle_start_seconds:.1f} s",
            "if the policy hesitates on the robot: --idle_weight=0.1",
        )


def _idles(diagnosis: Diagnosis) -> bool:
    idle = diagnosis.idling
    return idle.stuck > STUCK and idle.predicted > idle.recorded + MORE_IDLE


def _falling_short(diagnosis: Diagnosis) -> Iterator[Finding]:
    way = diagnosis.idling.way
    if way is not None and way < SHORT and not _idles(diagnosis):
        yield Finding(
            "falls_short",
            "problem",
            f"where the recorded robot moves, the predicted one goes {way:.0%} of the way",
            "are the data's actions positions, in the state's units and in time with it? Otherwise it is not sure of "
            "the way, and goes the mean of several: more --train_steps or episodes, and see what else is found here",
        )


def _worst_tenth(diagnosis: Diagnosis) -> str:
    idle = diagnosis.idling
    more = [
        -1.0 if ours is None or theirs is None else ours - theirs
        for ours, theirs in zip(idle.predicted_by_tenth, idle.recorded_by_tenth, strict=True)
    ]
    tenth = int(np.argmax(more))
    return f"the {10 * tenth} to {10 * (tenth + 1)} % of an episode"


def _words(diagnosis: Diagnosis, config: PolicyConfig) -> Iterator[Finding]:
    early, late = (_others(answers) for answers in (diagnosis.answers, diagnosis.whole))
    if early is None or late is None:
        if isinstance(config.observation_encoder.text, NoTextConfig) and len(diagnosis.tasks) > 1:
            yield Finding(
                "no_words",
                "problem",
                f"the policy reads no instructions, and the data has {len(diagnosis.tasks)} of them",
                "--policy.observation_encoder.text.type=clip, or a policy a task",
            )
        return
    if not any(_matters(answer, error) for answer, error in ((early, _error(diagnosis)), (late, diagnosis.error))):
        told = (
            ""
            if not diagnosis.pairs or min(p.projected for p in diagnosis.pairs) < ALIKE
            else ("; after the text projection all instructions are one and the same vector")
        )
        yield Finding(
            "deaf",
            "problem",
            f"it does not listen: another instruction changes the prediction by {_told(diagnosis, early.change)}, "
            f"{early.times_noise:.1f} times what other noise does{told}",
            _words_advice(config),
        )
        return
    if early.times_noise < HEARD_WELL and late.times_noise < HEARD_WELL:
        yield Finding(
            "hears_weakly",
            "note",
            f"the words weigh little: another instruction changes the prediction by {early.times_noise:.1f} times what "
            f"other noise does, over whole episodes by {late.times_noise:.1f} times",
            _words_advice(config),
        )
    if early.error < WORSE * _error(diagnosis) and late.error < WORSE * diagnosis.error:
        yield Finding(
            "unheeded",
            "problem",
            f"it hears, but wrong words cost nothing: error {_told(diagnosis, early.error)} with another instruction, "
            f"{_told(diagnosis, _error(diagnosis))} with the right one",
            "the tasks' motions may be alike in these episodes (then nothing is wrong), or labels are mixed up: look "
            "at some episodes of each task by python -m dit_policy_training.inference",
        )


def _others(answers: list[Answer]) -> Answer | None:
    """The mean of what other instructions do."""
    found = [answer for answer in answers if answer.asked.startswith(OTHER_INSTRUCTION)]
    if not found:
        return None
    names = ("error", "change", "change_share", "times_noise")
    error, change, share, times = (float(np.mean([getattr(one, name) for one in found])) for name in names)
    return Answer(OTHER_INSTRUCTION, error, change, share, times)


def _words_advice(config: PolicyConfig) -> str:
    return (
        f"{_words_in_vision(config)}; {_guidance(config)}; --balance_tasks if one task outweighs; more episodes in "
        "which the same scene is shown with each instruction, or the pictures alone tell the task"
    )


def _words_in_vision(config: PolicyConfig) -> str:
    vision = config.observation_encoder.vision
    if vision.is_modulated_by_text:
        return "train longer or with a higher --optimizer.lr, since words reach the pictures already"
    if isinstance(vision, ResNetConfig):
        return "words in the vision encoder: --policy.observation_encoder.vision.film=true"
    return "words in the vision encoder: --policy.observation_encoder.vision.text_pooling=true"


def _guidance(config: PolicyConfig) -> str:
    if config.instruction_dropout > 0:
        return (
            f"a guidance_scale above the present {config.guidance_scale:g}, which needs no training: tune "
            "--guidance_scale='[1, 1.5, 2, 3]' tries some"
        )
    return "--policy.instruction_dropout=0.1, then a guidance_scale of 1.5 to 3 when it runs"


def _cameras(diagnosis: Diagnosis, config: PolicyConfig) -> Iterator[Finding]:
    names = [camera_blank(key) for key in config.cameras]
    if not names:
        return
    together = _without_pictures(config)
    if not _answer_matters(diagnosis, together):
        yield Finding(
            "blind",
            "problem",
            f"it does not look: without any picture the prediction changes by {_change(diagnosis, together)}",
            "a higher --policy.observation_encoder.vision.lr_multiplier, larger pictures (resize_shape), and "
            "--policy.state_noise=0.05, since a policy that knows its joints exactly can do without looking; are the "
            "pictures sharp, and is what matters in them?",
        )
        return
    unused = [name for name in names if len(names) > 1 and not _answer_matters(diagnosis, name)]
    if unused == names:
        yield _cameras_alike(diagnosis, names, together)
        return
    for name in unused:
        yield Finding(
            "camera_unused",
            "note",
            f"{name.removesuffix(' blank')} hardly matters: blanked it changes the prediction by "
            f"{_change(diagnosis, name)}",
            "leave it out, which makes every step cheaper (of several one at a time: they may show the same), or see "
            "whether it shows what the task needs",
        )


def _cameras_alike(diagnosis: Diagnosis, names: list[str], together: str) -> Finding:
    each = ", ".join(f"{name.removesuffix(' blank')} by {_change(diagnosis, name)}" for name in names)
    return Finding(
        "cameras_alike",
        "note",
        f"the cameras may show the same: blanked alone, none changes the prediction much ({each}), all together by "
        f"{_change(diagnosis, together)}",
        "one of them could go, which makes every step cheaper; never all",
    )


def _state(diagnosis: Diagnosis, config: PolicyConfig) -> Iterator[Finding]:
    state = diagnosis.answer(NO_STATE)
    if state is None:
        return
    if not _answer_matters(diagnosis, NO_STATE):
        is_relative = config.action_mode == "relative"
        yield Finding(
            "numb",
            "note" if is_relative else "problem",
            f"it does not feel: with the mean state the prediction changes by {_change(diagnosis, NO_STATE)}",
            "as it may be with --policy.action_mode=relative"
            if is_relative
            else "lower --policy.state_noise; are the state's values those of the moment, and not constant?",
        )
    pictures = _without_pictures(config)
    seen, felt = ([_of(answers, asked) for answers in _both(diagnosis)] for asked in (pictures, NO_STATE))
    leans = all(a and b and a.change_share < LEANING * b.change_share for a, b in zip(seen, felt, strict=True))
    if leans and _answer_matters(diagnosis, pictures):
        yield Finding(
            "leans_on_state",
            "problem",
            f"it acts by its joints, hardly by what it sees: blank pictures change the prediction by "
            f"{_change(diagnosis, pictures)}, the mean state by {_change(diagnosis, NO_STATE)}",
            "--policy.state_noise=0.05 to 0.1, --policy.n_obs_steps=1 (a history invites to copy the past), "
            "--policy.action_mode=relative",
        )


def _without_pictures(config: PolicyConfig) -> str:
    """What is asked where no camera shows anything; empty without cameras."""
    names = [camera_blank(key) for key in config.cameras]
    return ALL_CAMERAS if len(names) > 1 else "".join(names)


def _tasks(diagnosis: Diagnosis) -> Iterator[Finding]:
    tasks = diagnosis.tasks
    mean = float(np.mean([task.frames for task in tasks]))
    for task in tasks:
        if not task.trained_on:
            yield Finding(
                "task_unknown",
                "note",
                f"{task.task!r} is not among the instructions that the checkpoint was trained on",
                "expect little of it, or --finetune with episodes of it",
            )
        if task.frames < RARE * mean:
            yield Finding(
                "task_rare",
                "problem",
                f"{task.task!r} has {task.frames} frames in {task.episodes} episodes, the mean of a task is {mean:.0f}",
                f"--balance_tasks, or --task_weights='{{{task.task}: 4}}'; better, more episodes of it",
            )
        elif task.episodes < FEW_EPISODES:
            yield Finding(
                "task_small",
                "note",
                f"{task.task!r} has {task.episodes} episodes",
                f"record more of it, {FEW_EPISODES} at the very least; 50 and more are usual",
            )
    judged = [(task, task.error) for task in tasks if task.error is not None and task.moments >= FEW_MOMENTS]
    for task, error in judged:
        others = [theirs for other, theirs in judged if other is not task]
        if others and error > HARDER * float(np.median(others)):
            yield _harder(diagnosis, task, error, float(np.median(others)))


def _harder(diagnosis: Diagnosis, task: Task, error: float, usual: float) -> Finding:
    return Finding(
        "task_worse",
        "note",
        f"{task.task!r} is predicted worse than the others: error {_told(diagnosis, error)} against "
        f"{_told(diagnosis, usual)}",
        f"--task_weights='{{{task.task}: 2}}', or more episodes of it; if its motions are larger, it may be right so",
    )


def _texts(diagnosis: Diagnosis) -> Iterator[Finding]:
    for pair in diagnosis.pairs:
        if _plain(pair.one) == _plain(pair.other):
            yield Finding(
                "same_words",
                "problem",
                f"{pair.one!r} and {pair.other!r} are two tasks with the same words",
                "write one of them in all episodes (meta/tasks.parquet; merge and convert unite equal texts)",
            )
        elif pair.tower > ALIKE:
            yield Finding(
                "alike_words",
                "note",
                f"the text encoder hardly tells {pair.one!r} from {pair.other!r} (cosine {pair.tower:.4f})",
                "say the tasks in words that differ more: other verbs and nouns, the difference early in the sentence",
            )


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _matters(answer: Answer, error: float) -> bool:
    return answer.times_noise >= HEARD_NOISE and answer.change >= HEARD_ERROR * error


def _answer_matters(diagnosis: Diagnosis, asked: str) -> bool:
    """Whether what was taken away there changes the prediction, in the first seconds or over whole episodes."""
    found = ((_of(answers, asked), answers[0].error) for answers in _both(diagnosis))
    return any(answer is not None and _matters(answer, error) for answer, error in found)


def _change(diagnosis: Diagnosis, asked: str) -> str:
    answer = diagnosis.answer(asked)
    if answer is None:
        return "nothing"
    return f"{_told(diagnosis, answer.change)} ({answer.times_noise:.1f} times other noise)"


def _told(diagnosis: Diagnosis, distance: float) -> str:
    return f"{diagnosis.unit.of(distance)} {diagnosis.unit.name}"


def _both(diagnosis: Diagnosis) -> tuple[list[Answer], list[Answer]]:
    return diagnosis.answers, diagnosis.whole


def _error(diagnosis: Diagnosis) -> float:
    """As recorded, in the first seconds."""
    return diagnosis.answers[0].error


def _of(answers: list[Answer], asked: str) -> Answer | None:
    return next((answer for answer in answers if answer.asked == asked), None)
