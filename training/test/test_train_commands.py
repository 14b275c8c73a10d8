"""The command line of training, as it is typed: every option that docs/train.md names, in processes of their own."""

import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import yaml
from converting import Launcher
from dit_policy_training import cli
from dit_policy_training.loop import options
from dit_policy_training.loop.arguments import given, overlaid, with_checkpoint
from dit_policy_training.loop.options import TrainConfig
from dit_policy_training.loop.trainer import Trainer
from small_run import QUIET, rows_of
from transformers import CLIPVisionConfig, CLIPVisionModel, DINOv3ViTConfig, DINOv3ViTModel

from dit_policy_ros.policy.checkpoint import CheckpointError, load_checkpoint, load_config
from dit_policy_ros.policy.configuration import DiffusionConfig
from dit_policy_ros.policy.vision_configuration import ClipVisionConfig

TINY = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
SMALL = [
    "--policy.transformer.num_layers=1",
    "--policy.transformer.hidden_dim=16",
    "--policy.transformer.num_heads=2",
    "--device=cpu",
    "--tracking.pictures=false",
]
VISION = "--policy.observation_encoder.vision"


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vision towers with a few thousand weights, in Hugging Face's folders."""
    folder = tmp_path_factory.mktemp("backbones")
    CLIPVisionModel(CLIPVisionConfig(**TINY, image_size=32)).save_pretrained(folder / "clip")
    DINOv3ViTModel(DINOv3ViTConfig(**TINY, num_register_tokens=2)).save_pretrained(folder / "dinov3")
    return folder


@pytest.mark.timeout(300)  # processes that take seconds to start, on a busy machine a minute
def test_the_options_of_the_loop_and_the_longest_list(
    launcher: Launcher, dataset: Path, text_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [
        f"--dataset_path={dataset}",
        "--batch_size=3",
        "--train_steps=4",
        "--num_workers=1",
        "--save_freq=2",
        "--log_freq=1",
        f"--output_dir={run}",
        "--device=cpu",
        "--use_amp=true",
        "--seed=3",
        "--policy.horizon=6",
        "--policy.n_action_steps=4",
        "--policy.n_obs_steps=3",
        "--policy.objective.type=diffusion",
        "--policy.objective.num_train_timesteps=20",
        "--policy.objective.prediction_type=v_prediction",
        f"{VISION}.type=resnet",
        f"{VISION}.resize_shape=[224,224]",
        f"{VISION}.widths=[8,8]",
        f"{VISION}.stem_channels=8",
        f"{VISION}.norm_groups=4",
        f"--policy.observation_encoder.text.model={text_model}",
        *SMALL,
    ]
    status, output = launcher.run(arguments, "train")
    assert status == 0, output
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4]
    policy = load_checkpoint(run / "checkpoints" / "last")
    assert (policy.config.horizon, policy.config.n_action_steps, policy.config.n_obs_steps) == (6, 4, 3)
    assert policy.config.objective.prediction_type == "v_prediction"
    assert policy.config.observation_encoder.vision.resize_shape == (224, 224)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["000002", "000004", "last"]
    for words in (
        "3 episodes, 71 frames at 10 Hz, 2 instructions; none held out",
        "parameters trained",
        "cpu, bfloat16 products, float32 weights",
        "4 of 3 samples (3 a batch); an epoch is 23.7 steps, the run 0.2 epochs",
        f"{run}/checkpoints/last: step 4 of 4",
        f"-m dit_policy_training.evaluate --checkpoint_dir={run}/checkpoints/last --dataset_path={dataset}",
        "-m dit_policy_training.inference --checkpoint_dir=",
        f"robot.launch.py checkpoint:={run}/checkpoints/last embodiment:={run}/checkpoints/last/embodiment.yaml",
    ):
        assert words in output, words

    status, output = launcher.run(
        [f"--checkpoint_path={run}/checkpoints/last", "--train_steps=5", "--log_freq=1"], "train"
    )
    assert status == 0, output
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4, 5]
    status, output = launcher.run([f"--checkpoint_path={run}/checkpoints/last", "--policy.horizon=8"], "train")
    assert status == 1
    assert "policy.horizon: 6 -> 8" in output


