"""The parts of a training step, each against what it must be."""

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dit_policy_training.loop.optimization import make_optimizer, scaled_step
from dit_policy_training.loop.options import OptimizerConfig, TrainConfig
from dit_policy_training.loop.prefetch import Prefetched
from dit_policy_training.loop.trainer import AGREE_FREQ, AGREE_SECONDS, Trainer
from small_run import QUIET, rows_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")


class TwoGroups(nn.Module):
    """Stands for a policy: two groups of weights at different rates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(7, 5), nn.Linear(5, 3)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        return [
            {"params": list(self.first.parameters()), "lr": lr},
            {"params": list(self.second.parameters()), "lr": 0.1 * lr},
        ]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs)))


@pytest.mark.parametrize("kind", ["adam", "adamw"])
@pytest.mark.parametrize("grad_clip", [0.0, 0.05])
def test_a_step_is_torchs_own(kind: str, grad_clip: float) -> None:
    """The plain optimizer after clip_grad_norm_ on the mean's gradient, against one factor on the sum's."""
    config = OptimizerConfig(type=kind, lr=0.01, weight_decay=0.1, grad_clip=grad_clip)
    ours, theirs = TwoGroups(), TwoGroups()
    optimizer = make_optimizer(config, ours)
    plain = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind](
        theirs.parameter_groups(0.01), betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8, fused=False, foreach=False
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        inputs, target = torch.randn(4, 7, generator=generator), torch.randn(4, 3, generator=generator)
        optimizer.zero_grad()
        (ours(inputs) - target).square().sum().backward()
        norm = scaled_step(optimizer, torch.tensor(1 / 12), grad_clip)
        plain.zero_grad()
        (theirs(inputs) - target).square().mean().backward()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), grad_clip or float("inf"))
        plain.step()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
        assert not grad_clip or expected > grad_clip, "nothing was cut"
        for weight, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(weight, other, rtol=0, atol=1e-6)


def test_gradients_that_overflow_change_nothing_but_the_factor() -> None:
    """float16's loss is scaled; what overflows is left out, and the factor halved."""
    config = OptimizerConfig(lr=0.01, grad_clip=1.0)
    ours, plain = TwoGroups(), TwoGroups()
    optimizer, other = make_optimizer(config, ours), make_optimizer(config, plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inputs = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    for factor in (1.0, float("inf"), 1.0):
        before = [weight.detach().clone() for weight in ours.parameters()]
        optimizer.zero_grad()
        scaler.scale(factor * ours(inputs).square().sum()).backward()
        norm = scaled_step(optimizer, torch.tensor(1 / 12), 1.0, scaler)
        if factor == 1.0:
            other.zero_grad()
            plain(inputs).square().sum().backward()
            assert norm.item() == pytest.approx(scaled_step(other, torch.tensor(1 / 12), 1.0).item(), rel=1e-5)
        else:
            assert not norm.isfinite()
            assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))
            assert scaler.get_scale() == 512.0
    for weight, other_weight in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, other_weight, rtol=0, atol=1e-6)


class Waits(TorchDispatchMode):
    """Counts what would wait for a device: a number of a tensor asked for by Python."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_steps_between_rows_never_ask_for_a_number(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """But of what is on the host: whether the batch's state and actions are finite."""
    waited: list[int] = []
    step = Trainer._train_step

    def counted(self: Trainer, ready: Prefetched) -> Any:
        with Waits() as waits:
            result = step(self, ready)
        waited.append(waits.count)
        return result

    monkeypatch.setattr(Trainer, "_train_step", counted)
    encoder = config.policy.observation_encoder
    vision = replace(encoder.vision, random_shift=2, brightness=0.2)
    policy = replace(
        config.policy, state_noise=0.1, instruction_dropout=0.2, observation_encoder=replace(encoder, vision=vision)
    )
    Trainer(replace(config, policy=policy, train_steps=6), QUIET).train()
    on_the_host = 3  # the state twice, for the conditioning and as the actions' origin, and the actions
    assert len(waited) == 6
    assert max(waited) <= on_the_host


