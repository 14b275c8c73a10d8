"""What continues a run exactly, in the folder `training` of a checkpoint. No pickle.

state.safetensors   the last step's weights (where the checkpoint's are their average), the optimizer's moments, and
                    losses that no row of metrics.jsonl tells yet
state.json          counters, and what a run that goes on must agree with
config.yaml         the run's settings, which are those of the run that goes on

The order of samples, the noise, the augmentation and the learning rate are functions of the seed and the step, so the
step is all of their state.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from dit_policy_ros.policy.checkpoint import CheckpointError, read_json, write_json, write_tensors

FOLDER = "training"
TENSORS, COUNTERS, SETTINGS = "state.safetensors", "state.json", "config.yaml"
FORMAT_VERSION = 1
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Best:
    """The checkpoint with the lowest figure on the episodes that are held out."""

    step: int
    figure: str  # such as validation_action_error
    value: float


@dataclass(frozen=True)
class Counters:
    """What a run has come to at a checkpoint."""

    step: int
    samples_per_step: int  # batch_size x processes x gradient_accumulation_steps
    processes: int
    fingerprint: str  # of the data
    seconds: float  # that the run has taken
    ema_updates: int = 0
    best: Best | None = None
    scaler: dict[str, float] = field(default_factory=dict)  # of float16: its state_dict
    torch: str = torch.__version__
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class SavedState:
    """The state of a checkpoint, its tensors still on disk."""

    folder: Path
    counters: Counters
    settings: str  # YAML

    def restore(self, policy: nn.Module, optimizer: Optimizer) -> Tensor:
        """Puts the last step's weights and the moments into their places; returns the losses not told, (n, 2).

        Raises CheckpointError if they are not of this policy.
        """
        path = self.folder / TENSORS
        try:
            with safe_open(path, framework="pt") as file:
                _restore_weights(file, policy)
                _restore_moments(file, policy, optimizer)
                pending: Tensor = file.get_tensor("pending")
                return pending
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} cannot be read, or is not of this policy ({str(error).splitlines()[0]}): copy the whole "
                "checkpoint again, or go on from another one of the run"
            ) from error


def writer(
    policy: nn.Module,
    live: Mapping[str, Tensor],
    optimizer: Optimizer,
    pending: Tensor,
    counters: Counters,
    settings: str,
) -> Callable[[Path], None]:
    """What save_checkpoint calls to add the state. live: the last step's weights, where the policy's are not those."""

    def write(checkpoint: Path) -> None:
        folder = checkpoint / FOLDER
        folder.mkdir()
        tensors = {f"live.{name}": weight for name, weight in live.items()}
        tensors |= dict(_moments(policy, optimizer)) | {"pending": pending}
        write_tensors(tensors, folder / TENSORS)
        write_json(folder / COUNTERS, asdict(counters))
        (folder / SETTINGS).write_text(settings, encoding="utf-8")

    return write


def state_bytes(policy: nn.Module, averaged: bool) -> int:
    """How many bytes of a checkpoint its state will be."""
    trained = sum(weight.nbytes for weight in policy.parameters() if weight.requires_grad)
    return trained * (3 if averaged else 2)


def read_state(checkpoint: Path) -> SavedState:
    """The state of a checkpoint. Raises CheckpointError for one that has none, or another version's."""
    folder = checkpoint / FOLDER
    if not folder.is_dir():
        there = "" if checkpoint.exists() else " (it does not exist)"
        raise CheckpointError(
            f"{checkpoint} holds no {FOLDER}/{there}: a run cannot go on from it. It was converted from another "
            "program's, or copied without it. Its weights can start a new run: --finetune --output_dir=NEW"
        )
    content = read_json(folder / COUNTERS)
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / COUNTERS}: format_version is {version}, this version of dit_policy_training reads "
            f"{FORMAT_VERSION}: go on with the version that wrote it, or start anew from the weights with --finetune"
        )
    try:
        best = content.pop("best")
        counters = Counters(**content, best=Best(**best) if best else None)
        settings = (folder / SETTINGS).read_text(encoding="utf-8")
    except (KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{folder} is damaged ({error}): copy the whole checkpoint again") from error
    return SavedState(folder, counters, settings)


def _moments(policy: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's tensors by their weight's name; `steps` counts each weight's, in the order of the names."""
    states = [
        (name, optimizer.state[weight]) for name, weight in policy.named_parameters() if weight in optimizer.state
    ]
    for name, state in states:
        for moment in MOMENTS:
            yield f"{moment}.{name}", state[moment]
    steps = [state["step"].reshape(1) for _, state in states]
    yield "steps", torch.cat(steps) if steps else torch.zeros(0)


def _restore_weights(file: Any, policy: nn.Module) -> None:
    live = {name.removeprefix("live.") for name in file.keys() if name.startswith("live.")}  # noqa: SIM118
    weights = dict(policy.named_parameters())
    if live and (missing := {name for name, weight in weights.items() if weight.requires_grad} - live):
        raise RuntimeError(f"it lacks {', '.join(sorted(missing))}")
    with torch.no_grad():
        for name in live:
            weights[name].copy_(file.get_tensor(f"live.{name}"))


def _restore_moments(file: Any, policy: nn.Module, optimizer: Optimizer) -> None:
    there = set(file.keys())
    names = [name for name, _ in policy.named_parameters() if f"{MOMENTS[0]}.{name}" in there]
    weights = dict(policy.named_parameters())
    for name, step in zip(names, file.get_tensor("steps"), strict=True):
        weight = weights[name]
        state = optimizer.state[weight]
        state["step"] = step.clone().to(weight.device)
        for moment in MOMENTS:
            state[moment] = torch.empty_like(weight).copy_(file.get_tensor(f"{moment}.{name}")).detach()
