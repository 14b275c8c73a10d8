"""A bounded store of what was made lately."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock


class Recent[Value]:
    """The last `size` values used, by key; safe for threads.

    A copy of it, a pickled one as well, begins empty: values may be on a device, or of a thing, that the copy's owner
    has not.
    """

    def __init__(self, size: int):
        """Raises ValueError for a size below 1."""
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self._size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        """How many values are kept."""
        return len(self._values)

    def __reduce__(self) -> tuple[type["Recent[Value]"], tuple[int]]:
        """How it is copied and pickled: its size alone."""
        return type(self), (self._size,)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made now if it is not kept. What `make` raises is raised, and nothing kept."""
        with self._lock:
            if key not in self._values:
                self._values[key] = make()
                if len(self._values) > self._size:
                    self._values.popitem(last=False)
            self._values.move_to_end(key)
            return self._values[key]

    def clear(self) -> None:
        """Forgets all values."""
        with self._lock:
            self._values.clear()
