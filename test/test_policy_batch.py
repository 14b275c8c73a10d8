"""What a policy is given, checked by name."""

import numpy as np
import pytest
from policy_fixtures import demo_config

from dit_policy_ros.policy.batch import BatchReader
from dit_policy_ros.policy.configuration import NoTextConfig, ObservationEncoderConfig, ResNetConfig


@pytest.fixture(scope="module")
def reader():
    config = demo_config("unused")
    return BatchReader(config, config.cameras)


@pytest.mark.parametrize("tasks", [["push", "pull"], ("push", "pull"), np.array(["push", "pull"])])
def test_instructions_may_stand_in_any_sequence(reader, tasks):
    assert reader.tasks({"task": tasks}, 2) == ["push", "pull"]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (None, "must be a list of 2 instructions, one a sample; got None"),
        ("push", "must be a list of 2 instructions, one a sample; got 'push'"),
        (7, "must be a list of 2 instructions, one a sample; got 7"),
        (["push"], r"must be a list of 2 instructions, one a sample; got \['push'\]"),
        (["push", 7], r"batch\['task'\]\[1\] must be an instruction in words, got 7"),
        ([["push"], "pull"], r"batch\['task'\]\[0\] must be an instruction in words, got \['push'\]"),
        ({"push": 1, "pull": 2}.values(), r"batch\['task'\]\[0\] must be an instruction in words, got 1"),
    ],
)
def test_instructions_that_are_none_are_refused(reader, tasks, message):
    with pytest.raises(ValueError, match=message):
        reader.tasks({"task": tasks}, 2)


def test_only_a_policy_without_words_may_go_without_instructions():
    config = demo_config(
        "unused", observation_encoder=ObservationEncoderConfig(ResNetConfig(film=False), NoTextConfig())
    )
    assert BatchReader(config, config.cameras).tasks({}, 2) is None
