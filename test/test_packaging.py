"""The packages: what they declare, that they install by pip alone, and that messages, parameters and code agree."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = {"dit_policy_ros": ROOT, "dit_policy_msgs": ROOT / "msg", "dit_policy_training": ROOT / "training"}
ROS_MODULES = {
    "action_msgs", "builtin_interfaces", "diagnostic_msgs", "dit_policy_msgs", "lifecycle_msgs", "rcl_interfaces",
    "rclpy", "rosgraph_msgs", "sensor_msgs", "std_msgs", "std_srvs", "trajectory_msgs",
}  # fmt: skip


def manifest(package: str) -> ElementTree.Element:
    return ElementTree.parse(PACKAGES[package] / "package.xml").getroot()


def imported_modules(folder: Path) -> set[str]:
    """First parts of the absolute imports of all files under a folder."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names


class TestManifests:
    @pytest.mark.parametrize("package", PACKAGES)
    def test_has_name_licence_and_a_mail_address(self, package):
        root = manifest(package)
        assert root.get("format") == "3"
        assert root.findtext("name") == package
        assert root.findtext("license") == "Apache-2.0"
        maintainer = root.find("maintainer")
        assert maintainer is not None  # rosidl refuses a package whose maintainer has no valid address
        assert re.fullmatch(r"[\w.+-]+@[\w-]+(\.[\w-]+)+", maintainer.get("email", ""))

    def test_agree_on_the_version(self):
        versions = {package: manifest(package).findtext("version") for package in PACKAGES}
        for folder in (ROOT, ROOT / "training"):
            found = re.search(r'version="(.+)"', (folder / "setup.py").read_text())
            assert found
            versions[f"{folder}/setup.py"] = found[1]
        assert len(set(versions.values())) == 1, versions
        assert f"{versions['dit_policy_ros']} (" in (ROOT / "CHANGELOG.rst").read_text()

    def test_names_each_ros_package_that_the_nodes_import(self):
        declared = {element.text for element in manifest("dit_policy_ros").iter("exec_depend")}
        used = imported_modules(ROOT / "dit_policy_ros" / "nodes") & ROS_MODULES
        assert "rclpy" in used
        assert used <= declared


class TestRequirements:
    LISTS = ("uv", "base", "colcon", "ros", "ros-jazzy")

    @pytest.mark.parametrize("name", LISTS)
    def test_is_pinned_and_free_of_addresses(self, name):
        lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
        assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[\w.+]+", line)] == []

    @pytest.mark.parametrize("distribution", ["ros", "ros-jazzy"])
    def test_do_not_contradict_each_other(self, distribution):
        """Each environment takes one of the two lists of ROS wheels."""
        pins: dict[str, set[str]] = {}
        for name in ("uv", "base", "colcon", distribution):
            for line in (ROOT / "requirements" / f"{name}.txt").read_text().split():
                package, version = line.split("==")
                pins.setdefault(package, set()).add(version)
        assert {package: versions for package, versions in pins.items() if len(versions) > 1} == {}

    @pytest.mark.parametrize("name", ["base", "colcon", "ros", "ros-jazzy"])
    def test_hold_what_is_asked_for(self, name):
        asked = re.findall(
            r"^([\w-]+)(?:\[.+\])?(?:==(\S+))?", (ROOT / "requirements" / f"{name}.in").read_text(), re.M
        )
        asked = [(package, version) for package, version in asked if package != "-c"]
        pinned = dict(line.split("==") for line in (ROOT / "requirements" / f"{name}.txt").read_text().split())
        missing = [package for package, version in asked if not pinned.get(package.lower(), "").startswith(version)]
        assert missing == []
        assert asked

    def test_of_both_distributions_name_the_same_message_packages(self):
        """What the messages and nodes are built against and import must be there on both."""
        packages = []
        for name in ("ros", "ros-jazzy"):
            asked = (ROOT / "requirements" / f"{name}.in").read_text()
            packages.append(set(re.findall(r"^ros-(?:jazzy-)?([\w-]+)", asked, re.M)))
        kilted, jazzy = ({p for p in found if p.endswith(("-msgs", "-srvs"))} for found in packages)
        assert kilted == jazzy
        assert "std-msgs" in jazzy

    def test_install_no_ros_beside_a_ros(self):
        """Where a ROS is sourced, only these are installed; empy must stay the one that ROS was released with."""
        beside = (ROOT / "requirements/base.txt").read_text() + (ROOT / "requirements/colcon.txt").read_text()
        assert not re.search(r"^(ros-|empy|lark|cv-bridge|rclpy)", beside, re.M)


