"""Where a bag's episodes begin and end, as far as that is known before its rows are made.

One for the whole bag, or at changes of its instruction (which the sampler sees by itself); or as small topics of the
bag, or a file of annotations, say. Since a take may be discarded when it is over, those are read before the rows.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.runtime.messages import decode_joints
from dit_policy_training.conversion.annotations import Annotation, read_annotations
from dit_policy_training.conversion.idle import WINDOW, Stillness
from dit_policy_training.conversion.options import EPISODES_BY, ConvertConfig, EpisodeOptions, OptionError
from dit_policy_training.conversion.recording import BagMessage, Recording
from dit_policy_training.conversion.times import stamp_choice

BEGINNING_OF_TIME, END_OF_TIME = -(1 << 62), 1 << 62
EVENTS = ("start", "stop", "discard", "rerecord")
_REQUEST_SENT, _REQUEST_RECEIVED = 0, 1  # service_msgs/ServiceEventInfo


class EpisodeError(ValueError):
    """Marks of episodes in a recording that make no sense; says where, what was found and what was expected."""


@dataclass(frozen=True)
class Span:
    """A time in which rows are wanted: start_ns <= t < end_ns. `task` is None if the instruction topic tells it."""

    start_ns: int = BEGINNING_OF_TIME
    end_ns: int = END_OF_TIME
    task: str | None = None


@dataclass
class Plan:
    """The spans in order, and what is to say of how they came about; `trimmed` s were left out as idle."""

    spans: list[Span]
    notes: list[str] = field(default_factory=list)
    trimmed: float = 0.0

    def at(self, t_ns: int) -> tuple[int, Span] | None:
        """The span of an instant and its number; None between them."""
        index = bisect_right(self.spans, t_ns, key=lambda span: span.start_ns) - 1
        return (index, self.spans[index]) if index >= 0 and t_ns < self.spans[index].end_ns else None

    def next_start(self, t_ns: int) -> int:
        """When the next span begins after t_ns; the end of time if none does."""
        index = bisect_right(self.spans, t_ns, key=lambda span: span.start_ns)
        return self.spans[index].start_ns if index < len(self.spans) else END_OF_TIME


def plan_episodes(recording: Recording, config: ConvertConfig, embodiment: Embodiment) -> Plan:
    """The spans of a recording. Reads its small topics once where the options need that.

    Raises EpisodeError for marks that make no sense, OptionError for options that do not, BagError for a damaged bag.
    """
    options = config.episodes
    plan = _planned(recording, options)
    if options.trim_idle:
        if options.by == "instruction":
            plan = Plan(list(_instruction_spans(recording, embodiment.instruction_topic)))
        plan = _trimmed(plan, recording, config, embodiment)
    if not plan.spans:
        found = "; ".join(plan.notes) or "nothing marks one"
        raise EpisodeError(f"no episode in it by --episodes.by={options.by}: {found}")
    return plan


def _planned(recording: Recording, options: EpisodeOptions) -> Plan:
    if options.by not in EPISODES_BY:
        raise OptionError(f"--episodes.by={options.by}: expected one of {', '.join(EPISODES_BY)}")
    if options.by in ("events", "service") and not options.topic:
        what = "std_msgs/String topic" if options.by == "events" else "service's name"
        raise OptionError(f"--episodes.by={options.by}: expected the {what} as --episodes.topic")
    if options.by == "events":
        return plan_events(_messages(recording, options.topic), recording.end_ns, options.topic)
    if options.by == "service":
        return plan_service(_messages(recording, f"{options.topic.rstrip('/')}/_service_event"), recording.end_ns)
    if options.by == "annotations":
        if options.annotations is None:
            raise OptionError("--episodes.by=annotations: expected the file as --episodes.annotations")
        return plan_annotations(read_annotations(options.annotations), recording)
    return Plan([Span()])


def _messages(recording: Recording, topic: str) -> Iterator[BagMessage]:
    if not any(name.lstrip("/") == topic.lstrip("/") for name in recording.topics):
        there = ", ".join(sorted(recording.topics)) or "none at all"
        hidden = (
            " (service events are recorded with `ros2 service` introspection on, and `ros2 bag record "
            "--include-hidden-topics`)"
        )
        hint = hidden if topic.endswith("/_service_event") else ""
        raise EpisodeError(f"no message on {topic}, which marks episodes{hint}; topics with messages: {there}")
    yield from recording.messages([topic])


class _Takes:
    """Takes as an operator begins, ends and discards them."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.notes: list[str] = []
        self.discarded = 0
        self._open: tuple[int, str | None] | None = None

    @property
    def is_open(self) -> bool:
        return self._open is not None

    def start(self, t_ns: int, task: str | None = None) -> None:
        self.stop(t_ns)
        self._open = (t_ns, task)

    def stop(self, t_ns: int) -> None:
        if self._open is not None:
            begun_ns, task = self._open
            self.spans.append(Span(begun_ns, t_ns, task))
            self._open = None

    def discard(self, t_ns: int) -> None:
        """The open take, or the last one."""
        if self._open is not None:
            self._open = None
        elif self.spans:
            self.spans.pop()
        else:
            self.notes.append(f"a discard at {_seconds(t_ns)} finds nothing to discard")
            return
        self.discarded += 1

    def finish(self, end_ns: int) -> Plan:
        if self._open is not None:
            self.notes.append("the recording ends before its last episode is stopped: it ends there")
            self.stop(end_ns + 1)
        if self.discarded:
            self.notes.append(f"{_were(self.discarded)} discarded by the operator")
        return Plan(self.spans, self.notes)


