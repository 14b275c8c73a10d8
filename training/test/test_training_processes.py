"""One process or several, one batch or accumulated: the same training."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import draccus
import pytest
from dit_policy_training.loop.options import TrainConfig
from dit_policy_training.loop.trainer import Trainer
from safetensors.torch import load_file
from small_run import QUIET, rows_of, small_config

STEPS = 12


def everything_random(dataset: Path, output_dir: Path, text_model: Path) -> TrainConfig:
    """All that is random of a step but the dropout within the transformer, which is each process's own.

    Where a gradient is zero but for rounding (a bias before a normalisation, a key's bias), Adam makes steps of the
    whole learning rate of that rounding, unless eps is above it: no two orders of summation would agree.
    """
    config = small_config(dataset, output_dir, text_model)
    encoder = config.policy.observation_encoder
    vision = replace(
        encoder.vision, resize_shape=(20, 20), crop_shape=(16, 16), random_shift=2, brightness=0.3, hue=0.1
    )
    policy = replace(
        config.policy,
        state_noise=0.1,
        instruction_dropout=0.3,
        max_delay=2,
        objective=replace(config.policy.objective, noise_draws=2),
        observation_encoder=replace(encoder, vision=vision),
    )
    optimizer = replace(config.optimizer, eps=1e-5)
    return replace(
        config, policy=policy, optimizer=optimizer, train_steps=STEPS, log_freq=1, num_threads=1, batch_size=16
    )


@pytest.fixture(scope="module")
def whole(dataset: Path, text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """One process, batches of 16."""
    config = everything_random(dataset, tmp_path_factory.mktemp("whole") / "run", text_model)
    Trainer(config, QUIET).train()
    return config


def assert_same_weights(run: Path, other: Path, within: float) -> None:
    ours, theirs = (load_file(folder / "checkpoints" / "last" / "model.safetensors") for folder in (run, other))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) <= within
    losses = [[row["loss"] for row in rows_of(folder)] for folder in (run, other)]
    assert len(losses[0]) == STEPS
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_weights_moved(whole: TrainConfig, tmp_path: Path) -> None:
    """Else the others would show nothing: another seed's noise is far outside of what they allow."""
    other = replace(whole, seed=1, output_dir=tmp_path / "other")
    Trainer(other, QUIET).train()
    with pytest.raises(AssertionError):
        assert_same_weights(other.output_dir, whole.output_dir, 1e-3)


@pytest.mark.parametrize("batch_size", [8, 4])
def test_accumulated_batches_are_one_batch(whole: TrainConfig, tmp_path: Path, batch_size: int) -> None:
    parts = replace(
        whole, batch_size=batch_size, gradient_accumulation_steps=16 // batch_size, output_dir=tmp_path / "parts"
    )
    Trainer(parts, QUIET).train()
    assert_same_weights(parts.output_dir, whole.output_dir, 1e-5)


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate": [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",  # with --cpu it starts several processes by mpirun only; the processes take --device
        "--num_processes=2",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--main_process_port=0",
    ],
}


def launch(launcher: str, *arguments: str) -> tuple[int, str]:
    """Two processes with gloo on this machine's loopback; exit status and what they printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *LAUNCHERS[launcher], "-m", "dit_policy_training.train", *arguments]
    with Popen(command, env=environment, stdout=PIPE, stderr=STDOUT, text=True, start_new_session=True) as process:
        output = process.communicate()[0]
    return process.returncode, output


@pytest.mark.timeout(300)  # processes that take seconds to start, on a busy machine a minute
def test_two_processes_are_one_with_twice_the_batch(whole: TrainConfig, tmp_path: Path) -> None:
    config = replace(whole, batch_size=4, gradient_accumulation_steps=2, output_dir=tmp_path / "run")
    settings = tmp_path / "settings.yaml"
    settings.write_text(draccus.dump(config))
    status, output = launch("torchrun", f"--config={settings}")
    assert status == 0, output
    assert "16 samples (4 a batch x 2 processes x 2 batches)" in output
    assert_same_weights(config.output_dir, whole.output_dir, 1e-5)


@pytest.mark.timeout(300)  # processes that take seconds to start, on a busy machine a minute
def test_what_one_process_began_two_go_on_with(whole: TrainConfig, tmp_path: Path) -> None:
    begun = replace(whole, output_dir=tmp_path / "run", save_freq=5, keep_checkpoints=-1)
    Trainer(begun, QUIET).train()
    checkpoint = begun.output_dir / "checkpoints" / "000005"
    options = [f"--checkpoint_path={checkpoint}", f"--output_dir={tmp_path / 'two'}", "--batch_size=8"]
    status, output = launch("accelerate", *options)
    assert status == 0, output
    assert_same_weights(tmp_path / "two", whole.output_dir, 1e-5)