class TestPip:
    @pytest.fixture(scope="class")
    def installed(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Both packages, installed by pip alone from a copy (pip leaves a build folder behind), without a network."""
        copy, target = tmp_path_factory.mktemp("sources") / "repository", tmp_path_factory.mktemp("installed")
        built = [pattern for folder in ("build", "install", "log") for pattern in (folder, f"{folder}-*")]
        skip = shutil.ignore_patterns(".*", *built, "outputs", "*.egg-info", "__pycache__", "test", "docs")
        shutil.copytree(ROOT, copy, ignore=skip)
        options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", target, copy, copy / "training"]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        return target

    def test_brings_what_ros_looks_for(self, installed):
        share = installed / "share"
        assert (share / "ament_index/resource_index/packages/dit_policy_ros").is_file()
        assert (share / "ament_index/resource_index/packages/dit_policy_training").is_file()
        assert (share / "dit_policy_ros/package.xml").is_file()
        for folder in ("launch", "config", "config/embodiments"):
            expected = {path.name for path in (ROOT / folder).glob("*.launch.py" if folder == "launch" else "*.yaml")}
            assert expected
            assert {path.name for path in (share / "dit_policy_ros" / folder).iterdir() if path.is_file()} == expected

    def test_policy_and_training_import_without_ros(self, installed):
        program = f"""
import importlib, importlib.util, pkgutil, sys
class NoRos:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ROS_MODULES!r}:
            raise ImportError(f"{{name}} is not on this server")
sys.meta_path.insert(0, NoRos())
sys.path[:0] = [{str(installed)!r}]
names = ["dit_policy_ros.embodiment"]
for package in ("dit_policy_ros.policy", "dit_policy_ros.runtime", "dit_policy_training"):
    names += [module.name for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + ".")]
for name in names:
    if not name.endswith("__main__"):
        assert importlib.import_module(name).__file__.startswith({str(installed)!r}), name
print(len(names))
"""
        run = subprocess.run(
            [sys.executable, "-I", "-c", program], cwd=installed, capture_output=True, text=True, timeout=110
        )
        assert run.returncode == 0, run.stderr
        assert int(run.stdout) > 15

    def test_entry_points_lead_somewhere(self):
        scripts = re.findall(r'f"(\w+) = \{NAME\}\.([\w.]+):(\w+)"', (ROOT / "setup.py").read_text())
        assert [name for name, _, _ in scripts] == ["guard_node", "policy_node", "rollout", "sim_node"]
        for name, module, function in scripts:
            tree = ast.parse((ROOT / "dit_policy_ros" / f"{module.replace('.', '/')}.py").read_text())
            assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


@pytest.mark.ros
class TestMessages:
    FILES = (*(ROOT / "msg").glob("msg/*.msg"), *(ROOT / "msg").glob("srv/*.srv"))

    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
    def test_document_each_field(self, path):
        """A comment stands behind the field, or above it and its neighbours without an empty line between."""
        documented = False
        for line in path.read_text().splitlines():
            if not line or line == "---":
                documented = False
            elif line.startswith("#") or "#" in line:
                documented = True
            else:
                assert documented, f"{path.name}: {line}"

    def test_verdicts_are_those_of_the_gate(self):
        from dit_policy_msgs.msg import ActionChunk

        from dit_policy_ros.runtime.gate import Verdict

        names = re.findall(r"^uint8 VERDICT_(\w+)", (ROOT / "msg/msg/ActionChunk.msg").read_text(), re.M)
        assert {name: getattr(ActionChunk, f"VERDICT_{name}") for name in names} == {v.name: int(v) for v in Verdict}

    def test_missing_are_reported_in_one_sentence(self):
        """As where only the root package was built: rclpy is there, the messages are not."""
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(":") if "dit_policy_msgs" not in path]
        environment = os.environ | {"PYTHONPATH": ":".join([str(ROOT), *paths])}
        run = subprocess.run(
            [sys.executable, "-c", "import dit_policy_ros.nodes.policy_node"],
            env=environment, cwd="/", capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 1
        assert (
            "ImportError: dit_policy_msgs is not built or not sourced: run `make setup`" in run.stderr.splitlines()[-1]
        )


class TestParameterFiles:
    @pytest.mark.parametrize(
        ("file", "node", "module"), [("dit_policy", "dit_policy", "parameters"), ("sim", "simulator", "sim_node")]
    )
    def test_hold_every_parameter_with_its_default(self, file, node, module):
        declarations = importlib.import_module(f"dit_policy_ros.nodes.{module}").DECLARATIONS
        content = yaml.safe_load((ROOT / "config" / f"{file}.yaml").read_text())
        values = content[f"/**/{node}"]["ros__parameters"]
        defaults = {declaration.name: declaration.default for declaration in declarations}
        assert values == defaults
        assert {name: type(value) for name, value in values.items()} == {n: type(d) for n, d in defaults.items()}
