"""The report as one HTML file: figures, warnings, pictures and plots in, text out. Nothing is fetched when it opens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from dit_policy_training.conversion.report_pictures import Strip
from dit_policy_training.conversion.report_plots import MANY, bars, curves
from dit_policy_training.conversion.report_style import SCRIPT, STYLE
from dit_policy_training.conversion.report_warnings import IDLE_SHARE, Caution

OPEN = 3  # episodes that are unfolded when the page opens

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Drawn:
    """What is drawn of one episode: strips, and by the values' names what was measured and commanded, (N,) each."""

    strips: Sequence[Strip]
    series: Mapping[str, Sequence[tuple[str, np.ndarray]]]  # [("s" state or "a" action, values)] by name


def page(figures: Figures, cautions: Sequence[Caution], drawn: Mapping[int, Drawn]) -> str:
    """The whole file; `drawn` by episode, those that are not in it stand in the table alone."""
    name = escape(figures["dataset"]["name"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}: conversion report</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>"
        f"{_head(figures)}{_cautions(cautions, drawn)}{_dataset(figures)}{_vectors(figures)}{_bags(figures)}"
        f"{_table(figures, cautions, drawn)}{_episodes(figures, cautions, drawn)}{_foot(figures)}"
        f"</main><script>{SCRIPT}</script></body></html>\n"
    )


def _head(figures: Figures) -> str:
    data = figures["dataset"]
    tiles = [
        (f"{data['episodes']:,}", "episodes"),
        (f"{data['frames']:,}", f"frames at {data['fps']} Hz"),
        (_duration(data["seconds"]), "of data"),
        (f"{len(figures['tasks'])}", "task" if len(figures["tasks"]) == 1 else "tasks"),
        (f"{len(data['cameras'])}", "camera" if len(data["cameras"]) == 1 else "cameras"),
        (_bytes(data["bytes"]), "on disk"),
    ]
    shown = "".join(f'<div class="card tile"><b>{value}</b><span>{what}</span></div>' for value, what in tiles)
    cameras = ", ".join(
        f"{escape(key.removeprefix('observation.images.'))} {shape[1]}&times;{shape[0]}"
        for key, shape in data["cameras"].items()
    )
    return (
        f'<h1>{escape(data["name"])}</h1><div class="soft">{escape(data["robot"])} &middot; {cameras or "no cameras"}'
        f'</div><div class="tiles">{shown}</div>{_checked(figures["verified"])}'
    )


def _checked(verified: Figures) -> str:
    if verified.get("mode") == "off":
        return '<div class="check off"><b>Not verified.</b> Nobody has compared this dataset with its bags.</div>'
    compared = [f"{verified['frames']:,} rows" if "frames" in verified else ""]
    if "values_compared" in verified:
        compared.append(f"{verified['values_compared']:,} numbers bit for bit")
    if verified.get("pictures_compared"):
        least = [p["min"] for p in verified.get("psnr_db", {}).values() if p["min"] is not None]
        likeness = f" (PSNR {min(least):.1f} dB and more)" if least else " (identical)"
        compared.append(f"{verified['pictures_compared']:,} pictures{likeness}")
    told = ", ".join(part for part in compared if part)
    if verified.get("problems"):
        found = f"<b>{verified['problems']} problems</b> were found when it was reloaded."
        return f'<div class="check off">{found}</div>'
    return f'<div class="check"><b>Verified.</b> Reloaded with LeRobot and compared with the bags: {told}.</div>'


def _cautions(cautions: Sequence[Caution], drawn: Mapping[int, Drawn]) -> str:
    if not cautions:
        return '<h2>Warnings</h2><div class="none">None. The data looks fit for training.</div>'
    items = "".join(
        f"<li><b>{escape(caution.kind.capitalize())}.</b> {escape(caution.found)} "
        f'<span class="advice">{escape(caution.advice)}</span>{_where(caution, drawn)}</li>'
        for caution in cautions
    )
    return f'<h2>Warnings <span class="soft">({len(cautions)})</span></h2><ul class="cautions">{items}</ul>'


def _where(caution: Caution, drawn: Mapping[int, Drawn]) -> str:
    if not caution.episodes:
        return ""
    links = ", ".join(_link(number, drawn) for number in caution.episodes[:12])
    more = f" and {len(caution.episodes) - 12} more" if len(caution.episodes) > 12 else ""
    return f'<div class="where">Episodes {links}{more}</div>'


