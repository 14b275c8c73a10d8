"""What a person should look at before training, in words, with what to do; docs/convert.md explains each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dit_policy_training.conversion.report_figures import ACTION, STATE

IDLE_SHARE = 0.3  # of an episode's frames
FEW_EPISODES = 10  # of a task
SKEW = 0.05  # s between header and receive time, at the median
AGE = 0.15  # s at the 95th percentile, or MANY_PERIODS frames
MANY_PERIODS = 2.0
REPEATED = 0.2  # share of rows with the picture of the row before
WARM_UP = 2.0  # s
EQUAL_SHARE = 0.9  # of rows whose action is the state
STILL_RANGE = 1e-3  # rad or m over the whole dataset
AT_LIMIT_SHARE = 0.05  # of rows
TOO_FAST_SHARE = 0.001
LENGTH_RATIO = 3.0  # of the median
COARSE = 33.0  # dB, the median PSNR of a camera's frames
COLOUR = 24.0  # of 255, the error in every tenth frame
DARK, BRIGHT = 0.08, 0.92  # mean brightness, 0 to 1


@dataclass(frozen=True)
class Caution:
    """One thing to look at: what was found, what to do, and where."""

    kind: str
    found: str
    advice: str
    episodes: list[int] = field(default_factory=list)

    @property
    def sentence(self) -> str:
        """All in words."""
        return f"{self.found} {self.advice}"

    def as_json(self) -> dict[str, Any]:
        """The same in JSON's types."""
        return asdict(self)


Figures = Mapping[str, Any]


def warnings_of(figures: Figures) -> list[Caution]:
    """All warnings, what is worst first."""
    return [warning for rule in _RULES for warning in rule(figures)]


def _refused(figures: Figures) -> Iterator[Caution]:
    refused = [bag for bag in figures["bags"] if bag["refused"]]
    if refused:
        reasons = "; ".join(f"{bag['name']}: {bag['refused']}" for bag in refused[:5])
        more = f"; and {len(refused) - 5} more" if len(refused) > 5 else ""
        yield Caution(
            "refused bags",
            f"{_count(len(refused), 'bag')} of {len(figures['bags'])} gave no data ({reasons}{more}).",
            "Each reason says what to do; the other bags are complete.",
        )


def _unchecked(figures: Figures) -> Iterator[Caution]:
    if figures["verified"].get("mode") == "off":
        yield Caution(
            "not verified", "The dataset was not checked against the bags.", "Run convert again with --verify=sample."
        )


def _left_out(figures: Figures) -> Iterator[Caution]:
    left_out = [(bag["name"], episode) for bag in figures["bags"] for episode in bag["left_out"]]
    if left_out:
        reasons: dict[str, int] = {}
        for _, episode in left_out:
            reasons[episode["left_out"]] = reasons.get(episode["left_out"], 0) + 1
        told = "; ".join(f"{count} x {reason}" for reason, count in sorted(reasons.items(), key=lambda r: -r[1])[:5])
        yield Caution(
            "left out",
            f"{_count(len(left_out), 'episode')} of the bags {_are(len(left_out))} not in the dataset: {told}.",
            "Right if they were discarded on purpose; otherwise see --episodes and --time.on_gap.",
        )


def _gaps(figures: Figures) -> Iterator[Caution]:
    by_kind: dict[tuple[str, str], list[tuple[Figures, Figures]]] = {}
    for bag in figures["bags"]:
        for gap in bag.get("gaps", []):
            by_kind.setdefault((gap["stream"], gap["kind"]), []).append((bag, gap))
    advice = {
        "stale": "Look for a loose cable, a full disk, or a busy network at that time; a camera that is slow by design "
        "needs a larger max_age in the embodiment.",
        "skew": "The cameras' clocks or triggers differ: synchronise them, or raise max_camera_skew in the embodiment.",
        "damaged": "Pictures could not be decoded: look for packet loss between camera and recorder.",
        "clock": "The clock was set while recording: let NTP or PTP settle before, or take "
        "--time.stamps='{\"*\": receive}'.",
    }
    for (stream, kind), found in by_kind.items():
        seconds = sum(gap["end"] - gap["start"] for _, gap in found)
        longest_bag, longest = max(found, key=lambda pair: pair[1]["end"] - pair[1]["start"])
        yield Caution(
            "gaps",
            f"{stream}: {_count(len(found), 'gap')} ({kind}) in {_count(len({id(bag) for bag, _ in found}), 'bag')}, "
            f"{seconds:.1f} s in all, the longest {longest['end'] - longest['start']:.2f} s in {longest_bag['name']} "
            f"at {longest['start']:.1f} s.",
            f"No frames were made of these times. {advice.get(kind, '')}".strip(),
            _unique(number for bag, _ in found for number in bag["episodes"]),
        )


