"""Every command of the package: installed by its name, and --help with words for each of its own options."""

import ast
import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
from converting import Launcher

TRAINING = Path(__file__).parents[1]
COMMANDS = re.findall(r'f"(\w+) = \{NAME\}\.(\w+):main"', (TRAINING / "setup.py").read_text())
JUDGING = {
    "compare": "CompareConfig",
    "diagnose": "DiagnoseConfig",
    "evaluate": "EvaluateConfig",
    "inference": "InferenceConfig",
    "tune": "TuneConfig",
}


def test_every_command_is_installed() -> None:
    there = []
    for path in (TRAINING / "dit_policy_training").glob("*.py"):
        tree = ast.parse(path.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            there.append(path.stem)
    assert sorted(there) == sorted(name for name, _ in COMMANDS)
    assert all(name == module for name, module in COMMANDS)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", sorted(JUDGING))
def test_help_says_what_each_option_is(command: str, launcher: Launcher) -> None:
    status, text = launcher.run(["--help"], command)
    assert status == 0
    assert f"python -m dit_policy_training.{command} --" in text
    entries = re.split(r"\n  (?=--)", text)[1:]
    explained = {entry.split()[0].removeprefix("--"): " ".join(entry.split()[1:]) for entry in entries}
    config = getattr(import_module(f"dit_policy_training.{command}"), JUDGING[command])
    for field in fields(config):
        assert field.name in explained, f"--{field.name} is not in the help"
        words = explained[field.name].partition("(default:")[0]
        assert len(re.findall(r"[a-z]{2,}", words)) >= 2, f"--{field.name}: {words!r}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("inference", ["--checkpoint_dir=x"], "Missing required field(s) `dataset_path`"),
        ("evaluate", ["--checkpoint_dir=x", "--dataset_path=/nowhere"], "/nowhere is not a LeRobotDataset"),
        ("evaluate", ["--checkpoint_dir=x", "--dataset_path=y", "--closed_loop=real"], "real"),
        ("compare", ["--checkpoints=[/nowhere]", "--dataset_path=y"], "no checkpoint in /nowhere"),
        ("tune", ["--checkpoint_dir=/nowhere"], "no checkpoint in /nowhere"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(
    command: str, arguments: list[str], said: str, launcher: Launcher
) -> None:
    status, text = launcher.run(arguments, command)
    assert status in (1, 2)
    assert said in " ".join(text.split())
