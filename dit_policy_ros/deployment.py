"""What the launch files compute from an embodiment: names below a namespace, cameras over a network, a recording."""

from __future__ import annotations

from dataclasses import replace

from dit_policy_ros.embodiment import Embodiment


def resolve(topic: str, namespace: str) -> str:
    """The full name of an embodiment's topic for a node in `namespace` ("", "left" and "/left" are all fine)."""
    if topic.startswith("/"):
        return topic
    return "/".join(["", *(part for part in namespace.split("/") if part), topic])


def compressed_topic(topic: str) -> str:
    """Where image_transport's `compressed` puts the images of a raw topic."""
    return f"{topic}/compressed"


def over_network(embodiment: Embodiment) -> Embodiment:
    """The same robot seen from another computer: each raw camera by its compressed topic, all else as it is.

    A policy may run on it, since nothing that it was trained on differs (`Embodiment.incompatibilities`).
    """
    cameras = tuple(
        replace(camera, transport="compressed", topic=compressed_topic(camera.topic))
        if camera.transport == "raw"
        else camera
        for camera in embodiment.cameras
    )
    return replace(embodiment, cameras=cameras)


def record_command(embodiment: Embodiment, namespace: str, output: str, use_sim_time: bool = False) -> list[str]:
    """`ros2 bag record` of exactly the embodiment's topics. With an empty `output` the folder is named by the time."""
    topics = [resolve(topic, namespace) for topic in embodiment.topics]
    options = ["--storage", "mcap"]
    if output:
        options += ["--output", output]
    if use_sim_time:
        options.append("--use-sim-time")
    # rosbag2 leaves out names with a part that begins with an underscore, as those of actions do.
    if any(part.startswith("_") for topic in topics for part in topic.split("/")):
        options.append("--include-hidden-topics")
    return ["ros2", "bag", "record", *options, "--topics", *topics]
