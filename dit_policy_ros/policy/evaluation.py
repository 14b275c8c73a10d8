"""Evaluation mode for as long as some thread needs it."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


class EvaluationMode:
    """Puts modules into evaluation mode while any thread is inside, and back into the mode each of them had.

    Were each thread to restore the mode by itself, the first to leave would put the modules into training mode
    under the others. One instance serves all modules that share some of theirs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._were_training: list[nn.Module] = []

    def __reduce__(self) -> tuple[type["EvaluationMode"], tuple[()]]:
        return EvaluationMode, ()  # a copy of the module has threads of its own, and a lock cannot be copied

    @contextmanager
    def __call__(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Evaluation mode of these modules inside; name all that are in a module, whatever its own mode says."""
        with self._lock:
            self._inside += 1
            for each in modules:
                if each.training:
                    each.training = False
                    self._were_training.append(each)
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    for each in self._were_training:
                        each.training = True
                    self._were_training.clear()
