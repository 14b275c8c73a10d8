"""The bounded store, and that copies of it begin empty."""

import copy
import pickle
import threading

import pytest

from dit_policy_ros.policy.recent import Recent


def test_what_was_used_last_is_kept():
    recent, made = Recent(2), []

    def get(key):
        return recent.get(key, lambda: made.append(key) or key.upper())

    assert [get(key) for key in "abacab"] == list("ABACAB")
    assert made == list("abcb")  # b, used least lately, went when c came
    assert len(recent) == 2
    recent.clear()
    assert len(recent) == 0


def test_what_cannot_be_made_is_not_kept():
    recent = Recent(2)
    with pytest.raises(ZeroDivisionError):
        recent.get("a", lambda: 1 // 0)
    assert recent.get("a", lambda: 1) == 1
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Recent(0)


def test_copies_begin_empty():
    recent = Recent(1)
    recent.get("a", lambda: 1)
    for other in (copy.copy(recent), copy.deepcopy(recent), pickle.loads(pickle.dumps(recent))):
        assert len(other) == 0
        other.get("b", lambda: 2)
        other.get("c", lambda: 3)
        assert len(other) == 1
    assert recent.get("a", lambda: 4) == 1


def test_a_value_is_made_once_however_many_threads_ask():
    recent, made, together = Recent(1), [], threading.Barrier(4)

    def make():
        made.append(1)
        return threading.Event().wait(0.05)  # long enough for all the others to ask

    def ask():
        together.wait()
        recent.get("a", make)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
