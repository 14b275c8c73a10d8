"""What a run held out is what is judged, and what it was trained on is told; both follow from its checkpoint."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dit_policy_training.compare import CompareConfig
from dit_policy_training.compare import run as compare
from dit_policy_training.diagnose import DiagnoseConfig
from dit_policy_training.diagnose import run as diagnose
from dit_policy_training.evaluate import EvaluateConfig
from dit_policy_training.evaluate import run as evaluate
from dit_policy_training.loop.options import ValidationConfig
from dit_policy_training.loop.trainer import Trainer
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from rich.console import Console
from small_run import QUIET, small_config

EPISODES, FRAMES = 15, 10
FEATURES = {
    "observation.state": {"dtype": "float32", "shape": (1,), "names": ["x"]},
    "observation.images.above": {"dtype": "image", "shape": (16, 16, 3), "names": ["height", "width", "channels"]},
    "action": {"dtype": "float32", "shape": (1,), "names": ["x"]},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many") / "many"
    written = LeRobotDataset.create("toy/many", fps=10, features=FEATURES, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    for _ in range(EPISODES):
        for _ in range(FRAMES):
            frame = {"observation.state": rng.random(1, np.float32), "action": rng.random(1, np.float32)}
            picture = rng.integers(256, size=(16, 16, 3), dtype=np.uint8)
            written.add_frame(frame | {"observation.images.above": picture, "task": "drive"})
        written.save_episode()
    written.finalize()
    return root


@pytest.fixture(scope="module")
def runs(data: Path, text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, set[int]]]:
    """A checkpoint and the episodes that its trainer drew no batch from, by name; c held out none."""
    found = {}
    for name, seed, share in (("a", 3, 0.3), ("b", 4, 0.3), ("c", 3, 0.0)):
        folder = tmp_path_factory.mktemp("run") / name
        config = small_config(data, folder, text_model)
        config = replace(config, train_steps=1, seed=seed, validation=ValidationConfig(share))
        trainer = Trainer(config, QUIET)
        drawn = np.concatenate([trainer._order.at(batch) for batch in range(EPISODES * FRAMES // 8 + 1)])
        found[name] = (trainer.train(), set(range(EPISODES)) - set((drawn // FRAMES).tolist()))
    return found


def said_by(program: object, config: object, path: Path) -> str:
    console = Console(record=True, width=300, file=path.open("w"))
    program(config, console)  # type: ignore[operator]
    return console.export_text()


def test_only_what_was_held_out_is_evaluated(
    runs: dict[str, tuple[Path, set[int]]], data: Path, tmp_path: Path
) -> None:
    checkpoint, held_out = runs["a"]
    assert 3 <= len(held_out) <= 6
    config = EvaluateConfig(checkpoint, data, output_dir=tmp_path / "out", samples=2, sampled_moments=2)
    said = said_by(evaluate, replace(config, held_out=True), tmp_path / "said")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {one["episode"] for one in report["by_episode"]} == held_out
    assert report["settings"]["episodes"] == "held out"
    assert f"Not trained on any of the {len(held_out)} judged episodes." in said
    said = said_by(evaluate, config, tmp_path / "said")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["trained_on"] == {"episodes": EPISODES, "trained_on": EPISODES - len(held_out)}
    sentence = f"Trained on {EPISODES - len(held_out)} of the {EPISODES} judged episodes"
    assert sentence in said
    assert sentence in (tmp_path / "out/report.html").read_text()


def test_only_what_was_held_out_is_diagnosed(
    runs: dict[str, tuple[Path, set[int]]], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dit_policy_training.judging import diagnosis

    asked: set[int] = set()
    listen = diagnosis.listen

    def watched(policy: object, windows: object, frames: object, rows: np.ndarray, **options: object) -> object:
        asked.update((rows // FRAMES).tolist())
        return listen(policy, windows, frames, rows, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(diagnosis, "listen", watched)
    checkpoint, held_out = runs["a"]
    config = DiagnoseConfig(checkpoint, data, output_dir=tmp_path, held_out=True, seconds=0.5)
    assert "Not trained on any" in said_by(diagnose, config, tmp_path / "said")
    assert asked == held_out
    said = said_by(diagnose, replace(config, held_out=False), tmp_path / "said")
    assert f"Trained on {EPISODES - len(held_out)} of the {EPISODES}" in said
    seen = json.loads((tmp_path / "diagnosis.json").read_text())["seen"]
    assert seen == {"episodes": EPISODES, "trained_on": EPISODES - len(held_out)}


def test_compared_is_what_none_was_trained_on(
    runs: dict[str, tuple[Path, set[int]]], data: Path, tmp_path: Path
) -> None:
    (a, of_a), (b, of_b), (c, of_c) = (runs[name] for name in "abc")
    assert of_a != of_b
    assert of_c == set()
    config = CompareConfig([a, b], data, output_dir=tmp_path, held_out=True)
    assert compare(config, QUIET)["settings"]["moments"] == FRAMES * len(of_a & of_b)
    report = compare(replace(config, held_out=False, checkpoints=[a, c]), QUIET)
    assert [one["trained_on"]["trained_on"] for one in report["checkpoints"]] == [EPISODES - len(of_a), EPISODES]
    with pytest.raises(ValueError, match=r"no episode of many that the checkpoints' runs all held out"):
        compare(replace(config, checkpoints=[a, c]), QUIET)
    with pytest.raises(ValueError, match=r"no episode of many that .*000001 held out: see --validation.episode_share"):
        compare(replace(config, checkpoints=[c]), QUIET)


def test_what_is_not_known_is_refused_if_asked_for_and_else_said_to_be_unknown(
    runs: dict[str, tuple[Path, set[int]]], data: Path, tmp_path: Path
) -> None:
    checkpoint, _ = runs["a"]
    bare, other = tmp_path / "bare", tmp_path / "other"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("training"))
    shutil.copytree(checkpoint, other)
    state = json.loads((other / "training/state.json").read_text())
    (other / "training/state.json").write_text(json.dumps(state | {"fingerprint": "of another"}))
    config = EvaluateConfig(bare, data, output_dir=tmp_path / "out", samples=2, sampled_moments=2, max_samples=9)
    for folder, said in ((bare, "has no folder training"), (other, "was trained on other data than many")):
        with pytest.raises(ValueError, match=said):
            evaluate(replace(config, checkpoint_dir=folder, held_out=True), QUIET)
        assert not (tmp_path / "out").exists()
    console = Console(record=True, width=400, file=(tmp_path / "said").open("w"))
    assert evaluate(config, console)["trained_on"] is None
    assert "Whether it was trained on the judged episodes is not known" in console.export_text()
    with pytest.raises(ValueError, match="either --held_out or the episodes"):
        evaluate(replace(config, held_out=True, episode=3), QUIET)


def test_the_model_card_names_them(runs: dict[str, tuple[Path, set[int]]]) -> None:
    checkpoint, held_out = runs["a"]
    told = ", ".join(str(number) for number in sorted(held_out))
    assert (
        f"- held out, not trained on: {len(held_out)} episodes: {told}\n" in (checkpoint / "model_card.md").read_text()
    )
    assert "- held out, not trained on: none\n" in (runs["c"][0] / "model_card.md").read_text()
