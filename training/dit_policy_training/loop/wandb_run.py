"""Weights & Biases, where WANDB_API_KEY is set or WANDB_MODE is offline. Whatever goes wrong there, the run goes on."""

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import draccus

from dit_policy_training.loop.options import TrainConfig

RUN_ID = "wandb_id.txt"
PATIENCE = 30.0  # seconds to wait for the server before the run is logged to a folder instead

Say = Callable[[str], None]


class WandbRun:
    """A run there. The first error is told, and ends the logging but not the training."""

    def __init__(self, run: Any, say: Say):
        self._run: Any | None = run
        self._say = say
        # wandb's own step may not go back, as that of a run that goes on from a checkpoint does.
        self._safely(lambda: run.define_metric("step"))
        self._safely(lambda: run.define_metric("*", step_metric="step"))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Log the figures of a step."""
        self._safely(lambda: self._run and self._run.log({**figures, "step": step}))

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log a PNG."""
        import wandb

        self._safely(lambda: self._run and self._run.log({name: wandb.Image(str(path)), "step": step}))

    def close(self) -> None:
        """Wait until everything is sent."""
        self._safely(lambda: self._run and self._run.finish())

    def _safely(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # of the network, the server, its client: none is worth a training run
            self._say(f"Weights & Biases: {error}; from here on nothing is logged there, the run goes on")
            self._run = None


def start_wandb(config: TrainConfig, output_dir: Path, continues: bool, say: Say) -> WandbRun | None:
    """The run there, the same as before if it `continues`; None if it is not asked for or cannot be."""
    mode: Any = os.environ.get("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "disabled")
    if mode == "disabled":
        return None
    try:
        import wandb
    except ImportError:
        say("Weights & Biases is asked for but not installed: pip install wandb")
        return None

    def start(mode: Any) -> Any:
        return wandb.init(
            project=config.tracking.wandb_project,
            name=config.tracking.run_name or output_dir.resolve().name,
            id=_run_id(output_dir, continues),
            resume=None if mode == "offline" else "allow",  # offline it is `wandb sync` that joins the parts
            mode=mode,
            dir=output_dir,
            config=draccus.encode(config),
            settings=wandb.Settings(init_timeout=PATIENCE, console="off", silent=True),
        )

    try:
        run = start(mode)
    except Exception as error:
        say(f"Weights & Biases cannot be reached ({error}); what would go there is kept in a folder")
        mode = "offline"
        try:
            run = start(mode)
        except Exception as again:
            say(f"nor can that be: {again}; nothing is logged there")
            return None
    say(
        f"Weights & Biases, to be sent by: wandb sync {Path(run.dir).parent}"
        if mode == "offline"
        else f"Weights & Biases: {run.url}"
    )
    return WandbRun(run, say)


def _run_id(output_dir: Path, continues: bool) -> str:
    """The run's name there, which it keeps when it goes on."""
    path = output_dir / RUN_ID
    if not (continues and path.exists()):
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text()
