"""The loop: batches to steps, steps to figures and checkpoints.

All that is random of a step is a function of (seed, step), so a run is the same whether it was interrupted or not. It
is drawn for the samples of the whole step (but for the transformer's dropout), so that one process or several, one
batch or an accumulated one make no difference. What a step computes stays on the device until a row is logged.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import draccus
import numpy as np
import torch
import transformers
import yaml
from rich.console import Console
from torch import Tensor

from dit_policy_ros.policy.checkpoint import save_checkpoint
from dit_policy_ros.policy.draws import Draws
from dit_policy_ros.policy.interop.form import embodiment_form
from dit_policy_training.data.frames import Frames, batches, gather, open_frames
from dit_policy_training.data.order import SampleOrder, row_weights, split_episodes
from dit_policy_training.data.sources import resolve
from dit_policy_training.data.table import load_tables
from dit_policy_training.data.windows import Windows
from dit_policy_training.judging.held_out import episodes_of
from dit_policy_training.judging.opening import unit_of
from dit_policy_training.loop import pictures
from dit_policy_training.loop.checkpoints import BEST, LAST, Checkpoints
from dit_policy_training.loop.continuing import check_same_run
from dit_policy_training.loop.failures import OutOfResources, disk_is_full, explained, free_bytes
from dit_policy_training.loop.interrupts import Interrupts
from dit_policy_training.loop.model_card import model_card
from dit_policy_training.loop.optimization import Ema, Rates, make_optimizer, scaled_step
from dit_policy_training.loop.options import TrainConfig
from dit_policy_training.loop.policies import new_policy, policy_of_run
from dit_policy_training.loop.prefetch import Prefetched
from dit_policy_training.loop.processes import make_accelerator
from dit_policy_training.loop.progress import TrainingProgress
from dit_policy_training.loop.state import Best, Counters, SavedState, read_state, state_bytes, writer
from dit_policy_training.loop.summary import command_to_go_on, ending, opening
from dit_policy_training.loop.tracking import METRICS, Tracker
from dit_policy_training.loop.validation import Validation

AGREE_FREQ, AGREE_SECONDS = 10, 5.0
"""When several processes ask each other whether one was told to stop: asking waits for the device, so after some steps;
but soon enough to save within the half a minute that torchrun leaves them.
"""


class Trainer:
    """A run: `train` does the steps. `policy` has the last step's weights, the checkpoints their average."""

    def __init__(self, config: TrainConfig, console: Console | None = None):
        """Everything that can be wrong is looked for here, before anything is written. Raises ValueError."""
        config.validate()
        self._config = config
        transformers.utils.logging.disable_progress_bar()  # it would write over ours
        self._accelerator = make_accelerator(config)
        self._main = self._accelerator.is_main_process
        self._console = (console or Console()) if self._main else Console(quiet=True)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self._checkpoints = Checkpoints(config.output_dir, config.keep_checkpoints)
        start, saved = config.checkpoint_path, None
        if start is not None and not config.finetune:
            saved = read_state(start := start.resolve())  # a link may lead elsewhere in a moment
        self._check_output(saved)
        with self._accelerator.main_process_first():  # one download is enough
            sources = resolve(config)
        self._table = load_tables(sources, config.embodiment)
        self._windows = Windows(self._table, config.policy.n_obs_steps, config.policy.horizon)
        self._rows, self._held_out = split_episodes(self._table, config.validation.episode_share, config.seed)
        self._notes = []
        if saved is not None:
            self._notes = check_same_run(config, saved, self._samples_per_step, self._table.fingerprint)
        self._order = self._make_order()
        torch.manual_seed(config.seed)
        self.policy = (
            policy_of_run(start)
            if saved and start
            else new_policy(config.policy, self._windows, config.checkpoint_path)
        )
        self.policy.to(self._accelerator.device).train()
        self._optimizer = make_optimizer(config.optimizer, self.policy)
        self._rates = Rates(config.scheduler, self._optimizer, config.train_steps)
        self._ema = Ema(self.policy, config.ema_decay) if config.ema_decay else None
        self._generator = torch.Generator(self._accelerator.device)
        self._step, self._saved_step, self._seconds_before = 0, 0, 0.0
        self._agreed, self._agreed_step, self._agree_step = 0.0, 0, 0  # when, at which step, at which step again
        self._pending: list[Tensor] = []  # (loss, norm of the gradient) of each step that no row tells yet
        self._best: Best | None = None
        self._goes_on_here = False
        self._settings = draccus.dump(config)
        if saved is not None:
            self._go_on_from(saved)
        if config.compile:
            # In place, so that the weights keep their names.
            for module in (self.policy.noise_predictor, *self.policy.observation_encoder.vision_encoders):
                module.compile()
        self._model = self._accelerator.prepare_model(self.policy)
        self._interrupts = Interrupts(launched=self._processes > 1)
        averaged = self._ema is not None
        weights = sum(tensor.nbytes for tensor in self.policy.state_dict().values())
        self._checkpoint_bytes = weights + state_bytes(self.policy, averaged)
        if free_bytes(config.output_dir) < self._checkpoint_bytes:
            raise OutOfResources(disk_is_full(config.output_dir, self._checkpoint_bytes))

    def train(self) -> Path:
        """Run to train_steps, or to a signal; returns the folder of the last checkpoint.

        Raises ValueError for a loss that is not finite, memory or disk that do not suffice, and pictures that cannot
        be read; the checkpoints there are stay.
        """
        config = self._config
        with explained(self._accelerator.device, config.output_dir, self._checkpoint_bytes):
            if self._step >= config.train_steps:
                self._console.print(
                    f"nothing to do: {self._step} of {config.train_steps} steps are done; --train_steps=MORE goes on"
                )
                return self._checkpoints.place(self._step)
            if self._main:
                self._prepare_output()
            with TrainingProgress(self._console, config.train_steps, self._step) as progress:
                self._run(progress)
            folder = self._checkpoints.place(self._saved_step)
            self._tell_end(folder)
            if self._processes > 1:
                self._accelerator.end_training()
            return folder

    @property
    def _processes(self) -> int:
        return int(self._accelerator.num_processes)

    @property
    def _samples_per_step(self) -> int:
        return self._config.batch_size * self._processes * self._config.gradient_accumulation_steps

    # What is there before the first step

    def _check_output(self, saved: SavedState | None) -> None:
        config, there = self._config, self._checkpoints.steps()
        for folder in (config.output_dir, *config.output_dir.parents):
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"output_dir {config.output_dir} cannot be made: {folder} is a file")
        if config.overwrite or not there:
            return
        last = self._checkpoints.linked(LAST) or there[-1]
        if not self._is_own(saved):
            linked = self._checkpoints.linked(LAST)  # none: the run was killed before the first link
            sound = self._checkpoints.folder / LAST if linked else self._checkpoints.place(last)
            raise ValueError(
                f"{config.output_dir} holds a run of {last} steps; choose another output_dir or give --overwrite=true. "
                f"To go on with it: {command_to_go_on(sound, self._processes)}"
            )
        if saved is not None and last > saved.counters.step:
            raise ValueError(
                f"{config.output_dir} has a later checkpoint, of step {last}: go on from it "
                f"({self._checkpoints.folder / LAST}), or give another output_dir, or --overwrite=true to lose what "
                f"comes after step {saved.counters.step}"
            )

    def _is_own(self, saved: SavedState | None) -> bool:
        """Whether the run goes on where it was, so that what stands in output_dir is of it."""
        return saved is not None and saved.folder.parent.parent == self._checkpoints.folder.resolve()

    def _go_on_from(self, saved: SavedState) -> None:
        counters = saved.counters
        self._goes_on_here = self._is_own(saved)
        self._step = self._saved_step = counters.step
        self._seconds_before = counters.seconds
        if counters.best and self._goes_on_here and self._checkpoints.place(counters.best.step).exists():
            self._best = counters.best  # elsewhere it would lead to nothing
        if self._ema is not None:
            self._ema.updates = counters.ema_updates  # its average are the checkpoint's weights
        self._pending = list(saved.restore(self.policy, self._optimizer).to(self._accelerator.device))
        if counters.scaler and self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(counters.scaler)
        started = yaml.safe_load(saved.settings)
        start = started["checkpoint_path"]
        origin = replace(
            self._config, checkpoint_path=Path(start) if start else None, finetune=started["finetune"], overwrite=False
        )
        self._settings = draccus.dump(origin)

    def _prepare_output(self) -> None:
        config = self._config
        config.output_dir.mkdir(parents=True, exist_ok=True)
        for left in self._checkpoints.clear():
            self._console.print(f"removed {left}, which an interrupted run left", highlight=False, soft_wrap=True)
        self._checkpoints.cut(self._step if self._goes_on_here else 0, self._best.step if self._best else None)
        (config.output_dir / "config.yaml").write_text(self._settings, encoding="utf-8")

    def _rows_so_far(self) -> list[dict[str, float]]:
        """Those of metrics.jsonl up to the checkpoint that the run goes on from."""
        if self._step == 0 or self._config.checkpoint_path is None:
            return []
        path = self._config.checkpoint_path.resolve().parent.parent / METRICS
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                break
            if row["step"] > self._step:
                break
            rows.append(row)
        return rows

    def _open_frames(self, progress: TrainingProgress) -> Frames:
        config, encoder = self._config, self.policy.observation_encoder
        resize: dict[str, Any] = {
            key: preprocessor.resize for key, preprocessor in zip(encoder.cameras, encoder.preprocessors, strict=True)
        }
        return open_frames(
            self._table,
            cache=config.cache,
            cache_limit_gb=config.cache_limit_gb,
            cache_disk_limit_gb=config.cache_disk_limit_gb,
            cache_dir=config.cache_dir,
            resize=resize,
            num_workers=config.num_workers,
            progress=progress.rich if self._main else None,
        )

    def _make_order(self) -> SampleOrder:
        config = self._config
        weights = row_weights(
            self._table,
            self._windows,
            task_weights=config.task_weights,
            balance_tasks=config.balance_tasks,
            idle_weight=config.idle_weight,
            idle_motion=config.idle_motion,
            n_action_steps=config.policy.n_action_steps,
            drop_n_last_frames=config.drop_n_last_frames,
            among=self._rows,
        )
        return SampleOrder(self._rows, weights[self._rows], config.batch_size * self._processes, config.seed)

    def _own_rows(self) -> Iterator[np.ndarray]:
        """This process's part of each batch from the next step on."""
        config = self._config
        first = self._accelerator.process_index * config.batch_size
        batch = self._step * config.gradient_accumulation_steps
        while True:
            yield self._order.at(batch)[first : first + config.batch_size]
            batch += 1

    # The loop

    def _run(self, progress: TrainingProgress) -> None:
        config = self._config
        rows = (len(self._rows), len(self._held_out))
        device = self._accelerator.device
        for line in opening(config, self._table, self.policy, rows, self._processes, device, self._notes):
            progress.say(line)
        frames = self._open_frames(progress)
        progress.say(f"pictures  {frames.description}")
        self._tracker = Tracker(config, config.output_dir, self._rows_so_far(), progress.say) if self._main else None
        self._validation = None
        if len(self._held_out):
            self._validation = Validation(self._table, self._windows, frames, self._held_out, config)
        if self._step == 0:
            self._draw_samples(gather(self._windows, frames, self._order.at(0)[: config.batch_size]))
        try:
            # A signal is noticed from here on, also while the first batch is made.
            with (
                self._interrupts.watched(),
                closing(Prefetched(batches(self._windows, frames, self._own_rows()), device)) as ready,
            ):
                self._steps(ready, progress)
        finally:
            if self._tracker is not None:
                self._tracker.close()

    def _steps(self, ready: Prefetched, progress: TrainingProgress) -> None:
        config = self._config
        self._started = self._agreed = time.perf_counter()
        self._agreed_step = self._step
        self._restart_clock(ready)
        while self._step < config.train_steps:
            figures, told = self._train_step(ready)
            self._pending.append(figures)
            progress.advance()
            ended = self._step == config.train_steps
            save = ended or self._step % config.save_freq == 0
            validate = self._validation is not None and (save or self._step % config.validation.freq == 0)
            log = ended or validate or self._step % config.log_freq == 0
            if log:
                row = self._row(ready) | (self._measured() if validate else {})
                if self._tracker is not None:
                    self._tracker.log(row)
                    progress.row(row)
                if validate:
                    self._draw_validation()
            stop = self._told_to_stop(told, log or save)
            if save or stop:
                if self._pending:
                    self._figures()  # nothing is saved of a run that is lost
                self._save(progress)
            if save or validate:
                self._restart_clock(ready)
            if stop and not ended:
                progress.say(f"stopped at step {self._step} of {config.train_steps}; it is saved. To go on:")
                progress.say(f"  {command_to_go_on(self._checkpoints.folder / LAST, self._processes)}")
                return

    def _train_step(self, ready: Prefetched) -> tuple[Tensor, Tensor]:
        """A step; returns (loss, norm of the gradient), and what the processes tell each other, on the device: how many
        were told to stop, and the sum of their seconds since they last asked.
        """
        config, device = self._config, self._accelerator.device
        rank, processes, batch_size = self._accelerator.process_index, self._processes, config.batch_size
        # What the loss's sum is divided by before it is known by what it must be: gradients stay in float16's range.
        scale = batch_size * config.policy.horizon * self._table.action.shape[1] * config.policy.objective.noise_draws
        # Of the transformer's dropout, which knows no generator.
        torch.manual_seed(_mixed(config.seed, self._step, rank + 1))
        self._rates.set(self._step)
        self._optimizer.zero_grad()
        sums = torch.zeros(4, device=device)
        for micro in range(config.gradient_accumulation_steps):
            last = micro == config.gradient_accumulation_steps - 1
            first = (micro * processes + rank) * batch_size
            self._generator.manual_seed(_mixed(config.seed, self._step, 0))
            draws = Draws(self._generator, slice(first, first + batch_size), self._samples_per_step)
            # Not a dict: DistributedDataParallel would move all of one to the device, and checking it there waits.
            batch: Mapping[str, Any] = MappingProxyType(next(ready))
            with nullcontext() if last else self._accelerator.no_sync(self._model):
                total, count = self._model(batch, draws)
                self._accelerator.backward(total / scale)
            sums[:2] += torch.stack([total.detach().float(), count.float()])
        sums[2].fill_(float(self._interrupts.asked))
        sums[3].fill_(time.perf_counter() - self._agreed)
        sums = self._accelerator.reduce(sums, "sum")
        total, count = sums[:2]
        count = count.clamp_min(1.0)
        # The gradients are the mean over processes of those of total / scale.
        norm = scaled_step(
            self._optimizer, processes * scale / count, config.optimizer.grad_clip, self._accelerator.scaler
        )
        if self._ema is not None:
            self._ema.update()
        self._step += 1
        return torch.stack([total / count, norm]), sums[2:]

    def _told_to_stop(self, told: Tensor, waited: bool) -> bool:
        """Whether to stop after this step. Several processes must agree; waited: the device has been waited for."""
        if self._processes == 1:
            return self._interrupts.asked
        if not waited and self._step < self._agree_step:
            return False
        stops, seconds = told.tolist()  # the same for all, and so is when they ask again
        a_step = seconds / self._processes / (self._step - self._agreed_step)
        self._agree_step = self._step + min(max(int(AGREE_SECONDS / max(a_step, 1e-6)), 1), AGREE_FREQ)
        self._agreed, self._agreed_step = time.perf_counter(), self._step
        return stops > 0

    # What is told

    def _restart_clock(self, ready: Prefetched) -> None:
        self._clock, self._waited, self._clocked_steps = time.perf_counter(), ready.waited, self._step

    def _row(self, ready: Prefetched) -> dict[str, float]:
        """The means over the steps since the last row."""
        loss, norm = self._figures()
        self._pending = []
        overflowed = ~np.isfinite(norm)
        seconds = max(time.perf_counter() - self._clock, 1e-9)
        steps_per_s = (self._step - self._clocked_steps) / seconds
        row = {
            "step": self._step,
            "loss": float(loss.mean()),
            "lr": self._optimizer.param_groups[0]["lr"],
            "grad_norm": float(norm[~overflowed].mean()) if not overflowed.all() else 0.0,
            "steps_per_s": steps_per_s,
            "samples_per_s": steps_per_s * self._samples_per_step,
            "data_share": (ready.waited - self._waited) / seconds,
            "seconds": self._seconds(),
        }
        if self._accelerator.scaler is not None:
            row["overflowed_steps"] = int(overflowed.sum())  # float16's, which changed nothing but the loss's factor
        self._restart_clock(ready)
        return row

    def _figures(self) -> tuple[np.ndarray, np.ndarray]:
        """Losses and norms of the gradient that no row tells yet, (n,) each.

        Raises ValueError if the weights are lost: by a loss that is not finite, or by a gradient where no scaler leaves
        such a step out.
        """
        loss, norm = np.array(torch.stack(self._pending).tolist()).T
        for name, values in (("loss", loss), ("gradient", norm)):
            lost = ~np.isfinite(values)
            if lost.any() and (name == "loss" or self._accelerator.scaler is None):
                place = int(lost.argmax())
                kept = self._checkpoints.linked(LAST)
                sound = f"go on from {self._checkpoints.folder / LAST}, of step {kept}" if kept else "start anew"
                raise ValueError(
                    f"the {name} is {values[place]} at step {self._step - len(values) + place + 1}: lower optimizer.lr "
                    f"or optimizer.grad_clip, and {sound}"
                )
        return loss, norm

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started

    def _averaged(self) -> AbstractContextManager[dict[str, Tensor]]:
        """The policy has the weights that are saved, inside; gives the last step's where they are others."""
        return nullcontext({}) if self._ema is None else self._ema.applied()

    def _measured(self) -> dict[str, float]:
        if not self._main or self._validation is None:
            return {}
        with self._averaged():
            return self._validation.measure(self.policy)

    def _draw_samples(self, batch: dict[str, Any]) -> None:
        if self._tracker is not None and self._config.tracking.pictures:
            path = self._config.output_dir / pictures.SAMPLES
            pictures.sample_frames(self.policy, batch, path)
            self._tracker.picture(path.stem, path, self._step)

    def _draw_validation(self) -> None:
        tracker, validation = self._tracker, self._validation
        if (
            tracker is None
            or validation is None
            or validation.predictions is None
            or not self._config.tracking.pictures
        ):
            return
        path = self._config.output_dir / pictures.PREDICTIONS
        pictures.predicted_actions(validation.predictions, self._table, path)
        tracker.picture(path.stem, path, self._step)

    def _draw_curves(self, tracker: Tracker) -> None:
        if tracker.rows and self._config.tracking.pictures:
            path = self._config.output_dir / pictures.CURVES
            pictures.curves(tracker.rows, path, unit_of(self._table.embodiment))
            tracker.picture(path.stem, path, self._step)

    # What is kept

    def _save(self, progress: TrainingProgress) -> None:
        self._saved_step = self._step
        if self._tracker is None:
            return
        folder = self._checkpoints.place(self._step)
        is_best = self._is_best(self._tracker.rows)
        counters = Counters(
            step=self._step,
            samples_per_step=self._samples_per_step,
            processes=self._processes,
            fingerprint=self._table.fingerprint,
            seconds=self._seconds(),
            ema_updates=self._ema.updates if self._ema is not None else 0,
            best=self._best,
            scaler=self._accelerator.scaler.state_dict() if self._accelerator.scaler is not None else {},
        )
        pending = torch.stack(self._pending) if self._pending else torch.zeros(0, 2)
        embodiment = self._table.embodiment
        described = embodiment.to_yaml() if embodiment is not None else embodiment_form(self.policy.config)
        with self._averaged() as live:
            state = writer(self.policy, live, self._optimizer, pending, counters, self._settings)
            save_checkpoint(folder, self.policy, described, self._card(self._tracker.rows), state)
        self._checkpoints.link(LAST, self._step)
        if is_best:
            self._checkpoints.link(BEST, self._step)
        self._checkpoints.thin()
        self._draw_curves(self._tracker)

    def _is_best(self, rows: list[dict[str, float]]) -> bool:
        """Whether the checkpoint of this step is the best so far; then it is kept in mind."""
        figures = ("validation_action_error", "validation_loss")
        row = rows[-1] if rows and rows[-1]["step"] == self._step else {}
        figure = next((name for name in figures if name in row), None)
        if figure is None or (self._best is not None and self._best.value <= row[figure]):
            return False
        self._best = Best(self._step, figure, row[figure])
        return True

    def _card(self, rows: list[dict[str, float]]) -> str:
        results = {
            "steps": f"{self._step} of {self._config.train_steps}",
            "duration": f"{self._seconds() / 60:.1f} minutes on {self._accelerator.device}",
            "loss": f"{np.mean([row['loss'] for row in rows[-5:]]):.4f}" if rows else "not logged yet",
            "weights": "the last step's" if self._ema is None else "their exponential moving average over the training",
            "torch": torch.__version__,
        }
        measured = [row for row in rows if "validation_action_error" in row]
        if measured:
            last = measured[-1]
            results["held-out episodes"] = (
                f"action error {last['validation_action_error']:.4g}, loss {last['validation_loss']:.4f} "
                f"at step {int(last['step'])}"
            )
        return model_card(self._table, self._settings, results, episodes_of(self._table, self._held_out))

    def _tell_end(self, folder: Path) -> None:
        done = f"step {self._step} of {self._config.train_steps}, {self._seconds() / 60:.1f} minutes"
        embodied = self._table.embodiment is not None
        last = self._checkpoints.folder / LAST
        for line in ending(last, f"{done} ({folder.name})", self._best, self._config.dataset_path, embodied):
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _mixed(*numbers: int) -> int:
    """A seed that follows from several numbers, and is unlike that of any others."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
