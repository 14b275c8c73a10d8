"""The training benchmark's script: a loop held between blocks, its processes' memory, rows; figures need real runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import bench_train
import pytest
from bench_train_loops import Block, Gate

MB = 2**20


def test_a_gate_lets_as_many_steps_pass_as_it_is_told() -> None:
    (tokens, tell), (hear, reports) = os.pipe(), os.pipe()
    os.write(tell, b"3\n2\n")
    os.close(tell)
    done = 0
    with os.fdopen(tokens) as incoming, os.fdopen(reports, "w") as outgoing, suppress(SystemExit):
        gate = Gate(incoming, outgoing)
        gate.decoded(1.5)
        while done < 10:
            gate.waited(0.25)
            done += 1
            gate.step(lambda: 7)
    with os.fdopen(hear) as lines:
        blocks = [Block(**json.loads(line)) for line in lines]
    assert done == 1 + 3 + 2
    assert [block.steps for block in blocks] == [1, 3, 2]
    assert [block.waited for block in blocks] == [0.25, 0.75, 0.5]
    assert [block.decoding for block in blocks] == [1.5, 0, 0]
    assert {block.parameters for block in blocks} == {7}


def test_memory_is_that_of_all_processes_of_a_group() -> None:
    child = "import sys; kept = bytearray(b'x' * {} * 2**20); print(flush=True); sys.stdin.read()"
    grandchild = [sys.executable, "-c", child.format(60)]
    parent = f"import subprocess; subprocess.Popen({grandchild!r}).wait()"
    group = subprocess.Popen(
        [sys.executable, "-c", parent],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert group.stdout is not None
    group.stdout.readline()  # the memory is filled
    try:
        peak = bench_train.Peak(group.pid).stop()
        assert 60 * MB < peak < 160 * MB
        assert bench_train.group_pss(2**22 + 1) == 0  # above the largest process id
    finally:
        group.communicate(b"")


SECONDS = {"ours": [1.0, 2.0, 1.0], "lerobot": [2.0, 2.0, 2.0]}


def made_rows(faster: float | None = 1.3, ours_mb: float = 900) -> dict[str, bench_train.Row]:
    blocks = {
        kind: [Block(5, seconds, 0.5 if kind == "lerobot" else 0.0) for seconds in each]
        for kind, each in SECONDS.items()
    }
    starts = {"ours": Block(parameters=10**6, decoding=4.0), "lerobot": Block(parameters=10**6)}
    peaks = {"ours": int(ours_mb * 1e6), "lerobot": 10**9}
    size = replace(bench_train.DEMO, faster=faster)
    rows = bench_train.rows_of(size, blocks, starts, peaks, "so", "cpu")
    return {row["name"].removeprefix("the demo's size: "): row for row in rows}


def test_rows_tell_speed_memory_and_waiting() -> None:
    rows = made_rows()
    assert (rows["against lerobot-train"]["value"], rows["against lerobot-train"]["bar"]) == (2.0, ">= 1.3")
    assert rows["ours"]["value"] == 5 * 48 / 1.0
    assert rows["lerobot-train"]["value"] == 5 * 48 / 2.0
    assert (rows["peak memory"]["value"], rows["peak memory"]["holds"]) == (0.9, True)
    assert not made_rows(ours_mb=1100)["peak memory"]["holds"]
    assert rows["waiting for data, lerobot-train"]["value"] == 25.0
    assert rows["waiting for data, ours"]["value"] == 0.0
    assert rows["decoding once"]["value"] == 4.0
    assert all(row["bar"] is None for row in made_rows(faster=None).values())  # a trial judges nothing


def test_other_models_are_not_compared() -> None:
    bench_train.check_same_model({"ours": Block(parameters=10000), "lerobot": Block(parameters=10005)})
    for theirs in (9999, 10100):
        with pytest.raises(RuntimeError, match="not the same model"):
            bench_train.check_same_model({"ours": Block(parameters=10000), "lerobot": Block(parameters=theirs)})


@pytest.mark.timeout(300)
def test_our_loop_is_the_real_one_and_rests_when_it_is_not_asked(tmp_path: Path) -> None:
    size = replace(bench_train.QUICK[1], batch=2, hidden_dim=32, layers=1, heads=2)
    clip = bench_train.make_clip(tmp_path / "clip", size)
    dataset = bench_train.make_dataset(tmp_path / "dataset", size.picture, episodes=1, frames=40)
    given = bench_train.commands(size, dataset, clip, "cpu", False, tmp_path)
    with bench_train.running("ours", given["ours"], 1, tmp_path) as loop:
        assert loop.start.steps == 1
        assert loop.start.decoding > 0
        state = Path(f"/proc/{loop.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert state == "T"
        block = loop.run(3)
        assert asdict(block)["steps"] == 3
        assert 0 <= block.waited < block.seconds
    assert loop.process.returncode is not None
    assert (tmp_path / "ours" / "config.yaml").exists()
