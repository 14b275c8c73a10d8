"""`python -m dit_policy_training.inspect`: what is in recordings, and a first embodiment file for them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.padding import Padding
from rich.progress import track
from rich.table import Table

from dit_policy_ros.embodiment import Embodiment
from dit_policy_training import cli
from dit_policy_training.conversion.guessing import guess
from dit_policy_training.conversion.inspection import BagLook, TopicLook, look_at, natural
from dit_policy_training.conversion.lacking import lacks
from dit_policy_training.conversion.recording import find_bags

_MANY = 8  # joints or texts that are told one by one
_LONGER, _LONGER_BY = 3.0, 0.1  # times, and s more: a gap that is told of one bag among many


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
    reading = track(find_bags(config.bags), "looking", console=console, transient=True, disable=not console.is_terminal)
    looks = [look_at(bag, config.recover) for bag in reading]
    for group in _alike(looks):
        _print(group, console)
    for look in looks:
        _print_notes(look, embodiment, console)
    if len(looks) > 1:
        console.print(_totals(looks))
    if config.output is not None:
        config.output.write_text(guess(looks, _name(config)), encoding="utf-8")
        console.print(f"wrote {config.output}: look at every line with GUESS", highlight=False, soft_wrap=True)
    return looks


def _name(config: InspectConfig) -> str:
    stem = config.output.stem if config.output else ""
    return stem if stem.isidentifier() else "robot"


def _alike(looks: Sequence[BagLook]) -> list[list[BagLook]]:
    """The bags that can be read, those together that have the same topics, types and kinds of pictures."""
    groups: dict[Any, list[BagLook]] = {}
    for look in looks:
        topics = {(name, topic.info.msgtype, *sorted(topic.pictures.kinds)) for name, topic in look.topics.items()}
        if topics:
            groups.setdefault((frozenset(topics), look.damage is None), []).append(look)
    return list(groups.values())


def _print(looks: Sequence[BagLook], console: Console) -> None:
    """One table for bags that are alike."""
    size, seconds = sum(look.size for look in looks) / 1e6, [look.seconds for look in looks]
    which = f"{looks[0].bag}" if len(looks) == 1 else f"{len(looks)} bags alike, {looks[0].bag} to {looks[-1].bag.name}"
    console.print(
        f"{which}  {_range(seconds, 1)} s, {size:.1f} MB", style="bold", markup=False, highlight=False, soft_wrap=True
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("topic", overflow="fold")
    # The figures keep their width, so that the words wrap and not they.
    for heading in ("messages", "Hz", "largest\ngap s", "stamp lag ms\nmedian / most"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in sorted(looks[0].topics):
        topics = [look.topics[name] for look in looks]
        rates = [topic.rate for topic in topics if topic.rate]
        gap = f"{max(topic.largest_gap for topic in topics):.3f}" if rates else ""
        counts = _range([topic.info.count for topic in topics], 0)
        table.add_row(_told(name, topics), counts, _range(rates, 1), gap, _lag(topics))
    console.print(table)
    for text in _longer_gaps(looks):
        console.print(f"[yellow]note[/yellow] {_plain(text)}", highlight=False, soft_wrap=True)


def _print_notes(look: BagLook, embodiment: Embodiment | None, console: Console) -> None:
    for text in [*look.notes, *([f"damaged: {look.damage}"] if look.damage else [])]:
        console.print(f"[yellow]note[/yellow] {_plain(f'{look.bag.name}: {text}')}", highlight=False, soft_wrap=True)
    for text in lacks(look, embodiment) if embodiment else ():
        console.print(f"[red]lacks[/red] {_plain(f'{look.bag.name}: {text}')}", highlight=False, soft_wrap=True)


def _range(values: Sequence[float], digits: int) -> str:
    """The least and the most, as one number if they are the same."""
    said = list(dict.fromkeys(f"{value:.{digits}f}" for value in (min(values), max(values)))) if values else []
    return "-".join(said)


def _longer_gaps(looks: Sequence[BagLook]) -> Iterator[str]:
    """Where one of many bags has a gap that the others do not have."""
    for name in sorted(looks[0].topics) if len(looks) > 2 else ():
        usual = median(look.topics[name].largest_gap for look in looks)
        for look in looks:
            gap = look.topics[name].largest_gap
            if gap > _LONGER * usual and gap > usual + _LONGER_BY:
                yield f"{look.bag.name}: {name} has a gap of {gap:.3f} s, where {usual:.3f} s is usual"


def _told(name: str, topics: Sequence[TopicLook]) -> Group:
    """The topic, below it its type and what it carries."""
    below = [_short(topics[0].info.msgtype), *_what(topics)]
    return Group(_plain(name), *(Padding(f"[dim]{_plain(line)}[/dim]", (0, 0, 0, 2)) for line in below))


def _short(msgtype: str) -> str:
    """sensor_msgs/Image, as ROS's tools have it in tables."""
    return msgtype.replace("/msg/", "/")


