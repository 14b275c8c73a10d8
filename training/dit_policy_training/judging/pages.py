"""The HTML reports of an evaluation and of a comparison: one file each, which opens offline and has no script."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import cv2
import numpy as np

from dit_policy_training.conversion.report_style import STYLE
from dit_policy_training.judging import drawing
from dit_policy_training.judging.evaluation import FILM, STILL, Evaluation, on_samples, on_training, verdicts
from dit_policy_training.judging.opening import place_of
from dit_policy_training.judging.predictions import Predictions

MOST_CHUNKS = 200  # drawn of an episode, evenly spread
MANY_MODES = 3  # moments whose samples are drawn
_THUMB = 150  # pixels

Figures = Mapping[str, Any]


def document(title: str, body: str) -> str:
    """A whole page."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}{drawing.STYLE}</style></head><body><main>{body}"
        "<footer>The same figures: report.json.</footer></main></body></html>\n"
    )


def evaluation_page(evaluation: Evaluation, report: Figures) -> str:
    """The report of one checkpoint; `report` is `evaluation.figures`, perhaps with `closed_loop`."""
    parts = [
        _head(report),
        _closed_loop(report.get("closed_loop")),
        _by_step(report),
        _by_action(report),
        _by_task(report),
        _samples(evaluation, report),
        "<h2>Chunks over the recorded actions</h2>" if evaluation.drawn else "",
        *(_episode(evaluation, number, found) for number, found in evaluation.drawn.items()),
        _episodes(evaluation, report),
        settings_table(report["settings"]),
    ]
    return document(f"{report['checkpoint']}: evaluation", "".join(parts))


def told(report: Figures, value: float | None) -> str:
    """A distance in the report's unit, without its name."""
    if value is None:
        return ""
    scaled = report["unit"]["scale"] * value
    return f"{scaled:.3g}" if report["unit"]["scale"] == 1 else f"{scaled:.1f}"


def tiles(pairs: Sequence[tuple[str, str]]) -> str:
    """Figures in large, each with what it is."""
    shown = "".join(f'<div class="card tile"><b>{escape(value)}</b><span>{what}</span></div>' for value, what in pairs)
    return f'<div class="tiles">{shown}</div>'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table whose first `words` columns are text; cells are HTML."""
    first = "".join(f"<th{'' if place < words else ' class=n'}>{name}</th>" for place, name in enumerate(heads))
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{"t" if place < words else "n"}">{cell}</td>' for place, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>'


def settings_table(settings: Mapping[str, Any]) -> str:
    """How it was measured."""
    rows = [(escape(name), escape(_listed(value))) for name, value in settings.items()]
    return f'<h2>How it was measured</h2><div class="card">{table(("", ""), rows, words=2)}</div>'


def _listed(value: Any) -> str:
    """A setting in words: neither Python's brackets nor its quotes."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {each}" for name, each in value.items())
    return ", ".join(str(each) for each in value) if isinstance(value, list) else str(value)


def _head(report: Figures) -> str:
    unit, data, settings = report["unit"]["name"], report["dataset"], report["settings"]
    pairs = [
        (f"{told(report, report['error'])} {unit}", "mean error of a chunk's steps"),
        (f"{told(report, report['error_executed'])} {unit}", f"of the {settings['n_action_steps']} executed"),
        *(
            (f"{told(report, baseline['error'])} {unit}", "if it stood still" if name == STILL else escape(name))
            for name, baseline in report["baselines"].items()
        ),
        (f"{settings['moments']:,}", "moments"),
    ]
    note = ", mm for a prismatic joint" if report["robot"] else ": as the dataset has them"
    lines = "".join(
        f'<div class="check{"" if well else " off"}">{escape(text)}</div>' for well, text in verdicts(dict(report))
    )
    return (
        f'<h1>{escape(report["checkpoint"])}</h1><div class="soft">on {escape(data["name"])}, {data["episodes"]} '
        f"episodes, {data['frames']:,} frames at {data['fps']} Hz &middot; error: mean |predicted &minus; recorded|, "
        f"{escape(unit)}{note}. {escape(on_training(dict(report)))}</div>{tiles(pairs)}"
        f'<div style="display:grid;gap:8px">{lines}</div>'
    )


def _closed_loop(found: Figures | None) -> str:
    if found is None:
        return ""
    pairs = [
        (f"{found['success']} of {found['episodes']}", "succeeded"),
        (f"{found['wrong_block']}", "moved the wrong block"),
        (f"{found['refused']}", "chunks refused"),
    ]
    rows = [
        [str(row["seed"]), escape(row["instruction"]), escape(row["outcome"]), f"{row['duration_s']:.1f} s"]
        for row in found["results"]
    ]
    return (
        f"<h2>Closed loop in the simulator, {escape(found['how'])}</h2>{tiles(pairs)}"
        f'<details class="ep"><summary>Episode by episode</summary><div class="inside">'
        f"{table(('Seed', 'Instruction', 'Outcome', 'Time'), rows, words=3)}</div></details>"
    )


