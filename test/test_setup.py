"""The set-up: which Python, which ROS, what is redone when, and what survives an interruption or a move."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dit_policy_ros.nodes import domain
from tools.bootstrap import graphics, packages, ros, venv
from tools.bootstrap.places import Places
from tools.bootstrap.step import Step, StepFailed, command, fingerprint, write

ROOT = Path(__file__).parents[1]
PYTHON = Path(sys._base_executable)  # type: ignore[attr-defined]


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


class TestFindPython:
    """A machine of its own each time: a PATH with next to nothing on it, an empty home."""

    @pytest.fixture
    def find(self, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
        shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
        for name in ("sed", "ls"):
            located = shutil.which(name)
            assert located
            (tmp_path / "bin").mkdir(exist_ok=True)
            (tmp_path / "bin" / name).symlink_to(located)

        def run(**variables: str) -> subprocess.CompletedProcess[str]:
            environment = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path / "home"), **variables}
            return subprocess.run(
                ["/bin/sh", "tools/find_python.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True
            )

        return run

    def test_passes_a_shim_that_fails_and_finds_pyenvs_version(self, find, tmp_path):
        executable(tmp_path / "bin" / "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
        executable(tmp_path / "home/.pyenv/versions/3.12.9/bin/python", f'exec {PYTHON} "$@"')
        assert find().stdout.strip() == str(PYTHON)

    def test_takes_the_python_that_is_asked_for(self, find):
        assert find(PYTHON=str(PYTHON)).stdout.strip() == str(PYTHON)

    def test_refuses_another_version_that_is_asked_for(self, find, tmp_path):
        old = executable(tmp_path / "old", "echo 'it is Python 3.10' >&2; exit 1")
        run = find(PYTHON=str(old))
        assert run.returncode == 1
        assert "it is Python 3.10" in run.stderr
        assert f"PYTHON={old} cannot be used" in run.stderr

    def test_keeps_the_interpreter_of_the_environment(self, find, tmp_path):
        executable(tmp_path / "first/python3.12", f'exec {PYTHON} "$@"')
        executable(tmp_path / "bin/python3.12", "echo /other/python3.12")
        write(tmp_path / ".venv/pyvenv.cfg", f"home = {tmp_path / 'first'}\n")
        assert find().stdout.strip() == str(PYTHON)

    def test_keeps_the_interpreter_of_the_environment_that_is_asked_for(self, find, tmp_path):
        executable(tmp_path / "first/python3.12", f'exec {PYTHON} "$@"')
        executable(tmp_path / "bin/python3.12", "echo /other/python3.12")
        write(tmp_path / ".venv-jazzy/pyvenv.cfg", f"home = {tmp_path / 'first'}\n")
        assert find(ROS="jazzy").stdout.strip() == str(PYTHON)
        assert find().stdout.strip() != str(PYTHON)

    def test_lets_uv_install_one(self, find, tmp_path):
        target = tmp_path / "pythons/cpython-3.12.9-linux/bin"
        install = f"/bin/mkdir -p {target}; /bin/ln -s {PYTHON} {target}/python3.12"
        executable(tmp_path / "bin/uv", f"[ \"$*\" = 'python install 3.12' ] || exit 0; {install}")
        run = find(UV_PYTHON_INSTALL_DIR=str(tmp_path / "pythons"))
        assert run.returncode == 0, run.stderr
        assert (target / "python3.12").samefile(run.stdout.strip())

    def test_says_what_to_do_where_there_is_nothing(self, find):
        run = find()
        assert run.returncode == 1
        assert run.stdout == ""
        assert "set-up failed: find Python 3.12" in run.stderr
        assert "remedy: sudo apt-get install -y python3.12" in run.stderr


class TestChoiceOfRos:
    SOURCED = f"/opt/ros/x:{ROOT / 'install' / 'dit_policy_msgs'}"

    @pytest.mark.parametrize(
        ("variables", "expected"),
        [
            ({}, "wheels"),
            ({"ROS_DISTRO": "jazzy"}, "wheels"),  # an image sets it, nothing is sourced
            ({"AMENT_PREFIX_PATH": f"{ROOT / 'install' / 'dit_policy_msgs'}:{ROOT / '.venv'}"}, "wheels"),
            ({"AMENT_PREFIX_PATH": SOURCED, "ROS_DISTRO": "jazzy"}, "jazzy"),
            ({"AMENT_PREFIX_PATH": SOURCED, "ROS_DISTRO": "kilted"}, "kilted"),
        ],
    )
    def test_is_what_is_sourced(self, variables, expected):
        assert ros.choose(variables, ROOT, lambda: None) == expected

    @pytest.mark.parametrize("distribution", ["humble", "rolling", ""])
    def test_refuses_another_distribution(self, distribution):
        with pytest.raises(StepFailed, match=distribution or "without ROS_DISTRO") as failure:
            ros.choose({"AMENT_PREFIX_PATH": self.SOURCED, "ROS_DISTRO": distribution}, ROOT, lambda: None)
        assert "no ROS is sourced" in failure.value.remedy

    def test_refuses_a_ros_that_this_python_cannot_import(self):
        sourced = {"AMENT_PREFIX_PATH": self.SOURCED, "ROS_DISTRO": "jazzy"}
        with pytest.raises(StepFailed, match="No module named rclpy") as failure:
            ros.choose(sourced, ROOT, lambda: "No module named rclpy")
        assert "ros-jazzy-ros-base" in failure.value.remedy

    def test_takes_wheels_by_name(self):
        assert [ros.wheels_list({}), ros.wheels_list({"ROS": "kilted"})] == ["ros.txt", "ros.txt"]
        assert ros.wheels_list({"ROS": "jazzy"}) == "ros-jazzy.txt"
        assert ros.choose({"ROS": "jazzy"}, ROOT, lambda: None) == "wheels"

    def test_refuses_a_name_that_it_does_not_know(self):
        with pytest.raises(StepFailed, match="ROS=humble is not one of jazzy, kilted") as failure:
            ros.suffix({"ROS": "humble"})
        assert "leave ROS away" in failure.value.remedy

    def test_mixes_no_wheels_with_another_ros(self):
        sourced = {"AMENT_PREFIX_PATH": self.SOURCED, "ROS_DISTRO": "kilted"}
        with pytest.raises(StepFailed, match="ROS=jazzy is asked for while ROS 2 kilted is sourced"):
            ros.choose({**sourced, "ROS": "jazzy"}, ROOT, lambda: None)
        assert ros.choose({**sourced, "ROS": "kilted"}, ROOT, lambda: None) == "kilted"


class TestPlaces:
    def test_of_a_name_are_its_own(self):
        places = [Places(ROOT, ros.suffix({"ROS": name})) for name in ("", "jazzy")]
        folders = [{place.venv, place.build, place.install, place.log, place.step_logs} for place in places]
        assert not folders[0] & folders[1]
        assert places[0].venv == Places(ROOT, ros.suffix({"ROS": "kilted"})).venv

    @pytest.mark.parametrize("name", ["", "kilted", "jazzy"])
    def test_are_those_that_run_sh_takes(self, tmp_path, name):
        """The two agree by construction only as long as both are changed together."""
        places = Places(tmp_path, ros.suffix({"ROS": name}))
        write(tmp_path / "tools/run.sh", (ROOT / "tools/run.sh").read_text())
        write(places.venv / "bin/activate", "found=environment")
        write(places.install / "local_setup.bash", 'found="$found and build"; export found')
        write(places.stamps / "graphics", "egl")
        command = ["bash", tmp_path / "tools/run.sh", "printenv", "found", "ROS_DISTRO"]
        environment = {**os.environ, "ROS": name, "ROS_DISTRO": "rolling"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (run.stdout.splitlines(), run.stderr) == (["environment and build", name or "rolling"], "")

    def test_are_not_in_git(self):
        names = [Places(ROOT, suffix).venv for suffix in ("", "-jazzy")]
        names += [folder for s in ("", "-jazzy") for folder in (Places(ROOT, s).build, Places(ROOT, s).log)]
        names += [Places(ROOT, suffix).install for suffix in ("", "-jazzy")]
        ignored = (ROOT / ".gitignore").read_text().split()
        assert [path for path in names if not any(path.match(pattern.rstrip("/")) for pattern in ignored)] == []


class TestStep:
    @pytest.fixture
    def taken(self) -> list[bool]:
        """For each time that the work was done, whether it had to start afresh."""
        return []

    def step(self, folder: Path, taken: list[bool], facts: str = "1") -> Step:
        return Step("part", folder / "made" / "stamp", fingerprint(facts), lambda _, afresh: taken.append(afresh))

    def test_is_done_once_for_each_fingerprint(self, tmp_path, taken):
        assert not self.step(tmp_path, taken).done()
        self.step(tmp_path, taken).run(tmp_path)
        assert self.step(tmp_path, taken).done()
        assert not self.step(tmp_path, taken, "2").done()
        self.step(tmp_path, taken, "2").run(tmp_path)
        assert taken == [True, False]

    def test_starts_afresh_on_another_basis(self, tmp_path, taken):
        for basis, facts in (("here", "1"), ("here", "2"), ("elsewhere", "2"), ("elsewhere", "3")):
            stamp, work = tmp_path / "stamp", lambda _, afresh: taken.append(afresh)
            step = Step("part", stamp, fingerprint(facts), work, basis=fingerprint(basis))
            assert not step.done()
            step.run(tmp_path)
            assert step.done()
        assert taken == [True, False, True, False]

    def test_starts_afresh_after_an_interruption(self, tmp_path, taken):
        def interrupted(_: Path, __: bool) -> None:
            raise KeyboardInterrupt

        self.step(tmp_path, taken).run(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            Step("part", tmp_path / "made" / "stamp", fingerprint("2"), interrupted).run(tmp_path)
        self.step(tmp_path, taken, "2").run(tmp_path)
        assert taken == [True, True]

    def test_is_not_done_when_its_result_is_gone(self, tmp_path, taken):
        self.step(tmp_path, taken).run(tmp_path)
        shutil.rmtree(tmp_path / "made")
        assert not self.step(tmp_path, taken).done()

    def test_command_names_the_cause_the_log_and_the_remedy(self, tmp_path):
        with pytest.raises(StepFailed) as failure:
            command(["/bin/sh", "-c", "seq 1 100; echo no space left >&2; exit 3"], tmp_path / "log", "free some space")
        assert "(3)" in failure.value.cause
        assert "no space left" in failure.value.cause
        assert "\n    85\n" not in failure.value.cause
        assert "\n    99\n" in failure.value.cause
        assert str(tmp_path / "log") in failure.value.cause
        assert failure.value.remedy == "free some space"
        with pytest.raises(StepFailed, match="No such file"):
            command([tmp_path / "absent"], tmp_path / "log", "")

    def test_write_leaves_the_other_names_of_a_file_alone(self, tmp_path):
        """uv's cache is the other name of each installed file."""
        (tmp_path / "cache").write_text("original")
        (tmp_path / "installed").hardlink_to(tmp_path / "cache")
        write(tmp_path / "installed", "changed")
        assert (tmp_path / "cache").read_text() == "original"