def plan_events(messages: Iterable[BagMessage], end_ns: int, topic: str) -> Plan:
    """Episodes by start, stop, discard and rerecord, known by receive time.

    discard takes back the open episode, or else the last one; rerecord does so and begins anew at once. Raises
    EpisodeError for another word.
    """
    takes = _Takes()
    for message in messages:
        word, t_ns = str(message.data).strip().lower(), message.receive_ns
        if word == "start":
            if takes.is_open:
                takes.notes.append(f"a start at {_seconds(t_ns)} comes without a stop: it ends the episode before it")
            takes.start(t_ns)
        elif word == "stop":
            if not takes.is_open:
                takes.notes.append(f"a stop at {_seconds(t_ns)} ends nothing")
            takes.stop(t_ns)
        elif word in ("discard", "rerecord"):
            takes.discard(t_ns)
            if word == "rerecord":
                takes.start(t_ns)
        else:
            raise EpisodeError(f"{topic}: '{word}' at {_seconds(t_ns)}, expected one of {', '.join(EVENTS)}")
    return takes.finish(end_ns)


def plan_service(messages: Iterable[BagMessage], end_ns: int) -> Plan:
    """Episodes by the calls of a service, as its introspection recorded them.

    std_srvs/SetBool: true starts, false stops; std_srvs/Trigger: starts and stops by turns;
    dit_policy_msgs/SetInstruction: a new episode of that task, until the next call. Raises EpisodeError for another
    service, and for calls recorded without their content.
    """
    takes = _Takes()
    for t_ns, topic, kind, request in _calls(messages):
        if kind == "Trigger":
            (takes.stop if takes.is_open else takes.start)(t_ns)
            continue
        if not len(request):
            raise EpisodeError(
                f"{topic}: the call at {_seconds(t_ns)} was recorded without its content; switch introspection to "
                "`contents` when recording"
            )
        if kind == "SetInstruction":
            task = str(request[0].instruction).strip()
            if task:  # an empty one is refused by the node, and the instruction in force stays
                takes.start(t_ns, task)
        elif request[0].data:
            takes.start(t_ns)
        else:
            takes.stop(t_ns)
    return takes.finish(end_ns)


def _calls(messages: Iterable[BagMessage]) -> Iterator[tuple[int, str, str, Any]]:
    """Receive time, topic, service type and request of each call, once: client and server may both tell of it."""
    known: set[tuple[bytes, int]] = set()
    for message in messages:
        kind = message.msgtype.rsplit("/", 1)[-1].removesuffix("_Event")
        if kind not in ("SetBool", "Trigger", "SetInstruction"):
            expected = "std_srvs/srv/SetBool, std_srvs/srv/Trigger or dit_policy_msgs/srv/SetInstruction"
            raise EpisodeError(f"{message.topic}: its service is {message.msgtype}, expected {expected}")
        info = message.info
        call = (bytes(bytearray(info.client_gid)), int(info.sequence_number))
        if info.event_type in (_REQUEST_SENT, _REQUEST_RECEIVED) and call not in known:
            known.add(call)
            yield message.receive_ns, message.topic, kind, message.request


