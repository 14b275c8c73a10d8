"""`python -m dit_policy_training.inspect`: what is in recordings, and a first embodiment file for them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table

from dit_policy_ros.embodiment import Embodiment
from dit_policy_training import cli
from dit_policy_training.conversion.guessing import guess
from dit_policy_training.conversion.inspection import BagLook, TopicLook, look_at, natural
from dit_policy_training.conversion.lacking import lacks
from dit_policy_training.conversion.recording import find_bags

_MANY = 8  # joints or texts that are told one by one


@dataclass
class InspectConfig:
    """Tells what is in bags. Exit status: 1 if a bag is damaged or lacks what the embodiment names."""

    bags: str  # a bag, a folder of bags, or a glob pattern
    embodiment: Path | None = None  # also tell what the bags lack of this description
    output: Path | None = None  # write a first embodiment file here, to edit
    overwrite: bool = False  # replace `output`
    recover: bool = False  # look at what can be read of a damaged mcap file


def inspect(config: InspectConfig, console: Console | None = None) -> list[BagLook]:
    """Look at every bag, print it, write `output`. Raises BagError, GuessError, EmbodimentError, FileExistsError."""
    console = console or Console()
    embodiment = Embodiment.load(config.embodiment) if config.embodiment else None
    if config.output is not None and config.output.exists() and not config.overwrite:
        raise FileExistsError(f"{config.output} exists; give --overwrite=true to replace it, or another --output")
    looks = []
    for bag in find_bags(config.bags):
        looks.append(look := look_at(bag, config.recover))
        _print(look, embodiment, console)
    if len(looks) > 1:
        console.print(_totals(looks))
    if config.output is not None:
        config.output.write_text(guess(looks, _name(config)), encoding="utf-8")
        console.print(f"wrote {config.output}: look at every line with GUESS", highlight=False, soft_wrap=True)
    return looks


def _name(config: InspectConfig) -> str:
    stem = config.output.stem if config.output else ""
    return stem if stem.isidentifier() else "robot"


def _print(look: BagLook, embodiment: Embodiment | None, console: Console) -> None:
    title = f"{look.bag}  {look.seconds:.1f} s, {look.size / 1e6:.1f} MB"
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("topic", overflow="fold")
    # The figures keep their width, so that the words wrap and not they.
    for heading in ("messages", "Hz", "largest\ngap s", "stamp lag ms\nmedian / most"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in sorted(look.topics):
        topic = look.topics[name]
        rate, gap = (f"{topic.rate:.1f}", f"{topic.largest_gap:.3f}") if topic.rate else ("", "")
        table.add_row(_told(name, topic), str(topic.info.count), rate, gap, _skew(topic))
    console.print(table)
    for text in [*look.notes, *([f"damaged: {look.damage}"] if look.damage else [])]:
        console.print(f"[yellow]note[/yellow] {_plain(text)}", highlight=False, soft_wrap=True)
    for text in lacks(look, embodiment) if embodiment else ():
        console.print(f"[red]lacks[/red] {_plain(text)}", highlight=False, soft_wrap=True)


def _told(name: str, topic: TopicLook) -> Group:
    """The topic, below it its type and what it carries."""
    below = [_short(topic.info.msgtype), *_what(topic)]
    return Group(_plain(name), *(Padding(f"[dim]{_plain(line)}[/dim]", (0, 0, 0, 2)) for line in below))


def _short(msgtype: str) -> str:
    """sensor_msgs/Image, as ROS's tools have it in tables."""
    return msgtype.replace("/msg/", "/")


def _plain(text: str) -> str:
    return text.replace("[", "\\[")  # rich would take it as markup


def _skew(topic: TopicLook) -> str:
    if not topic.skews:
        return "not stamped" if topic.unstamped else ""
    skews = np.array(topic.skews)
    unstamped = f"\n{topic.unstamped} not stamped" if topic.unstamped else ""
    return f"{np.median(skews) * 1e3:.1f} / {skews[np.abs(skews).argmax()] * 1e3:.1f}{unstamped}"


def _what(topic: TopicLook) -> list[str]:
    said = []
    for (width, height, kind), count in topic.pictures.kinds.most_common():
        said.append(f"{width}x{height} {kind}" + (f" ({count})" if len(topic.pictures.kinds) > 1 else ""))
    if topic.pictures.broken:
        said.append(f"{topic.pictures.broken} broken pictures")
    if topic.joints.names:
        fields = f" ({', '.join(topic.joints.fields)})" if topic.joints.fields else ""
        names = sorted(topic.joints.names, key=natural)
        said.append(f"{len(names)} joints: {_few(names)}{fields}")
    if topic.joints.orders > 1:
        said.append(f"in {topic.joints.orders} different orders or selections")
    said += [f"'{text}' ({count})" for text, count in topic.texts.most_common(_MANY)]
    said += [f"{size} values ({count})" for size, count in topic.sizes.most_common(_MANY)]
    return said


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_MANY]) + (", ..." if len(names) > _MANY else "")


def _totals(looks: Sequence[BagLook]) -> Table:
    table = Table(title="all bags", show_header=False, title_justify="left")
    damaged = [look.bag.name for look in looks if look.damage]
    table.add_row("bags", f"{len(looks)}" + (f", damaged: {', '.join(damaged)}" if damaged else ""))
    table.add_row("duration", f"{sum(look.seconds for look in looks):.1f} s")
    table.add_row("size", f"{sum(look.size for look in looks) / 1e6:.1f} MB")
    topics = Counter((name, topic.info.msgtype) for look in looks for name, topic in look.topics.items())
    for (name, msgtype), count in sorted(topics.items()):
        missing = f", missing in {len(looks) - count}" if count < len(looks) else ""
        table.add_row(name, f"{_short(msgtype)} in {count} bags{missing}")
    texts: dict[str, Counter[str]] = {}
    for look in looks:
        for name, topic in look.topics.items():
            for text in topic.texts:
                texts.setdefault(name, Counter())[text] += 1
    for name, counter in sorted(texts.items()):
        table.add_row(
            f"texts on {name}", _plain("\n".join(f"'{text}' in {n} bags" for text, n in counter.most_common()))
        )
    return table


def main() -> int:
    """The command line; returns the exit status."""

    def program(config: InspectConfig) -> int:
        looks = inspect(config)
        embodiment = Embodiment.load(config.embodiment) if config.embodiment else None
        return int(any(look.damage or (embodiment and lacks(look, embodiment)) for look in looks))

    return cli.run(program, InspectConfig, "dit_policy_training.inspect")


if __name__ == "__main__":
    raise SystemExit(main())
