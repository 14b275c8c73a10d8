"""`make bench-trainers`: the demo's policy trained by our trainer and by lerobot-train, run alike.

The same architecture, loss, dataset, batch, steps, optimizer and schedule, three seeds each; lerobot-train takes the
policy as a plugin (demo_for_lerobot). What our trainer does by itself and lerobot-train does not is left on: the
average of the weights, episodes held out. Each policy runs 60 unseen scenes in simulated time, told the scene's colour
and told another one, and the first seed's 20 in real time by the node. Needs the dataset of `make demo-train`. What was
trained and measured is kept in outputs/bench/trainers, so that an interrupted benchmark continues. Writes
outputs/bench/trainers.json; exits 1 if our success is lower.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_recipe import DATASET, rolled_out, trained
from bench_report import Row, count_row, publish
from demo_for_lerobot import fresh_policy, recipe
from dit_policy_training.data.table import load_table
from safetensors.torch import load_file

from dit_policy_ros.policy.checkpoint import save_checkpoint

RECIPE = "config/training/demo.yaml"
WORK = Path("outputs/bench/trainers")
SEEDS, SCENES, REAL_SCENES = (0, 1, 2), 60, 20
OURS, THEIRS = "ours", "lerobot-train"
CONTROLS = {"none": "told the colour", "wrong_instruction": "told another colour"}


def main() -> int:
    """All trainers and seeds; 0 if our success is not lower."""
    policies = {(trainer, seed): checkpoint_of(trainer, seed) for seed in SEEDS for trainer in (OURS, THEIRS)}
    rows: list[Row] = []
    for control, told in CONTROLS.items():
        reports = {
            (trainer, seed): rolled_out(policy, WORK / f"{trainer}-{seed}" / f"{control}.json", SCENES, control)
            for (trainer, seed), policy in policies.items()
        }
        rows += rows_of(reports, told, f"{SCENES} unseen scenes, simulated time")
    real = {(trainer, SEEDS[0]): run_by_node(trainer, policies[trainer, SEEDS[0]]) for trainer in (OURS, THEIRS)}
    rows += rows_of(real, "told the colour, by the node", f"{REAL_SCENES} unseen scenes, real time, over DDS")
    return publish("trainers", rows)


def rows_of(reports: Mapping[tuple[str, int], Mapping[str, Any]], told: str, how: str) -> list[Row]:
    """Successes and wrong blocks of each policy; the sum of our successes must not be below that of theirs."""
    rows: list[Row] = []
    for (trainer, seed), report in reports.items():
        for figure in ("success", "wrong_block"):
            rows.append(count_row(f"{trainer}, seed {seed}, {told}: {figure}", report[figure], report["episodes"], how))
    ours, theirs = (
        sum(report["success"] for (trainer, _), report in reports.items() if trainer == kind)
        for kind in (OURS, THEIRS)
    )
    scenes = sum(report["episodes"] for (trainer, _), report in reports.items() if trainer == OURS)
    total = count_row(f"ours, all seeds, {told}: success", ours, scenes, f"{how}; lerobot-train's is the bar")
    return [*rows, total | {"bar": f">= {theirs}", "holds": ours >= theirs}]


def checkpoint_of(trainer: str, seed: int) -> Path:
    """A checkpoint of ours, trained if it is not there; ours are the preset on one thread."""
    folder = WORK / f"{trainer}-{seed}"
    if trainer == OURS:
        return trained(folder, f"--seed={seed}", "--num_threads=1")
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)  # lerobot-train refuses a folder that is there
        by_lerobot(folder, seed)
        (folder / "done").touch()  # an interrupted training leaves checkpoints as well
    return folder / "exported"


def by_lerobot(folder: Path, seed: int) -> None:
    """The same by lerobot-train; its last weights as a checkpoint of ours."""
    config = recipe(RECIPE, str(DATASET))
    run(
        "lerobot.scripts.lerobot_train",
        "--policy.discover_packages_path=demo_for_lerobot",
        "--policy.type=demo_dit",
        f"--policy.recipe={RECIPE}",
        f"--policy.dataset={DATASET}",
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
        "--dataset.repo_id=local/demo",
        f"--dataset.root={DATASET}",
        f"--output_dir={folder}",
        f"--batch_size={config.batch_size}",
        f"--steps={config.train_steps}",
        f"--save_freq={config.train_steps}",
        "--num_workers=2",
        f"--seed={seed}",
        "--wandb.enable=false",
    )
    export(folder / "checkpoints" / "last" / "pretrained_model" / "model.safetensors", folder / "exported")


def export(weights: Path, folder: Path) -> None:
    """LeRobot's weights of the plugin as a checkpoint of ours. Raises RuntimeError for weights of another policy."""
    policy = fresh_policy(recipe(RECIPE, str(DATASET)))
    policy.load_state_dict({name.removeprefix("policy."): tensor for name, tensor in load_file(weights).items()})
    embodiment = load_table(DATASET).embodiment
    assert embodiment is not None  # our converter made the dataset
    save_checkpoint(folder, policy, embodiment.to_yaml(), "Trained by lerobot-train, for a comparison.\n")


def run_by_node(trainer: str, checkpoint: Path) -> dict[str, Any]:
    """The report of the demo, whose node runs the policy in real time, run if it is not there."""
    output = WORK / f"{trainer}-{SEEDS[0]}" / "node"
    if not (output / "report.json").exists():
        arguments = (f"--checkpoint={checkpoint}", f"--output={output}", "--video-episodes=0")
        run("dit_policy_ros.nodes.demo", *arguments, most=1)  # 1 only says that a bar of the demo does not hold
    return dict(json.loads((output / "report.json").read_text()))


def run(module: str, *arguments: str, most: int = 0) -> None:
    """Run a module, which finds the plugin beside this file. Raises SystemExit if its status is above `most`."""
    places = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", module, *arguments]
    status = subprocess.run(command, env=os.environ | {"PYTHONPATH": places}, check=False).returncode
    if not 0 <= status <= most:
        raise SystemExit(f"{module} ended with {status}")


if __name__ == "__main__":
    sys.exit(main())
