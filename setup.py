"""Package `dit_policy_ros`: colcon builds it beside ROS; `pip install .` serves a training server without ROS."""

from pathlib import Path

from setuptools import find_packages, setup

NAME = "dit_policy_ros"
SHARE = Path("share") / NAME


def files(folder: str, pattern: str) -> tuple[str, list[str]]:
    """The files of one folder as an entry of data_files, kept in the same folder under share/."""
    return str(SHARE / folder), sorted(str(path) for path in Path(folder).glob(pattern) if path.is_file())


setup(
    name=NAME,
    version="0.1.0",
    description="Runs a Multitask Diffusion-Transformer policy on a ROS 2 arm",
    maintainer="dit_policy_ros maintainers",
    maintainer_email="maintainers@dit-policy-ros.dev",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (str(SHARE), ["package.xml"]),
        files("launch", "*.launch.py"),
        files("config", "*.yaml"),
        files("config/cluster", "*.sh"),
        files("config/embodiments", "*.yaml"),
        files("config/foxglove", "*.json"),
        files("config/plotjuggler", "*.xml"),
        files("config/rqt", "*.perspective"),
        files("config/training", "*.yaml"),
        files("checkpoints/demo", "*"),
        files("checkpoints/demo/tokenizer", "*"),
    ],
    install_requires=[
        "draccus",
        "numpy>=2",
        "opencv-python-headless",
        "pyyaml",
        "rich",
        "safetensors",
        "torch>=2.6",
        "transformers>=5.5,<5.6",  # later ones give CLIP's weights other names
    ],
    extras_require={"sim": ["mujoco", "rosbags"], "test": ["pytest", "pytest-timeout"]},
    zip_safe=False,
    entry_points={
        "console_scripts": [
            f"guard_node = {NAME}.nodes.guard_node:main",
            f"policy_node = {NAME}.nodes.policy_node:main",
            f"rollout = {NAME}.sim.rollout:main",
            f"sim_node = {NAME}.nodes.sim_node:main",
        ],
    },
)
