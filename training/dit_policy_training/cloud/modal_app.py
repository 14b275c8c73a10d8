"""Modal's objects for a launch: the image, the volume, the function. The only file that imports modal."""

from dataclasses import asdict
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import modal
from modal.exception import NotFoundError
from packaging.requirements import Requirement

from dit_policy_training.cloud.job import Job
from dit_policy_training.cloud.launch import ModalTrainConfig

ROOT = "/volume"  # where the volume is mounted
PACKAGES = ("dit_policy_ros", "dit_policy_training")
PYTHON = "3.12"
SYSTEM = ("libgl1", "libglib2.0-0")  # OpenCV's


class VolumeFiles:
    """The files of a volume, as far as one needs to know of them."""

    def __init__(self, volume: modal.Volume):
        self._volume = volume

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder of that name, relative to the volume."""
        place = PurePosixPath(path)
        parent = "/" if str(place.parent) == "." else f"/{place.parent}"
        try:
            return any(PurePosixPath(entry.path).name == place.name for entry in self._volume.listdir(parent))
        except NotFoundError:
            return False


def has_token() -> bool:
    """Whether modal knows who is asking."""
    from modal.config import config

    return bool(config.get("token_id")) and bool(config.get("token_secret"))


def open_volume(name: str, create: bool) -> modal.Volume:
    """The volume of that name."""
    return modal.Volume.from_name(name, create_if_missing=create)


def requirements() -> list[str]:
    """Of both packages, in the versions that are installed here: the same code runs there as here."""
    needed: dict[str, str] = {}
    for package in PACKAGES:
        for line in metadata.requires(package) or []:
            requirement = Requirement(line)
            if requirement.name in PACKAGES or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
            version = metadata.version(requirement.name).partition("+")[0]  # torch 2.9.0+cpu has a local build
            needed[requirement.name] = f"{requirement.name}{extras}=={version}"
    return sorted(needed.values())


def make_image(environment: dict[str, str]) -> modal.Image:
    """Debian with Python, the requirements, and this machine's two packages, whose changes need no new image."""
    return (
        modal.Image.debian_slim(python_version=PYTHON)
        .apt_install(*SYSTEM)
        .uv_pip_install(*requirements(), "wandb")
        .env(environment)
        .add_local_python_source(*PACKAGES)
    )


def make_app(config: ModalTrainConfig, volume: modal.Volume, tokens: dict[str, str]) -> tuple[modal.App, Any]:
    """The app and its function, which takes a Job as a dictionary; `tokens` are environment variables kept secret."""
    app = modal.App("dit-policy-training")

    def train(job: dict[str, Any]) -> dict[str, Any]:
        """An attempt. What would fail again is answered, what would not is raised, for Modal to try again."""
        from dit_policy_training.cloud.job import Job, RunFailed, run_job

        try:
            return {"step": run_job(Job(**job), Path(ROOT), volume.commit), "failed": ""}
        except RunFailed as error:
            return {"step": -1, "failed": str(error)}

    function = app.function(
        image=make_image({"PYTHONUNBUFFERED": "1"}),
        gpu=config.gpu_type,
        cpu=config.num_cpus,
        memory=config.memory_amount,
        timeout=round(3600 * config.timeout_hours),
        retries=modal.Retries(max_retries=config.attempts - 1, backoff_coefficient=1.0, initial_delay=5.0),
        volumes={ROOT: volume},
        secrets=[modal.Secret.from_dict(dict(tokens))] if tokens else [],
        single_use_containers=True,
        serialized=True,
        name="train",
    )(train)
    return app, function


def start(app: modal.App, function: Any, job: Job, detach: bool) -> dict[str, Any] | None:
    """Run it and wait for the answer, its output shown here; None if detached."""
    with modal.enable_output(), app.run(detach=detach):
        if detach:
            function.spawn(asdict(job))
            return None
        answer: dict[str, Any] = function.remote(asdict(job))
        return answer


def upload(volume: modal.Volume, folder: Path, path: str) -> None:
    """Put a folder on the volume."""
    with volume.batch_upload() as batch:
        batch.put_directory(folder, f"/{path}")
