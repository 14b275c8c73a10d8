"""Evaluation mode for as long as some thread needs it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class EvaluationMode:
    """Puts a module into evaluation mode while any thread is inside, and back into the mode it had.

    Were each thread to restore the mode by itself, the first to leave would put the module into training mode
    under the others.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._was_training = False

    def __reduce__(self) -> tuple[type["EvaluationMode"], tuple[()]]:
        return EvaluationMode, ()  # a copy of the module has threads of its own, and a lock cannot be copied

    @contextmanager
    def __call__(self, module: nn.Module) -> Iterator[None]:
        """Evaluation mode inside."""
        with self._lock:
            if self._inside == 0:
                self._was_training = module.training
                if module.training:
                    module.eval()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0 and self._was_training:
                    module.train()
