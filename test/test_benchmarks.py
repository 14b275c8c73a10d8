"""The benchmarks' scripts: what they build, the rows they make and how they report; the figures are for real runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import bench_gpu
import bench_policy
import bench_report
import pytest
import torch

TINY = replace(bench_policy.QUICK, step_repeats=2, chunk_repeats=2)
FIELDS = {"name", "value", "unit", "bar", "holds", "how"}


def test_a_ratio_is_the_median_of_pairs_with_its_spread() -> None:
    row = bench_report.ratio_row("x", [4.0, 9.0, 8.0], [2.0, 3.0, 8.0], bar=2.0, how="so")
    assert (row["value"], row["bar"], row["holds"]) == (2.0, ">= 2.0", True)
    assert "quartiles 1.00 to 3.00" in row["how"]
    assert not bench_report.ratio_row("x", [4.0, 4.0], [4.0, 4.0], bar=2.0, how="")["holds"]
    assert not bench_report.figure_row("x", 1.31, "times", "", at_most=1.3)["holds"]


def test_the_report_is_written_and_tells_by_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(bench_report, "FOLDER", tmp_path)
    good = bench_report.figure_row("good", 1.0, "ms", "how", at_most=2.0)
    bad = bench_report.figure_row("bad", 3.0, "ms", "how", at_most=2.0)
    assert bench_report.publish("part", [good], device="a GPU", date="2026-11-22") == 0
    written = json.loads((tmp_path / "part.json").read_text())
    assert written["machine"]["device"] == "a GPU"
    assert written["rows"] == [good]
    assert bench_report.publish("part", [good, bad]) == 1
    out = capsys.readouterr().out
    assert out.rindex("bad") < out.rindex("good")  # what does not hold comes first


def test_the_gpus_rows_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where the graphs are none, and without the compiler."""
    rows = bench_gpu.measure(TINY, "cpu", compiles=False)
    assert all(set(row) == FIELDS for row in rows)
    named = {row["name"]: row for row in rows}
    for precision in ("fp32", "bf16"):
        assert named[f"loop, {precision}, graphs, against eager"]["bar"] == ">= 10.0"
        assert named[f"loop, {precision}, no graphs, against eager"]["bar"] is None
        assert named[f"chunk, {precision}, graphs"]["bar"] == "<= 5"
    assert named["verification, fp32, graphs, transformer"]["holds"]
    json.dumps(rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what it says where there is no CUDA")
def test_without_cuda_the_gpus_benchmark_says_so(capsys) -> None:
    assert bench_gpu.main(["--quick"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> bench_policy.Pair:
    return bench_policy.make_pair(TINY, tmp_path_factory.mktemp("pair"))


def test_both_sides_have_the_same_weights(pair: bench_policy.Pair) -> None:
    batch = bench_policy.make_batch(TINY)
    noise = torch.randn(1, 32, bench_policy.JOINTS)
    with torch.inference_mode():
        expected = bench_policy.their_normalised(pair, bench_policy.their_batch(pair, batch), noise)
        torch.testing.assert_close(pair.ours.predict_chunk(batch, noise=noise), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1
    assert bench_policy.load("read", pair.native)["seconds"] > 0


def test_growth_has_each_subject(pair: bench_policy.Pair) -> None:
    engines = {"fp32": bench_policy.PolicyEngine(pair.ours)}
    with torch.inference_mode():
        assert set(bench_policy.frame_seconds(pair, engines, TINY)) == {"LeRobot", "fp32"}
        assert set(bench_policy.sampling_seconds(pair, TINY, cameras=3)) == {"LeRobot", "fp32", "bf16"}
