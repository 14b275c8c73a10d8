"""`python -m dit_policy_training.to_bag`: an episode of a dataset back to a bag of the embodiment's topics.

To play it to the policy node (`ros2 bag play`), or to look at it in any viewer of bags.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rosbags.interfaces import Connection, Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import StoragePlugin, Writer

from dit_policy_ros.embodiment import Embodiment
from dit_policy_training import cli
from dit_policy_training.conversion.layout import image_key
from dit_policy_training.conversion.message_types import definition_to_write, types_to_write
from dit_policy_training.conversion.reloaded import Reel, Reloaded
from dit_policy_training.conversion.replay import Numbers, Outgoing, Replay, ReplayError
from dit_policy_training.conversion.times import Ticks


@dataclass
class ToBagConfig:
    """An episode to an mcap bag."""

    dataset: Path  # a dataset that convert made: it holds its embodiment
    episode: int  # its number, from 0
    output: Path  # folder of the bag
    start: int = 1_700_000_000  # s since 1970, of the first frame
    jpeg_quality: int = 95  # 1 to 100, of cameras whose transport is compressed
    overwrite: bool = False  # replace `output` if it is a bag


def to_bag(config: ToBagConfig) -> list[str]:
    """Write the bag; returns what it could not carry, in sentences. Raises ReplayError, EmbodimentError, OSError."""
    _check(config)
    embodiment = Embodiment.load(config.dataset / "embodiment.yaml")
    relative = _is_relative(config.dataset)
    dataset = Reloaded.open(config.dataset)
    if not 0 <= config.episode < len(dataset.episodes):
        raise ReplayError(f"--episode={config.episode}: the dataset has episodes 0 to {len(dataset.episodes) - 1}")
    if dataset.fps != embodiment.fps:
        raise ReplayError(
            f"{config.dataset}: of {dataset.fps} frames a second, its embodiment.yaml says {embodiment.fps}"
        )
    numbers = _numbers(dataset, config.episode, relative)
    replay = Replay(embodiment, numbers, Ticks(config.start * 10**9, embodiment.fps), config.jpeg_quality)
    notes = [*replay.notes]
    described = {image_key(camera.name) for camera in embodiment.cameras}
    if missing := sorted(described - set(dataset.cameras)):
        raise ReplayError(f"{config.dataset} has no {', '.join(missing)}, which its embodiment describes")
    if others := sorted(set(dataset.cameras) - described):
        notes.append(f"left out, as the embodiment does not describe them: {', '.join(others)}")
    write_bag(config.output, replay, _messages(replay, Reel(dataset, config.episode)))
    return notes


def _check(config: ToBagConfig) -> None:
    if not 1 <= config.jpeg_quality <= 100:
        raise ReplayError(f"--jpeg_quality={config.jpeg_quality}: expected 1 to 100")
    if config.start < 1:
        raise ReplayError(f"--start={config.start}: expected 1 or more, as a stamp of zero means that there is none")
    if not config.output.exists():
        return
    if not config.overwrite:
        raise FileExistsError(f"{config.output} exists; give --overwrite=true to replace it, or another --output")
    if not (config.output / "metadata.yaml").exists():
        raise FileExistsError(f"{config.output} is no bag, and is not replaced; give another --output")


def _numbers(dataset: Reloaded, episode: int, relative: bool) -> Numbers:
    rows = dataset.rows(episode)
    return Numbers(
        state_names=dataset.names("observation.state"),
        states=dataset.vector("observation.state")[rows],
        action_names=dataset.names("action"),
        actions=dataset.vector("action")[rows],
        tasks=[dataset.tasks[int(task)] for task in dataset.table["task_index"].iloc[rows]],
        relative=relative,
    )


def _is_relative(dataset: Path) -> bool:
    try:
        settings: Any = json.loads((dataset / "conversion.json").read_text())["settings"]
    except FileNotFoundError as error:
        raise ReplayError(f"{dataset} has no conversion.json, so convert did not make it") from error
    return bool(settings["vectors"]["action_mode"] == "relative")


def _messages(replay: Replay, reel: Reel) -> Iterator[Outgoing]:
    cameras = [camera.name for camera in replay.embodiment.cameras]
    yield from replay.before()
    for frame in range(len(reel)):
        pictures: dict[str, np.ndarray] = {name: reel.picture(image_key(name), frame) for name in cameras}
        yield from replay.at(frame, pictures)
    yield from replay.after()


def write_bag(output: Path, replay: Replay, messages: Iterator[Outgoing]) -> None:
    """Write the messages to an mcap bag, which gets its name only when complete."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as working:
        unfinished = Path(working) / output.name
        with Writer(unfinished, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
            connections = {
                topic: _connect(writer, topic, kind, topic == replay.embodiment.instruction_topic)
                for topic, kind in replay.types().items()
            }
            for sent in messages:
                raw = types_to_write(sent.msgtype).serialize_cdr(sent.message, sent.msgtype)
                writer.write(connections[sent.topic], sent.receive_ns, raw)
        if output.exists():
            shutil.rmtree(output)
        unfinished.rename(output)


def _connect(writer: Writer, topic: str, kind: str, latched: bool) -> Connection:
    # The node asks for the instruction as transient local, and would not hear a player that offers less.
    qos = [_latched()] if latched else []
    absolute = "/" + topic.removeprefix("~").lstrip("/")
    text, digest = definition_to_write(kind)
    return writer.add_connection(absolute, kind, msgdef=text, rihs01=digest, offered_qos_profiles=qos)


def _latched() -> Qos:
    never = QosTime(2**31 - 1, 10**9 - 1)
    return Qos(
        QosHistory.KEEP_LAST,
        1,
        QosReliability.RELIABLE,
        QosDurability.TRANSIENT_LOCAL,
        never,
        never,
        QosLiveliness.AUTOMATIC,
        never,
        False,
    )


def main() -> int:
    """The command line; returns the exit status."""

    def program(config: ToBagConfig) -> int:
        notes = to_bag(config)
        console = Console()
        for note in notes:
            console.print(f"[yellow]note[/yellow] {note}", highlight=False, soft_wrap=True)
        console.print(f"wrote {config.output}", highlight=False, soft_wrap=True)
        return 0

    return cli.run(program, ToBagConfig, "dit_policy_training.to_bag")


if __name__ == "__main__":
    raise SystemExit(main())
