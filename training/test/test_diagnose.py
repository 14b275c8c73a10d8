"""A policy made deaf, blind, numb or idle is found out, and one that is none of it is not accused.

The task: a point drives to the red or to the blue square, whichever it is told. The camera shows the squares, one left
and one right, and not the point; the state is the point's place. So words, picture and state are all needed.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from dit_policy_training import diagnose as program
from dit_policy_training.data.frames import gather, open_frames
from dit_policy_training.data.table import Table, load_table
from dit_policy_training.data.windows import Windows
from dit_policy_training.diagnose import DiagnoseConfig
from dit_policy_training.judging.colours import legible_on
from dit_policy_training.judging.diagnosis import Diagnosis, amount_of_work, diagnose
from dit_policy_training.judging.findings import Finding, findings
from dit_policy_training.judging.idling import idling
from dit_policy_training.judging.instructions import closest_pairs
from dit_policy_training.judging.listening import AS_RECORDED, NO_STATE, OTHER_NOISE, Answer, listen
from dit_policy_training.judging.opening import MILLIRADIANS, Subject
from dit_policy_training.judging.predictions import Predictions
from dit_policy_training.loop.policies import new_policy
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from rich.console import Console

from dit_policy_ros.policy.checkpoint import save_checkpoint
from dit_policy_ros.policy.configuration import (
    STATE,
    ClipTextConfig,
    FlowMatchingConfig,
    ObservationEncoderConfig,
    PolicyConfig,
    ResNetConfig,
    TransformerConfig,
)
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.tiny_clip import make_tiny_clip

TASKS = ["drive to the red square", "drive to the blue square"]
COLOURS = [(220, 30, 30), (30, 60, 220)]
ROBOT = """
name: point
fps: 10
instruction: {topic: instruction}
cameras:
  above: {topic: above/image_raw, transport: raw, width: 16, height: 16, max_age: 0.3}
max_camera_skew: 0.3
state: {topic: joint_states, joints: [x], max_age: 0.2}
action_groups:
  arm:
    topic: arm_controller/joint_trajectory
    interface: trajectory
    joints:
      x: {position: [-3, 3], velocity: 2.0, acceleration: 10.0}
