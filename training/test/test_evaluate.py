"""Evaluation of policies on the toy robot's dataset: figures against formulas, reports, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dit_policy_training.data.frames import gather
from dit_policy_training.data.table import Table, load_table
from dit_policy_training.evaluate import EvaluateConfig, run
from dit_policy_training.inference import InferenceConfig, draw, infer
from dit_policy_training.inference import run as show
from dit_policy_training.judging.evaluation import STILL, Choice, evaluate, figures
from dit_policy_training.judging.opening import Subject, checkpoint_in, checkpoints_in, open_subject
from dit_policy_training.judging.predictions import predict, row_noise
from dit_policy_training.judging.rollouts import ClosedLoopError, in_simulated_time
from judged import toy_checkpoint
from PIL import Image
from rich.console import Console

from dit_policy_ros.policy.checkpoint import load_config
from dit_policy_ros.policy.configuration import ACTION, TASK
from dit_policy_ros.policy.interop.form import embodiment_form
from dit_policy_ros.policy.sampling import Sampling

QUIET = Console(quiet=True)


@pytest.fixture(scope="session")
def checkpoint(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(dataset, tmp_path_factory.mktemp("judged") / "000001")


@pytest.fixture(scope="session")
def diffusion_checkpoint(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(dataset, tmp_path_factory.mktemp("judged") / "diffusion", objective="diffusion")


@pytest.fixture(scope="session")
def table(dataset: Path) -> Table:
    return load_table(dataset)


@pytest.fixture(scope="session")
def subject(checkpoint: Path, table: Table) -> Subject:
    return open_subject(checkpoint, table, "cpu")


class TestPredictions:
    def test_are_the_policys_own_chunks_beside_what_was_recorded(self, subject: Subject, table: Table) -> None:
        rows = np.array([0, 5, len(table) - 1])
        found = predict(subject.policy, subject.windows, subject.frames, rows, seed=3)
        batch = gather(subject.windows, subject.frames, rows)
        noise = row_noise(rows, 3, 1, (1, 8, 2))[0]
        np.testing.assert_allclose(found.predicted, subject.policy.predict_chunk(batch, noise=noise), atol=1e-6)
        np.testing.assert_array_equal(found.recorded, batch[ACTION][:, 1:])
        assert found.is_pad[-1].tolist() == [False] + [True] * 6  # the last row has nothing ahead
        assert found.tasks == [table.tasks[index] for index in table.task_index[rows]]
        by_hand = np.abs(found.predicted - found.recorded)[~found.is_pad]
        assert found.error == pytest.approx(by_hand.mean())
        assert found.by_action() == pytest.approx(by_hand.mean(axis=0))
        last = ~found.is_pad[:, 6]
        assert found.by_step()[6] == pytest.approx(np.abs(found.predicted - found.recorded)[last, 6].mean())

    @pytest.mark.parametrize("kind", ["checkpoint", "diffusion_checkpoint"])
    def test_of_a_moment_depend_on_nothing_but_seed_and_moment(
        self, kind: str, table: Table, request: pytest.FixtureRequest
    ) -> None:
        subject = open_subject(request.getfixturevalue(kind), table, "cpu")
        sampler = Sampling("ddpm", 3) if kind == "diffusion_checkpoint" else Sampling()  # ddpm draws at every step
        options = {"sampling": sampler, "seed": 1}
        rows = np.arange(2, 12)
        every = predict(subject.policy, subject.windows, subject.frames, rows, **options)
        some = predict(subject.policy, subject.windows, subject.frames, rows[[7, 3]], batch_size=1, **options)
        np.testing.assert_allclose(some.predicted, every.predicted[[7, 3]], atol=1e-5)
        several = predict(subject.policy, subject.windows, subject.frames, rows[:2], samples=3, **options)
        np.testing.assert_allclose(several.predicted, every.predicted[:2], atol=1e-5)
        assert several.spread()[~several.is_pad].mean() > 1e-3
        other = predict(subject.policy, subject.windows, subject.frames, rows, **(options | {"seed": 2}))
        assert np.abs(other.predicted - every.predicted).max() > 1e-3
        noise = row_noise(rows[:2], 1, 2, (1, 8, 2))[0].flatten(1)
        assert torch.corrcoef(noise).fill_diagonal_(0.0).abs().max() < 0.9  # of moments and samples, each its own

    def test_what_is_changed_is_what_the_policy_sees_and_not_what_it_is_held_against(self, subject: Subject) -> None:
        rows = np.arange(4)
        usual = predict(subject.policy, subject.windows, subject.frames, rows)
        other = ["push the blue block"] * 4
        changed = predict(
            subject.policy, subject.windows, subject.frames, rows, change=lambda batch: batch | {TASK: other}
        )
        assert usual.tasks == changed.tasks == ["push the red block"] * 4
        assert np.abs(usual.predicted - changed.predicted).max() > 1e-4
        np.testing.assert_array_equal(usual.recorded, changed.recorded)

    def test_closest_of_samples(self, subject: Subject) -> None:
        found = predict(subject.policy, subject.windows, subject.frames, np.arange(6), samples=4)
        by_hand = [
            min(np.abs(chunk - recorded)[~pad].mean() for chunk in chunks)
            for chunks, recorded, pad in zip(found.samples, found.recorded, found.is_pad, strict=True)
        ]
        assert found.closest() == pytest.approx(by_hand)
        assert (found.closest() <= found.by_row() + 1e-12).all()


def test_figures_are_the_means_they_say(subject: Subject, table: Table) -> None:
    report = figures(evaluate(subject, Choice(samples=2, sampled_moments=5, drawn_episodes=1)))
    found = predict(subject.policy, subject.windows, subject.frames, np.arange(len(table)))
    apart, keep = np.abs(found.predicted - found.recorded), ~found.is_pad
    assert report["error"] == pytest.approx(apart[keep].mean(), rel=1e-5)
    assert report["error_executed"] == pytest.approx(apart[:, :4][keep[:, :4]].mean(), rel=1e-5)
    still = np.abs(table.state[:, None, [1, 0]] - found.recorded)[keep].mean()  # turn, lift of lift, turn, reach
    assert report["baselines"][STILL]["error"] == pytest.approx(still, rel=1e-5)
    mean = np.abs(table.action.mean(axis=0) - found.recorded)[keep].mean()
    assert report["baselines"]["mean action"]["error"] == pytest.approx(mean, rel=1e-5)
    red = np.array(found.tasks) == "push the red block"
    tasks = {task["task"]: task for task in report["tasks"]}
    assert tasks["push the red block"]["error"] == pytest.approx(apart[red][keep[red]].mean(), rel=1e-5)
    assert tasks["push the red block"]["moments"] == red.sum()
    assert tasks["push the red block"]["episodes"] == 2
    assert [one["episode"] for one in report["by_episode"]] == [0, 1, 2]
    first = table.episode_end[0]
    assert report["by_episode"][0]["error"] == pytest.approx(apart[:first][keep[:first]].mean(), rel=1e-5)
    assert report["unit"] == {"name": "mrad", "scale": 1000.0}
    json.dumps(report, allow_nan=False)


def test_a_report_says_all_of_it_and_asks_for_nothing(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(checkpoint, dataset, output_dir=tmp_path / "out", samples=2, sampled_moments=4)
    report = run(config, QUIET)
    page = (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    for said in ("push the blue block", "turn", "lift", "stands still", "Error by step", 'id="e0"', "side", "hand"):
        assert said in page
    assert page.count(">rad</text>") == 2 * (3 + 3)  # of every panel of chunks
    assert page.count("recorded<i") == 3 + 3  # and a legend below
    assert page.count('class="recorded"') == 2 * (3 + 3)  # three episodes and three moments, two actions each


def test_episodes_and_moments_are_chosen(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    common = {"samples": 2, "sampled_moments": 2, "drawn_episodes": 0, "output_dir": tmp_path}
    report = run(EvaluateConfig(checkpoint, dataset, episode=1, **common), QUIET)
    assert [one["episode"] for one in report["by_episode"]] == [1]
    assert report["settings"]["moments"] == report["by_episode"][0]["frames"]
    assert run(EvaluateConfig(checkpoint, dataset, max_samples=7, **common), QUIET)["settings"]["moments"] == 7
    with pytest.raises(ValueError, match=r"episode 3: video has episodes 0 to 2"):
        run(EvaluateConfig(checkpoint, dataset, episode=3, **common), QUIET)
    with pytest.raises(ValueError, match=r"samples must be at least 2"):
        run(EvaluateConfig(checkpoint, dataset, **(common | {"samples": 1})), QUIET)
    with pytest.raises(ValueError, match=r"(?s)cannot be sampled.*ddim"):
        run(EvaluateConfig(checkpoint, dataset, sampler="ddim", **common), QUIET)


def test_a_loop_is_closed_only_where_there_is_a_simulator(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"closed_loop=node is for policies of the simulated arm.* is of 'toy'"):
        run(EvaluateConfig(checkpoint, dataset, output_dir=tmp_path / "out", closed_loop="node"), QUIET)
    assert not (tmp_path / "out").exists()


def test_a_robot_that_nobody_has_described_is_measured_in_the_datasets_units(
    checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    """As of a dataset of the hub: no embodiment.yaml there, and with the checkpoint the form that training writes."""
    folders = (tmp_path / "data", tmp_path / "policy")
    for folder, source in zip(folders, (dataset, checkpoint), strict=True):
        folder.mkdir()
        for path in source.iterdir():
            if path.name != "embodiment.yaml":
                (folder / path.name).symlink_to(path)
    (folders[1] / "embodiment.yaml").write_text(embodiment_form(load_config(checkpoint)))
    common = {"output_dir": tmp_path / "out", "samples": 2, "sampled_moments": 2, "max_samples": 10}
    report = run(EvaluateConfig(folders[1], folders[0], **common), QUIET)
    described = run(EvaluateConfig(checkpoint, dataset, **common), QUIET)
    assert report["unit"] == {"name": "units", "scale": 1.0}
    assert report["robot"] is None
    assert (report["error"], report["by_step"]) == (described["error"], described["by_step"])
    with pytest.raises(ValueError, match="is of a robot that is not described: leave it out"):
        run(EvaluateConfig(folders[1], folders[0], closed_loop="simulated_time", **common), QUIET)


def simulated(checkpoint: Path, folder: Path) -> Path:
    """The same policy, said to be of the arm that there is a simulator of."""
    shutil.copytree(checkpoint, folder)
    text = (folder / "embodiment.yaml").read_text()
    (folder / "embodiment.yaml").write_text(text.replace("name: toy", "name: sim_arm"))
    return folder


def test_a_loop_that_fails_leaves_the_rest_and_one_that_does_not_adds_to_it(
    checkpoint: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> dict[str, object]:
        raise ClosedLoopError("the simulator fell over")

    found = {"how": "by a test", "success": 3, "episodes": 4, "wrong_block": 1, "refused": 0, "results": []}
    common = {"output_dir": tmp_path / "out", "samples": 2, "sampled_moments": 2, "max_samples": 10}
    config = EvaluateConfig(simulated(checkpoint, tmp_path / "arm"), dataset, closed_loop="simulated_time", **common)
    monkeypatch.setattr("dit_policy_training.judging.rollouts.in_simulated_time", broken)
    with pytest.raises(ClosedLoopError, match=r"(?s)all else is in .*out/report\.html.*the simulator fell over"):
        run(config, QUIET)
    kept = json.loads((tmp_path / "out/report.json").read_text())
    assert kept["settings"]["moments"] == 10
    assert "Error by step" in (tmp_path / "out/report.html").read_text()
    monkeypatch.setattr("dit_policy_training.judging.rollouts.in_simulated_time", lambda *_: found)
    assert run(config, QUIET) == kept | {"closed_loop": found}
    assert json.loads((tmp_path / "out/report.json").read_text()) == kept | {"closed_loop": found}
    assert "3 of 4" in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize(("name", "value"), [("closed_loop_episodes", 0), ("seed", -1)])
def test_a_number_that_cannot_be_is_named(
    checkpoint: Path, dataset: Path, tmp_path: Path, name: str, value: int
) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be at least \d, got {value}$"):
        run(EvaluateConfig(checkpoint, dataset, output_dir=tmp_path / "out", **{name: value}), QUIET)
    if name == "seed":
        with pytest.raises(ValueError, match=r"^seed must be at least 0, got -1$"):
            infer(open_subject(checkpoint, load_table(dataset), "cpu"), InferenceConfig(Path(), Path(), seed=-1))


@pytest.mark.timeout(300)
def test_the_simulators_report_is_taken_over_and_its_refusal_too(tmp_path: Path) -> None:
    """Of the demo's own policy, in a process of its own; this package imports no simulator."""
    demo = Path(__file__).parents[2] / "checkpoints/demo"
    report = in_simulated_time(demo, {"episodes": 1, "n_action_steps": 6})
    assert (report["episodes"], report["success"], report["refused"]) == (1, 1, 0)
    assert report["settings"]["n_action_steps"] == 6
    assert report["how"] == "in simulated time"
    with pytest.raises(ClosedLoopError, match=r"(?s)sim\.rollout ended with 1:.*a chunk of this policy has 16 steps"):
        in_simulated_time(demo, {"n_action_steps": 17})