@pytest.mark.timeout(300)  # processes that take seconds to start, on a busy machine a minute
@pytest.mark.parametrize("kind", ["clip", "dinov3"])
def test_vision_transformers(
    kind: str, launcher: Launcher, dataset: Path, text_model: Path, backbones: Path, tmp_path: Path
) -> None:
    """From their files once; a run that starts from the checkpoint's weights needs these no more."""
    run = tmp_path / "run"
    file = tmp_path / "settings.yaml"
    file.write_text("train_steps: 9\nbatch_size: 4\nlog_freq: 1\npolicy: {horizon: 8, n_action_steps: 4}\n")
    model = tmp_path / "text"
    model.symlink_to(text_model)
    arguments = [
        f"--config={file}",
        f"--dataset_path={dataset}",
        f"--output_dir={run}",
        "--train_steps=1",
        "--policy.objective.type=flow_matching",
        "--policy.objective.sigma_min=0.01",
        f"{VISION}.type={kind}",
        f"{VISION}.backbone={backbones / kind}",
        f"{VISION}.resize_shape=[32,32]",
        f"{VISION}.crop_shape=[32,32]",
        f"--policy.observation_encoder.text.model={model}",
        *SMALL,
    ]
    status, output = launcher.run(arguments, "train")
    assert status == 0, output
    config = load_config(run / "checkpoints" / "last")
    assert (config.horizon, config.objective.sigma_min) == (8, 0.01)
    model.unlink()
    tuned = [f"--checkpoint_path={run}/checkpoints/last", "--finetune", f"--dataset_path={dataset}"]
    options_of_its_own = ["--train_steps=1", "--batch_size=4", "--device=cpu", "--policy.n_action_steps=3"]
    status, output = launcher.run([*tuned, f"--output_dir={tmp_path / 'tuned'}", *options_of_its_own], "train")
    assert status == 0, output
    config = load_config(tmp_path / "tuned" / "checkpoints" / "last")
    assert (config.horizon, config.n_action_steps, config.objective.sigma_min) == (8, 3, 0.01)


def test_every_option_of_the_loop_is_explained(launcher: Launcher) -> None:
    status, text = launcher.run(["--help"], "train")
    assert status == 0
    entries = re.split(r"\n  --", text)[1:]
    explained = {entry.split()[0]: " ".join(re.split(r"\s{2,}", entry)[1:]) for entry in entries}
    wanted = set(leaves(TrainConfig))
    assert {"optimizer.lr", "validation.freq", "tracking.pictures", "cache"} <= wanted
    for option in wanted:
        assert option in explained, option
        words = explained[option].partition("(default:")[0]
        assert len(re.findall(r"[a-z]+", words)) >= 2, f"{option}: {explained[option]!r}"
    assert "--checkpoint_path=RUN/checkpoints/last" in text


def leaves(group: type, prefix: str = "") -> list[str]:
    """The options of the loop with dots between the names; the policy's are tested with the policy."""
    names = []
    for field in fields(group):
        kind = getattr(options, str(field.type), None) if isinstance(field.type, str) else field.type
        if field.name == "policy":
            continue
        names += leaves(kind, f"{field.name}.") if is_dataclass(kind) else [prefix + field.name]
    return names