def _link(number: int, drawn: Mapping[int, Drawn]) -> str:
    return f'<a href="#e{number}">{number}</a>' if number in drawn else f"{number}"


def _dataset(figures: Figures) -> str:
    most = max((task["frames"] for task in figures["tasks"]), default=1)
    tasks = "".join(
        f'<div class="task"><div class="row"><span>{escape(task["task"])}</span><span class="soft small">'
        f"{_count(task['episodes'], 'episode')} &middot; {_duration(task['seconds'])}</span></div>"
        f'<div class="bar" style="width:{100 * task["frames"] / max(most, 1):.1f}%"></div></div>'
        for task in figures["tasks"]
    )
    lengths = figures["lengths"]
    return (
        f'<h2>Tasks and lengths</h2><div class="two"><div class="card"><h3>Tasks</h3>{tasks}</div>'
        f'<div class="card"><h3>Lengths of the episodes</h3><div class="box">{bars(lengths["counts"])}</div>'
        f'<div class="row small soft"><span>{lengths["from"]:.1f} s</span><span>median {lengths["median"]:.1f} s</span>'
        f"<span>{lengths['to']:.1f} s</span></div></div></div>"
    )


def _vectors(figures: Figures) -> str:
    told = []
    for key in sorted(figures["vectors"], key=lambda key: key != "action"):
        plots = "".join(_histogram(value) for value in figures["vectors"][key])
        title = {"action": "Actions", "observation.state": "States"}.get(key, key)
        told.append(f'<h2>{escape(title)}</h2><div class="card plots">{plots}</div>')
    note = "How often each value occurs over all rows. A dashed line: a limit that values reach."
    return "".join(told).replace("</h2>", f'</h2><p class="soft small">{note}</p>', 1)


def _histogram(value: Figures) -> str:
    low, high = value["from"], value["to"]
    marks = [(limit - low) / (high - low) for limit in value.get("limits", [])]
    return (
        f'<div class="plot"><div class="head"><b title="{escape(value["name"])}">{escape(value["name"])}</b>'
        f"<span>{_number(value['min'])} &hellip; {_number(value['max'])}</span></div>"
        f'<div class="box">{bars(value["counts"], marks)}</div></div>'
    )


def _bags(figures: Figures) -> str:
    bags = [bag for bag in figures["bags"] if bag.get("streams")]
    if not bags:
        return ""
    names = list(dict.fromkeys(stream["name"] for bag in bags for stream in bag["streams"]))
    rows = "".join(_stream_row([s for bag in bags for s in bag["streams"] if s["name"] == name]) for name in names)
    heads = ("Stream", "Topic", "Messages", "Rate", "Age p50", "p95", "max", "Skew", "Repeated", "Late", "Twice")
    return (
        '<h2>Streams</h2><div class="card"><p class="soft small">Over all bags: medians, and the worst of each in '
        "age. Age: how old the data was when a row was made of it. Skew: header stamp less receive time. Repeated: "
        "rows that hold the message of the row before.</p>"
        f'<div class="scroll"><table><thead><tr>{_heads(heads, text=2)}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></div>"
    )


def _stream_row(streams: Sequence[Figures]) -> str:
    first = streams[0]

    def median(key: str) -> float:
        return float(np.median([stream[key] for stream in streams]))

    cells = [
        f"{sum(stream['count'] for stream in streams):,}",
        _rate(median("rate")),
        _ms(median("age_p50")),
        _ms(median("age_p95")),
        _ms(max(stream["age_max"] for stream in streams)),
        _ms(median("skew_median")),
        f"{median('repeated'):.0%}",
        f"{sum(stream['late'] for stream in streams)}",
        f"{sum(stream['duplicates'] for stream in streams)}",
    ]
    shown = "".join(f'<td class="n">{cell}</td>' for cell in cells)
    return f"<tr><td>{escape(first['name'])}</td><td>{escape(first['topic'])}</td>{shown}</tr>"


