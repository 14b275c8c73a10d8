"""Training runs of a tiny policy on the toy robot's dataset."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dit_policy_training import cli
from dit_policy_training.data.frames import gather, open_frames
from dit_policy_training.data.table import load_table
from dit_policy_training.data.windows import Windows
from dit_policy_training.loop.optimization import Ema, lr_factor
from dit_policy_training.loop.options import OptimizerConfig, SchedulerConfig, TrackingConfig, TrainConfig
from dit_policy_training.loop.trainer import Trainer
from small_run import QUIET, rows_of
from torch import nn

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.policy.checkpoint import load_checkpoint
from dit_policy_ros.policy.configuration import FlowMatchingConfig, PolicyConfig

ROOT = Path(__file__).parents[2]


def test_a_run_learns_and_leaves_a_checkpoint_that_predicts(
    config: TrainConfig, dataset: Path, embodiment: Embodiment, no_network: None
) -> None:
    config = replace(config, train_steps=120, save_freq=80, tracking=TrackingConfig())
    folder = Trainer(config, QUIET).train()
    rows = rows_of(config.output_dir)
    assert [row["step"] for row in rows] == list(range(5, 121, 5))
    loss = [row["loss"] for row in rows]
    assert np.mean(loss[-5:]) < 0.5 * loss[0]
    for picture in ("samples.png", "curves.png"):
        assert (config.output_dir / picture).read_bytes()[:4] == b"\x89PNG"
    checkpoints = config.output_dir / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["000080", "000120", "last"]
    assert (checkpoints / "last").resolve() == folder

    policy = load_checkpoint(checkpoints / "last")
    assert policy.config.tasks == ["push the red block", "push the blue block"]
    assert policy.config.action_state_indices == [1, 0]
    assert list(policy.config.cameras) == ["observation.images.side", "observation.images.hand"]
    assert Embodiment.load(checkpoints / "last" / "embodiment.yaml") == embodiment
    table = load_table(dataset)
    batch = gather(Windows(table, 2, 8), open_frames(table), np.arange(len(table)))
    predicted = policy.predict_chunk(batch, generator=torch.Generator().manual_seed(0))
    assert predicted.shape == (len(table), 7, 2)
    keep = ~batch["action_is_pad"][:, 1:]
    error = (predicted - batch["action"][:, 1:]).abs()[keep].mean()
    standing_still = (batch["observation.state"][:, -1:, [1, 0]] - batch["action"][:, 1:]).abs()[keep].mean()
    assert error < 0.7 * standing_still
    card = (checkpoints / "last" / "model_card.md").read_text()
    for expected in ("3 episodes", "`push the blue block`: 1", "turn, lift", "side 48x32", "steps: 120 of 120"):
        assert expected in card


def test_the_average_of_the_weights_is_what_is_saved(config: TrainConfig) -> None:
    trainer = Trainer(config, QUIET)
    saved = load_checkpoint(trainer.train()).state_dict()
    live = trainer.policy.state_dict()
    trained = {name for name, weight in trainer.policy.named_parameters() if weight.requires_grad}
    differing = {name for name in live if not torch.equal(saved[name], live[name])}
    assert differing <= trained
    assert len(differing) > len(trained) / 2

    raw = Trainer(replace(config, ema_decay=0.0, output_dir=config.output_dir.with_name("raw")), QUIET)
    saved = load_checkpoint(raw.train()).state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in raw.policy.state_dict().items())


def test_ema_is_the_recurrence_it_says() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema, expected = Ema(model, 0.5), 1.0
    for n in range(1, 12):
        nn.init.constant_(model.weight, float(n))
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    with ema.applied():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 11.0


def test_schedule() -> None:
    cosine = SchedulerConfig("cosine", warmup_steps=10)
    assert [lr_factor(cosine, step, 110) for step in (0, 4, 9, 10, 60, 110)] == pytest.approx([0.1, 0.5, 1, 1, 0.5, 0])
    constant = SchedulerConfig("constant", warmup_steps=0)
    assert [lr_factor(constant, step, 110) for step in (0, 50, 109)] == [1, 1, 1]


def test_the_same_seed_gives_the_same_losses(config: TrainConfig) -> None:
    def losses(seed: int, name: str) -> list[float]:
        run = replace(config, seed=seed, output_dir=config.output_dir / name, train_steps=10)
        Trainer(run, QUIET).train()
        return [row["loss"] for row in rows_of(run.output_dir)]

    assert losses(1, "a") == losses(1, "b") != losses(2, "c")


def test_fine_tuning_starts_from_a_checkpoints_weights(config: TrainConfig) -> None:
    first = Trainer(replace(config, train_steps=40), QUIET)
    checkpoint = first.train()
    again = replace(config, checkpoint_path=checkpoint, finetune=True, output_dir=config.output_dir.with_name("again"))
    second = Trainer(again, QUIET)
    started = {name: weight.clone() for name, weight in second.policy.state_dict().items()}
    saved = load_checkpoint(checkpoint).state_dict()
    assert all(torch.equal(started[name], weight) for name, weight in saved.items())
    second.train()
    assert rows_of(again.output_dir)[0]["step"] == 5
    assert rows_of(again.output_dir)[0]["loss"] < rows_of(config.output_dir)[0]["loss"]

    wider = replace(config.policy, transformer=replace(config.policy.transformer, hidden_dim=32))
    with pytest.raises(ValueError, match="another architecture") as told:
        Trainer(replace(again, policy=wider, output_dir=config.output_dir.with_name("wider")), QUIET)
    lines = str(told.value).splitlines()
    groups = [line.partition(":")[0].removeprefix("  - ") for line in lines if line.startswith("  - ")]
    other = {"noise_predictor.transformer_blocks", "noise_predictor.input_proj", "observation_encoder.text_encoder"}
    assert other <= set(groups)
    assert len(groups) == len(set(groups))  # a line a group, not one a tensor
    assert any("(16,) there, (32,) here" in line for line in lines)


def test_pictures_are_streamed_where_the_cache_does_not_fit(config: TrainConfig) -> None:
    run = replace(config, cache_limit_gb=0.0, cache_disk_limit_gb=0.0, num_workers=0, train_steps=3, log_freq=1)
    Trainer(run, QUIET).train()
    cached = replace(run, cache_limit_gb=1.0, output_dir=config.output_dir.with_name("cached"))
    Trainer(cached, QUIET).train()
    streamed_loss, cached_loss = ([row["loss"] for row in rows_of(r.output_dir)] for r in (run, cached))
    assert streamed_loss == cached_loss  # to the last bit: a run may go on where there is less memory


def test_bfloat16(config: TrainConfig) -> None:
    def losses(use_amp: bool) -> list[float]:
        run = replace(config, use_amp=use_amp, output_dir=config.output_dir / str(use_amp))
        Trainer(run, QUIET).train()
        return [row["loss"] for row in rows_of(run.output_dir)]

    half, full = losses(True), losses(False)
    assert half != full
    assert half == pytest.approx(full, rel=0.1)


def test_command_line_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("dataset_path: data\noutput_dir: out\nbatch_size: 7\npolicy: {horizon: 20, n_obs_steps: 3}\n")
    for flag in ("--config", "--config_path"):
        config = cli.parse(
            TrainConfig,
            [
                f"{flag}={file}",
                "--policy.horizon=26",
                "--policy.objective.type=flow_matching",
                "--policy.observation_encoder.vision.type=resnet",
                "--policy.observation_encoder.vision.resize_shape=[32,40]",
                "--policy.transformer.num_layers=3",
                "--optimizer.type=adam",
            ],
        )
        assert (config.batch_size, config.policy.n_obs_steps, config.policy.horizon) == (7, 3, 26)
        assert isinstance(config.policy.objective, FlowMatchingConfig)
        assert config.policy.observation_encoder.vision.resize_shape == (32, 40)
        assert (config.policy.transformer.num_layers, config.optimizer.type) == (3, "adam")
        assert config.policy.n_action_steps == PolicyConfig().n_action_steps


@pytest.mark.parametrize("preset", sorted(path.name for path in (ROOT / "config" / "training").glob("*.yaml")))
def test_presets_are_valid(preset: str, dataset: Path) -> None:
    config = cli.parse(
        TrainConfig,
        [f"--config={ROOT / 'config/training' / preset}", f"--dataset_path={dataset}", "--output_dir=x"],
    )
    table = load_table(dataset)
    config.validate()
    replace(
        config.policy,
        input_features=table.input_features,
        output_features=table.output_features,
        action_state_indices=[1, 0],
    ).validate()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dataset_path=x", "--output_dir=y", "--batch_siz=3"], "batch_siz"),
        (
            ["--dataset_path=x", "--output_dir=y", "--batch_size=many"],
            "batch_size is 'many'; expected a whole",
        ),
        (["--dataset_path=x"], "Missing required field(s) `output_dir`"),
        (["--config=absent.yaml"], "absent.yaml"),
        (["--dataset_path=x", "--output_dir=y", "--policy.objective.type=gan"], "gan"),
        (
            ["--dataset_path=x", "--output_dir=y", "--policy.n_action_steps=99"],
            "\n  - n_action_steps 99 exceeds horizon",
        ),
    ],
)
def test_bad_arguments_are_told_in_words(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.parse(TrainConfig, args)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_settings_that_cannot_be_are_refused_before_anything_is_written(config: TrainConfig, tmp_path: Path) -> None:
    bad = replace(config, batch_size=0, ema_decay=1.0, optimizer=OptimizerConfig(lr=0.0))
    with pytest.raises(ValueError, match=r"batch_size must.*\n.*ema_decay must.*\n.*optimizer\.lr must"):
        Trainer(bad, QUIET)
    with pytest.raises(ValueError, match=r"absent is not a LeRobotDataset"):
        Trainer(replace(config, dataset_path=tmp_path / "absent"), QUIET)
    with pytest.raises(ValueError, match=r"n_action_steps 9 exceeds"):
        Trainer(replace(config, policy=replace(config.policy, n_action_steps=9)), QUIET)
    assert not config.output_dir.exists()
    Trainer(replace(config, train_steps=1), QUIET).train()
    with pytest.raises(ValueError, match=r"holds a run of 1 steps; choose another output_dir or give --overwrite=true"):
        Trainer(config, QUIET)
    Trainer(replace(config, train_steps=2, save_freq=2, overwrite=True), QUIET).train()
    checkpoints = config.output_dir / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["000002", "last"]


def test_a_loss_that_is_not_finite_ends_the_run(config: TrainConfig) -> None:
    trainer = Trainer(replace(config, log_freq=1), QUIET)
    with torch.no_grad():
        next(trainer.policy.noise_predictor.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the loss is nan at step 1: lower optimizer\.lr"):
        trainer.train()
    assert not (config.output_dir / "checkpoints").exists()
