"""Training on Modal, as far as it goes without an account: what is checked, what is built, what would run there."""

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import draccus
import modal
import pytest
import yaml
from dit_policy_training import train_modal
from dit_policy_training.cloud import modal_app
from dit_policy_training.cloud.job import Job, MoreToDo, RunFailed, command, last_step, run_job
from dit_policy_training.cloud.launch import (
    GPUS,
    ModalTrainConfig,
    check_machine,
    check_run,
    check_volume,
    cost,
    gpu_count,
)
from dit_policy_training.loop.options import TrainConfig
from rich.console import Console
from small_run import rows_of

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)


class Folder:
    """A volume's files, in a folder."""

    def __init__(self, root: Path):
        self._root = root

    def exists(self, path: str) -> bool:
        return (self._root / path).exists()


@pytest.fixture
def launched(tmp_path: Path) -> ModalTrainConfig:
    """What can be launched, on the volume `tmp_path`."""
    (tmp_path / "datasets/toy/meta").mkdir(parents=True)
    (tmp_path / "datasets/toy/meta/info.json").touch()
    return ModalTrainConfig(output_dir=Path("runs/toy"), dataset_path=Path("datasets/toy"))


def test_what_can_be_launched_is_not_refused(launched: ModalTrainConfig, tmp_path: Path) -> None:
    check_machine(launched)
    check_run(launched)
    check_volume(launched, Folder(tmp_path))
    check_machine(replace(launched, attempts=11))
    for gpu in GPUS:
        check_machine(replace(launched, gpu_type=gpu))
    goes_on = ModalTrainConfig(output_dir=Path("runs/toy"), checkpoint_path=Path("runs/toy/checkpoints/last"))
    (tmp_path / "runs/toy/checkpoints/last").mkdir(parents=True)
    check_run(goes_on)
    check_volume(goes_on, Folder(tmp_path))
    check_volume(replace(launched, overwrite=True), Folder(tmp_path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpu_type": "H1000"}, r"'H1000' is not known; did you mean H100\? There are: T4, L4, A10,"),
        ({"gpu_type": "A10:8"}, r"'A10:8': a machine has 1 to 4 of them"),
        ({"gpu_type": "H100:many"}, r"expected a type, or type:number"),
        ({"timeout_hours": 25.0}, r"timeout_hours must be .* at most 24, got 25"),
        ({"timeout_hours": 0.01}, r"timeout_hours must be above 0\.083"),
        ({"num_cpus": 0.0, "memory_amount": -1}, r"num_cpus must be positive, got 0\.0\n.*memory_amount must"),
        ({"output_dir": Path("/runs/toy")}, r"output_dir /runs/toy must be relative to the volume dit_policy"),
        ({"attempts": 12}, r"attempts must be at most 11, got 12: .*--checkpoint_path=runs/toy/checkpoints/last"),
        (
            {"upload": Path("here"), "dataset_path": None, "dataset_repo_id": "toy/toy"},
            r"upload here needs --dataset_path, the place on the volume",
        ),
        ({"dataset_path": Path("../toy")}, r"dataset_path \.\./toy must be relative"),
    ],
)
def test_a_machine_that_modal_does_not_give_is_refused(
    launched: ModalTrainConfig, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=r"this cannot be launched:\n(.*\n)*.*" + said):
        check_machine(replace(launched, **changes))  # type: ignore[arg-type]


def remove(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).unlink()


def make(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).mkdir(parents=True)


@pytest.mark.parametrize(
    ("changes", "edit", "said"),
    [
        (
            {},
            remove("datasets/toy/meta/info.json"),
            r"no dataset datasets/toy on the volume .* modal volume put dit_policy",
        ),
        ({}, make("runs/toy/checkpoints"), r"runs/toy on the volume dit_policy holds a run: choose another output_dir"),
        ({"checkpoint_path": Path("runs/a")}, make("runs/b"), r"no checkpoint runs/a on the volume"),
        ({"embodiment": Path("toy.yaml")}, make("runs/b"), r"no file toy\.yaml on the volume"),
        (
            {"upload": Path("here")},
            make("runs/b"),
            r"datasets/toy is on the volume dit_policy already: leave --upload out",
        ),
        (
            {"checkpoint_path": Path("runs/a"), "finetune": True},
            lambda root: [make("runs/a")(root), make("runs/toy/checkpoints")(root)],
            r"runs/toy on the volume dit_policy holds a run",
        ),
    ],
)
def test_what_is_missing_on_the_volume_or_in_the_way_is_told(
    launched: ModalTrainConfig, tmp_path: Path, changes: dict[str, object], edit: Callable[[Path], None], said: str
) -> None:
    edit(tmp_path)
    with pytest.raises(ValueError, match=said):
        check_volume(replace(launched, **changes), Folder(tmp_path))  # type: ignore[arg-type]