def _table(figures: Figures, cautions: Sequence[Caution], drawn: Mapping[int, Drawn]) -> str:
    heads = ("#", "Task", "Bag", "Seconds", "Frames", "Idle", "Peak speed", "Age p95", "Gaps", "Warnings")
    streams = (stream for bag in figures["bags"] for stream in bag.get("streams", []))
    seen = {stream["name"] for stream in streams if stream["kind"] in ("camera", "depth", "state")}
    rows = "".join(_episode_row(episode, seen, cautions, drawn) for episode in figures["episodes"])
    refused = "".join(
        f'<tr><td class="t">{escape(bag["name"])}</td><td class="t">{escape(bag["refused"])}</td></tr>'
        for bag in figures["bags"]
        if bag["refused"]
    )
    return (
        '<h2>Episodes</h2><div class="tools"><input id="find" type="search" placeholder="Find by task, bag or number" '
        'aria-label="Find episodes"></div>'
        f'<div class="card scroll" style="max-height:440px"><table class="sort"><thead><tr>{_heads(heads, 3)}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
        + (
            f'<h2>Bags that were refused</h2><div class="card"><table><tbody>{refused}</tbody></table></div>'
            if refused
            else ""
        )
    )


def _heads(names: Sequence[str], text: int) -> str:
    """The first `text` columns hold words, the others numbers."""
    return "".join(f"<th{'' if place < text else ' class=n'}>{name}</th>" for place, name in enumerate(names))


def _episode_row(episode: Figures, seen: set[str], cautions: Sequence[Caution], drawn: Mapping[int, Drawn]) -> str:
    """`seen`: the streams that a policy sees; commands and tasks are not late, they hold."""
    number = episode["episode"]
    speed = max(episode.get("peak_speed", {}).values(), default=None)
    age = max((ages[1] for name, ages in episode.get("ages", {}).items() if name in seen), default=None)
    count = sum(number in caution.episodes for caution in cautions)
    cells = [
        (f"{episode['seconds']:.1f}", episode["seconds"]),
        (f"{episode['frames']}", episode["frames"]),
        (f"{episode['idle_share']:.0%}" if "idle_share" in episode else "", episode.get("idle_share", 0)),
        ("" if speed is None else f"{speed:.2f}", speed or 0),
        ("" if age is None else _ms(age), age or 0),
        (f"{len(episode['gaps'])}" if episode["gaps"] else "", len(episode["gaps"])),
        (f'<span class="chip w">{count}</span>' if count else "", count),
    ]
    shown = "".join(f'<td class="n" data-v="{value}">{text}</td>' for text, value in cells)
    tasks = "; ".join(task for _, task in episode["tasks"])
    return (
        f'<tr data-find="{_searchable(episode)}"><td data-v="{number}">{_link(number, drawn)}</td>'
        f'<td class="t">{escape(tasks)}</td><td class="t">{escape(episode["bag"] or "")}</td>{shown}</tr>'
    )


def _searchable(episode: Figures) -> str:
    words = [str(episode["episode"]), episode["bag"] or "", *(task for _, task in episode["tasks"])]
    return escape(" ".join(words).lower())


def _episodes(figures: Figures, cautions: Sequence[Caution], drawn: Mapping[int, Drawn]) -> str:
    left = len(figures["episodes"]) - len(drawn)
    note = (
        f" {len(drawn)} of {len(figures['episodes'])} are drawn: those with warnings, and others evenly."
        if left
        else ""
    )
    cards = "".join(
        _episode(figures["episodes"][number], cautions, drawn[number], position < OPEN)
        for position, number in enumerate(sorted(drawn))
    )
    return (
        '<h2>Episode by episode</h2><div class="tools"><button id="all">Unfold or fold all</button>'
        '<span class="small soft"><i class="key ks"></i>state, measured<i class="key ka"></i>action, commanded.'
        f" Point at a plot to read values.{note}</span></div>{cards}"
    )


def _episode(episode: Figures, cautions: Sequence[Caution], drawn: Drawn, unfolded: bool) -> str:
    number = episode["episode"]
    chips = "".join(
        f'<span class="chip w">{escape(kind)}</span>'
        for kind in dict.fromkeys(caution.kind for caution in cautions if number in caution.episodes)
    )
    tasks = " &rarr; ".join(escape(task) for _, task in episode["tasks"])
    return (
        f'<details class="ep" id="e{number}" data-seconds="{episode["seconds"]}" data-find="{_searchable(episode)}"'
        f"{' open' if unfolded else ''}><summary><b>Episode {number}</b><span>{tasks}</span>"
        f'<span class="soft small">{escape(episode["bag"] or "")} &middot; {episode["seconds"]:.1f} s &middot; '
        f'{episode["frames"]} frames</span>{chips}<span class="now soft small"></span></summary>'
        f'<div class="inside">{_strips(episode, drawn)}{_figures_row(episode)}{_plots(drawn)}</div></details>'
    )