def test_a_row_is_the_mean_of_its_steps(config: TrainConfig) -> None:
    each = replace(config, log_freq=1, output_dir=config.output_dir.with_name("each"))
    for run in (config, each):
        Trainer(run, QUIET).train()
    losses = np.array([row["loss"] for row in rows_of(each.output_dir)]).reshape(-1, config.log_freq)
    assert [row["loss"] for row in rows_of(config.output_dir)] == pytest.approx(losses.mean(1), rel=1e-6)
    rows = rows_of(config.output_dir)
    assert {"data_share", "samples_per_s", "steps_per_s", "grad_norm", "lr", "seconds"} <= set(rows[0])
    assert all(0 <= row["data_share"] <= 1 for row in rows)


def test_batches_come_in_order_and_their_errors_where_they_are_due() -> None:
    def numbers() -> Iterator[dict[str, Any]]:
        yield from ({"number": number} for number in range(5))
        raise ValueError("the sixth cannot be decoded")

    ready = Prefetched(numbers(), CPU)
    assert [next(ready)["number"] for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="the sixth"):
        next(ready)
    ready.close()


def test_the_loop_does_not_begin_while_processes_are_forked() -> None:
    """What another thread holds locked at that moment, torch's random state in a step, nobody unlocks in a fork."""
    forked = []

    def slow() -> Iterator[dict[str, Any]]:
        time.sleep(0.2)
        forked.append(True)
        yield {}

    def broken() -> Iterator[dict[str, Any]]:
        raise ValueError("nothing can be decoded")
        yield {}

    Prefetched(slow(), CPU).close()
    assert forked
    ready = Prefetched(broken(), CPU)
    with pytest.raises(ValueError, match="nothing can be"):
        next(ready)
    ready.close()


@pytest.mark.parametrize(("a_step", "every"), [(0.01, AGREE_FREQ), (1.0, AGREE_SECONDS), (20.0, 1)])
def test_processes_agree_to_stop_within_seconds(a_step: float, every: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two, of which the other is told to stop; each step takes `a_step` seconds."""
    now = 0.0
    monkeypatch.setattr("dit_policy_training.loop.trainer.time.perf_counter", lambda: now)
    run = SimpleNamespace(_processes=2, _step=0, _agreed=0.0, _agreed_step=0, _agree_step=0)
    asked = []
    for run._step in range(1, 41):
        now += a_step
        told = torch.tensor([float(run._step >= 25), 2 * (now - run._agreed)])
        before = run._agreed_step
        stops = Trainer._told_to_stop(run, told, waited=False)  # type: ignore[arg-type]
        if run._agreed_step != before:
            asked.append(run._step)
        if stops:
            break
    assert asked[:3] == [1, 1 + every, 1 + 2 * every]
    assert 25 <= run._step == asked[-1] < 25 + every


def test_no_thread_and_no_open_batches_are_left() -> None:
    closed = threading.Event()

    def endless() -> Iterator[dict[str, Any]]:
        try:
            yield from ({"number": number} for number in itertools.count())
        finally:
            closed.set()

    ready = Prefetched(endless(), CPU)
    next(ready)
    ready.close()
    assert closed.is_set()
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


def test_float16_on_a_cpu_is_refused(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="amp_dtype float16 is for GPUs; a CPU has bfloat16"):
        Trainer(replace(config, use_amp=True, amp_dtype="float16"), QUIET)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("bad", ["loss", "norm"])
def test_weights_that_are_lost_are_told_before_they_are_saved(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    """A checkpoint may come before the row that tells the loss; a gradient may be lost where the loss is not."""
    step = Trainer._train_step

    def lost(self: Trainer, ready: Prefetched) -> Any:
        (loss, norm), stops = step(self, ready)
        if self._step == 7:
            loss, norm = (loss * float("nan"), norm) if bad == "loss" else (loss, norm * float("inf"))
        return torch.stack([loss, norm]), stops

    monkeypatch.setattr(Trainer, "_train_step", lost)
    named = {"loss": "the loss is nan at step 7", "norm": "the gradient is inf at step 7"}[bad]
    with pytest.raises(ValueError, match=rf"{named}: lower optimizer\.lr .*checkpoints/last, of step 4"):
        Trainer(replace(config, train_steps=20, save_freq=4, log_freq=100), QUIET).train()
    assert (config.output_dir / "checkpoints" / "last").resolve().name == "000004"
