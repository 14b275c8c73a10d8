"""Options that make no sense are refused before the work, all at once. What depends on the robot is Layout's."""

import math
import re
from collections.abc import Sequence

from dit_policy_ros.embodiment import TRANSPORTS
from dit_policy_training.conversion.options import (
    EPISODES_BY,
    EXECUTORS,
    ON_GAP,
    SAMPLINGS,
    STAMPS,
    VERIFY,
    ConvertConfig,
    OptionError,
)

_SHARD = re.compile(r"(\d+)/(\d+)")


def check_options(config: ConvertConfig) -> None:
    """Raises OptionError that names each wrong option, its value and what is expected."""
    problems = [*_general(config), *_time(config), *_episodes(config), *_depth(config)]
    if problems:
        raise OptionError("\n".join(problems))


def shard_of(config: ConvertConfig) -> tuple[int, int]:
    """i and n of --shard=i/n; 1 and 1 without. Raises OptionError."""
    if not config.shard:
        return 1, 1
    found = _SHARD.fullmatch(config.shard)
    number, of = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= of:
        raise OptionError(_expected("shard", config.shard, "i/n with i from 1 to n, such as 2/8"))
    return number, of


def check_verify(mode: str) -> list[str]:
    """What is wrong with --verify, if anything."""
    # YAML's off is false, which arrives here as a text again.
    hint = ' (in a YAML file in quotes: "off")' if mode == "False" else ""
    return [problem + hint for problem in _one_of("verify", mode, VERIFY)]


def _general(config: ConvertConfig) -> list[str]:
    problems = [
        *_one_of("executor", config.executor, EXECUTORS),
        *check_verify(config.verify),
        *_at_least("workers", config.workers, 0),
        *_at_least("video.gop", config.video.gop, 1),
        *_at_least("video.crf", config.video.crf, 0),
    ]
    if config.fps is not None and config.fps < 1:
        problems.append(_expected("fps", config.fps, "a whole number of 1 or more"))
    if not config.output.name:
        problems.append(_expected("output", config.output, "a folder's name, such as datasets/my_task"))
    try:
        shard_of(config)
    except OptionError as error:
        problems.append(str(error))
    return problems


def _time(config: ConvertConfig) -> list[str]:
    problems = [*_positive("time.max_skew", config.time.max_skew), *_one_of("time.on_gap", config.time.on_gap, ON_GAP)]
    for topic, stamp in config.time.stamps.items():
        problems += _one_of(f"time.stamps of {topic}", stamp, STAMPS)
    for stream, sampling in config.time.sampling.items():
        problems += _one_of(f"time.sampling of {stream}", sampling, SAMPLINGS)
    return problems


def _episodes(config: ConvertConfig) -> list[str]:
    asked = config.episodes
    problems = [
        *_one_of("episodes.by", asked.by, EPISODES_BY),
        *_not_negative("episodes.min_seconds", asked.min_seconds),
        *_not_negative("episodes.idle_speed", asked.idle_speed),
        *_not_negative("episodes.idle_margin", asked.idle_margin),
    ]
    if asked.by in ("events", "service") and not asked.topic:
        what = "the events' topic" if asked.by == "events" else "the service's name"
        problems.append(_expected("episodes.topic", "", f"{what}, since episodes.by is {asked.by}"))
    if asked.by == "annotations" and asked.annotations is None:
        problems.append(_expected("episodes.annotations", "", "a CSV or YAML file, since episodes.by is annotations"))
    if asked.annotations is not None and not asked.annotations.is_file():
        problems.append(_expected("episodes.annotations", asked.annotations, "a file; there is none of that name"))
    if asked.annotations is not None and asked.by != "annotations":
        problems.append(_expected("episodes.by", asked.by, "annotations, since episodes.annotations is given"))
    return problems


def _depth(config: ConvertConfig) -> list[str]:
    problems = []
    for name, camera in config.depth.items():
        problems += [
            *_one_of(f"depth.{name}.transport", camera.transport, TRANSPORTS),
            *_at_least(f"depth.{name}.width", camera.width, 1),
            *_at_least(f"depth.{name}.height", camera.height, 1),
            *_positive(f"depth.{name}.max_age", camera.max_age),
            *_not_negative(f"depth.{name}.depth_min", camera.depth_min),
        ]
        if not camera.depth_min < camera.depth_max < math.inf:
            above = f"metres, more than depth_min ({camera.depth_min})"
            problems.append(_expected(f"depth.{name}.depth_max", camera.depth_max, above))
    return problems


def _one_of(name: str, value: str, allowed: Sequence[str]) -> list[str]:
    return [] if value in allowed else [_expected(name, value, " or ".join(choice for choice in allowed if choice))]


def _at_least(name: str, value: int, least: int) -> list[str]:
    return [] if value >= least else [_expected(name, value, f"{least} or more")]


def _positive(name: str, value: float) -> list[str]:
    return [] if 0 < value < math.inf else [_expected(name, value, "a number above 0")]


def _not_negative(name: str, value: float) -> list[str]:
    return [] if 0 <= value < math.inf else [_expected(name, value, "0 or more")]


def _expected(name: str, value: object, expected: str) -> str:
    return f"--{name} is {str(value) or 'empty'!r}; expected {expected}"
