"""Checkpoints side by side: the same moments and noise, figures against formulas, and what cannot be compared."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from dit_policy_training.compare import CompareConfig, run
from dit_policy_training.data.table import load_table
from dit_policy_training.judging.comparison import names_of
from dit_policy_training.judging.opening import open_subject
from dit_policy_training.judging.predictions import predict
from judged import toy_checkpoint
from rich.console import Console

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: the first with two checkpoints, the second with one of a shorter horizon."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed, changes in (
        ("a/checkpoints/000100", 0, {}),
        ("a/checkpoints/000200", 1, {}),
        ("b/checkpoints/000100", 2, {"horizon": 6, "n_action_steps": 3}),
    ):
        toy_checkpoint(dataset, folder / name, seed, **changes)
        shutil.rmtree(folder / f"{name}_clip")
    return folder


def test_checkpoints_are_compared_over_the_steps_that_all_of_them_have(
    runs: Path, dataset: Path, tmp_path: Path
) -> None:
    console = Console(record=True, width=200, file=(tmp_path / "said").open("w"))
    config = CompareConfig([runs / "a", runs / "b"], dataset, output_dir=tmp_path)
    report = run(config, console)
    assert [one["name"] for one in report["checkpoints"]] == ["a/000100", "a/000200", "b/000100"]
    assert [one["step"] for one in report["checkpoints"]] == [100, 200, 100]
    assert report["settings"]["steps of each"] == {"a/000100": 7, "a/000200": 7, "b/000100": 5}
    assert report["settings"]["steps compared"] == 5
    table = load_table(dataset)
    apart = []
    for one in report["checkpoints"]:
        subject = open_subject(Path(one["folder"]), table, "cpu")
        found = predict(subject.policy, subject.windows, subject.frames, np.arange(len(table)))
        distances = np.where(found.is_pad[:, :5, None], np.nan, np.abs(found.predicted - found.recorded)[:, :5])
        assert one["error"] == pytest.approx(np.nanmean(distances), rel=1e-5)
        assert one["by_action"]["lift"] == pytest.approx(np.nanmean(distances[:, :, 1]), rel=1e-5)
        apart.append(distances)
    first = report["differences"][0]
    assert (first["of"], first["to"]) == ("a/000100", "a/000200")
    assert first["difference"] == pytest.approx(np.nanmean(np.nanmean(apart[0] - apart[1], axis=(1, 2))), rel=1e-4)
    assert first["low"] <= first["difference"] <= first["high"]
    page = (tmp_path / "report.html").read_text()
    for said in ("a/000200", "b/000100", "Error over training", "push the blue block", "stands still"):
        assert said in page
    assert "<script" not in page
    assert json.loads((tmp_path / "report.json").read_text()) == report
    least = min(report["checkpoints"], key=lambda one: one["error"])["name"]
    printed = console.export_text()
    assert least in printed.split("checkpoint")[-1].split("000")[0] + printed


def test_what_is_the_same_cannot_be_told_apart(runs: Path, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a/checkpoints/000100", tmp_path / "copy")
    twice = [runs / "a/checkpoints/000100", tmp_path / "copy"]
    report = run(CompareConfig(twice, dataset, output_dir=tmp_path, max_samples=20), QUIET)
    page = (tmp_path / "report.html").read_text()
    assert "&minus;0.0" not in page
    assert "a/000100: 7, copy: 7" in page  # steps of each
    assert report["differences"][0] | {"of": "", "to": ""} == {
        "of": "",
        "to": "",
        "difference": 0.0,
        "low": 0.0,
        "high": 0.0,
        "sure": False,
    }


def test_a_checkpoint_given_twice_is_refused(runs: Path, dataset: Path, tmp_path: Path) -> None:
    one = runs / "a/checkpoints/000100"
    (tmp_path / "link").symlink_to(one)
    for twice in ([one, one], [runs / "a", one], [one, tmp_path / "link"]):
        with pytest.raises(ValueError, match=r"--checkpoints names a checkpoint twice: .*000100"):
            run(CompareConfig(twice, dataset, output_dir=tmp_path / "out"), QUIET)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_left_out_and_told(runs: Path, dataset: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs / "a/checkpoints/000100", other)
    text = (other / "embodiment.yaml").read_text()
    (other / "embodiment.yaml").write_text(text.replace("fps: 10", "fps: 5"))
    config = CompareConfig([other, runs / "b"], dataset, output_dir=tmp_path / "out", max_samples=10)
    report = run(config, QUIET)
    assert [one["name"] for one in report["checkpoints"]] == ["b/000100"]
    assert "fps: the policy was trained on 5, the dataset has 10" in report["left_out"]["other"]
    assert "fps: the policy was trained on 5" in (tmp_path / "out/report.html").read_text()
    with pytest.raises(ValueError, match=r"(?s)nothing to compare:.*fps: the policy was trained on 5"):
        run(CompareConfig([other], dataset, output_dir=tmp_path / "none"), QUIET)
    assert not (tmp_path / "none").exists()


def test_names_are_as_short_as_tells_them_apart() -> None:
    paths = [Path(name) for name in ("/x/a/checkpoints/000100", "/x/b/checkpoints/000100", "/y/b/checkpoints/000100")]
    assert names_of(paths) == ["a/000100", "x/b/000100", "y/b/000100"]
    assert names_of([Path("/x/demo"), Path("/x/run/checkpoints/last")]) == ["demo", "last"]
