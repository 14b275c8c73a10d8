"""What is seen of a run: its bar or lines, metrics, TensorBoard, Weights & Biases, pictures, validation."""

import io
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from dit_policy_training.data.frames import gather, open_frames
from dit_policy_training.data.table import Table, load_table
from dit_policy_training.data.windows import Windows
from dit_policy_training.judging.opening import unit_of
from dit_policy_training.judging.predictions import predict
from dit_policy_training.loop.options import TrainConfig, ValidationConfig
from dit_policy_training.loop.pictures import curves, predicted_actions, sample_frames
from dit_policy_training.loop.policies import new_policy
from dit_policy_training.loop.progress import TrainingProgress, duration
from dit_policy_training.loop.tracking import METRICS, Tracker
from dit_policy_training.loop.validation import Validation
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dit_policy_ros.policy.modeling import MultitaskDiTPolicy


def row(step: int, **more: float) -> dict[str, float]:
    told = {"step": step, "loss": 1 / step, "lr": 1e-3, "grad_norm": 0.5, "steps_per_s": 2.0, "samples_per_s": 16.0}
    return told | {"data_share": 0.1, "seconds": step / 2} | more


@pytest.fixture(scope="module")
def table(dataset: Path) -> Table:
    return load_table(dataset)


@pytest.fixture
def windows(table: Table, config: TrainConfig) -> Windows:
    return Windows(table, config.policy.n_obs_steps, config.policy.horizon)


@pytest.fixture
def policy(config: TrainConfig, windows: Windows) -> MultitaskDiTPolicy:
    """Untrained, with an output layer that is not zero."""
    torch.manual_seed(0)
    made = new_policy(config.policy, windows)
    torch.nn.init.normal_(made.noise_predictor.output_proj.weight, std=0.1)
    return made.train()


@pytest.fixture
def no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) as TensorBoard shows them."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def next_second() -> None:
    """TensorBoard orders a run's files by the second they were begun in: a run goes on in a later one than it began."""
    begun = int(time.time())
    while int(time.time()) == begun:
        time.sleep(0.01)


def test_rows_go_to_metrics_and_tensorboard(config: TrainConfig, tmp_path: Path, no_wandb: None) -> None:
    tracker = Tracker(config, tmp_path)
    measured = {"validation_loss": 0.3, "validation_action_error": 0.2, "validation_action_error/turn": 0.1}
    rows = [row(5), row(10, **measured), {"step": 12, "seconds": 6.0, **measured}]
    for each in rows:
        tracker.log(each)
        assert [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()] == tracker.rows
    picture = np.zeros((4, 6, 3), np.uint8)
    picture[..., 2] = 200  # red, in OpenCV's order
    cv2.imwrite(str(tmp_path / "red.png"), picture)
    tracker.picture("samples", tmp_path / "red.png", 10)
    tracker.close()
    assert tracker.rows == rows
    assert scalars(tmp_path, "train/loss") == [(5, pytest.approx(0.2)), (10, pytest.approx(0.1))]
    assert scalars(tmp_path, "speed/samples_per_s") == [(5, 16.0), (10, 16.0)]
    assert scalars(tmp_path, "validation/action_error/turn") == [(10, pytest.approx(0.1)), (12, pytest.approx(0.1))]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (image,) = events.Images("samples")
    shown = cv2.imdecode(np.frombuffer(image.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(shown, picture)


def test_a_run_that_goes_on_has_each_step_once(config: TrainConfig, tmp_path: Path, no_wandb: None) -> None:
    first = Tracker(config, tmp_path)
    for step in (5, 10, 15):
        first.log(row(step))
    first.close()
    next_second()
    again = Tracker(config, tmp_path, rows=first.rows[:2])  # killed after step 15, its checkpoint is of step 10
    again.log(row(15, loss=0.5))
    again.close()
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS).read_text().splitlines()] == [5, 10, 15]
    assert scalars(tmp_path, "train/loss") == [(5, pytest.approx(0.2)), (10, pytest.approx(0.1)), (15, 0.5)]
    anew = Tracker(config, tmp_path)
    anew.log(row(5, loss=7.0))
    anew.close()
    assert (tmp_path / METRICS).read_text().count("\n") == 1
    assert scalars(tmp_path, "train/loss") == [(5, 7.0)]


