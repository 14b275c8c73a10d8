"""`python -m dit_policy_training.train_modal`: train on a machine of Modal, with the options of `train`.

Datasets and runs are on a Modal volume; all paths are relative to it. Everything that can be wrong is found out before
a machine is started: the options, the GPU, whether the dataset is there, whether a run is in the way. Checkpoints are
on the volume as soon as they are saved, and a run whose time is up, or whose machine was taken away, goes on by itself.

Needs `pip install modal` and, once, `modal token new`. HUGGINGFACE_TOKEN, HF_TOKEN and WANDB_API_KEY are handed on.
"""

import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dit_policy_training import cli
from dit_policy_training.cloud.job import Job
from dit_policy_training.cloud.launch import (
    GRACE,
    MODAL_ONLY,
    ModalTrainConfig,
    check_machine,
    check_run,
    check_volume,
    cost,
    gpu_count,
)
from dit_policy_training.data.table import load_table
from dit_policy_training.loop.arguments import given

PROGRAM = "dit_policy_training.train_modal"
TOKENS = ("HUGGINGFACE_TOKEN", "HF_TOKEN", "WANDB_API_KEY")
EXAMPLES = """\
examples:
  a first run    --upload=DATASET --dataset_path=datasets/my_task --output_dir=runs/my_task --gpu_type=L40S --detach
  look at it     modal volume ls dit_policy runs/my_task/checkpoints
  fetch it       modal volume get dit_policy runs/my_task/checkpoints/030000 .
  train longer   --checkpoint_path=runs/my_task/checkpoints/last --train_steps=60000
"""


def launch(config: ModalTrainConfig, arguments: Sequence[str], console: Console | None = None) -> int:
    """Check everything, start the run, and wait for its end unless it is detached; the exit status."""
    console = console or Console()
    check_machine(config)
    check_run(config)
    modal_app = _modal()
    if not modal_app.has_token():
        raise ValueError("Modal does not know you: run `modal token new` once (it opens a browser)")
    if config.upload is not None:
        load_table(config.upload, None)  # a dataset that cannot be trained on is not worth sending
    from modal.exception import Error as ModalError

    try:
        volume = modal_app.open_volume(config.modal_volume_name, create=config.upload is not None)
        check_volume(config, modal_app.VolumeFiles(volume))
        if config.upload is not None:
            console.print(f"uploading {config.upload} to {config.dataset_path} on {config.modal_volume_name}")
            modal_app.upload(volume, config.upload, str(config.dataset_path))
        tokens = {name: os.environ[name] for name in TOKENS if os.environ.get(name)}
        app, function = modal_app.make_app(config, volume, tokens)
        console.print(cost(config), highlight=False)
        answer = modal_app.start(app, function, job_of(config, arguments), config.detach)
    except ModalError as error:
        raise ValueError(f"Modal: {error}") from error
    where = f"{config.modal_volume_name}: {config.output_dir}/checkpoints"
    if answer is None:
        console.print(
            f"started; its checkpoints go to {where}; see it by: modal app list, modal app logs", highlight=False
        )
        return 0
    if answer["failed"]:
        raise ValueError(answer["failed"])
    console.print(f"done at step {answer['step']}; {where}", highlight=False)
    return 0


def job_of(config: ModalTrainConfig, arguments: Sequence[str]) -> Job:
    """What is sent: the options of train as they were given, so that those that were not are the machine's own."""
    file = given(arguments, "config") or given(arguments, "config_path")
    return Job(
        launch=uuid.uuid4().hex,
        arguments=train_arguments(arguments),
        settings=Path(file).read_text(encoding="utf-8") if file else "",
        output_dir=str(config.output_dir),
        processes=gpu_count(config.gpu_type),
        seconds=3600 * config.timeout_hours - GRACE,
    )


def train_arguments(arguments: Sequence[str]) -> list[str]:
    """Those that train knows, each as --name=value; the file of --config is sent by itself."""
    kept, rest = [], list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        if name.removeprefix("--") not in (*MODAL_ONLY, "config", "config_path"):
            kept.append(f"{name}={value}")
    return kept


def _modal() -> Any:
    try:
        from dit_policy_training.cloud import modal_app
    except ModuleNotFoundError as error:
        if error.name != "modal":
            raise
        raise ValueError("Modal is not installed here: pip install modal, then once `modal token new`") from error
    return modal_app


def _completed(arguments: list[str]) -> list[str]:
    """The run's folder, where --checkpoint_path names it: that of a run that goes on."""
    checkpoint = given(arguments, "checkpoint_path")
    if not checkpoint or given(arguments, "output_dir") or given(arguments, "finetune").lower() == "true":
        return arguments
    folder = Path(checkpoint).parent
    return [*arguments, f"--output_dir={folder.parent}"] if folder.name == "checkpoints" else arguments


def main() -> int:
    """The command line; returns the exit status."""
    arguments = _completed(sys.argv[1:])
    return cli.run(lambda config: launch(config, arguments), ModalTrainConfig, PROGRAM, EXAMPLES, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
