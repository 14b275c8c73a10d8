"""The examples for a cluster, run as they stand; only Slurm's own commands are stood in for."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import draccus
import pytest
from dit_policy_training.loop.options import TrainConfig
from small_run import rows_of

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "config" / "cluster"

# Two tasks on one machine, each with its number, as srun starts them; signals are handed on to both.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
trap 'kill -TERM $first $second' TERM
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
while kill -0 $first 2>/dev/null || kill -0 $second 2>/dev/null; do wait $first $second; done
wait $first && wait $second
"""
SCONTROL = """#!/bin/bash
case $1 in show) echo localhost;; *) echo "$@" >> "$SCONTROL_LOG";; esac
"""


@pytest.fixture
def environment(config: TrainConfig, tmp_path: Path) -> dict[str, str]:
    """What a user sets, and a folder of stand-ins for Slurm before the rest of PATH."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    settings = tmp_path / "settings.yaml"
    settings.write_text(draccus.dump(replace(config, train_steps=12, log_freq=1, save_freq=6)))
    return os.environ | {
        "PATH": f"{bin_dir}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'training'}",
        "DATASET": str(config.dataset_path),
        "RUN": str(config.output_dir),
        "CONFIG": str(settings),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SCONTROL_LOG": str(tmp_path / "scontrol.log"),
    }


@pytest.mark.parametrize("script", sorted(path.name for path in CLUSTER.glob("*.sh")))
def test_the_scripts_are_bash(script: str) -> None:
    assert os.access(CLUSTER / script, os.X_OK)
    subprocess.run(["bash", "-n", CLUSTER / script], check=True)


@pytest.mark.timeout(600)
def test_a_slurm_job_saves_at_its_signal_and_is_queued_again_and_torchrun_goes_on(
    environment: dict[str, str], config: TrainConfig
) -> None:
    """Two processes each time."""
    job = [CLUSTER / "slurm.sh", "--train_steps=100000"]
    process = subprocess.Popen(job, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "step 3/" in line:
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait() == 0, rest
    assert Path(environment["SCONTROL_LOG"]).read_text() == f"requeue {environment['SLURM_JOB_ID']}\n"
    step = int((config.output_dir / "checkpoints" / "last").resolve().name)
    assert 3 <= step == rows_of(config.output_dir)[-1]["step"]

    run = [CLUSTER / "torchrun.sh", f"--train_steps={step + 2}"]
    subprocess.run(run, cwd=ROOT, env=environment | {"PROCESSES": "2"}, check=True)
    assert [row["step"] for row in rows_of(config.output_dir)] == list(range(1, step + 3))


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_slurm_job_begins_a_run_or_goes_on_with_it(
    environment: dict[str, str], config: TrainConfig, tmp_path: Path, has_checkpoint: bool
) -> None:
    """Two tasks that only say what they would run; the job that ended by itself is not queued again."""
    said_by_each = 'echo "$RANK of $WORLD_SIZE, $LOCAL_WORLD_SIZE here, at $MASTER_ADDR: $@"'
    (tmp_path / "bin" / "python").write_text(f"#!/bin/bash\n{said_by_each}\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    if has_checkpoint:
        for step in ("000900", "1000000"):  # and no `last`, as after a kill within that instant
            (config.output_dir / "checkpoints" / step).mkdir(parents=True)
    said = subprocess.run(
        [CLUSTER / "slurm.sh", "--batch_size=3"], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    arguments = (
        f"-m dit_policy_training.train --config={environment['CONFIG']} --dataset_path={config.dataset_path} "
        f"--output_dir={config.output_dir} --batch_size=3"
    )
    goes_on = f" --checkpoint_path={config.output_dir}/checkpoints/1000000 --finetune=false --overwrite=false"
    goes_on = goes_on if has_checkpoint else ""
    assert sorted(said) == [f"{rank} of 2, 2 here, at localhost: {arguments}{goes_on}" for rank in (0, 1)]
    assert not Path(environment["SCONTROL_LOG"]).exists()
