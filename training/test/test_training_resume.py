"""Runs that are killed, stopped, moved, changed: what goes on is the undisturbed run, to the last bit."""

import os
import random
import resource
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import draccus
import pytest
import torch
from converting import Launcher
from dit_policy_training.data.frames import batches
from dit_policy_training.data.sources import DatasetSource
from dit_policy_training.loop.continuing import check_same_run
from dit_policy_training.loop.options import OptimizerConfig, SchedulerConfig, TrainConfig, ValidationConfig
from dit_policy_training.loop.state import read_state
from dit_policy_training.loop.trainer import Trainer
from dit_policy_training.train import train
from small_run import QUIET, rows_of, small_config

from dit_policy_ros.policy.checkpoint import load_checkpoint
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy

KILLS = int(os.environ.get("TRAIN_KILLS", "3"))  # `make test-kills` takes 10
LOSSES = ("step", "loss", "lr", "grad_norm")


def restless(dataset: Path, output_dir: Path, text_model: Path) -> TrainConfig:
    """All that is random of a step is on, and a row does not end where a checkpoint is."""
    config = small_config(dataset, output_dir, text_model)
    encoder = config.policy.observation_encoder
    policy = replace(
        config.policy,
        state_noise=0.1,
        instruction_dropout=0.3,
        max_delay=2,
        transformer=replace(config.policy.transformer, dropout=0.2),
        observation_encoder=replace(encoder, vision=replace(encoder.vision, random_shift=2, brightness=0.3)),
    )
    return replace(config, policy=policy, train_steps=24, save_freq=4, log_freq=3, num_threads=1)


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The settings of a run that nothing disturbed."""
    config = restless(dataset, tmp_path_factory.mktemp("undisturbed") / "run", text_model)
    Trainer(config, QUIET).train()
    return config


def losses(run: Path) -> list[list[float]]:
    return [[row[name] for name in LOSSES] for row in rows_of(run)]


def assert_same_run(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    for file in ("model.safetensors", "training/state.safetensors"):
        ours, theirs = (folder / "checkpoints" / "last" / file for folder in (run, other))
        assert ours.read_bytes() == theirs.read_bytes(), file


def command(config: TrainConfig) -> list[str]:
    """What starts the run, and goes on with it if it has a checkpoint."""
    settings = config.output_dir.with_suffix(".yaml")
    settings.write_text(draccus.dump(config))
    last = config.output_dir / "checkpoints" / "last"
    return [f"--config={settings}", *([f"--checkpoint_path={last}"] if last.exists() else [])]


def written(run: Path) -> int:
    """Grows from the first to the last moment of a run."""
    metrics = run / "metrics.jsonl"
    rows = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    # What is not yet renamed counts: a kill may come while a checkpoint is written.
    return rows + sum(1 for _ in run.glob("checkpoints/*")) + sum(1 for _ in run.glob("checkpoints/.*/*"))


@pytest.mark.timeout(300 + 60 * KILLS)  # processes that take seconds to start, on a busy machine a minute
def test_killed_at_random_moments_it_goes_on_as_if_nothing_had_been(
    launcher: Launcher, undisturbed: TrainConfig, tmp_path: Path
) -> None:
    # Long enough for each kill to find it running: between seeing a moment and killing there are some steps.
    expected = replace(undisturbed, output_dir=tmp_path / "expected", train_steps=20 * KILLS)
    Trainer(expected, QUIET).train()
    config = replace(expected, output_dir=tmp_path / "run")
    run, rng, killed = config.output_dir, random.Random(KILLS), 0
    for _ in range(KILLS):
        moment = written(run) + rng.randrange(1, 4)
        with launcher.command(command(config), "train") as disturbed:
            if disturbed.until(lambda moment=moment: written(run) >= moment):
                disturbed.signal(signal.SIGKILL)
            killed += disturbed.wait() == -signal.SIGKILL
    status, output = launcher.run(command(config), "train")
    assert status == 0, output
    assert killed > KILLS // 2, "the runs were too short to be killed: little was tested"
    assert_same_run(run, expected.output_dir)
    left = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not left


@pytest.mark.timeout(300)  # processes that take seconds to start, on a busy machine a minute
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_command_it_tells_goes_on(
    launcher: Launcher, undisturbed: TrainConfig, tmp_path: Path, number: signal.Signals
) -> None:
    config = replace(undisturbed, output_dir=tmp_path / "a run")
    with launcher.command(command(config), "train") as stopped:
        assert stopped.until(lambda: written(config.output_dir) >= 2)
        stopped.signal(number)
        status, output = stopped.finish()
    assert status == 0, output
    assert "stopped at step" in output
    told = next(line for line in output.splitlines() if "-m dit_policy_training.train --checkpoint_path=" in line)
    assert shlex.split(told)[:3] == ["python", "-m", "dit_policy_training.train"]
    status, output = launcher.run(shlex.split(told)[3:], "train")
    assert status == 0, output
    assert_same_run(config.output_dir, undisturbed.output_dir)


def test_a_second_signal_ends_at_once(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer._train_step

    def interrupted(self: Trainer, ready: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, ready)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, QUIET).train()
    assert signal.getsignal(signal.SIGINT) == before
    assert not list(config.output_dir.glob("checkpoints/*"))


def test_a_signal_before_the_first_step_is_noticed_as_any(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch takes long where processes are started for it."""

    def interrupted(*arguments: object) -> Iterator[object]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield from batches(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("dit_policy_training.loop.trainer.batches", interrupted)
    assert Trainer(config, QUIET).train().name == "000001"


def going_on(config: TrainConfig, step: int | None = None, **changes: object) -> TrainConfig:
    name = "last" if step is None else f"{step:06d}"
    return replace(config, checkpoint_path=config.output_dir / "checkpoints" / name, **changes)


def test_a_copy_of_the_run_goes_on_from_an_older_checkpoint(undisturbed: TrainConfig, tmp_path: Path) -> None:
    copy = replace(undisturbed, output_dir=tmp_path / "moved")
    shutil.copytree(undisturbed.output_dir, copy.output_dir, symlinks=True)
    with pytest.raises(ValueError, match=r"has a later checkpoint, of step 24: go on from it .*--overwrite=true"):
        Trainer(going_on(copy, 20), QUIET)
    Trainer(going_on(copy, 20, overwrite=True), QUIET).train()
    assert_same_run(copy.output_dir, undisturbed.output_dir)

    branch = replace(going_on(copy, 20), output_dir=tmp_path / "branch")
    Trainer(branch, QUIET).train()
    assert_same_run(branch.output_dir, undisturbed.output_dir)
    assert Trainer(going_on(branch), QUIET).train() == branch.output_dir / "checkpoints" / "000024"  # nothing to do


def test_what_may_not_change_is_named(undisturbed: TrainConfig, dataset: Path) -> None:
    same = going_on(undisturbed)
    policy = replace(same.policy, state_noise=0.2, horizon=10)
    changed = replace(
        same,
        policy=policy,
        seed=5,
        batch_size=4,
        optimizer=replace(same.optimizer, type="adam"),
        validation=replace(same.validation, episode_share=0.5),
        ema_decay=0.0,
        dataset_path=None,
        datasets=[DatasetSource(dataset), DatasetSource(dataset)],
    )
    with pytest.raises(ValueError, match="differs from this one in what may not change") as told:
        Trainer(changed, QUIET)
    for words in (
        "samples a step: 8 -> 4",
        "the data: another dataset, or this one has changed since",
        "ema_decay: 0.9 -> 0.0",
        "policy.state_noise: 0.1 -> 0.2",
        "policy.horizon: 8 -> 10",
        "seed: 0 -> 5",
        "optimizer.type: adamw -> adam",
        "validation.episode_share: 0.05 -> 0.5",
        "--finetune",
    ):
        assert words in str(told.value)
    # The product is what counts.
    Trainer(replace(same, batch_size=4, gradient_accumulation_steps=2), QUIET)


def test_what_may_change_is_said(undisturbed: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = replace(undisturbed, output_dir=tmp_path / "longer")
    shutil.copytree(undisturbed.output_dir, copy.output_dir, symlinks=True)
    longer = going_on(copy, train_steps=27, log_freq=1, optimizer=replace(copy.optimizer, lr=1e-3))
    Trainer(longer).train()
    output = capsys.readouterr().out
    assert "train_steps: 24 -> 27 (the learning rate follows the cosine of that length from here on)" in output
    assert "optimizer.lr: 0.003 -> 0.001" in output
    assert "log_freq" not in output
    assert [row["step"] for row in rows_of(copy.output_dir)][-4:] == [24, 25, 26, 27]


def test_a_weight_that_is_taken_back_is_said(undisturbed: TrainConfig) -> None:
    saved = read_state(undisturbed.output_dir / "checkpoints" / "last")
    weighted = replace(undisturbed, task_weights={"push the red block": 2.0})
    before = replace(saved, settings=draccus.dump(weighted))
    counters = saved.counters
    notes = check_same_run(undisturbed, before, counters.samples_per_step, counters.fingerprint)
    assert "task_weights.push the red block: 2.0 -> None" in notes


def test_weights_without_state_are_for_fine_tuning(undisturbed: TrainConfig, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree((undisturbed.output_dir / "checkpoints" / "last").resolve(), bare)
    shutil.rmtree(bare / "training")
    config = replace(undisturbed, checkpoint_path=bare, output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=r"bare holds no training/.*--finetune --output_dir=NEW"):
        Trainer(config, QUIET)
    with pytest.raises(ValueError, match="finetune starts from the weights of a checkpoint"):
        Trainer(replace(undisturbed, finetune=True), QUIET)
    started = Trainer(replace(config, finetune=True), QUIET).policy.state_dict()
    saved = load_checkpoint(bare).state_dict()
    assert all(torch.equal(started[name], weight) for name, weight in saved.items())


def test_a_damaged_state_is_told(undisturbed: TrainConfig, tmp_path: Path) -> None:
    copy = replace(undisturbed, output_dir=tmp_path / "run")
    shutil.copytree(undisturbed.output_dir, copy.output_dir, symlinks=True)
    state = copy.output_dir / "checkpoints" / "last" / "training" / "state.safetensors"
    content = state.read_bytes()
    state.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"state\.safetensors cannot be read"):
        Trainer(going_on(copy), QUIET)


def test_what_a_killed_run_left_half_written_goes(config: TrainConfig) -> None:
    checkpoints = config.output_dir / "checkpoints"
    (checkpoints / ".000010.abc.partial").mkdir(parents=True)
    (checkpoints / ".000010.abc.partial" / "model.safetensors").write_bytes(b"half")
    config = replace(config, train_steps=10)
    Trainer(config, QUIET).train()
    assert sorted(path.name for path in checkpoints.iterdir()) == ["000010", "last"]
    (checkpoints / ".000012.abc.partial").mkdir()
    Trainer(going_on(config, train_steps=12), QUIET).train()
    assert sorted(path.name for path in checkpoints.iterdir()) == ["000010", "000012", "last"]


def with_validation(config: TrainConfig) -> TrainConfig:
    """The dataset four times over has twelve episodes, of which some are held out."""
    return replace(
        config,
        dataset_path=None,
        datasets=[DatasetSource(config.dataset_path)] * 4,
        validation=ValidationConfig(episode_share=0.2, freq=5, samples=16),
        save_freq=5,
        train_steps=30,
        keep_checkpoints=1,
    )


def test_the_best_and_the_last_stay_and_older_ones_are_thinned(config: TrainConfig) -> None:
    # A learning rate so high that the policy soon gets worse: the best is not the last.
    config = replace(with_validation(config), optimizer=OptimizerConfig(lr=0.1), scheduler=SchedulerConfig("constant"))
    Trainer(config, QUIET).train()
    measured = {row["step"]: row["validation_action_error"] for row in rows_of(config.output_dir)}
    best = int(min(measured, key=lambda step: measured[step]))
    assert list(measured) == [5, 10, 15, 20, 25, 30]
    assert best not in (25, 30), "nothing would be seen of the best's being kept"
    checkpoints = config.output_dir / "checkpoints"
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {"last", "best", f"{best:06d}", "000025", "000030"}
    assert (checkpoints / "best").resolve().name == f"{best:06d}"

    longer = going_on(config, train_steps=35, keep_checkpoints=0, optimizer=OptimizerConfig(lr=1e-6))
    Trainer(longer, QUIET).train()
    now = {row["step"]: row["validation_action_error"] for row in rows_of(config.output_dir)}
    best = int(min(now, key=lambda step: now[step]))
    assert {path.name for path in checkpoints.iterdir()} == {"last", "best", f"{best:06d}", "000035"}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_leaves_the_old_checkpoint(undisturbed: TrainConfig, tmp_path: Path) -> None:
    copy = replace(undisturbed, output_dir=tmp_path / "run")
    shutil.copytree(undisturbed.output_dir, copy.output_dir, symlinks=True)
    trainer = Trainer(going_on(copy, train_steps=26), QUIET)
    weights = copy.output_dir / "checkpoints" / "000024" / "model.safetensors"
    with largest_file(weights.stat().st_size - 1), pytest.raises(ValueError, match="no space for a checkpoint") as told:
        trainer.train()
    for words in ("it takes", "are free", "--keep_checkpoints=0", "--output_dir", "--cache_dir", "--checkpoint_path"):
        assert words in str(told.value)
    checkpoints = copy.output_dir / "checkpoints"
    assert (checkpoints / "last").resolve().name == "000024"
    assert not list(checkpoints.glob(".*"))
    Trainer(going_on(copy, train_steps=26), QUIET).train()
    assert (checkpoints / "last").resolve().name == "000026"


def test_memory_that_ends_is_told_with_what_needs_less(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(config, QUIET)
    monkeypatch.setattr(trainer.policy.noise_predictor, "forward", lambda *_: torch.empty(2**50))  # torch's own error
    with pytest.raises(ValueError, match="memory is exhausted") as told:
        trainer.train()
    for words in ("batch_size", "gradient_accumulation_steps", "use_amp", "resize_shape", "cache", "--checkpoint_path"):
        assert words in str(told.value)


def test_memory_too_small_for_the_weights_is_told_too(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(MultitaskDiTPolicy, "to", full)  # stands for a GPU that others use
    with pytest.raises(ValueError, match=r"memory is exhausted \(CUDA out of memory") as told:
        train(config)
    assert "--checkpoint_path" in str(told.value)


def test_other_weights_of_the_datasets_are_said(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """They change which samples come: task_weights are said as well."""
    assert config.dataset_path is not None
    sources = [DatasetSource(config.dataset_path, weight=weight) for weight in (1.0, 2.0)]
    config = replace(config, dataset_path=None, datasets=sources, train_steps=2)
    Trainer(config, QUIET).train()
    other = [replace(sources[0], weight=5.0), sources[1]]
    Trainer(going_on(config, train_steps=3, datasets=other)).train()
    assert "weights of the datasets: [1.0, 2.0] -> [5.0, 2.0]" in capsys.readouterr().out