def test_options_of_train_are_checked_as_train_does(launched: ModalTrainConfig) -> None:
    with pytest.raises(ValueError, match=r"batch_size must be at least 1"):
        check_run(replace(launched, batch_size=0))
    with pytest.raises(ValueError, match=r"give one of dataset_path"):
        check_run(replace(launched, dataset_path=None))


def test_without_a_token_it_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_network: None
) -> None:
    """Through the command line, with the real package."""
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("sys.argv", ["train_modal", "--dataset_path=datasets/toy", "--output_dir=runs/toy"])
    assert train_modal.main() == 1
    assert "modal token new" in capsys.readouterr().err


def test_a_volume_is_asked_by_listing_a_folder() -> None:
    asked: list[str] = []

    class Volume:
        def listdir(self, path: str) -> list[object]:
            asked.append(path)
            if path == "/absent":
                raise modal.exception.NotFoundError("no such folder")
            return [type("Entry", (), {"path": name}) for name in ("datasets/toy/meta/info.json", "runs")]

    files = modal_app.VolumeFiles(Volume())  # type: ignore[arg-type]
    assert files.exists("datasets/toy/meta/info.json")
    assert not files.exists("datasets/toy/meta/stats.json")
    assert not files.exists("absent/info.json")
    assert files.exists("runs")
    assert asked == ["/datasets/toy/meta", "/datasets/toy/meta", "/absent", "/"]