def _by_step(report: Figures) -> str:
    scale, settings = report["unit"]["scale"], report["settings"]
    steps = np.arange(len(report["by_step"]))
    series = {"policy": report["by_step"]} | {name: one["by_step"] for name, one in report["baselines"].items()}
    lines = [drawing.Line(name, steps, scale * np.array(y, dtype=float)) for name, y in series.items()]
    mark = (settings["n_action_steps"] - 0.5, "executed up to here")
    chart = drawing.curves(lines, "step of the chunk, 0 the newest observation's", report["unit"]["name"], mark)
    return f'<h2>Error by step of the chunk</h2><div class="card">{chart}</div>'


def _by_action(report: Figures) -> str:
    names = list(report["baselines"])
    heads = ("Action", "Error", "Executed", "Share of range", *(escape(name.capitalize()) for name in names))
    rows = [
        [
            escape(action["name"]),
            told(report, action["error"]),
            told(report, action["error_executed"]),
            "" if action["share_of_range"] is None else f"{action['share_of_range']:.2%}",
            *(told(report, report["baselines"][name]["by_action"][number]) for name in names),
        ]
        for number, action in enumerate(report["actions"])
    ]
    return (
        f'<h2>Error by action <span class="soft">({escape(report["unit"]["name"])})</span></h2>'
        f'<div class="card">{table(heads, rows)}</div>{_heat(report)}'
    )


