"""`make bench-demo`: the demo's recipe with three training seeds, each on 20 unseen scenes and under two controls.

Needs the dataset that `make demo-train` leaves in outputs/demo-train. Seeds already trained there under `seeds/` are
not trained again, runs already reported are not repeated, so an interrupted benchmark continues. Writes
outputs/bench/demo.json; exits 1 if a bar does not hold.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_report import publish

from dit_policy_ros.nodes.demo_report import MAX_WRONG_BLOCK, MIN_SUCCESS
from dit_policy_ros.sim.task import CONTROLS

WORK = Path("outputs/demo-train")
SEEDS = (0, 1, 2)
HOW = {
    "none": "told the scene's colour",
    "wrong_instruction": "the same scenes, told another colour",
    "blank_images": "the same scenes, the cameras' images black",
}


def module(name: str, *arguments: str) -> None:
    """Run a module; its exit status 1 only says that a bar does not hold."""
    status = subprocess.run([sys.executable, "-m", name, *arguments], check=False).returncode
    if status > 1:
        raise SystemExit(f"{name} ended with {status}")


def checkpoint(seed: int) -> Path:
    """The checkpoint of a seed, trained if it is not there."""
    run = WORK / "seeds" / str(seed)
    last = run / "checkpoints" / "last"
    if not last.exists():
        module(
            "dit_policy_training.train",
            "--config=config/training/demo.yaml",
            f"--dataset_path={WORK / 'dataset'}",
            f"--output_dir={run}",
            f"--seed={seed}",
        )
    return last


def result(seed: int, control: str) -> dict[str, Any]:
    """The report of 20 episodes, run if it is not there."""
    output = WORK / "seeds" / str(seed) / control
    report = output / "report.json"
    if not report.exists():
        module(
            "dit_policy_ros.nodes.demo",
            f"--checkpoint={checkpoint(seed)}",
            f"--control={control}",
            f"--output={output}",
            "--video-episodes=0",
        )
    return dict(json.loads(report.read_text()))


def rows(seed: int, control: str) -> list[dict[str, Any]]:
    """Successes and wrong blocks of one run, with the demo's bars where it has any."""
    report = result(seed, control)
    episodes = report["episodes"]
    how = f"{episodes} unseen scenes, {HOW[control]}; chunk p50 {report['chunk_ms']['p50']} ms"
    barred = control != "blank_images"
    return [
        {
            "name": f"seed {seed}, {control}: success",
            "value": report["success"],
            "unit": f"of {episodes}",
            "bar": f">= {MIN_SUCCESS * episodes:.0f}" if barred else None,
            "holds": not barred or report["success"] >= MIN_SUCCESS * episodes,
            "how": how,
        },
        {
            "name": f"seed {seed}, {control}: wrong block",
            "value": report["wrong_block"],
            "unit": f"of {episodes}",
            "bar": f"<= {MAX_WRONG_BLOCK * episodes:.0f}" if barred else None,
            "holds": not barred or report["wrong_block"] <= MAX_WRONG_BLOCK * episodes,
            "how": how,
        },
    ]


def main() -> int:
    """All seeds and controls; 0 if every bar holds."""
    found = [row for seed in SEEDS for control in CONTROLS for row in rows(seed, control)]
    return publish("demo", found)


if __name__ == "__main__":
    sys.exit(main())
