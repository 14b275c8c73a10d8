"""Which checkpoints stay, and what the links lead to, whenever a run was ended."""

from dataclasses import replace
from pathlib import Path

import pytest
from dit_policy_training.data.sources import DatasetSource
from dit_policy_training.loop.checkpoints import BEST, LAST, Checkpoints
from dit_policy_training.loop.options import TrainConfig, ValidationConfig
from dit_policy_training.loop.trainer import Trainer
from small_run import QUIET


@pytest.mark.parametrize("keep", [0, 1, 2, 3, 5])
def test_as_many_older_ones_are_kept_as_were_asked_for(tmp_path: Path, keep: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep)
    for step in range(1, 9):
        checkpoints.place(step).mkdir(parents=True)
        checkpoints.link(LAST, step)
        checkpoints.thin()
        assert checkpoints.steps() == list(range(max(1, step - keep), step + 1))


def test_going_back_leaves_links_that_lead_to_what_is_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.place(step).mkdir(parents=True)
    checkpoints.link(LAST, 3)
    checkpoints.link(BEST, 3)
    checkpoints.cut(2, best=1)
    assert (checkpoints.steps(), checkpoints.linked(LAST), checkpoints.linked(BEST)) == ([1, 2], 2, 1)
    checkpoints.cut(0)
    assert not list(checkpoints.folder.iterdir())


def test_nothing_of_the_run_that_is_overwritten_stays(config: TrainConfig) -> None:
    """Going on from elsewhere, as from step 0, what stands in output_dir is another run's, whatever its step."""
    config = replace(config, train_steps=4, save_freq=2)
    elsewhere = replace(config, output_dir=config.output_dir.with_name("elsewhere"))
    for run in (config, elsewhere):
        Trainer(run, QUIET).train()
    start = elsewhere.output_dir / "checkpoints" / LAST
    Trainer(replace(config, train_steps=6, checkpoint_path=start, overwrite=True), QUIET).train()
    assert {path.name for path in (config.output_dir / "checkpoints").iterdir()} == {"000006", LAST}


def test_a_run_killed_before_the_links_were_set_has_them_when_it_goes_on(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint just written knows that it is the best; the link must not stay with an older one."""
    config = replace(
        config,
        dataset_path=None,
        datasets=[DatasetSource(config.dataset_path)] * 4,
        validation=ValidationConfig(episode_share=0.2, freq=5, samples=8),
        save_freq=5,
        train_steps=15,
        keep_checkpoints=0,
    )
    link = Checkpoints.link

    def killed(self: Checkpoints, name: str, step: int) -> None:
        if step == 10 and name == BEST:
            raise KeyboardInterrupt
        link(self, name, step)

    monkeypatch.setattr(Trainer, "_measured", measured)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "link", killed)
        with pytest.raises(KeyboardInterrupt):
            Trainer(config, QUIET).train()
    last = config.output_dir / "checkpoints" / LAST
    Trainer(replace(config, checkpoint_path=last), QUIET).train()
    names = {path.name for path in (config.output_dir / "checkpoints").iterdir()}
    assert names == {"000010", "000015", LAST, BEST}
    assert (config.output_dir / "checkpoints" / BEST).resolve().name == "000010"


def measured(trainer: Trainer) -> dict[str, float]:
    """Better at step 10 than before and after."""
    error = {5: 3.0, 10: 1.0, 15: 2.0}[trainer._step]
    return {"validation_loss": error, "validation_action_error": error}