def test_a_policy_of_another_robot_is_told_what_differs(checkpoint: Path, table: Table, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    text = (other / "embodiment.yaml").read_text()
    (other / "embodiment.yaml").write_text(text.replace("fps: 10", "fps: 20").replace("reach", "stretch"))
    with pytest.raises(ValueError, match=r"(?s)does not fit the dataset video.*fps: .*20.*10.*stretch.*reach"):
        open_subject(other, table, "cpu")
    document = json.loads((other / "config.json").read_text())
    key = "observation.images.side"
    document["input_features"]["observation.images.front"] = document["input_features"].pop(key)
    (other / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"observation\.images\.front: the policy takes .* the dataset has none"):
        open_subject(other, table, "cpu")


def test_a_run_stands_for_its_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    parent = tmp_path / "checkpoints"
    for name in ("000900", "001000", "000100"):
        shutil.copytree(checkpoint, parent / name)
    (parent / "last").symlink_to("001000")
    assert checkpoint_in(tmp_path) == parent / "last"
    assert [path.name for path in checkpoints_in(tmp_path)] == ["000100", "000900", "001000"]
    assert checkpoints_in(parent / "000900") == [parent / "000900"]
    with pytest.raises(ValueError, match=r"no checkpoint in .*empty: expected config\.json"):
        checkpoint_in(tmp_path / "empty")


class TestInference:
    def test_without_a_screen_it_draws_a_png_and_says_where(
        self, checkpoint: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("DISPLAY", "WAYLAND_DISPLAY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(tmp_path)
        console = Console(record=True, quiet=False, width=200, file=(tmp_path / "said").open("w"))
        config = InferenceConfig(checkpoint, dataset, episode=1, frame=4, instruction="push the red block")
        assert show(config, console) == 0
        said = console.export_text()
        assert "episode 1, frame 4 (0.4 s): 'push the blue block'" in said
        assert "'push the red block' changes the prediction by" in said
        assert "not trained on" not in said
        assert "drawn to outputs/inference.png" in said
        with Image.open(tmp_path / "outputs/inference.png") as picture:
            assert min(picture.size) > 300
            assert len(set(picture.convert("RGB").resize((60, 60)).getdata())) > 50

    def test_words_that_it_was_not_trained_on_are_told(self, checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
        console = Console(record=True, width=200, file=(tmp_path / "said").open("w"))
        output = tmp_path / "moment.png"
        show(InferenceConfig(checkpoint, dataset, samples=1, instruction="make coffee", output=output), console)
        said = console.export_text()
        assert "it was not trained on these words, but on: '" in said
        assert all(f"'{task}'" in said for task in ("push the blue block", "push the red block"))

    def test_a_folder_is_no_picture(self, checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=rf"output {tmp_path} is a folder; .* such as {tmp_path}/inference\.png"):
            show(InferenceConfig(checkpoint, dataset, output=tmp_path), QUIET)
        console = Console(record=True, width=200, file=(tmp_path / "said").open("w"))
        show(InferenceConfig(checkpoint, dataset, samples=1, output=tmp_path / "moment"), console)
        assert f"drawn to {tmp_path}/moment.png" in console.export_text()
        assert (tmp_path / "moment.png").is_file()

    def test_no_text_lies_on_another(self, subject: Subject) -> None:
        """The figure's title on the cameras'; and the legend's title is no larger than its text."""
        from matplotlib import pyplot
        from matplotlib.text import Text

        moment = infer(subject, InferenceConfig(Path(), Path(), episode=1, frame=4, samples=2))
        figure = draw(subject, moment)
        figure.canvas.draw()
        (title,) = [each.get_window_extent() for each in figure.findobj(Text) if "mean |predicted" in each.get_text()]
        assert not any(title.overlaps(axes.title.get_window_extent()) for axes in figure.axes)
        (legend,) = [each for part in figure.subfigs for each in part.legends]
        assert legend.get_title().get_fontsize() <= legend.get_texts()[0].get_fontsize()
        assert {axes.get_ylabel() for axes in figure.axes} == {"", "rad"}
        pyplot.close(figure)

    def test_a_moment_is_the_one_asked_for(self, subject: Subject, table: Table) -> None:
        config = InferenceConfig(Path(), Path(), episode=2, frame=3, samples=3)
        moment = infer(subject, config)
        assert moment.row == table.episode_starts[2] + 3
        assert moment.predictions.samples.shape == (1, 3, 7, 2)
        assert torch.equal(moment.batch[ACTION][0, 1:], torch.from_numpy(moment.predictions.recorded[0]))
        drawn = {infer(subject, InferenceConfig(Path(), Path(), seed=seed, samples=1)).row for seed in range(8)}
        assert len(drawn) > 4
        with pytest.raises(ValueError, match=r"frame 99: episode 2 has \d+ frames"):
            infer(subject, InferenceConfig(Path(), Path(), episode=2, frame=99))
        with pytest.raises(ValueError, match=r"episode 7: video has episodes 0 to 2"):
            infer(subject, InferenceConfig(Path(), Path(), episode=7))