def _idle(figures: Figures) -> Iterator[Caution]:
    idle = [e["episode"] for e in figures["episodes"] if e.get("idle_share", 0.0) > IDLE_SHARE]
    if idle:
        ends = sum(e["idle_start"] + e["idle_end"] for e in figures["episodes"] if e["episode"] in set(idle))
        yield Caution(
            "idling",
            f"{_count(len(idle), 'episode')} of {len(figures['episodes'])} "
            f"{'stands' if len(idle) == 1 else 'stand'} still for more than {IDLE_SHARE:.0%} of the time, "
            f"{ends:.1f} s of it at the ends.",
            "A policy learns to stand still from such data. Leave the ends out with --episodes.trim_idle=true, and "
            "move without pauses when recording.",
            idle,
        )


def _few(figures: Figures) -> Iterator[Caution]:
    few = [task for task in figures["tasks"] if 0 < task["episodes"] < FEW_EPISODES]
    if few:
        named = ", ".join(f"'{task['task']}' ({task['episodes']})" for task in few[:5])
        yield Caution(
            "few episodes",
            f"{_count(len(few), 'task')} of {len(figures['tasks'])} {'has' if len(few) == 1 else 'have'} fewer than "
            f"{FEW_EPISODES} episodes: {named}{', ...' if len(few) > 5 else ''}.",
            "Record more of these, or leave them out: a few examples are learnt by heart, not in general.",
        )


def _same_words(figures: Figures) -> Iterator[Caution]:
    spellings: dict[str, list[str]] = {}
    for task in figures["tasks"]:
        plain = " ".join("".join(c if c.isalnum() else " " for c in task["task"].lower()).split())
        spellings.setdefault(plain, []).append(task["task"])
    for tasks in spellings.values():
        if len(tasks) > 1:
            yield Caution(
                "spelling",
                f"One task is spelled in {len(tasks)} ways: {', '.join(repr(task) for task in tasks)}.",
                "The policy takes them for different tasks; give one spelling (--episodes.by=annotations).",
            )


def _streams(figures: Figures) -> Iterator[Caution]:
    """The worst bag of each stream stands for all of them."""
    fps = figures["dataset"]["fps"]
    by_name: dict[str, list[tuple[Figures, Figures]]] = {}
    for bag in figures["bags"]:
        for stream in bag.get("streams", []):
            by_name.setdefault(stream["name"], []).append((bag, stream))
    for name, found in by_name.items():
        for rule in (_skew, _age, _repeated, _clock, _late):
            guilty = [(bag, stream) for bag, stream in found if rule(stream, fps)[0] > 0]
            if guilty:
                bag, stream = max(guilty, key=lambda pair: rule(pair[1], fps)[0])
                _, kind, what, advice = rule(stream, fps)
                where = f"{_count(len(guilty), 'bag')} of {len(figures['bags'])}, worst in {bag['name']}"
                episodes = _unique(number for one, _ in guilty for number in one["episodes"])
                yield Caution(kind, f"{name}: {what} ({where}).", advice, episodes)


def _skew(stream: Figures, _: int) -> tuple[float, str, str, str]:
    skew = abs(stream["skew_median"])
    return (
        skew - SKEW,
        "skew",
        f"header stamps are {1e3 * stream['skew_median']:.0f} ms off the receive times at the median",
        "Either the clocks of the two machines differ (run chrony or PTP), or messages wait on their way; if stamps "
        "cannot be trusted, --time.stamps='{" + stream["topic"] + ": receive}'.",
    )


