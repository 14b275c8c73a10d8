"""What a launch on Modal asks for, and whether it can be: all that can be found out before anything is started."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Protocol

from dit_policy_training.loop.options import TrainConfig

GPUS = (  # as modal.com/docs/guide/gpu lists them
    "T4",
    "L4",
    "A10",
    "L40S",
    "A100",
    "A100-40GB",
    "A100-80GB",
    "RTX-PRO-6000",
    "H100",
    "H100!",
    "H200",
    "B200",
    "B200+",
)
MOST_GPUS, MOST_A10 = 8, 4
MOST_HOURS = 24.0  # modal.com/docs/guide/timeouts
MOST_ATTEMPTS = 11  # a first one, and 10 retries: modal.com/docs/reference/modal.Retries
GRACE = 300.0  # seconds of an attempt that are left for its last checkpoint
CHECKPOINTS = "checkpoints"


@dataclass
class ModalTrainConfig(TrainConfig):
    """A training run on a machine of Modal. Every option of dit_policy_training.train; paths are on the volume."""

    gpu_type: str = "A10"  # T4, L4, A10, L40S, A100-80GB, H100, H200, B200, ...; H100:4 for four, one process each
    num_cpus: float = 16.0  # cores
    memory_amount: int = 65536  # MiB; pictures that are cached take cache_limit_gb of it
    timeout_hours: float = 10.0  # of an attempt, at most 24: then it saves, and the next goes on
    attempts: int = 10  # at most 11, after which a run that is not at its end stays where it is
    modal_volume_name: str = "dit_policy"  # where datasets and runs are; all paths are relative to it
    upload: Path | None = None  # folder of a dataset on this machine, put to dataset_path on the volume first
    detach: bool = False  # do not wait for it: it goes on when this machine is switched off


_OF_TRAIN = {field.name for field in fields(TrainConfig)}
MODAL_ONLY = tuple(field.name for field in fields(ModalTrainConfig) if field.name not in _OF_TRAIN)


class Files(Protocol):
    """The files of a volume."""

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder of that name, relative to the volume."""


def gpu_count(gpu_type: str) -> int:
    """4 of `H100:4`; 1 without a number. Raises ValueError where it is none."""
    _, colon, number = gpu_type.partition(":")
    if colon and not number.isdecimal():
        raise ValueError(f"gpu_type is {gpu_type!r}; expected a type, or type:number as H100:4")
    return int(number) if colon else 1


def check_machine(config: ModalTrainConfig) -> None:
    """Raises ValueError naming everything that Modal would not give."""
    problems = list(_machine_problems(config))
    if problems:
        raise ValueError("this cannot be launched:\n  - " + "\n  - ".join(problems))


def check_run(config: ModalTrainConfig) -> None:
    """Raises ValueError naming every option of the run that is out of range. What the checkpoint of a run that goes on
    says of its dataset, its machine will read.
    """
    goes_on = config.checkpoint_path is not None and not config.finetune
    if goes_on and not (config.dataset_path or config.dataset_repo_id or config.datasets):
        config = replace(config, dataset_path=config.checkpoint_path)
    replace(config, device="cuda").validate()


def _machine_problems(config: ModalTrainConfig) -> Iterator[str]:
    kind = config.gpu_type.partition(":")[0].upper()
    if kind not in GPUS:
        near = difflib.get_close_matches(kind, GPUS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield f"gpu_type {config.gpu_type!r} is not known{hint} There are: {', '.join(GPUS)}"
    else:
        try:
            most = MOST_A10 if kind == "A10" else MOST_GPUS
            if not 1 <= gpu_count(config.gpu_type) <= most:
                yield f"gpu_type {config.gpu_type!r}: a machine has 1 to {most} of them"
        except ValueError as error:
            yield str(error)
    if not GRACE / 3600 < config.timeout_hours <= MOST_HOURS:
        yield (
            f"timeout_hours must be above {GRACE / 3600:.2g} and at most {MOST_HOURS:g}, got {config.timeout_hours:g}; "
            "a longer run goes on by itself after each, see attempts"
        )
    for name in ("num_cpus", "memory_amount", "attempts"):
        if not getattr(config, name) > 0:
            yield f"{name} must be positive, got {getattr(config, name)}"
    if config.attempts > MOST_ATTEMPTS:
        yield (
            f"attempts must be at most {MOST_ATTEMPTS}, got {config.attempts}: Modal tries no more; a longer run goes "
            f"on by another launch with --checkpoint_path={config.output_dir}/{CHECKPOINTS}/last"
        )
    if config.upload is not None and config.dataset_path is None:
        yield f"upload {config.upload} needs --dataset_path, the place on the volume that it is put to"
    for name, path in _paths(config):
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            yield f"{name} {path} must be relative to the volume {config.modal_volume_name}, such as datasets/my_task"


def _paths(config: TrainConfig) -> Iterator[tuple[str, str]]:
    given = {name: getattr(config, name) for name in ("output_dir", "dataset_path", "checkpoint_path", "embodiment")}
    given |= {f"datasets[{index}].path": source.path for index, source in enumerate(config.datasets)}
    for name, path in given.items():
        if path is not None:
            yield name, str(path)


def check_volume(config: ModalTrainConfig, files: Files) -> None:
    """Raises ValueError naming everything that is missing on the volume, or in the way."""
    problems = list(_volume_problems(config, files))
    if problems:
        raise ValueError("this cannot be launched:\n  - " + "\n  - ".join(problems))


def _volume_problems(config: ModalTrainConfig, files: Files) -> Iterator[str]:
    volume = config.modal_volume_name
    datasets = [config.dataset_path, *(source.path for source in config.datasets)]
    for path in (str(path) for path in datasets if path is not None and config.upload is None):
        if not files.exists(f"{path}/meta/info.json"):
            yield (
                f"no dataset {path} on the volume {volume} (no meta/info.json there). Put it there by --upload=FOLDER, "
                f"or by: modal volume put {volume} FOLDER {path}"
            )
    if config.upload is not None and files.exists(str(config.dataset_path)):
        yield (
            f"{config.dataset_path} is on the volume {volume} already: leave --upload out, or remove it by: "
            f"modal volume rm -r {volume} {config.dataset_path}"
        )
    if config.embodiment is not None and not files.exists(str(config.embodiment)):
        yield f"no file {config.embodiment} on the volume {volume}: modal volume put {volume} FILE {config.embodiment}"
    if config.checkpoint_path is not None and not files.exists(str(config.checkpoint_path)):
        yield f"no checkpoint {config.checkpoint_path} on the volume {volume}; see: modal volume ls {volume}"
    goes_on = config.checkpoint_path is not None and not config.finetune
    if not goes_on and not config.overwrite and files.exists(f"{config.output_dir}/{CHECKPOINTS}"):
        yield (
            f"{config.output_dir} on the volume {volume} holds a run: choose another output_dir, give --overwrite, go "
            f"on by --checkpoint_path={config.output_dir}/checkpoints/last, or remove it by: modal volume rm -r "
            f"{volume} {config.output_dir}"
        )


def cost(config: ModalTrainConfig) -> str:
    """What is reserved, in words."""
    count = gpu_count(config.gpu_type)
    hours = config.timeout_hours * config.attempts
    return (
        f"{config.gpu_type}, {config.num_cpus:g} cores, {config.memory_amount / 1024:g} GiB: at most "
        f"{hours:g} h ({count * hours:g} GPU hours) in {config.attempts} attempts; paid by the second "
        "(modal.com/pricing), and only while it runs"
    )
