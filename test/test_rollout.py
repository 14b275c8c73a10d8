"""The demo's task in simulated time from the command line: what it counts, that it repeats, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from dit_policy_ros.sim.rollout import main, parse, rollout, write
from dit_policy_ros.sim.task import FIRST_SEED

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints/demo"
QUIET = Console(quiet=True)


def test_an_episode_is_the_same_again_whatever_else_is_run() -> None:
    two = rollout(parse([f"--checkpoint={CHECKPOINT}", "--episodes=2"]), QUIET)
    one = rollout(parse([f"--checkpoint={CHECKPOINT}", "--episodes=1"]), QUIET)
    assert two["results"][0] == one["results"][0]
    assert two["success"] == 2
    assert [row["seed"] for row in two["results"]] == [FIRST_SEED, FIRST_SEED + 1]
    assert [row["instruction"].split()[2] for row in two["results"]] == ["red", "green"]
    assert two["settings"]["n_action_steps"] == 8
    assert two["settings"]["sampler"] == "euler"
    other = rollout(parse([f"--checkpoint={CHECKPOINT}", "--episodes=1", "--control=wrong_instruction"]), QUIET)
    assert other["results"][0]["instruction"] == "push the green block over the line"
    assert other["results"][0]["moved_m"]["green"] > 0.1


def test_settings_are_those_that_were_asked_for() -> None:
    given = ["--episodes=1", "--n_action_steps=4", "--denoising_steps=2", "--sampler=heun", "--latency=0.2"]
    report = rollout(parse([f"--checkpoint={CHECKPOINT}", *given]), QUIET)
    settings = report["settings"]
    assert (settings["n_action_steps"], settings["denoising_steps"], settings["sampler"]) == (4, 2, "heun")
    # At 10 Hz the 4 steps last 0.4 s from the observation on, of which 0.2 s have passed when the chunk comes.
    seconds = report["results"][0]["duration_s"]
    assert seconds / 0.4 - 2 <= report["chunks"] <= seconds / 0.2 + 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--n_action_steps=17"], "a chunk of this policy has 16 steps"),
        (["--sampler=ddim"], "ddim"),
        (["--guidance_scale=2"], "instruction_dropout"),
    ],
)
def test_what_the_policy_cannot_do_is_said(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "report.json"
    assert main([f"--checkpoint={CHECKPOINT}", "--episodes=1", f"--output={output}", *options]) == 1
    assert said in capsys.readouterr().err
    assert not output.exists()


def test_another_robots_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "other"
    shutil.copytree(CHECKPOINT, folder)
    text = (folder / "embodiment.yaml").read_text()
    text = text.replace("name: sim_arm", "name: crane").replace("workspace_camera/image_raw", "mast/image_raw")
    (folder / "embodiment.yaml").write_text(text)
    assert main([f"--checkpoint={folder}"]) == 1
    said = capsys.readouterr().err
    assert "a policy for 'crane'" in said
    assert "mast/image_raw" in said
    assert main([f"--checkpoint={tmp_path}"]) == 1
    assert f"no checkpoint in {tmp_path}" in capsys.readouterr().err


def test_numbers_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--episodes=0"])
    assert "--episodes=0: expected 1 or more" in capsys.readouterr().err


def test_a_report_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    write({"success": 1}, path)
    assert json.loads(path.read_text()) == {"success": 1}
    assert [each.name for each in path.parent.iterdir()] == ["report.json"]