def _strips(episode: Figures, drawn: Drawn) -> str:
    strips = "".join(_strip(strip) for strip in drawn.strips)
    if not drawn.strips:
        return ""
    rate = episode["frames"] / episode["seconds"]
    times = "".join(f"<span>{frame / rate:.1f} s</span>" for frame in drawn.strips[0].frames)
    return f'{strips}<div class="times">{times}</div>{_timeline(episode)}'


def _strip(strip: Strip) -> str:
    name, count = escape(strip.camera), len(strip.frames)
    return (
        f'<div class="strip"><div class="name">{name}</div><div class="film" style="--n:{count}">'
        f'<img loading="lazy" alt="{name}, {count} frames of the episode" src="{strip.data}">'
        '<div class="cursor"></div></div></div>'
    )


def _timeline(episode: Figures) -> str:
    """Where the episode stands still at its ends, as a grey part of a bar."""
    seconds = episode["seconds"]
    first, last = (min(episode.get(key, 0.0) / seconds, 1.0) for key in ("idle_start", "idle_end"))
    if "idle_share" not in episode or not (first or last):
        return ""
    return (
        f'<div class="bartime" title="grey: nothing moves"><i style="left:0;width:{100 * first:.1f}%"></i>'
        f'<i style="right:0;width:{100 * last:.1f}%"></i></div>'
    )


def _figures_row(episode: Figures) -> str:
    facts = []
    if "idle_share" in episode:
        kind = " w" if episode["idle_share"] > IDLE_SHARE else ""
        facts.append(
            f'<span class="chip{kind}">idle {episode["idle_share"]:.0%} (start {episode["idle_start"]:.1f} s, '
            f"end {episode['idle_end']:.1f} s)</span>"
        )
    if speeds := episode.get("peak_speed"):
        joint = max(speeds, key=lambda name: (speeds[name], name))
        facts.append(f'<span class="chip">fastest {escape(joint)} {speeds[joint]:.2f} /s</span>')
    facts += [
        f'<span class="chip w">gap {escape(gap["stream"])} {gap["end"] - gap["start"]:.2f} s: {escape(gap["reason"])}'
        "</span>"
        for gap in episode["gaps"]
    ]
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{_rate(episode["rates"].get(name))}</td>'
        + "".join(f'<td class="n">{_ms(age)}</td>' for age in ages)
        + "</tr>"
        for name, ages in episode.get("ages", {}).items()
    )
    heads = _heads(("Stream", "Rate", "Age p50", "p95", "max"), 1)
    table = f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<p>{' '.join(facts)}</p>" + (
        f'<div style="max-width:520px;margin-bottom:14px">{table}</div>' if rows else ""
    )


def _plots(drawn: Drawn) -> str:
    many = len(drawn.series) > MANY
    return f'<div class="plots">{"".join(_plot(name, series, many) for name, series in drawn.series.items())}</div>'


def _plot(name: str, series: Sequence[tuple[str, np.ndarray]], many: bool) -> str:
    svg, low, high = curves(series, many)
    span = f"{_number(low)} &hellip; {_number(high)}"
    return (
        f'<div class="plot" data-lo="{low:.6g}" data-hi="{high:.6g}" data-range="{span}"><div class="head">'
        f'<b title="{escape(name)}">{escape(name)}</b><span>{span}</span></div>'
        f'<div class="box">{svg}<div class="cursor"></div></div></div>'
    )


def _foot(figures: Figures) -> str:
    parts = ", ".join(f"{escape(str(name))} {escape(str(value))}" for name, value in figures["converter"].items())
    made = f"Made by dit_policy_training.convert ({parts}). " if parts else ""
    return f"<footer>{made}The same figures: report.json.</footer>"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.2f} h"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms".replace("-", "&minus;")


def _rate(rate: float | None) -> str:
    return "" if rate is None or rate < 0.05 else f"{rate:.1f} Hz"


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "&minus;")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
