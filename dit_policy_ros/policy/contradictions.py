"""What makes a configuration contradict itself, whatever it is of: words, signs and numbers that cannot be meant.

Each function takes a dataclass and the name it goes by in messages, and says what it finds, a sentence each.
"""

import math
from typing import Any, Literal, get_args, get_origin, get_type_hints


class ConfigurationError(ValueError):
    """A configuration that contradicts itself; the message lists every contradiction."""


def unknown_choices(config: Any, where: str) -> list[str]:
    """Fields of which only certain words are allowed, and that hold another."""
    return [
        f"{where}.{name} must be one of {', '.join(get_args(kind))}; got {getattr(config, name)!r}"
        for name, kind in get_type_hints(type(config)).items()
        if get_origin(kind) is Literal and getattr(config, name) not in get_args(kind)
    ]


def not_positive(config: Any, where: str, *names: str) -> list[str]:
    """Those of the named fields that are zero or less."""
    return [
        f"{where}.{name} must be positive, got {getattr(config, name)}" for name in names if getattr(config, name) <= 0
    ]


def not_finite(config: Any, where: str) -> list[str]:
    """Fields that hold a number, or several, of which one is infinite or none at all: NaN passes any comparison."""
    return [
        f"{where}.{name} must be finite, got {value}"
        for name, value in vars(config).items()
        if not all(math.isfinite(number) for number in _floats(value))
    ]


def _floats(value: Any) -> list[float]:
    return [number for number in (value if isinstance(value, tuple) else (value,)) if isinstance(number, float)]