def _plain(text: str) -> str:
    return text.replace("[", "\\[")  # rich would take it as markup


def _lag(topics: Sequence[TopicLook]) -> str:
    unstamped = sum(topic.unstamped for topic in topics)
    lags = [topic.lags for topic in topics if topic.stamped]
    if not lags:
        return "not stamped" if unstamped else ""
    middle, most = median(lag.quantile(0.5) for lag in lags), max((lag.largest for lag in lags), key=abs)
    return f"{middle * 1e3:.1f} / {most * 1e3:.1f}" + (f"\n{unstamped} not stamped" if unstamped else "")


def _what(topics: Sequence[TopicLook]) -> list[str]:
    said = []
    kinds = sum((topic.pictures.kinds for topic in topics), Counter[tuple[int, int, str]]())
    for (width, height, kind), count in kinds.most_common():
        said.append(f"{width}x{height} {kind}" + (f" ({count})" if len(kinds) > 1 else ""))
    if broken := sum(topic.pictures.broken for topic in topics):
        said.append(f"{broken} broken pictures")
    if names := sorted({name for topic in topics for name in topic.joints.names}, key=natural):
        fields = dict.fromkeys(name for topic in topics for name in topic.joints.fields)
        said.append(f"{len(names)} joints: {_few(names)}" + (f" ({', '.join(fields)})" if fields else ""))
    if (orders := max(topic.joints.orders for topic in topics)) > 1:
        said.append(f"in {orders} different orders or selections")
    texts = sum((topic.texts for topic in topics), Counter[str]())
    said += [f"'{text}' ({count})" for text, count in texts.most_common(_MANY)]
    said += [f"and {len(texts) - _MANY} other texts"] if len(texts) > _MANY else []
    sizes = sum((topic.sizes for topic in topics), Counter[int]())
    return said + [f"{size} values ({count})" for size, count in sizes.most_common(_MANY)]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_MANY]) + (", ..." if len(names) > _MANY else "")


def _bags(count: int) -> str:
    return f"{count} bag{'' if count == 1 else 's'}"


def _totals(looks: Sequence[BagLook]) -> Table:
    table = Table(title="all bags", show_header=False, title_justify="left")
    damaged = [look.bag.name for look in looks if look.damage]
    table.add_row("bags", f"{len(looks)}" + (f", damaged: {', '.join(damaged)}" if damaged else ""))
    table.add_row("duration", f"{sum(look.seconds for look in looks):.1f} s")
    table.add_row("size", f"{sum(look.size for look in looks) / 1e6:.1f} MB")
    topics = Counter((name, topic.info.msgtype) for look in looks for name, topic in look.topics.items())
    for (name, msgtype), count in sorted(topics.items()):
        missing = f", missing in {len(looks) - count}" if count < len(looks) else ""
        table.add_row(name, f"{_short(msgtype)} in {_bags(count)}{missing}")
    texts: dict[str, Counter[str]] = {}
    for look in looks:
        for name, topic in look.topics.items():
            for text in topic.texts:
                texts.setdefault(name, Counter())[text] += 1
    for name, counter in sorted(texts.items()):
        table.add_row(
            f"texts on {name}", _plain("\n".join(f"'{text}' in {_bags(n)}" for text, n in counter.most_common()))
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
