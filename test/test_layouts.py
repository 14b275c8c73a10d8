"""The layouts for rqt, Foxglove and PlotJuggler: each opens, and each topic and field in it is published."""

import ast
import importlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dit_policy_ros.embodiment import Embodiment

pytestmark = pytest.mark.ros

ROOT = Path(__file__).parents[1]
RQT = ROOT / "config/rqt/dit_policy.perspective"
FOXGLOVE = ROOT / "config/foxglove/dit_policy.json"
PLOTJUGGLER = ROOT / "config/plotjuggler/dit_policy.xml"
ARM = Embodiment.load(ROOT / "config/embodiments/sim_arm.yaml")


@pytest.fixture(scope="module")
def node() -> Iterator[Any]:
    """The node itself, which knows what it publishes; its publishers do not depend on a checkpoint."""
    import rclpy

    from dit_policy_ros.nodes.lifecycle import PolicyNode

    rclpy.init()
    node = PolicyNode()
    yield node
    node.finish()
    node.destroy_node()
    rclpy.shutdown()


@pytest.fixture(scope="module")
def topics(node: Any) -> dict[str, str]:
    """Topic and type of all that the node and the simulated arm publish."""
    names = node.get_publisher_names_and_types_by_node("dit_policy", "/")
    return {f"/{topic}": kind for topic, kind in ARM.topics.items()} | {name: kinds[0] for name, kinds in names}


@pytest.fixture(scope="module")
def services(node: Any) -> dict[str, str]:
    return {name: kinds[0] for name, kinds in node.get_service_names_and_types_by_node("dit_policy", "/")}


def type_of(name: str) -> Any:
    """The class of a type such as sensor_msgs/msg/JointState."""
    package, folder, kind = name.split("/")
    return getattr(importlib.import_module(f"{package}.{folder}"), kind)


def check_field(topic: str, path: str, topics: dict[str, str]) -> None:
    """AssertionError unless the topic is published and its type has the field; path as "position[0]" or "a.b"."""
    assert topic in topics, f"nobody publishes {topic}"
    kind = topics[topic]
    for part in path.split("."):
        name = part.partition("[")[0]
        fields = type_of(kind).get_fields_and_field_types()
        assert name in fields, f"{topic}: {kind} has no field {name}"
        kind = fields[name]
        assert ("[" in part) == ("sequence" in kind or "[" in kind), f"{topic}: {name} is {kind}"


class TestRqt:
    def perspective(self) -> tuple[dict[str, list[int]], dict[str, Any]]:
        manager = json.loads(RQT.read_text())["groups"]["pluginmanager"]
        return ast.literal_eval(manager["keys"]["running-plugins"]["repr"]), manager["groups"]

    def test_opens_parameters_diagnostics_and_plots(self) -> None:
        plugins, groups = self.perspective()
        assert {"rqt_reconfigure/Param", "rqt_runtime_monitor/RuntimeMonitor", "rqt_plot/Plot"} == set(plugins)
        expected = {
            f"plugin__{name.replace('/', '__')}__{number}" for name, numbers in plugins.items() for number in numbers
        }
        assert set(groups) == expected

    def test_plots_what_is_published(self, topics: dict[str, str]) -> None:
        _, groups = self.perspective()
        plots = [group["groups"]["plugin"]["keys"] for name, group in groups.items() if "rqt_plot" in name]
        paths = [path for plot in plots for path in ast.literal_eval(plot["topics"]["repr"])]
        assert paths
        for path in paths:
            topic, _, field = path.rpartition("/")
            check_field(topic, field, topics)


class TestFoxglove:
    def test_shows_each_panel_once(self) -> None:
        layout = json.loads(FOXGLOVE.read_text())
        shown: list[str] = []

        def walk(part: Any) -> None:
            if isinstance(part, str):
                shown.append(part)
                for tab in layout["configById"][part].get("tabs", []):
                    walk(tab["layout"])
            else:
                assert part["direction"] in ("row", "column")
                walk(part["first"])
                walk(part["second"])

        walk(layout["layout"])
        assert sorted(shown) == sorted(layout["configById"])

    def test_shows_what_is_published(self, topics: dict[str, str]) -> None:
        panels = json.loads(FOXGLOVE.read_text())["configById"]
        paths = [path["value"] for panel in panels.values() for path in panel.get("paths", [])]
        assert len(paths) > 3 * len(ARM.state.joints)
        for path in paths:
            topic, _, field = path.partition(".")
            check_field(topic, field, topics)
        images = {panel["imageMode"]["imageTopic"] for panel in panels.values() if "imageMode" in panel}
        assert images == {f"/{camera.topic}" for camera in ARM.cameras}
        assert panels["DiagnosticSummary!all"]["topicToRender"] in topics

    def test_plots_each_joint_predicted_commanded_and_measured(self) -> None:
        panels = json.loads(FOXGLOVE.read_text())["configById"]
        for index in range(len(ARM.state.joints)):
            values = {path["value"] for path in panels[f"Plot!joint{index + 1}"]["paths"]}
            prefixes = ("/joint_states", "/dit_policy/commanded_joint_states", "/dit_policy/predicted_joint_states")
            assert values == {f"{topic}.position[{index}]" for topic in prefixes}

    def test_calls_services_that_are_there(self, services: dict[str, str]) -> None:
        panels = json.loads(FOXGLOVE.read_text())["configById"]
        calls = [panel for panel in panels.values() if "serviceName" in panel]
        assert {panel["serviceName"] for panel in calls} == {"/dit_policy/set_instruction", "/dit_policy/resume"}
        for panel in calls:
            request = type_of(services[panel["serviceName"]]).Request
            assert set(json.loads(panel["requestPayload"])) <= set(request.get_fields_and_field_types())


class TestPlotJuggler:
    def test_plots_what_is_published(self, topics: dict[str, str]) -> None:
        curves = [curve.get("name", "") for curve in ElementTree.parse(PLOTJUGGLER).iter("curve")]
        assert curves
        for curve in curves:
            joint = re.fullmatch(r"(.+)/(\w+)/position", curve)
            if joint is not None:  # PlotJuggler names a joint state's series by the joint
                check_field(joint[1], "position[0]", topics)
                assert topics[joint[1]] == "sensor_msgs/msg/JointState"
                assert joint[2] in ARM.state.joints
            else:
                topic, _, field = curve.rpartition("/")
                check_field(topic, field, topics)


def test_are_installed() -> None:
    """Where `ros2 launch` and users look for them: below share/dit_policy_ros."""
    setup = (ROOT / "setup.py").read_text()
    for path in (RQT, FOXGLOVE, PLOTJUGGLER):
        folder = os.path.relpath(path.parent, ROOT)
        assert f'files("{folder}", "*{path.suffix}")' in setup