def _heat(report: Figures) -> str:
    values = np.array(report["by_step_and_action"], dtype=float).T
    most = float(np.nanmax(values))
    steps = values.shape[1]
    head = "".join(f'<th class="n">{step}</th>' for step in range(steps))
    body = "".join(
        f"<tr><td>{escape(action['name'])}</td>"
        + "".join(
            f'<td class="heat" style="{drawing.heat(value, 0.0, most)}">{told(report, value)}</td>'
            if np.isfinite(value)
            else "<td></td>"
            for value in line
        )
        + "</tr>"
        for action, line in zip(report["actions"], values.tolist(), strict=True)
    )
    return (
        '<h3 style="margin-top:18px">By action and step</h3><div class="card scroll"><table><thead><tr><th></th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _by_task(report: Figures) -> str:
    heads = ("Task", "Moments", "Episodes", "Error", "Executed", "If it stood still")
    rows = [
        [
            escape(task["task"]),
            f"{task['moments']:,}",
            str(task["episodes"]),
            told(report, task["error"]),
            told(report, task["error_executed"]),
            told(report, task[STILL]),
        ]
        for task in report["tasks"]
    ]
    return f'<h2>Error by task</h2><div class="card">{table(heads, rows)}</div>'


def _samples(evaluation: Evaluation, report: Figures) -> str:
    found, unit, scale = report["samples"], report["unit"]["name"], report["unit"]["scale"]
    pairs = [
        (f"{told(report, found['error_of_one'])} {unit}", "error of one sample"),
        (f"{told(report, found['error_of_closest'])} {unit}", f"of the closest of {found['count']}"),
        (f"{told(report, found['error_of_mean'])} {unit}", "of the samples' mean"),
        (f"{told(report, found['spread'])} {unit}", "spread of the samples (standard deviation)"),
    ]
    moments = found["by_moment"]
    chart = drawing.points(
        scale * np.array(moments["spread"]), scale * np.array(moments["error"]), f"spread, {unit}", f"error, {unit}"
    )
    relation = "" if found["correlation"] is None else f" (correlation {found['correlation']:.2f})"
    text = (
        f"{on_samples(dict(report))}</p><p>A dot is one of {found['moments']} moments. "
        f"Large spread and large error: the policy is unsure there, or knows several ways{relation}. Little spread and "
        "large error: it is sure, and wrong, or the recorded action could not be known from what it sees."
    )
    # The end of an episode leaves nothing to compare with: of moments with a whole chunk, if there are any.
    whole = ~evaluation.sampled.is_pad.any(axis=1)
    widest = np.argsort(np.array(moments["spread"]) + whole * max(moments["spread"]))[::-1][:MANY_MODES]
    fans = "".join(_fan(evaluation, int(place)) for place in widest)
    return (
        f'<h2>Several samples of one moment</h2>{tiles(pairs)}<div class="card"><div class="two"><div>{chart}</div>'
        f'<div><p>{text}</p></div></div></div><div style="height:12px"></div>{fans}'
    )


def _fan(evaluation: Evaluation, place: int) -> str:
    """The samples of one moment, a panel an action."""
    found, subject = evaluation.sampled, evaluation.subject
    row = int(found.rows[place])
    episode, frame = place_of(subject.table, row)
    time = np.arange(found.recorded.shape[1]) / subject.table.fps
    recorded = np.where(found.is_pad[place][:, None], np.nan, found.recorded[place])
    panels = "".join(
        _panel(
            name,
            drawing.chunks(
                time,
                recorded[:, index],
                [(time, chunk[:, index]) for chunk in found.samples[place]],
                subject.unit.recorded,
            ),
        )
        for index, name in enumerate(subject.table.action_names)
    )
    return (
        f'<details class="ep"><summary><b>Among the widest: episode {episode}, frame {frame}</b>'
        f"<span>{escape(found.tasks[place])}</span></summary>"
        f'<div class="inside">{_film(evaluation, np.array([row]))}<div class="panels">{panels}</div>'
        f"{_legend('samples')}</div></details>"
    )


def _legend(predicted: str) -> str:
    return (
        '<div class="legend"><i style="background:var(--ink)"></i>recorded<i style="background:var(--c1)"></i>'
        f"{predicted}</div>"
    )


def _panel(name: str, chart: str) -> str:
    return f"<div><h3>{escape(name)}</h3>{chart}</div>"


def _episode(evaluation: Evaluation, number: int, found: Predictions) -> str:
    """Every chunk of an episode over what was recorded."""
    subject = evaluation.subject
    fps, executed = subject.table.fps, evaluation.executed
    time = np.arange(len(found)) / fps
    shown = np.unique(np.linspace(0, len(found) - 1, min(len(found), MOST_CHUNKS)).round().astype(int))
    panels = []
    for index, name in enumerate(subject.table.action_names):
        drawn = []
        for start in shown:
            there = ~found.is_pad[start]
            drawn.append(((start + np.flatnonzero(there)) / fps, found.predicted[start, there, index]))
        panels.append(_panel(name, drawing.chunks(time, found.recorded[:, 0, index], drawn, subject.unit.recorded)))
    scale = {"unit": {"scale": subject.unit.scale}}
    some = "" if len(shown) == len(found) else f", {len(shown)} of {len(found)} chunks drawn"
    return (
        f'<details class="ep" open id="e{number}"><summary><b>Episode {number}</b><span>{escape(found.tasks[0])}</span>'
        f'<span class="soft small">error {told(scale, found.error)} {escape(subject.unit.name)}, {len(found)} frames, '
        f"chunks of {found.recorded.shape[1]} steps of which {executed} are executed{some}</span></summary>"
        f'<div class="inside">{_film(evaluation, found.rows)}<div class="panels">{"".join(panels)}</div>'
        f"{_legend('predicted chunks')}</div></details>"
    )


def _film(evaluation: Evaluation, rows: np.ndarray) -> str:
    """A few pictures of each camera, evenly spread."""
    some = rows[np.unique(np.linspace(0, len(rows) - 1, min(FILM, len(rows))).round().astype(int))]
    pictures = evaluation.subject.frames.gather(some[:, None])
    cameras = evaluation.subject.policy.config.cameras
    return "".join(
        f'<div class="strip"><div class="name">{escape(key.removeprefix("observation.images."))}</div>'
        f'<img style="max-width:100%;border-radius:6px" alt="frames" src="{_jpeg(pictures[key][:, 0].numpy())}"></div>'
        for key in cameras
    )


def _jpeg(pictures: np.ndarray) -> str:
    """(N, 3, H, W) uint8 side by side, as a data URI."""
    height, width = pictures.shape[-2:]
    size = (_THUMB, max(1, round(_THUMB * height / width)))
    small = [
        cv2.resize(np.ascontiguousarray(p.transpose(1, 2, 0)), size, interpolation=cv2.INTER_AREA) for p in pictures
    ]
    whole = cv2.cvtColor(np.concatenate(small, axis=1), cv2.COLOR_RGB2BGR)
    jpeg = cv2.imencode(".jpg", whole, [cv2.IMWRITE_JPEG_QUALITY, 75])[1]
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode()


def _episodes(evaluation: Evaluation, report: Figures) -> str:
    rows = [
        [
            f'<a href="#e{one["episode"]}">{one["episode"]}</a>'
            if one["episode"] in evaluation.drawn
            else str(one["episode"]),
            escape(one["task"]),
            str(one["frames"]),
            told(report, one["error"]),
        ]
        for one in sorted(report["by_episode"], key=lambda one: -one["error"])
    ]
    return (
        '<h2>Episodes, the worst first</h2><div class="card scroll" style="max-height:440px">'
        f"{table(('#', 'Task', 'Frames', 'Error'), rows, words=2)}</div>"
    )


def comparison_page(report: Figures) -> str:
    """The report of several checkpoints; `report` is `comparison.figures`."""
    data, unit, scale = report["dataset"], report["unit"]["name"], report["unit"]["scale"]
    ranked = sorted(report["checkpoints"], key=lambda one: one["error"])
    head = (
        f"<h1>{len(ranked)} checkpoints on {escape(data['name'])}</h1><div class='soft'>{data['episodes']} episodes, "
        f"{report['settings']['moments']:,} moments, the same noise for all &middot; error: mean |predicted &minus; "
        f"recorded|, {escape(unit)}, of the {report['settings']['steps compared']} steps that all of them predict</div>"
    )
    heads = ("Checkpoint", "Error", "Executed steps", "Horizon, executed", "Parameters", "Sampling", "Trained on")
    rows = [
        [
            escape(one["name"]),
            told(report, one["error"]),
            told(report, one["error_executed"]),
            f"{one['horizon']}, {one['n_action_steps']}",
            f"{one['parameters'] / 1e6:.1f} M",
            escape(one["sampling"]),
            _trained_on(one["trained_on"]),
        ]
        for one in ranked
    ]
    rows += [[escape(name), told(report, one["error"]), *[""] * 5] for name, one in report["baselines"].items()]
    lines = [
        drawing.Line(one["name"], np.arange(len(one["by_step"])), scale * np.array(one["by_step"], dtype=float))
        for one in report["checkpoints"]
    ]
    chart = drawing.curves(lines, "step of the chunk, 0 the newest observation's", unit)
    parts = [
        head,
        f'<h2>The best first</h2><div class="card">{table(heads, rows)}</div>',
        _left_out(report),
        f'<h2>Error by step of the chunk</h2><div class="card">{chart}</div>',
        _over_training(report),
        _matrix(report, "by_task", "Error by task"),
        _matrix(report, "by_action", "Error by action"),
        _differences(report),
        settings_table(report["settings"]),
    ]
    return document(f"{len(ranked)} checkpoints compared", "".join(parts))


def _trained_on(found: Figures | None) -> str:
    return "not known" if found is None else f"{found['trained_on']} of {found['episodes']} episodes"


def _left_out(report: Figures) -> str:
    items = "".join(f"<li><b>{escape(name)}</b> {escape(why)}</li>" for name, why in report["left_out"].items())
    return f'<h2>Left out</h2><ul class="cautions">{items}</ul>' if items else ""


def _over_training(report: Figures) -> str:
    """Error over the steps of training, a line a run, for checkpoints that are of one."""
    runs: dict[str, list[tuple[int, float]]] = {}
    for one in report["checkpoints"]:
        if one["step"] is not None:
            runs.setdefault(one["name"].rpartition("/")[0], []).append((one["step"], one["error"]))
    lines = [
        drawing.Line(
            run or "run", np.array([p[0] for p in points]), report["unit"]["scale"] * np.array([p[1] for p in points])
        )
        for run, points in ((run, sorted(points)) for run, points in runs.items())
        if len(points) > 1
    ]
    if not lines:
        return ""
    chart = drawing.curves(lines, "training step", report["unit"]["name"])
    return f'<h2>Error over training</h2><div class="card">{chart}</div>'


def _matrix(report: Figures, key: str, title: str) -> str:
    """A row a task or action, a column a checkpoint; the least of a row is marked."""
    every = report["checkpoints"]
    rows = []
    for name in every[0][key]:
        values = [one[key][name] for one in every]
        least = min(value for value in values if value is not None)
        cells = [f"<b>{told(report, v)}</b>" if v == least else told(report, v) for v in values]
        rows.append([escape(name), *cells])
    heads = ("", *(escape(one["name"]) for one in every))
    return f'<h2>{title}</h2><div class="card">{table(heads, rows)}</div>'


def _differences(report: Figures) -> str:
    if not report["differences"]:
        return ""
    rows = [
        [
            escape(one["of"]),
            escape(one["to"]),
            _signed(report, one["difference"]),
            f"{_signed(report, one['low'])} &hellip; {_signed(report, one['high'])}",
            "yes" if one["sure"] else "cannot be told apart",
        ]
        for one in report["differences"]
    ]
    heads = ("Checkpoint", "Compared with", "Error more by", "95 % interval over episodes", "Different")
    return f'<h2>Differences</h2><div class="card">{table(heads, rows, words=2)}</div>'


def _signed(report: Figures, value: float) -> str:
    size = told(report, abs(value))
    sign = "+" if value > 0 else "&minus;"
    return size if float(size) == 0 else f"{sign}{size}"  # what rounds to nothing has no sign
