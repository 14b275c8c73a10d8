"""Tuning: what is measured, what is chosen and why, and the node's parameter file, which the node itself then reads."""

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from dit_policy_training import tune
from dit_policy_training.data.table import load_table
from dit_policy_training.judging.node_file import with_values, write_values
from dit_policy_training.judging.opening import open_subject
from dit_policy_training.judging.predictions import predict
from dit_policy_training.judging.tuning import Clock, Combination, Measured, Offline, best_of
from dit_policy_training.tune import TuneConfig, run
from judged import toy_checkpoint
from PIL import Image
from rich.console import Console

from dit_policy_ros.policy.sampling import Sampling

ROOT = Path(__file__).parents[2]
PARAMETERS = ROOT / "config/dit_policy.yaml"
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def checkpoint(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(dataset, tmp_path_factory.mktemp("tuned") / "000001")


@pytest.fixture
def config(checkpoint: Path, dataset: Path, tmp_path: Path) -> TuneConfig:
    return TuneConfig(
        checkpoint,
        dataset_path=dataset,
        denoising_steps=[1, 3],
        n_action_steps=[2, 7],
        samplers=["euler", "heun"],
        max_samples=20,
        output_dir=tmp_path / "tune",
    )


def test_offline_figures_are_those_of_the_predicted_chunks(checkpoint: Path, dataset: Path) -> None:
    table = load_table(dataset)
    subject = open_subject(checkpoint, table, "cpu")
    starts = np.array([0, 7, 40, len(table) - 1])
    found = Offline(subject, starts, seed=4).measure(Sampling("euler", 2), [2, 7])
    every = predict(
        subject.policy, subject.windows, subject.frames, np.arange(len(table)), sampling=Sampling("euler", 2), seed=4
    )
    keep = ~every.is_pad[starts, :2]
    assert found[2][0] == pytest.approx(np.abs(every.predicted - every.recorded)[starts, :2][keep].mean(), rel=1e-5)
    jumps = [np.abs(every.predicted[row, 2] - every.predicted[row + 2, 0]).mean() for row in (0, 7, 40)]
    assert found[2][1] == pytest.approx(np.mean(jumps), rel=1e-5)  # the last row has no next chunk
    gone_on = [
        np.abs(every.predicted[row, 6] + table.action[row + 7] - table.action[row + 6] - every.predicted[row + 7, 0])
        for row in (0, 7, 40)
    ]
    assert found[7][1] == pytest.approx(np.mean(gone_on), rel=1e-4)


def test_a_study_leaves_a_map_a_record_and_the_best(config: TuneConfig) -> None:
    choice = run(config, QUIET)
    document = json.loads((config.output_dir / "tune.json").read_text())
    combinations = [tuple(one["combination"].values()) for one in document["measured"]]
    assert sorted(combinations) == [(s, d, n, 1.0) for s in ("euler", "heun") for d in (1, 3) for n in (2, 7)]
    assert document["best"] == choice["best"]
    assert choice["best"] in document["measured"]
    assert document["why"].endswith(".")
    with Image.open(config.output_dir / "tune.png") as picture:
        assert min(picture.size) > 200


def test_interrupted_it_goes_on_with_what_is_left(config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str | None, int | None, list[int]]] = []
    measure = Offline.measure

    def watched(self: Offline, sampling: Sampling, executed: list[int]) -> Any:
        asked.append((sampling.sampler, sampling.denoising_steps, list(executed)))
        if len(asked) > 1 and not resumed:
            raise KeyboardInterrupt
        return measure(self, sampling, executed)

    resumed = False
    monkeypatch.setattr(Offline, "measure", watched)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        run(config, QUIET)
    document = json.loads((config.output_dir / "tune.json").read_text())
    assert len(document["measured"]) == 2
    resumed, asked[:] = True, []
    run(config, QUIET)
    assert asked == [("euler", 3, [2, 7]), ("heun", 1, [2, 7]), ("heun", 3, [2, 7])]
    asked.clear()
    run(config, QUIET)
    assert asked == []
    run(replace(config, max_samples=10), QUIET)  # another question
    assert len(asked) == 4