def test_the_function_is_what_was_asked_for(
    launched: ModalTrainConfig, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    """Modal's own objects are built; what they are given is held against what was asked for."""
    asked: dict[str, object] = {}
    function = modal.App.function

    def recorded(app: modal.App, **settings: object) -> Callable[[object], object]:
        asked.update(settings)
        return function(app, **settings)

    monkeypatch.setattr(modal.App, "function", recorded)
    config = replace(launched, gpu_type="H100:2", num_cpus=8.0, memory_amount=4096, timeout_hours=2.0, attempts=4)
    volume = modal_app.open_volume("toy", create=False)
    app, made = modal_app.make_app(config, volume, {"WANDB_API_KEY": "secret"})
    assert isinstance(app, modal.App)
    assert isinstance(made, modal.Function)
    assert (asked["gpu"], asked["cpu"], asked["memory"], asked["timeout"]) == ("H100:2", 8.0, 4096, 7200)
    assert asked["volumes"] == {"/volume": volume}
    retries = asked["retries"]
    assert isinstance(retries, modal.Retries)
    assert retries.max_retries == 3
    assert isinstance(asked["image"], modal.Image)
    assert len(asked["secrets"]) == 1  # type: ignore[arg-type]


def test_the_image_has_what_the_packages_need_in_the_versions_that_are_here() -> None:
    needed = dict(line.split("==") for line in modal_app.requirements())
    import safetensors
    import torch

    assert needed["torch"] == torch.__version__.partition("+")[0]
    assert needed["safetensors"] == safetensors.__version__
    assert "lerobot[dataset]" in needed
    assert not any(name.startswith(("dit_policy", "pytest", "ray", "mujoco")) for name in needed)


def test_train_gets_its_own_options_and_no_others(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("batch_size: 7\n")
    arguments = [
        f"--config={file}",
        "--gpu_type=H100:2",
        "--dataset_path",
        "datasets/toy",
        "--output_dir=runs/toy",
        "--detach",
        "--use_amp",
        "--policy.observation_encoder.vision.resize_shape=[224,224]",
        "--timeout_hours=3",
    ]
    config = ModalTrainConfig(Path("runs/toy"), Path("datasets/toy"), gpu_type="H100:2", timeout_hours=3.0)
    job = train_modal.job_of(config, arguments)
    assert job.arguments == [
        "--dataset_path=datasets/toy",
        "--output_dir=runs/toy",
        "--use_amp=true",
        "--policy.observation_encoder.vision.resize_shape=[224,224]",
    ]
    assert (job.settings, job.processes, job.seconds) == ("batch_size: 7\n", 2, 3 * 3600 - 300)
    assert job.launch != train_modal.job_of(config, arguments).launch
    assert "torch.distributed.run" in command(job.arguments, job.processes)


def test_cost_counts_every_gpu_and_attempt() -> None:
    config = ModalTrainConfig(Path("a"), Path("b"), gpu_type="L40S:4", timeout_hours=5.0, attempts=3)
    assert gpu_count("L40S") == 1
    assert "at most 15 h (60 GPU hours) in 3 attempts" in cost(config)


@pytest.fixture
def on_volume(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A run of 12 steps whose paths are relative to tmp_path, as on a volume."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'training'}")
    assert config.dataset_path is not None
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "toy").symlink_to(config.dataset_path)
    settings = draccus.dump(replace(config, train_steps=12, save_freq=4, log_freq=1, dataset_path=None))
    settings = "\n".join(line for line in settings.splitlines() if not line.startswith("output_dir"))
    arguments = ["--dataset_path=datasets/toy", "--output_dir=runs/toy"]
    return Job("launch", arguments, settings, "runs/toy", processes=1, seconds=1000.0)


@pytest.mark.timeout(300)
def test_an_attempt_trains_and_one_whose_time_is_up_goes_on(
    on_volume: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the function on Modal runs, in a folder in place of the volume; time is up once step 4 is saved."""
    commits: list[int] = []
    output = tmp_path / "runs/toy"

    def commit() -> None:
        commits.append(last_step(output))

    clock = SimpleNamespace(monotonic=lambda: 2000.0 if last_step(output) >= 4 else 0.0)
    monkeypatch.setattr("dit_policy_training.cloud.job.time", clock)
    long = replace(on_volume, arguments=[*on_volume.arguments, "--train_steps=100000"])
    assert Job(**asdict(long)) == long  # as it is sent
    with pytest.raises(MoreToDo, match="time was up at step"):
        run_job(long, tmp_path, commit, poll=0.2)
    stopped = last_step(output)
    assert stopped >= 4
    assert commits[-1] == stopped
    clock.monotonic = lambda: 0.0
    longer = replace(on_volume, arguments=[*on_volume.arguments, f"--train_steps={stopped + 2}"])
    assert run_job(longer, tmp_path, commit, poll=0.2) == stopped + 2
    assert [row["step"] for row in rows_of(output)] == list(range(1, stopped + 3))
    assert commits[-1] == stopped + 2


@pytest.mark.timeout(300)
def test_a_run_that_began_from_weights_goes_on_and_does_not_begin_again(
    on_volume: Job, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Though the file of settings says that it begins: `finetune`, from other weights, and `overwrite`."""
    output = tmp_path / "runs/toy"
    assert run_job(replace(on_volume, output_dir="runs/base", arguments=arguments("base", 4)), tmp_path, no, 0.2) == 4
    settings = yaml.safe_load(on_volume.settings)
    del settings["policy"]  # it is the weights'
    begins = {"finetune": True, "overwrite": True, "checkpoint_path": "runs/base/checkpoints/last"}
    job = replace(on_volume, settings=yaml.safe_dump(settings | begins))
    assert run_job(replace(job, arguments=arguments("toy", 4)), tmp_path, no, 0.2) == 4
    begun = rows_of(output)
    assert run_job(replace(job, arguments=arguments("toy", 8)), tmp_path, no, 0.2) == 8
    assert rows_of(output)[:4] == begun
    assert [row["step"] for row in rows_of(output)] == list(range(1, 9))
    first = draccus.parse(TrainConfig, output / "config.yaml", args=[])
    assert first.finetune  # as it began


def arguments(name: str, steps: int) -> list[str]:
    return ["--dataset_path=datasets/toy", f"--output_dir=runs/{name}", f"--train_steps={steps}"]


def no() -> None:
    """Nothing is committed."""


@pytest.mark.timeout(300)
def test_a_run_that_cannot_be_is_not_tried_again(on_volume: Job, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    wrong = replace(on_volume, arguments=["--dataset_path=datasets/absent", "--output_dir=runs/toy"])
    with pytest.raises(RunFailed, match="training ended with status 1"):
        run_job(wrong, tmp_path, lambda: None, poll=0.2)
    assert "datasets/absent is not a LeRobotDataset" in capfd.readouterr().err