def _age(stream: Figures, fps: int) -> tuple[float, str, str, str]:
    allowed = max(AGE, MANY_PERIODS / fps)
    holds = stream["max_age"] is None
    return (
        -1.0 if holds else stream["age_p95"] - allowed,
        "old data",
        f"data is {1e3 * stream['age_p95']:.0f} ms old at its 95th percentile",
        f"The policy sees the past: {allowed * 1e3:.0f} ms are usual at {fps} frames a second. Raise the sensor's "
        "rate, or shorten its way (compressed pictures, a wire instead of Wi-Fi).",
    )


def _repeated(stream: Figures, fps: int) -> tuple[float, str, str, str]:
    is_camera = stream["kind"] in ("camera", "depth")
    return (
        stream["repeated"] - REPEATED if is_camera else -1.0,
        "repeated frames",
        f"{stream['repeated']:.0%} of the frames are the frame before once more (camera {stream['rate']:.1f} Hz)",
        f"The dataset's {fps} frames a second are more than the camera gives, or it stalls: lower --fps, or raise the "
        "camera's rate.",
    )


def _clock(stream: Figures, _: int) -> tuple[float, str, str, str]:
    return (
        float(stream["clock_jumps"]),
        "clock jumps",
        f"its stamps jumped {_count(stream['clock_jumps'], 'time')}",
        "The clock was set while recording: let NTP or PTP settle before.",
    )


def _late(stream: Figures, _: int) -> tuple[float, str, str, str]:
    return (
        float(stream.get("too_late", 0)),
        "late messages",
        f"{_count(stream.get('too_late', 0), 'message')} came after the row they belong to was made",
        "Their rows are made of the messages around. Look for what delays this topic.",
    )


def _warm_up(figures: Figures) -> Iterator[Caution]:
    slow = [bag for bag in figures["bags"] if bag.get("warm_up", 0.0) > WARM_UP]
    if slow:
        worst = max(slow, key=lambda bag: bag["warm_up"])
        yield Caution(
            "late start",
            f"{_count(len(slow), 'bag')}: the first {worst['warm_up']:.1f} s (in {worst['name']}) give no frames, "
            f"until {worst['warm_up_stream'] or 'the last stream'} begins.",
            "Start the recording after all publishers, and publish the instruction first.",
            _unique(number for bag in slow for number in bag["episodes"]),
        )


def _no_command(figures: Figures) -> Iterator[Caution]:
    agreement = figures["agreement"]
    if agreement.get("state", 0.0) > EQUAL_SHARE:
        yield Caution(
            "action is state",
            f"In {agreement['state']:.0%} of the rows the action is the measured state of the same row.",
            "Such a policy learns to stay where it is. Record the controller's commands, or take "
            "--vectors.action_from=next_state.",
        )


def _still(figures: Figures) -> Iterator[Caution]:
    for key, what in ((ACTION, "commanded"), (STATE, "measured")):
        still = [v["name"] for v in figures["vectors"].get(key, []) if v["max"] - v["min"] < STILL_RANGE]
        if still:
            yield Caution(
                "still joints",
                f"{', '.join(still)}: {what} to be at one place in the whole dataset."
                if key == ACTION
                else f"{', '.join(still)}: measured at one place in the whole dataset.",
                "Check the joint's name and its cable; a joint that has no part in the tasks is better left out of the "
                "embodiment.",
            )


def _limits(figures: Figures) -> Iterator[Caution]:
    for vector in figures["vectors"].get(ACTION, []):
        if vector.get("at_limit", 0.0) > AT_LIMIT_SHARE:
            low, high = vector["limits"]
            yield Caution(
                "at the limit",
                f"{vector['name']} is commanded to within 1 % of its limits ({low:g} to {high:g}) in "
                f"{vector['at_limit']:.0%} of the rows.",
                "The command saturates, or the limits in the embodiment are too narrow.",
            )
        if vector.get("too_fast", 0.0) > TOO_FAST_SHARE:
            yield Caution(
                "jumps",
                f"{vector['name']} is commanded faster than 1.5 times its limit ({vector['speed_limit']:g} a second) "
                f"in {vector['too_fast']:.1%} of the rows, by up to {vector['largest_step']:.3g} from one to the next.",
                "Look at these episodes for teleoperation that jumps (clutch, tracking lost), and for wrong units.",
            )