def test_what_will_be_measured_is_told_and_nothing_is_promised_of_what_is_not(
    config: TuneConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Offline, "measure", stopped)
    console = Console(record=True, width=400, file=(tmp_path / "said").open("w"))
    with pytest.raises(KeyboardInterrupt, match="interrupted; nothing is measured yet"):
        run(config, console)
    assert "to measure: 8 combinations, at 20 moments of the dataset" in console.export_text()


def test_offline_says_what_it_cannot_know(config: TuneConfig, tmp_path: Path) -> None:
    console = Console(record=True, width=400, file=(tmp_path / "said").open("w"))
    caution = run(replace(config, denoising_steps=[1], n_action_steps=[2], samplers=["euler"]), console)["caution"]
    assert "how soon the robot must react" in caution
    assert "few denoising steps come near to the mean" in caution
    assert caution in console.export_text()


def test_another_device_is_another_question(config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chunks take another time."""
    asked = [tune._question(replace(config, device=device), tune.prepare(config)) for device in ("cpu", "cuda")]
    assert asked[0] != asked[1]


def test_guidance_is_tried_timed_and_written(
    dataset: Path, tmp_path: Path, config: TuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[Sampling] = []

    def milliseconds(_: Clock, sampling: Sampling) -> float:
        timed.append(sampling)
        return 5.0

    monkeypatch.setattr(Clock, "milliseconds", milliseconds)
    guided = toy_checkpoint(dataset, tmp_path / "guided", instruction_dropout=0.1)
    parameters = tmp_path / "node.yaml"
    parameters.write_text(PARAMETERS.read_text())
    few = replace(config, checkpoint_dir=guided, denoising_steps=[2], n_action_steps=[4], samplers=["euler"])
    few = replace(few, parameters=parameters, guidance_scale=[3.0, 1.5])
    best = run(few, QUIET)["best"]
    measured = json.loads((few.output_dir / "tune.json").read_text())["measured"]
    assert [one["combination"]["guidance_scale"] for one in measured] == [1.5, 3.0]
    assert measured[0]["error"] != measured[1]["error"]
    assert set(timed) == {Sampling("euler", 2, 1.5), Sampling("euler", 2, 3.0)}
    written = yaml.safe_load(parameters.read_text())["/**/dit_policy"]["ros__parameters"]
    assert written["guidance_scale"] == best["combination"]["guidance_scale"]
    run(replace(few, guidance_scale=[]), QUIET)  # what stands there of before is not what is measured now
    written = yaml.safe_load(parameters.read_text())["/**/dit_policy"]["ros__parameters"]
    assert written["guidance_scale"] == 1.0
    for wrong in (0.0, 20.5):
        with pytest.raises(ValueError, match=rf"guidance_scale must be above 0 and at most 20, got \[{wrong}\]"):
            run(replace(few, guidance_scale=[wrong]), QUIET)


class TestChoice:
    FPS = 10.0

    def measured(self, n: int = 4, steps: int = 5, ms: float = 20.0, **known: Any) -> Measured:
        return Measured(Combination("euler", steps, n), ms, **known)

    def test_success_goes_before_error_and_error_before_time(self) -> None:
        often = self.measured(n=4, error=0.9, seam=0.0, episodes=20, success=20, ms=90.0)
        near = self.measured(n=5, error=0.1, seam=0.0, episodes=20, success=19, ms=1.0)
        assert best_of([near, often], self.FPS)[0] == often
        better = self.measured(n=6, error=0.5, seam=0.0, episodes=20, success=20, ms=95.0)
        chosen, why = best_of([near, often, better], self.FPS)
        assert chosen == better
        assert "2 succeed most often, 100% of 20 episodes" in why

    def test_of_what_is_alike_the_cheaper_is_taken(self) -> None:
        slow = self.measured(steps=10, error=0.100, seam=0.0, ms=40.0)
        quick = self.measured(steps=5, error=0.101, seam=0.0, ms=20.0)
        worse = self.measured(steps=1, error=0.2, seam=0.0, ms=5.0)
        chosen, why = best_of([slow, quick, worse], self.FPS)
        assert chosen == quick
        assert "quickest with 20 ms" in why
        same = [self.measured(steps=s, error=0.1, seam=0.0) for s in (10, 2)]
        assert best_of(same, self.FPS)[0].combination.denoising_steps == 2

    def test_what_takes_longer_than_it_lasts_is_not_taken(self) -> None:
        late = self.measured(n=1, error=0.1, seam=0.0, ms=150.0)
        timely = self.measured(n=2, error=0.2, seam=0.0, ms=150.0)
        chosen, why = best_of([late, timely], self.FPS)
        assert chosen == timely
        assert "1 of 2 take longer than their steps last" in why

    def test_a_jump_counts_less_the_rarer_it_is(self) -> None:
        often = self.measured(n=1, error=0.10, seam=0.2)
        rare = self.measured(n=10, error=0.15, seam=0.2)
        assert best_of([often, rare], self.FPS)[0] == rare


def test_in_the_simulator_success_is_what_its_reports_say(
    config: TuneConfig, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    """The simulator's own command is tested with the simulator (test_rollout); here is what it is asked for."""
    asked = []

    def rolled_out(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
        asked.append(options)
        success = 5 if options["n_action_steps"] == 7 and options["sampler"] == "heun" else 3
        return {"episodes": 5, "success": success, "wrong_block": 1, "refused": 0, "settings": options}

    folder = tmp_path / "simulated"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path)
    text = (checkpoint / "embodiment.yaml").read_text()
    (folder / "embodiment.yaml").unlink()
    (folder / "embodiment.yaml").write_text(text.replace("name: toy", "name: sim_arm"))
    monkeypatch.setattr(tune, "in_simulated_time", rolled_out)
    monkeypatch.setattr(Clock, "milliseconds", lambda *_: 50.0)
    choice = run(replace(config, checkpoint_dir=folder, dataset_path=None, episodes=5, seed=3, workers=2), QUIET)
    best = {"sampler": "heun", "denoising_steps": 1, "n_action_steps": 7, "guidance_scale": 1.0}
    assert choice["best"]["combination"] == best
    assert "caution" not in choice
    assert choice["best"]["success"] == 5
    assert len(asked) == 8
    assert {options["seed"] for options in asked} == {500_003}
    assert {options["latency"] for options in asked} == {0.05}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"how": "simulator"}, "is of 'toy', the simulator is of 'sim_arm': use --how=offline"),
        ({"dataset_path": None}, "measuring offline needs recorded episodes: give --dataset_path"),
        ({"n_action_steps": [8]}, "n_action_steps 8: a chunk of this policy has 7 steps"),
        ({"samplers": ["ddim"]}, "ddim"),
        ({"workers": 0, "denoising_steps": [0]}, r"workers must be at least 1, got 0\n  - denoising_steps must"),
        ({"latency": -0.1, "seed": -1}, r"latency must be at least 0, got -0.1\n  - seed must be at least 0, got -1"),
        ({"parameters": ROOT / "config/sim.yaml"}, "has no parameters of a node dit_policy"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_written(
    config: TuneConfig, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=rf"(?s){said}"):
        run(replace(config, **changes), QUIET)
    assert not config.output_dir.exists()


VALUES = {"n_action_steps": 12, "denoising_steps": 3, "sampler": "dpm_solver++"}


class TestNodeFile:
    def test_only_the_values_change(self, tmp_path: Path) -> None:
        path = tmp_path / "my_robot.yaml"
        path.write_text(PARAMETERS.read_text())
        path.chmod(0o640)
        said = write_values(path, VALUES)
        before, after = PARAMETERS.read_text().splitlines(), path.read_text().splitlines()
        changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
        assert [new.split("#")[0].split() for _, new in changed] == [
            ["n_action_steps:", "12"],
            ["denoising_steps:", "3"],
            ["sampler:", "dpm_solver++"],
        ]
        assert all(old.index("#") == new.index("#") for old, new in changed)
        assert all(old.split("#")[1] == new.split("#")[1] for old, new in changed)
        assert said == ["n_action_steps: 0 -> 12", "denoising_steps: 0 -> 3", "sampler: '' -> 'dpm_solver++'"]
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        assert [each.name for each in tmp_path.iterdir()] == ["my_robot.yaml"]

    def test_into_a_copy(self, tmp_path: Path) -> None:
        target = tmp_path / "new" / "copy.yaml"
        before = PARAMETERS.read_text()
        write_values(PARAMETERS, VALUES, target)
        assert PARAMETERS.read_text() == before
        assert yaml.safe_load(target.read_text())["/**/dit_policy"]["ros__parameters"]["n_action_steps"] == 12

    @pytest.mark.parametrize(
        "text",
        [
            "dit_policy:\n  ros__parameters:\n    device: cpu\n",
            "left:\n  dit_policy:\n    ros__parameters: # all\n      device: cpu # x\n      sampler: 'ddim' # y\n",
            "/left/dit_policy:\n  ros__parameters: {n_action_steps: 4, sampler: ''}\n",
        ],
    )
    def test_files_of_other_forms(self, text: str) -> None:
        new = yaml.safe_load(with_values(text, VALUES))
        section = new.get("left", new)
        ((_, node),) = section.items()
        old = yaml.safe_load(text)
        ((_, before),) = old.get("left", old).items()
        assert node["ros__parameters"] == before["ros__parameters"] | VALUES

    @pytest.mark.parametrize(
        "text",
        [
            "dit_policy:\n  ros__parameters:\n    sampler:\n    device: cpu\n",
            "dit_policy:\n  ros__parameters:\n    sampler:   # none\n    denoising_steps:\n",
            "dit_policy:\n  ros__parameters: {}\n",
            "left: {dit_policy: {ros__parameters: {}}}\n",
            "dit_policy: {ros__parameters: {sampler: , device: cpu}}\n",
        ],
    )
    def test_values_and_sections_that_are_empty(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "node.yaml"
        path.write_text(text)
        write_values(path, VALUES)
        before, after = (yaml.safe_load(each) for each in (text, path.read_text()))
        before, after = (each.get("left", each)["dit_policy"]["ros__parameters"] for each in (before, after))
        assert after == before | VALUES
        assert ("# none" in path.read_text()) == ("# none" in text)

    def test_line_ends_stay(self, tmp_path: Path) -> None:
        path = tmp_path / "node.yaml"
        path.write_bytes(b"dit_policy:\r\n  ros__parameters:\r\n    sampler: ddim # x\r\n")
        write_values(path, VALUES)
        lines = path.read_bytes().split(b"\n")
        assert len(lines) == 6
        assert all(line.endswith(b"\r") for line in lines[:-1])

    @pytest.mark.parametrize(
        "lines",
        [
            "sampler: &s 'ddim'\n    other: *s",
            "other: &s 'ddim'\n    sampler: *s",
            "sampler: |\n      ddim\n    a: 1",
            "sampler: | # x\n      ddim",
        ],
    )
    def test_forms_that_cannot_be_changed_are_refused_before_anything_is_measured(
        self, lines: str, tmp_path: Path, config: TuneConfig
    ) -> None:
        path = tmp_path / "node.yaml"
        path.write_text(text := f"dit_policy:\n  ros__parameters:\n    {lines}\n")
        with pytest.raises(
            ValueError, match=r"node\.yaml is of a form .*; write sampler: VALUE, denoising_steps: VALUE"
        ):
            run(replace(config, parameters=path), QUIET)
        assert not config.output_dir.exists()
        assert path.read_text() == text
        with pytest.raises(ValueError, match=r"output_parameters .* is a folder"):
            run(replace(config, parameters=path, output_parameters=tmp_path), QUIET)

    def test_a_file_of_something_else_is_refused(self, tmp_path: Path) -> None:
        two = "a:\n  dit_policy: {ros__parameters: {device: cpu}}\nb:\n  dit_policy: {ros__parameters: {device: cpu}}\n"
        with pytest.raises(ValueError, match="2 sets of parameters of a node dit_policy"):
            with_values(two, VALUES)
        with pytest.raises(ValueError, match="is not YAML"):
            with_values("a: [", VALUES)

    @pytest.mark.ros
    def test_the_node_reads_it(self, tmp_path: Path) -> None:
        rclpy = pytest.importorskip("rclpy")
        from dit_policy_ros.nodes.parameters import Parameters

        target = tmp_path / "tuned.yaml"
        write_values(PARAMETERS, VALUES, target)
        context = rclpy.Context()
        rclpy.init(args=["--ros-args", "--params-file", str(target)], context=context)
        try:
            node = rclpy.create_node("dit_policy", context=context)
            parameters = Parameters(node, lambda _: None, lambda _: None)
            assert {name: parameters[name] for name in VALUES} == VALUES
            node.destroy_node()
        finally:
            rclpy.shutdown(context=context)
