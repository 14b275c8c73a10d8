"""`make bench-listening`: what cures a policy that does not listen, on the demo's task.

The demo's recipe, most of the time shorter, with the words at different places and the data in different amounts; each
policy runs 21 unseen scenes in simulated time, told the scene's colour and told another one. Needs the bags and the
dataset that `make demo-train` leaves in outputs/demo-train. What was trained and measured is kept in
outputs/bench/listening, so that an interrupted benchmark continues. Writes outputs/bench/listening.json; no bar.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench_recipe import rolled_out, trained
from bench_report import Row, count_row, publish

BAGS, ALL = Path("outputs/demo-train/bags"), (50, 50, 50)
WORK = Path("outputs/bench/listening")
STEPS, WHOLE, EPISODES = 600, 1800, 21  # in 600 steps what helps tells; how much data is enough, only in all of them
RARE = "push the blue block over the line"
OUTSIDE_VISION = ("--policy.observation_encoder.vision.film=false",)
GUIDED = ("--policy.instruction_dropout=0.2", "--policy.guidance_scale=2.0")


@dataclass(frozen=True)
class Variant:
    """A policy: how many bags of each colour (red, green, blue), and what differs from the demo's recipe."""

    name: str
    bags: tuple[int, int, int]
    changes: tuple[str, ...] = ()
    steps: int = STEPS


VARIANTS = (
    Variant("words beside the pictures", ALL, OUTSIDE_VISION),
    Variant("words beside the pictures, guidance 2", ALL, (*OUTSIDE_VISION, *GUIDED)),
    Variant("words in the vision encoder", ALL),
    Variant("words in the vision encoder, a third of the data", (17, 17, 17)),
    Variant("one task rare", (50, 50, 5)),
    Variant("one task rare, tasks balanced", (50, 50, 5), ("--balance_tasks",)),
    Variant("all steps", ALL, steps=WHOLE),
    Variant("all steps, a third of the data", (17, 17, 17), steps=WHOLE),
    Variant("all steps, a tenth of the data", (5, 5, 5), steps=WHOLE),
)


def main() -> int:
    """All variants; 0."""
    return publish("listening", [row for variant in VARIANTS for row in rows(variant)])


def rows(variant: Variant) -> list[Row]:
    """Success and wrong blocks, told the scene's colour and told another one; success on blue alone."""
    folder = WORK / variant.name.replace(" ", "_").replace(",", "")
    changes = (f"--train_steps={variant.steps}", "--num_threads=1", *variant.changes)
    checkpoint = trained(folder, *changes, dataset=converted(variant.bags))
    data = f"{variant.steps} steps on {' + '.join(map(str, variant.bags))} episodes"
    how = f"{data}, {EPISODES} unseen scenes, simulated time"
    found = []
    for control, told in (("none", "told the colour"), ("wrong_instruction", "told another colour")):
        report = rolled_out(checkpoint, folder / f"{control}.json", EPISODES, control)
        for figure in ("success", "wrong_block"):
            found.append(count_row(f"{variant.name}, {told}: {figure}", report[figure], EPISODES, how))
        if control == "none":
            rare = [episode for episode in report["results"] if episode["instruction"] == RARE]
            found.append(count_row(f"{variant.name}: blue alone", sum(e["success"] for e in rare), len(rare), how))
    return found


def converted(bags: tuple[int, int, int]) -> Path:
    """The dataset of the first so many bags of each colour; the colours take turns in the bags' order."""
    if bags == ALL:
        return BAGS.with_name("dataset")
    dataset = WORK / f"dataset_{'_'.join(map(str, bags))}"
    if not dataset.exists():
        chosen = dataset.with_suffix(".bags")
        shutil.rmtree(chosen, ignore_errors=True)
        chosen.mkdir(parents=True)
        for colour, count in enumerate(bags):
            for bag in sorted(path for path in BAGS.iterdir() if path.is_dir())[colour::3][:count]:
                (chosen / bag.name).symlink_to(bag.resolve())
        arguments = [
            f"--bags={chosen}",
            "--embodiment=config/embodiments/sim_arm.yaml",
            f"--output={dataset}",
            "--controller.interpolate_from_desired_state=true",
            "--video.codec=h264",
            "--video.pix_fmt=yuv444p",
            "--video.crf=18",
            "--video.preset=superfast",
        ]
        subprocess.run([sys.executable, "-m", "dit_policy_training.convert", *arguments], check=True)
    return dataset


if __name__ == "__main__":
    sys.exit(main())