def _lengths(figures: Figures) -> Iterator[Caution]:
    median = figures["lengths"]["median"]
    odd = [
        e["episode"]
        for e in figures["episodes"]
        if e["seconds"] > LENGTH_RATIO * median or e["seconds"] < median / LENGTH_RATIO
    ]
    if odd:
        low, high = figures["lengths"]["min"], figures["lengths"]["max"]
        yield Caution(
            "lengths",
            f"{_count(len(odd), 'episode')} {_are(len(odd))} more than {LENGTH_RATIO:g} times longer or shorter than "
            f"the median ({median:.1f} s; they go from {low:.1f} to {high:.1f} s).",
            "Look at them: a recording not stopped, one broken off, or an episode cut by gaps.",
            odd,
        )


def _cameras(figures: Figures) -> Iterator[Caution]:
    seen: dict[str, list[tuple[int, Figures]]] = {}
    for episode in figures["episodes"]:
        for camera, look in episode.get("cameras", {}).items():
            seen.setdefault(camera, []).append((episode["episode"], look))
    rules: list[tuple[str, str, str, Callable[[Figures], bool]]] = [
        ("frozen camera", "shows one and the same picture throughout", "Restart the camera; leave these episodes out.",
         lambda look: look["frozen"] and DARK <= look["brightness"] <= BRIGHT),
        ("dark camera", "is nearly black", "Check lens cap, exposure and light.",
         lambda look: look["brightness"] < DARK),
        ("bright camera", "is nearly white", "Check exposure and light.", lambda look: look["brightness"] > BRIGHT),
    ]  # fmt: skip
    for camera, looks in seen.items():
        for kind, what, advice, holds in rules:
            if found := [number for number, look in looks if holds(look)]:
                where = f"in {_count(len(found), 'episode')} of the {len(looks)} looked at"
                yield Caution(kind, f"{camera} {what} {where}.", advice, found)


def _coarse(figures: Figures) -> Iterator[Caution]:
    for key, likeness in figures["verified"].get("psnr_db", {}).items():
        if likeness["median"] is not None and likeness["median"] < COARSE:
            yield Caution(
                "coarse pictures",
                f"{key.removeprefix('observation.images.')} lost much in its video: PSNR {likeness['median']:.1f} dB "
                f"at the median, {likeness['min']:.1f} at the least.",
                "Look at it: a lower --video.crf keeps more, and more light makes less noise to lose.",
            )

    for key, error in figures["verified"].get("colour_error", {}).items():
        if error > COLOUR:
            yield Caution(
                "coarse pictures",
                f"{key.removeprefix('observation.images.')}: in every tenth frame the colour of some 8x8 pixels is "
                f"{error:.0f} of 255 off, and more.",
                "Small coloured things change their colour. Keep it with --video.codec=h264 --video.crf=18 "
                "--video.preset=superfast --video.pix_fmt=yuv444p.",
            )


def _notes(figures: Figures) -> Iterator[Caution]:
    by_note: dict[str, list[Figures]] = {}
    for bag in figures["bags"]:
        for note in bag["notes"]:
            by_note.setdefault(note, []).append(bag)
    for note, bags in by_note.items():
        where = bags[0]["name"] if len(bags) == 1 else f"{len(bags)} bags, {bags[0]['name']} the first"
        yield Caution("notes", f"{where}: {note}", "", _unique(number for bag in bags for number in bag["episodes"]))


_RULES: Sequence[Callable[[Figures], Iterator[Caution]]] = (
    _refused, _unchecked, _no_command, _idle, _gaps, _cameras, _coarse, _limits, _still, _streams, _few, _same_words,
    _lengths, _left_out, _warm_up, _notes,
)  # fmt: skip


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _unique(numbers: Iterator[int]) -> list[int]:
    return sorted(set(numbers))