"""
EPISODES, FRAMES, SPEED = 40, 10, 0.08
FEATURES = {
    "observation.state": {"dtype": "float32", "shape": (1,), "names": ["x"]},
    "observation.images.above": {"dtype": "image", "shape": (16, 16, 3), "names": ["height", "width", "channels"]},
    "action": {"dtype": "float32", "shape": (1,), "names": ["x"]},
}


def scene(places: list[float], rng: np.random.Generator) -> np.ndarray:
    """16 x 16 RGB: two squares, at x from -1 to 1."""
    picture = np.full((16, 16, 3), 110, np.uint8)
    for place, colour in zip(places, COLOURS, strict=True):
        left, top = round(7 + 5 * place), int(rng.integers(3, 10))
        picture[top : top + 4, left - 1 : left + 3] = colour
    return picture


@pytest.fixture(scope="module")
def driving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the episodes to either square, either on either side."""
    root = tmp_path_factory.mktemp("driving") / "dataset"
    written = LeRobotDataset.create("toy/driving", fps=10, features=FEATURES, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    for episode in range(EPISODES):
        task, side = episode % 2, 1 if episode // 2 % 2 else -1
        places = [side * rng.uniform(0.7, 1), -side * rng.uniform(0.7, 1)]
        picture, x = scene(places, rng), rng.uniform(-0.3, 0.3)
        for _ in range(FRAMES):
            then = x + np.sign(places[task]) * SPEED
            frame = {"observation.state": np.float32([x]), "action": np.float32([then])}
            written.add_frame(frame | {"observation.images.above": picture, "task": TASKS[task]})
            x = then
        written.save_episode()
    written.finalize()
    return root


@pytest.fixture(scope="module")
def table(driving: Path) -> Table:
    return load_table(driving)


@pytest.fixture(scope="module")
def sound(table: Table, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A policy that has learned all of it."""
    text = tmp_path_factory.mktemp("text")
    make_tiny_clip(text, TASKS, hidden_size=16, num_layers=1)
    vision = ResNetConfig(
        resize_shape=(16, 16), random_shift=0, stem_channels=16, stem_kernel=3, stem_stride=2, widths=(16,),
        num_keypoints=8, norm_groups=4,
    )  # fmt: skip
    config = PolicyConfig(
        n_obs_steps=1,
        horizon=4,
        n_action_steps=4,
        observation_encoder=ObservationEncoderConfig(vision, ClipTextConfig(str(text))),
        transformer=TransformerConfig(hidden_dim=32, num_layers=2, num_heads=2, timestep_embed_dim=16, dropout=0.0),
        objective=FlowMatchingConfig(denoising_steps=4),
    )
    torch.manual_seed(0)
    windows = Windows(table, 1, 4)
    policy, frames = new_policy(config, windows).train(), open_frames(table)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    for _ in range(400):
        optimizer.zero_grad()
        policy.loss(gather(windows, frames, rng.integers(len(table), size=32))).backward()
        optimizer.step()
    return Subject(Path("made"), policy.eval(), table, frames, None)


def diagnosed(subject: Subject) -> tuple[Diagnosis, list[Finding]]:
    found = diagnose(subject, seconds=0.5, samples=40)
    return found, findings(found, subject.policy.config)


@pytest.fixture(scope="module")
def sound_diagnosis(sound: Subject) -> Diagnosis:
    return diagnosed(sound)[0]


def problems(found: list[Finding]) -> set[str]:
    return {finding.kind for finding in found if finding.severity == "problem"}


def test_a_sound_policy_is_not_accused(sound: Subject, sound_diagnosis: Diagnosis) -> None:
    found = findings(sound_diagnosis, sound.policy.config)
    assert problems(found) == set()
    asked = [answer.asked for answer in sound_diagnosis.answers]
    assert asked == [AS_RECORDED, OTHER_NOISE, "another instruction (1)", "no instruction", "above blank", NO_STATE]
    assert sound_diagnosis.answers[0].change == 0
    assert sound_diagnosis.answers[1].times_noise == 1
    assert sound_diagnosis.standing_still == pytest.approx(SPEED * np.mean([1, 2, 3, 4]), rel=0.2)
    assert [(task.task, task.episodes, task.frames) for task in sound_diagnosis.tasks] == [
        (task, EPISODES // 2, EPISODES // 2 * FRAMES) for task in TASKS
    ]


def deaf(policy: MultitaskDiTPolicy) -> None:
    policy.observation_encoder.text_encoder.projection.weight.zero_()


def blind(policy: MultitaskDiTPolicy) -> None:
    policy.observation_encoder.vision_encoders[0].keypoint_maps.weight.zero_()


def numb(policy: MultitaskDiTPolicy) -> None:
    policy.state_normalizer.inverse_scale.zero_()


def short(policy: MultitaskDiTPolicy) -> None:
    """0.3 of the way from where the point is to where it would go; actions and state are places."""
    undo = policy.action_normalizer.undo
    policy.action_normalizer.undo = lambda chunk: 0.3 * undo(chunk)
    policy.action_origin = lambda batch: 0.7 * batch[STATE][:, -1:]


def idle(policy: MultitaskDiTPolicy) -> None:
    policy.action_normalizer.scale.zero_()


ILLS: dict[str, Callable[[MultitaskDiTPolicy], None]] = {"deaf": deaf, "blind": blind, "numb": numb, "idles": idle}


@pytest.mark.parametrize("kind", ILLS)
def test_what_is_wrong_with_a_policy_is_found(sound: Subject, kind: str) -> None:
    policy = copy.deepcopy(sound.policy)
    with torch.no_grad():
        ILLS[kind](policy)
    diagnosis, found = diagnosed(replace(sound, policy=policy))
    assert kind in problems(found)
    if kind != "idles":  # what does not move attends to nothing; and who knows not where to go may well stay
        assert not problems(found) & ({"deaf", "blind", "numb"} - {kind})
    finding = next(each for each in found if each.kind == kind)
    if kind == "deaf":
        answer = diagnosis.answer("another instruction (1)")
        assert answer is not None
        assert (answer.change, answer.error) == (0, diagnosis.answers[0].error)
        assert "one and the same vector" in finding.found
        assert "instruction_dropout" in finding.advice
    if kind == "idles":
        assert (diagnosis.idling.predicted, diagnosis.idling.recorded, diagnosis.idling.stuck) == (1, 0, 1)


def test_a_policy_that_goes_part_of_the_way_is_found(sound: Subject, sound_diagnosis: Diagnosis) -> None:
    policy = copy.deepcopy(sound.policy)
    short(policy)
    diagnosis, found = diagnosed(replace(sound, policy=policy))
    assert "falls_short" in problems(found)
    assert sound_diagnosis.idling.way == pytest.approx(1, abs=0.2)
    assert diagnosis.idling.way == pytest.approx(0.3 * sound_diagnosis.idling.way, rel=0.02)


def test_a_policy_that_hears_less_than_noise_is_told_so(sound: Subject, sound_diagnosis: Diagnosis) -> None:
    """0.65 and 0.4 times what other noise does, as was measured of the demo's with a quarter of its text projection."""
    said = {}
    for early, late in ((0.65, 0.4), (1.1, 0.4), (0.4, 0.3)):
        diagnosis = replace(
            sound_diagnosis,
            answers=with_times(sound_diagnosis.answers, "another", early),
            whole=with_times(sound_diagnosis.whole, "another", late),
        )
        said[early] = {each.kind: each for each in findings(diagnosis, sound.policy.config)}
    assert list(said[0.65]) == ["hears_weakly"]
    assert said[0.65]["hears_weakly"].severity == "note"
    assert "by 0.7 times what other noise does, over whole episodes by 0.4 times" in said[0.65]["hears_weakly"].found
    assert "instruction_dropout" in said[0.65]["hears_weakly"].advice
    assert said[1.1] == {}
    assert list(said[0.4]) == ["deaf"]


def with_times(answers: list[Answer], asked: str, times_noise: float) -> list[Answer]:
    return [replace(one, times_noise=times_noise) if one.asked.startswith(asked) else one for one in answers]


def test_not_all_cameras_are_advised_away(sound: Subject, sound_diagnosis: Diagnosis) -> None:
    """Two that show the same: either can be blanked, not both."""
    config = sound.policy.config
    feature = config.input_features["observation.images.above"]
    config = replace(config, input_features={**config.input_features, "observation.images.side": feature})

    def seen(above: float, side: float, both: float) -> list[Finding]:
        found = []
        for answers in (sound_diagnosis.answers, sound_diagnosis.whole):
            (blank,) = [one for one in answers if one.asked == "above blank"]
            others = [one for one in answers if one is not blank]
            times = {"above blank": above, "side blank": side, "all cameras blank": both}
            found.append([*others, *(replace(blank, asked=asked, times_noise=times[asked]) for asked in times)])
        return findings(replace(sound_diagnosis, answers=found[0], whole=found[1]), config)

    (alike,) = seen(0.1, 0.2, 5.0)
    assert alike.kind == "cameras_alike"
    assert "one of them could go" in alike.advice
    assert [each.kind for each in seen(5.0, 0.2, 5.0)] == ["camera_unused"]
    assert [each.kind for each in seen(0.1, 0.2, 0.3)] == ["blind"]


def test_relative_actions_do_not_pass_for_a_felt_state(sound: Subject, table: Table) -> None:
    """They are relative to the state whatever the policy makes of it: what counts is how far the robot is to go."""
    windows = Windows(table, 1, 4)
    policy = new_policy(replace(sound.policy.config, action_mode="relative"), windows).eval()
    with torch.no_grad():
        torch.nn.init.normal_(policy.noise_predictor.output_proj.weight, std=0.1)
        numb(policy)
    answers, _ = listen(policy, windows, sound.frames, np.arange(0, len(table), 20))
    (without,) = [answer for answer in answers if answer.asked == NO_STATE]
    assert without.change == pytest.approx(0, abs=1e-6)
    assert without.error == pytest.approx(answers[0].error, abs=1e-6)


def test_wrong_labels_are_found(sound: Subject, table: Table) -> None:
    """Half of the episodes say the other task: the policy hears, and is told the wrong thing as often as the right."""
    swapped = np.where(table.episode_start // FRAMES % 4 < 2, table.task_index, 1 - table.task_index)
    _, found = diagnosed(replace(sound, table=replace(table, task_index=swapped)))
    assert "unheeded" in problems(found)


def test_idling_is_counted_as_it_is_defined(table: Table) -> None:
    """By hand: 40 episodes of 10 frames, of which the first ten stand still for their first four frames."""
    action = table.action.copy()
    row = np.arange(len(table))
    still = (row < 10 * FRAMES) & (row - table.episode_start < 4)
    action[still] = action[table.episode_start[still] + 4]  # so that five actions are one
    windows = Windows(replace(table, action=action), 1, 4)
    commanded, is_pad = windows.commanded(row)
    recorded = action[commanded]
    predicted = recorded.copy()
    predicted[row % 2 == 0] = 0.25  # every other moment is predicted to stand still
    found = idling(Predictions(row, predicted[:, None], recorded, is_pad, [TASKS[0]] * len(row)), windows, 4, 0.01)
    assert found.moments == EPISODES * 7  # the last three of each have steps beyond the end
    assert found.recorded == pytest.approx(10 * 2 / found.moments)  # frames 0 and 1 look at nothing but stillness
    assert found.recorded_by_tenth[:3] == [0.25, 0.25, 0.0]
    assert found.predicted_by_tenth[:3] == [1.0, 0.25, 1.0]
    assert found.recorded_by_tenth[7:] == [None, None, None]
    assert found.stuck == pytest.approx((30 + 10 * 3 + 30 * 3) / (found.moments - 20))
    assert found.idle_starts == 10
    assert found.idle_start_seconds == pytest.approx(0.2)
    assert found.idle_frames == 10 * 2 + EPISODES  # an episode's last action is followed by nothing


def test_tasks_and_words_that_speak_against_a_dataset(sound: Subject, sound_diagnosis: Diagnosis) -> None:
    red, blue = sound_diagnosis.tasks
    changed = {
        "task_rare": replace(sound_diagnosis, tasks=[replace(red, frames=20, episodes=2), blue]),
        "task_unknown": replace(sound_diagnosis, tasks=[replace(red, trained_on=False), blue]),
        "task_small": replace(sound_diagnosis, tasks=[replace(red, episodes=19), blue]),
        "task_worse": replace(sound_diagnosis, tasks=[replace(red, error=0.5), replace(blue, error=0.2)]),
        "falls_short": replace(sound_diagnosis, idling=replace(sound_diagnosis.idling, way=0.59)),
        "not_learned": replace(sound_diagnosis, error=0.9 * (sound_diagnosis.standing_still or 0)),
        "same_words": replace(
            sound_diagnosis, pairs=[replace(sound_diagnosis.pairs[0], one="Stop.", other="stop", tower=1.0)]
        ),
        "alike_words": replace(sound_diagnosis, pairs=[replace(sound_diagnosis.pairs[0], tower=0.999)]),
        "idle_data": replace(
            sound_diagnosis, idling=replace(sound_diagnosis.idling, idle_frames_share=0.3, idle_frames=120)
        ),
    }
    for kind, diagnosis in changed.items():
        assert [each.kind for each in findings(diagnosis, sound.policy.config)] == [kind]
    few = replace(red, error=0.5, moments=4)  # too few to judge by
    assert findings(replace(sound_diagnosis, tasks=[few, replace(blue, error=0.2)]), sound.policy.config) == []
    rare = findings(changed["task_rare"], sound.policy.config)[0]
    assert "has 20 frames in 2 episodes" in rare.found
    assert f"--task_weights='{{{TASKS[0]}: 4}}'" in rare.advice


def test_cosines_of_instructions_are_those_of_the_text_encoder(sound: Subject) -> None:
    encoder = sound.policy.observation_encoder.text_encoder
    (pair,) = closest_pairs(sound.policy, TASKS)
    with torch.no_grad():
        for given, vectors in ((pair.tower, encoder.pooled(TASKS)), (pair.projected, encoder(TASKS))):
            assert given == pytest.approx(torch.cosine_similarity(vectors[0], vectors[1], dim=0).item(), abs=1e-5)
    assert closest_pairs(sound.policy, TASKS[:1]) == []


def test_the_command_prints_and_writes(
    sound: Subject, driving: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "checkpoint", sound.policy, ROBOT, "card")
    arguments = ["--samples=20", "--seconds=0.5", f"--output_dir={tmp_path / 'out'}", f"--dataset_path={driving}"]
    monkeypatch.setattr("sys.argv", ["diagnose", f"--checkpoint_dir={tmp_path / 'checkpoint'}", *arguments])
    assert program.main() == 0
    said = " ".join(capsys.readouterr().out.split())
    swapped = f"another instruction (1): '{TASKS[1]}' for '{TASKS[0]}', '{TASKS[0]}' for '{TASKS[1]}'"
    for expected in ("above blank", "drive to the red square", "idle chunks", "nothing stands out", swapped):
        assert expected in said
    written = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert written["findings"] == []
    assert written["answers"][0]["asked"] == AS_RECORDED
    assert written["answers"][2]["words"] == {TASKS[0]: TASKS[1], TASKS[1]: TASKS[0]}
    picture = cv2.imread(str(tmp_path / "out" / "diagnosis.png"))
    assert len(np.unique(picture)) > 20


def test_the_picture_can_be_read(sound_diagnosis: Diagnosis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_policy_training.judging.diagnosis_picture import draw
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    idling = replace(sound_diagnosis.idling, recorded=0.0, predicted=0.0, moments=123)
    tasks = [replace(task, error=0.0123) for task in sound_diagnosis.tasks]
    draw(replace(sound_diagnosis, idling=idling, tasks=tasks, unit=MILLIRADIANS), tmp_path / "x.png")
    (figure,) = drawn
    figure.canvas.draw()
    for axes in figure.axes[:2]:
        assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert "none of 123 chunks is idle" in texts[1][0]
    assert texts[2] == [" 20 episodes, error 12.3 mrad"] * 2
    one = figure.axes[3].texts[0]
    assert one.get_text() == "1.00"
    assert one.get_color() == "white"  # on the darkest red


@pytest.mark.parametrize(("grey", "colour"), [(0.0, "white"), (0.4, "white"), (0.55, "black"), (1.0, "black")])
def test_text_on_a_cell_has_the_greater_contrast(grey: float, colour: str) -> None:
    """By WCAG: white on 0.46 grey and black on it are 4.58 to 1 each."""
    assert legible_on((grey, grey, grey, 1.0)) == colour


def test_what_cannot_be_is_refused(sound: Subject, driving: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"seconds must be positive, got 0\.0\n.*samples must be positive(.|\n)*seed must be at least 0",
    ):
        program.run(DiagnoseConfig(tmp_path, driving, seconds=0.0, samples=0, seed=-1))
    with pytest.raises(ValueError, match="no checkpoint in"):
        program.run(DiagnoseConfig(tmp_path, driving), Console(quiet=True))
    save_checkpoint(tmp_path / "checkpoint", sound.policy, ROBOT, "card")
    with pytest.raises(ValueError, match=r"does not fit the dataset .*\n.*observation\.images\.above"):
        program.run(DiagnoseConfig(tmp_path / "checkpoint", dataset), Console(quiet=True))


def test_progress_is_told_of_all_moments(sound: Subject) -> None:
    done: list[int] = []
    diagnose(sound, seconds=0.2, samples=10, advance=done.append)
    assert sum(done) == amount_of_work(sound, seconds=0.2, samples=10) == 6 * (10 + 10)