def logged(path: Path) -> list[float]:
    """The losses in a file of an offline run, as wandb's own reader finds them."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store, losses = DataStore(), []
    store.open_for_scan(str(path))
    while data := store.scan_data():
        record = Record()
        record.ParseFromString(data)
        named = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        losses += [float(named[name]) for name in named if name == "train/loss"]
    return losses


@pytest.mark.timeout(300)
def test_weights_and_biases_offline_keeps_its_run(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    told: list[str] = []
    for rows in ([], [row(5)]):
        tracker = Tracker(config, tmp_path, rows=rows, say=told.append)
        tracker.log(row(5 + 5 * len(rows)))
        tracker.close()
    assert [line.startswith("Weights & Biases, to be sent by: wandb sync") for line in told] == [True, True]
    name = (tmp_path / "wandb_id.txt").read_text()
    kept = list((tmp_path / "wandb").glob(f"offline-run-*-{name}*/run-{name}.wandb"))
    assert len(kept) >= 1
    assert sorted(losses for path in kept for losses in logged(path)) == [pytest.approx(0.1), pytest.approx(0.2)]


def test_weights_and_biases_that_is_not_there_is_told_in_a_line(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)  # what an import of a package that is not installed finds
    told: list[str] = []
    tracker = Tracker(config, tmp_path, say=told.append)
    tracker.log(row(5))
    tracker.close()
    assert told == ["Weights & Biases is asked for but not installed: pip install wandb"]
    assert tracker.rows == [row(5)]


def test_an_error_of_weights_and_biases_does_not_end_a_run(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unreachable:
        """wandb as it is where its server is not, and then as it is where that goes away."""

        url, dir = "somewhere", "folder/files"
        logged = 0

        Settings = staticmethod(lambda **_: None)

        def init(self, mode: str, **_: object) -> "Unreachable":
            if mode == "online":
                raise OSError("no route to host")
            return self

        def log(self, _: object) -> None:
            Unreachable.logged += 1
            raise OSError("connection reset")

        def define_metric(self, *_: object, **__: object) -> None: ...

    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", Unreachable())
    told: list[str] = []
    tracker = Tracker(config, tmp_path, say=told.append)
    for step in (5, 10):
        tracker.log(row(step))
    tracker.close()
    assert [line for line in told if "no route to host" in line and "folder" in line]
    assert [line for line in told if "connection reset" in line and "the run goes on" in line]
    assert Unreachable.logged == 1
    assert len(tracker.rows) == 2


def test_without_a_terminal_each_row_is_a_line() -> None:
    output = io.StringIO()
    with TrainingProgress(Console(file=output, width=40), total=20, done=8) as progress:
        for _ in range(2):
            progress.advance()
        progress.row(row(10, validation_loss=0.25, validation_action_error=0.0625))
        progress.say("a picture: [not markup]")
    first, second = output.getvalue().splitlines()
    assert first.startswith("step 10/20  loss 0.1000  lr 1.0e-03  validation 0.2500  action error 0.0625  2.0 steps/s")
    assert first.endswith("left")
    assert second == "a picture: [not markup]"
    assert [duration(seconds) for seconds in (0, 59.6, 3723)] == ["0:00:00", "0:01:00", "1:02:03"]


def test_a_terminal_shows_a_bar() -> None:
    output = io.StringIO()
    with TrainingProgress(Console(file=output, force_terminal=True, width=150), total=20) as progress:
        progress.advance(10)
        progress.row(row(10))
    shown = output.getvalue()
    for expected in ("training", "10/20", "loss 0.1000", "16 samples/s", "left"):
        assert expected in shown


def test_validation_is_the_same_however_it_is_divided(
    config: TrainConfig, policy: MultitaskDiTPolicy, table: Table, windows: Windows
) -> None:
    """And equals the mean over the unpadded steps, by hand; the policy and torch's random numbers are left alone."""
    frames = open_frames(table)
    rows = np.flatnonzero(table.episode_start == table.episode_start[-1])
    config = replace(config, validation=ValidationConfig(samples=11))
    before = torch.get_rng_state()
    validation = Validation(table, windows, frames, rows, config)
    found = validation.measure(policy)
    assert policy.training
    assert torch.equal(torch.get_rng_state(), before)
    assert validation.measure(policy) == found
    small = Validation(table, windows, frames, rows, replace(config, batch_size=3)).measure(policy)
    assert small == pytest.approx(found, rel=1e-5)

    assert len(validation.rows) == 11
    assert {rows[0], rows[-1]} <= set(validation.rows) <= set(rows)
    batch = gather(windows, frames, validation.rows)
    keep = ~batch["action_is_pad"][:, 1:].numpy()
    predicted = predict(policy, windows, frames, validation.rows, seed=config.seed).predicted
    errors = np.abs(predicted - batch["action"][:, 1:].numpy())[keep]
    assert found["validation_action_error"] == pytest.approx(errors.mean(), rel=1e-5)
    assert found["validation_action_error/turn"] == pytest.approx(errors[:, 0].mean(), rel=1e-5)
    assert found["validation_action_error/lift"] == pytest.approx(errors[:, 1].mean(), rel=1e-5)
    with pytest.raises(ValueError, match="no episode is held out"):
        Validation(table, windows, frames, rows[:0], config)


