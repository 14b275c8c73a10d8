"""What a check found: sentences by kind, few enough to read, and all of them counted."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

SHOWN = 10  # problems of one kind; the rest is counted


@dataclass
class Findings:
    """Problems, SHOWN of each kind and a count of the others; and figures of what was compared, JSON types."""

    counts: Counter[str] = field(default_factory=Counter)
    sentences: dict[str, list[str]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, kind: str, sentence: str) -> None:
        """One problem."""
        self.counts[kind] += 1
        if self.counts[kind] <= SHOWN:
            self.sentences.setdefault(kind, []).append(sentence)

    def take(self, other: "Findings") -> None:
        """Add the problems of `other`."""
        for kind, count in other.counts.items():
            room = max(0, SHOWN - self.counts[kind])
            self.sentences.setdefault(kind, []).extend(other.sentences[kind][:room])
            self.counts[kind] += count

    @property
    def problems(self) -> list[str]:
        """All that is shown, and how many more there are."""
        return [
            sentence
            for kind, sentences in self.sentences.items()
            for sentence in (*sentences, *self._rest(kind, len(sentences)))
        ]

    def _rest(self, kind: str, shown: int) -> list[str]:
        more = self.counts[kind] - shown
        return [f"... and {more} more about {kind}"] if more else []