class TestEnvironment:
    def test_works_after_its_folder_moved(self, tmp_path):
        old, new = tmp_path / "old" / ".venv", tmp_path / "new" / ".venv"
        subprocess.run([PYTHON, "-m", "venv", "--without-pip", old], check=True)
        script = executable(old / "bin" / "script", "")
        script.write_text(f"#!{old}/bin/python\nimport sys; print(sys.prefix)\n")
        neighbour = f"# {old}-2/bin"
        (old / "bin" / "notes").write_text(neighbour)
        old.parent.rename(new.parent)

        assert venv.mend_after_move(new)

        assert subprocess.run([new / "bin" / "script"], capture_output=True, text=True).stdout.strip() == str(new)
        left = subprocess.run(["grep", "-rlI", f"{old}\\b", new], capture_output=True, text=True).stdout.split()
        assert left == [str(new / "bin" / "notes")]
        assert (new / "bin" / "notes").read_text() == neighbour
        assert not venv.mend_after_move(new)

    @pytest.mark.parametrize("damage", ["pip", "python", "activate", "kind", "configuration"])
    def test_half_made_does_not_work(self, tmp_path, damage):
        folder = tmp_path / ".venv"
        subprocess.run([PYTHON, "-m", "venv", "--without-pip", folder], check=True)
        write(venv.site_packages(folder) / "pip/__init__.py", "")
        record = venv.site_packages(folder) / "pip-1.dist-info" / "RECORD"
        write(record, "pip/__init__.py,,0\n")
        assert venv.works(folder, PYTHON, with_system=False)
        if damage == "pip":
            record.unlink()
        elif damage == "python":
            (folder / "bin" / "python").unlink()
        elif damage == "activate":
            (folder / "bin" / "activate").unlink()
        elif damage == "configuration":
            (folder / "pyvenv.cfg").unlink()
        assert not venv.works(folder, PYTHON, with_system=damage == "kind")

    def test_of_another_interpreter_does_not_work(self, tmp_path):
        subprocess.run([PYTHON, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
        assert not venv.works(tmp_path / ".venv", Path("/elsewhere/bin/python3.12"), with_system=False)

    def test_finds_packages_that_an_interruption_left_half_installed(self, tmp_path):
        for name, record in {
            "whole": "whole.py,sha256=x,3\n../../bin/whole,sha256=x,999\nwhole.pyc,,\nwhole-1.dist-info/RECORD,,\n",
            "cut_short": "cut.py,sha256=x,9\n",
            "missing": "never_written.py,sha256=x,3\n",
            "no_record": "",
        }.items():
            write(tmp_path / "lib/site" / f"{name}-1.dist-info" / "METADATA", "Name: x")
            if record:
                write(tmp_path / "lib/site" / f"{name}-1.dist-info" / "RECORD", record)
        write(tmp_path / "lib/site/whole.py", "abc")
        write(tmp_path / "lib/site/cut.py", "abc")
        write(tmp_path / "bin/whole", "#!/moved")
        assert set(venv.half_installed(tmp_path / "lib/site")) == {"cut-short", "missing", "no-record"}


class TestBuild:
    def test_wheels_exports_name_this_machines_headers(self, tmp_path):
        export = tmp_path / "share/p/cmake/pExport.cmake"
        numpy = "lib/python3.12/site-packages/numpy/_core/include"
        prefix = "/opt/python/cp312-cp312"
        write(export, f'X "{prefix}/include/python3.12;{prefix}/{numpy}"')
        (tmp_path / "lib/python3.12/site-packages").mkdir(parents=True)
        packages.relocate_wheels(tmp_path)
        python, numpy_headers = export.read_text().removeprefix('X "').removesuffix('"').split(";")
        assert (Path(python) / "Python.h").is_file()
        assert numpy_headers == "${_IMPORT_PREFIX}/" + numpy

    def test_depends_on_messages_and_package_files(self):
        contents, names = packages.inputs(ROOT)
        relative = {str(path.relative_to(ROOT)) for path in contents}
        assert {"setup.py", "training/package.xml", "msg/msg/ActionChunk.msg", "msg/CMakeLists.txt"} <= relative
        assert ROOT / "launch" / "sim.launch.py" in names

    def test_without_a_compiler_says_which_package_to_install(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        with pytest.raises(StepFailed) as failure:
            packages.require_tools()
        assert failure.value.remedy == "sudo apt-get install -y g++ make"


class TestGraphics:
    def test_without_the_right_to_install_prints_the_one_line(self, monkeypatch, tmp_path):
        monkeypatch.setattr(graphics, "as_root", lambda: None)
        with pytest.raises(StepFailed) as failure:
            graphics.install_libraries(tmp_path / "log")
        assert "sudo apt-get install -y libegl1" in failure.value.remedy

    def test_of_a_backend_that_left_is_not_intact(self, monkeypatch):
        monkeypatch.setattr(graphics, "BACKENDS", {"here": ("libc.so.6",), "gone": ("libgone.so.1",)})
        assert graphics.loads("here")
        assert not graphics.loads("gone")
        assert not graphics.loads(None)


class TestDomain:
    def test_is_not_shared_with_another_process(self, monkeypatch):
        claim = (
            "from dit_policy_ros.nodes import domain\nwith domain.claimed_domain() as d: print(d, flush=True); input()"
        )
        other = subprocess.Popen([sys.executable, "-c", claim], cwd=ROOT, stdin=-1, stdout=-1, text=True)
        try:
            assert other.stdout
            theirs = int(other.stdout.readline())
            monkeypatch.setattr(domain, "DOMAINS", range(theirs, theirs + 1))
            claim = domain.claimed_domain()
            with pytest.raises(RuntimeError, match="all of"):
                claim.__enter__()
        finally:
            other.kill()
            other.wait()
        with domain.claimed_domain() as ours:  # killed, it has left nothing behind
            assert ours == theirs

    def test_of_this_run_is_claimed(self):
        with domain.claimed_domain() as another:
            assert int(os.environ["ROS_DOMAIN_ID"]) in domain.DOMAINS
            assert another != int(os.environ["ROS_DOMAIN_ID"])
        assert os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST"


@pytest.mark.ros
def test_second_run_changes_nothing():
    """Of the environment that the tests run in, whichever ROS that is of."""
    places = Places(ROOT, ros.suffix(os.environ))
    assert sys.prefix == str(places.venv)

    def state() -> dict[Path, int]:
        folders = (places.stamps, places.install)
        return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}

    first = subprocess.run([ROOT / "tools" / "setup.sh"], capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    before = state()
    second = subprocess.run([ROOT / "tools" / "setup.sh"], capture_output=True, text=True, timeout=20)
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert state() == before