def test_pictures_are_drawn(
    config: TrainConfig, policy: MultitaskDiTPolicy, table: Table, windows: Windows, tmp_path: Path
) -> None:
    frames = open_frames(table)
    rows = np.arange(0, len(table), 9)
    before = torch.get_rng_state()
    sample_frames(policy, gather(windows, frames, rows), tmp_path / "samples.png")
    assert torch.equal(torch.get_rng_state(), before)
    predicted_actions(predict(policy, windows, frames, rows), table, tmp_path / "predictions.png")
    for name in ("samples", "predictions"):
        assert is_drawn(tmp_path / f"{name}.png")


@pytest.mark.parametrize(
    "rows",
    [
        [row(5)],
        [{"step": 5, "validation_loss": 0.3, "validation_action_error": 0.1, "seconds": 1.0}],
        [
            row(step, **({"validation_loss": 0.3, "validation_action_error": 0.1} if step % 3 == 0 else {}))
            for step in range(1, 60)
        ],
        [row(5, loss=0.0, grad_norm=0.0), row(6)],
    ],
    ids=["one", "measured_only", "many", "zeros"],
)
def test_curves_of_any_rows_are_drawn(rows: list[dict[str, float]], tmp_path: Path) -> None:
    curves(rows, tmp_path / "curves.png")
    assert is_drawn(tmp_path / "curves.png")


def texts_drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled with all texts of the figures that are written from now on."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    found: list[str] = []
    save = Figure.savefig

    def saved(figure: Figure, *args: object, **options: object) -> None:
        found.extend(text.get_text() for text in figure.findobj(Text))
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    return found


def test_pictures_say_units_and_places(
    policy: MultitaskDiTPolicy, table: Table, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = table.episode_starts[[0, 2]] + 3
    texts = texts_drawn(monkeypatch)
    predicted_actions(predict(policy, windows, open_frames(table), rows), table, tmp_path / "predictions.png")
    places = [text.splitlines()[:2] for text in texts if text.startswith("episode")]
    assert places == [["episode 0", "frame 3"], ["episode 2", "frame 3"]]
    assert [text for text in texts if text.startswith("held-out moments, in rad:")]
    assert "s from now" in texts
    texts.clear()
    measured = {"step": 5, "validation_loss": 0.3, "validation_action_error": 0.1, "seconds": 1.0}
    curves([measured], tmp_path / "curves.png", unit_of(table.embodiment))
    assert "action error (rad)" in texts
    curves([measured], tmp_path / "curves.png")
    assert "action error (units of the dataset)" in texts


def test_no_legend_covers_a_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    overlaps: list[bool] = []

    def looked_at(figure: Figure, *_: object, **__: object) -> None:
        figure.canvas.draw()
        for axes in figure.axes:
            if axes.get_legend() is not None:
                overlaps.append(axes.get_legend().get_window_extent().overlaps(axes.get_window_extent()))

    monkeypatch.setattr(Figure, "savefig", looked_at)
    curves([row(step, validation_loss=1.0, validation_action_error=1.0) for step in range(1, 9)], tmp_path / "x.png")
    assert overlaps == [False] * 3


def test_no_rows_are_no_curves(tmp_path: Path) -> None:
    curves([], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_samples_are_what_the_encoder_is_given(
    config: TrainConfig, table: Table, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut, not squeezed: a picture drawn has the encoder's size, and each sample its own window."""
    vision = replace(config.policy.observation_encoder.vision, resize_shape=(24, 24), crop_shape=(16, 16))
    encoder = replace(config.policy.observation_encoder, vision=vision)
    made = new_policy(replace(config.policy, observation_encoder=encoder), windows)
    drawn: list[np.ndarray] = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda axes, picture, **_: drawn.append(picture))
    same = np.full(4, 20)
    sample_frames(made.eval(), gather(windows, open_frames(table), same), tmp_path / "samples.png")
    seen = [picture for picture in drawn if picture.shape == (16, 16, 3)]
    assert len(seen) == 8
    assert all(0 <= picture.min() <= picture.max() <= 1 for picture in seen)
    assert any(not np.array_equal(seen[0], other) for other in seen[1:4])
    assert not made.training


def is_drawn(path: Path) -> bool:
    picture = cv2.imread(str(path))
    return picture is not None and len(np.unique(picture)) > 20
