"""Package `dit_policy_training`: colcon builds it beside ROS; on a server, `pip install . ./training`."""

from setuptools import find_packages, setup

NAME = "dit_policy_training"

setup(
    name=NAME,
    version="0.1.0",
    description="Bags to datasets, datasets to checkpoints, for dit_policy_ros",
    maintainer="dit_policy_ros maintainers",
    maintainer_email="maintainers@dit-policy-ros.dev",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
    ],
    install_requires=[
        "dit_policy_ros",
        "accelerate>=1.2",
        "backports.zstd; python_version < '3.14'",
        "draccus",
        "huggingface_hub",
        "lerobot[dataset]>=0.6.1,<0.7",
        "lz4",
        "matplotlib",
        "numpy>=2",
        "pyyaml",
        "rich",
        "rosbags",
        "safetensors",
        "tensorboard",
        "torch>=2.6",
    ],
    extras_require={
        "modal": ["modal>=1"],
        "ray": ["ray>=2.40"],
        "test": ["pytest", "pytest-timeout"],
        "wandb": ["wandb"],
    },
    zip_safe=False,
    entry_points={
        "console_scripts": [
            f"compare = {NAME}.compare:main",
            f"convert = {NAME}.convert:main",
            f"diagnose = {NAME}.diagnose:main",
            f"evaluate = {NAME}.evaluate:main",
            f"inference = {NAME}.inference:main",
            f"inspect = {NAME}.inspect:main",
            f"merge = {NAME}.merge:main",
            f"to_bag = {NAME}.to_bag:main",
            f"train = {NAME}.train:main",
            f"train_modal = {NAME}.train_modal:main",
            f"tune = {NAME}.tune:main",
        ],
    },
)