def test_what_is_no_checkpoint_and_no_yaml_is_told(tmp_path: Path) -> None:
    last = tmp_path / "run" / "checkpoints" / "last"
    last.mkdir(parents=True)
    (last / "config.json").touch()
    for folder in (tmp_path / "run", last.parent):
        with pytest.raises(CheckpointError, match=rf"{folder} is a run.* its last is {last}"):
            with_checkpoint([f"--checkpoint_path={folder}"], tmp_path / "merged.yaml")
    (tmp_path / "file").touch()
    for name, said in (("nowhere", "does not exist"), ("file", "is no folder"), (".", r"has no config\.json")):
        with pytest.raises(CheckpointError, match=rf"{said}; a run's checkpoints are as RUN/checkpoints/last"):
            with_checkpoint(["--finetune", f"--checkpoint_path={tmp_path / name}"], tmp_path / "merged.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("policy: {horizon: [1,\n")
    with pytest.raises(ValueError, match=r"(?s)broken\.yaml is not YAML: .*line 2"):
        with_checkpoint([f"--config={broken}"], tmp_path / "merged.yaml")
    broken.write_text("- horizon\n")
    for file, said in ((broken, "holds no settings"), (tmp_path / "absent.yaml", "there is no such file")):
        with pytest.raises(ValueError, match=said):
            with_checkpoint([f"--config={file}", f"--checkpoint_path={last}"], tmp_path / "merged.yaml")


def test_a_checkpoints_settings_lie_under_those_that_are_given(config: TrainConfig, tmp_path: Path) -> None:
    Trainer(config, QUIET).train()
    last = config.output_dir / "checkpoints" / "last"
    file = tmp_path / "mine.yaml"
    file.write_text("log_freq: 7\nscheduler: {type: constant}\n")
    merged = tmp_path / "merged.yaml"
    arguments = with_checkpoint([f"--config={file}", "--checkpoint_path", str(last), "--seed=1"], merged)
    assert arguments == [f"--config_path={merged}", "--checkpoint_path", str(last), "--seed=1"]
    settings = yaml.safe_load(merged.read_text())
    assert (settings["log_freq"], settings["scheduler"]["type"]) == (7, "constant")
    assert (settings["batch_size"], settings["output_dir"]) == (8, str(config.output_dir))
    assert settings["scheduler"]["warmup_steps"] == config.scheduler.warmup_steps

    with_checkpoint(["--finetune", f"--checkpoint_path={last}"], merged)
    settings = yaml.safe_load(merged.read_text())
    assert list(settings) == ["policy"]
    assert "input_features" not in settings["policy"]
    assert settings["policy"]["horizon"] == 8
    assert with_checkpoint(["--seed=1"], merged) == ["--seed=1"]

    # The dataset may have moved, also into a mixture: the checkpoint's is no second one beside it.
    moved = f"--datasets=[{{path: {config.dataset_path}}}]"
    going_on = cli.parse(TrainConfig, with_checkpoint([moved, f"--checkpoint_path={last}"], merged))
    assert going_on.dataset_path is None
    assert Trainer(going_on, QUIET).train() == last.resolve()
    # A job that began by fine-tuning is started again with the same words, and these behind them.
    again = ["--finetune", "--overwrite", "--checkpoint_path=elsewhere"]
    again += [f"--checkpoint_path={last}", "--finetune=false", "--overwrite=false"]
    going_on = cli.parse(TrainConfig, with_checkpoint(again, merged))
    assert (going_on.checkpoint_path, going_on.finetune, going_on.overwrite) == (last, False, False)
    assert going_on.batch_size == config.batch_size
    # Another objective has other options: those of the checkpoint's would not fit it.
    other = ["--finetune", f"--checkpoint_path={last}", "--policy.objective.type", "diffusion"]
    other += [f"--dataset_path={config.dataset_path}", f"--output_dir={tmp_path / 'other'}"]
    tuned = cli.parse(TrainConfig, with_checkpoint(other, merged))
    assert isinstance(tuned.policy.objective, DiffusionConfig)
    assert tuned.policy.horizon == 8
    assert Trainer(tuned, QUIET).policy.config.objective == DiffusionConfig()


def test_what_a_command_line_says_of_an_option() -> None:
    arguments = ["--a=1", "--b", "2", "--c", "--d=x=y"]
    assert [given(arguments, name) for name in "abcde"] == ["1", "2", "true", "x=y", ""]


def test_settings_over_settings() -> None:
    base = {"lr": 1, "vision": {"type": "clip", "backbone": "b", "crop": [1, 2]}, "kept": {"a": 1, "b": 2}}
    over = {"lr": 2, "vision": {"type": "resnet", "widths": [8]}, "kept": {"b": 3}}
    assert overlaid(base, over) == {"lr": 2, "vision": {"type": "resnet", "widths": [8]}, "kept": {"a": 1, "b": 3}}


def test_what_can_be_known_before_a_picture_is_decoded_is(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task_weights names instructions that no dataset has"):
        Trainer(replace(config, task_weights={"polish the moon": 2.0}), QUIET)
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=rf"output_dir {output} cannot be made: {tmp_path / 'file'} is a file"):
            Trainer(replace(config, output_dir=output), QUIET)
    assert not config.output_dir.exists()


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (f"{VISION}.resize_shape=224", f"a list, as {VISION}.resize_shape='[224, 224]'"),
        (f"{VISION}.resize_shape=[224]", f"2 values, as {VISION}.resize_shape='[A, B]'"),
        (f"{VISION}.brightness=dim", "a number"),
        ("--policy.objective.denoising_steps=few", "a whole number"),
        ("--optimizer=adam", "its options, each by itself, such as --optimizer.type=adam"),
        ("--policy.objective=diffusion", "its options, each by itself, such as --policy.objective.type=diffusion"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_in_words(
    argument: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.parse(TrainConfig, ["--dataset_path=x", "--output_dir=y", argument])
    option, _, value = argument.partition("=")
    assert capsys.readouterr().err.startswith(f"error: {option} is '{value}'; expected {expected}\n")


def test_what_yaml_reads_as_something_else_stays_what_it_is(tmp_path: Path) -> None:
    given = ["--dataset_path=x", "--output_dir=y", f"{VISION}.text_pooling", f"{VISION}.backbone=off", "--cache=off"]
    config = cli.parse(TrainConfig, given)
    assert config.cache == "off"
    (tmp_path / "file.yaml").write_text("cache: off\n")
    assert cli.parse(TrainConfig, [f"--config={tmp_path / 'file.yaml'}", "--output_dir=y"]).cache == "off"
    vision = config.policy.observation_encoder.vision
    assert isinstance(vision, ClipVisionConfig)
    assert (vision.text_pooling, vision.backbone) == (True, "off")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--train_step=60", "--train_steps"),
        ("--policy.transformer.num_layer=4", "--policy.transformer.num_layers"),
        (f"{VISION}.widhts=[8]", f"{VISION}.widths"),
    ],
)
def test_an_option_that_is_not_there_is_told_with_the_one_meant(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.parse(TrainConfig, ["--dataset_path=x", "--output_dir=y", typed])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"{typed.partition('=')[0]}: did you mean {meant}?"