def plan_annotations(annotations: Sequence[Annotation], recording: Recording) -> Plan:
    """The annotated episodes of a recording, counted from its first message. Raises EpisodeError."""
    mine = [annotation for annotation in annotations if annotation.is_of(recording.bag)]
    if not mine:
        raise EpisodeError(f"no annotation for {recording.bag.name}")
    seconds = (recording.end_ns - recording.start_ns) / 1e9
    spans: list[Span] = []
    for annotation in sorted(mine, key=lambda annotation: annotation.start):
        if annotation.end > seconds + 0.001:
            raise EpisodeError(f"{annotation.where}: end is {annotation.end} s, but the bag is {seconds:.3f} s long")
        start_ns, end_ns = (recording.start_ns + round(at * 1e9) for at in (annotation.start, annotation.end))
        if spans and start_ns < spans[-1].end_ns:
            raise EpisodeError(
                f"{annotation.where}: begins at {annotation.start} s, within another episode of this bag"
            )
        spans.append(Span(start_ns, end_ns, annotation.task))
    return Plan(spans)


def _instruction_spans(recording: Recording, topic: str) -> Iterator[Span]:
    before: tuple[int, str] | None = None
    for message in recording.messages([topic]):
        task = str(message.data).strip()
        if before is not None and task != before[1] and message.receive_ns > before[0]:
            yield Span(before[0], message.receive_ns)
        if before is None or task != before[1]:
            before = (message.receive_ns, task)
    if before is not None:
        yield Span(before[0])


def _trimmed(plan: Plan, recording: Recording, config: ConvertConfig, embodiment: Embodiment) -> Plan:
    """Each span from its first movement to its last, and the margin beyond."""
    options, state = config.episodes, embodiment.state
    margin_ns, window_ns = round(options.idle_margin * 1e9), round(WINDOW * 1e9)
    max_skew_ns = round(config.time.max_skew * 1e9) if stamp_choice(config.time, state.topic) != "receive" else None
    positions = partial(decode_joints, joints=state.joints, topic=state.topic)
    movements = _movements(recording.messages([state.topic]), positions, options.idle_speed, max_skew_ns)
    ends: dict[int, tuple[int, int]] = {}
    for t_ns in movements:
        found = plan.at(t_ns)
        if found is not None:
            first, _ = ends.get(found[0], (t_ns, t_ns))
            ends[found[0]] = (first, t_ns)
    spans = []
    trimmed = 0
    for index, span in enumerate(plan.spans):
        whole = (max(span.start_ns, recording.start_ns), min(span.end_ns, recording.end_ns + 1))
        if index not in ends:
            plan.notes.append(f"nothing moves from {_seconds(whole[0])} to {_seconds(whole[1])}: no episode of it")
            trimmed += whole[1] - whole[0]
            continue
        start_ns = max(whole[0], ends[index][0] - window_ns - margin_ns)
        end_ns = min(whole[1], ends[index][1] + margin_ns)
        trimmed += start_ns - whole[0] + whole[1] - end_ns
        spans.append(replace(span, start_ns=start_ns, end_ns=end_ns))
    return Plan(spans, plan.notes, trimmed / 1e9)


def _movements(
    messages: Iterable[BagMessage], positions: Callable[[Any], Any], idle_speed: float, max_skew_ns: int | None
) -> Iterator[int]:
    """The instants at which the joints are found to move; by receive time if max_skew_ns is None."""
    stillness = Stillness(idle_speed)
    newest_ns = BEGINNING_OF_TIME
    for message in messages:
        stamp_ns = None if max_skew_ns is None else message.stamp_ns
        t_ns = message.receive_ns if stamp_ns is None else stamp_ns
        if max_skew_ns is not None and abs(t_ns - message.receive_ns) > max_skew_ns:
            continue  # of no row either, see StreamClock.stamp; a stamp far ahead would make all that follow late
        if t_ns <= newest_ns:
            continue  # late: what came before it has told already
        newest_ns = t_ns
        if not stillness.is_idle(t_ns, positions(message)):
            yield t_ns


def _seconds(ns: int) -> str:
    return f"{ns / 1e9:.3f} s"


def _were(episodes: int) -> str:
    return f"{episodes} episode was" if episodes == 1 else f"{episodes} episodes were"
