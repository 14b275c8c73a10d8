"""Conversions that are killed, interrupted, repeated, shared: the dataset is always that of an undisturbed run."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import toy_robot
from converting import Launcher, arguments, config_for, digest, long_bag, tree, writer_of
from dit_policy_training.conversion import merging
from dit_policy_training.conversion.options import EpisodeOptions, VideoOptions
from dit_policy_training.conversion.recording import fingerprint
from dit_policy_training.convert import convert
from dit_policy_training.merge import MergeConfig, merge
from rich.console import Console

KILLS = int(os.environ.get("CONVERT_KILLS", "4"))  # `make test-kills` takes 20
FAST = "--verify=off"  # the check takes several times what the conversion of these bags takes


@pytest.fixture(scope="module")
def undisturbed(bags: Path, embodiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of the three bags by one whole run, not checked."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert convert(config_for(bags, embodiment_file, output, verify="off"), Console(quiet=True)) == []
    return output


@pytest.fixture(scope="module")
def with_long(bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three bags, and one that takes a while."""
    folder = tmp_path_factory.mktemp("with_long")
    for bag in bags.iterdir():
        shutil.copytree(bag, folder / bag.name)
    long_bag(folder / "long")
    return folder


@pytest.fixture(scope="module")
def undisturbed_long(
    with_long: Path, embodiment_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    output = tmp_path_factory.mktemp("undisturbed_long") / "out"
    assert convert(config_for(with_long, embodiment_file, output, verify="off"), Console(quiet=True)) == []
    return digest(output)


def left_overs(folder: Path) -> list[str]:
    """What a finished run must not leave beside or inside its output."""
    return [str(path) for pattern in (".out.*", ".partial-*", "*/.partial-*") for path in folder.glob(pattern)]


def shown(config: object) -> tuple[str, list[object]]:
    """What a run in this process prints, and which bags it refuses."""
    console = Console(record=True, width=200, file=io.StringIO())
    refusals = merge(config, console) if isinstance(config, MergeConfig) else convert(config, console)
    return console.export_text(), list(refusals)


@pytest.mark.timeout(120 + 30 * KILLS)
def test_killed_at_any_moment_and_run_again_it_makes_the_same(
    launcher: Launcher, bags: Path, embodiment_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Moments are counted in files and folders, of which there are ever more from the first to the last rename."""
    expected = digest(undisturbed)
    in_the_end = len(tree(undisturbed)) + len(tree(undisturbed.with_name("out.shards")))
    killed = 0
    for kill in range(KILLS):
        folder = tmp_path / str(kill)
        folder.mkdir()
        options = arguments(bags, embodiment_file, folder / "out", FAST)
        moment = 1 + kill * in_the_end // KILLS
        with launcher.command(options) as disturbed:
            if disturbed.until(lambda folder=folder, moment=moment: len(tree(folder)) >= moment):
                disturbed.signal(signal.SIGKILL)
            killed += disturbed.wait() == -signal.SIGKILL
        assert not (folder / "out").exists() or digest(folder / "out") == expected
        status, output = launcher.run(options)
        assert status == 0, output
        assert digest(folder / "out") == expected
        assert not left_overs(folder)
    assert killed > KILLS // 2, "the runs were too short to be killed: little was tested"


def test_workers_of_a_killed_conversion_go_with_it(
    launcher: Launcher, with_long: Path, embodiment_file: Path, tmp_path: Path
) -> None:
    with launcher.command(arguments(with_long, embodiment_file, tmp_path / "out", FAST)) as killed:
        assert killed.until(lambda: writer_of(tmp_path / "out.shards"))
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        while killed.processes():  # pytest's timeout ends a wait for ever
            time.sleep(0.01)
    assert launcher.run(arguments(with_long, embodiment_file, tmp_path / "out", FAST))[0] == 0


@pytest.mark.timeout(300)  # processes that take seconds to start, on a busy machine a minute
def test_a_bag_whose_worker_is_killed_is_refused_and_the_rest_is_converted(
    launcher: Launcher, with_long: Path, embodiment_file: Path, undisturbed_long: dict[str, str], tmp_path: Path
) -> None:
    options = arguments(with_long, embodiment_file, tmp_path / "out", FAST, "--workers=1")
    with launcher.command(options) as running:
        os.kill(running.until(lambda: writer_of(tmp_path / "out.shards")), signal.SIGKILL)
        status, output = running.finish()
    assert status == 1
    assert f"refused {with_long}/long: its worker was killed by SIGKILL; most likely the machine ran out" in output
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert [Path(bag["path"]).name for bag in record["bags"] if bag["refused"] is None] == ["a", "b", "c"]

    status, output = launcher.run(options)
    assert status == 0
    assert "3 of 4 bags done already, 1 to do" in output
    assert digest(tmp_path / "out") == undisturbed_long


@pytest.mark.timeout(300)  # processes that take seconds to start, on a busy machine a minute
def test_ray_converts_the_same_though_a_worker_is_killed(
    launcher: Launcher, with_long: Path, embodiment_file: Path, undisturbed_long: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    options = arguments(with_long, embodiment_file, tmp_path / "out", FAST, "--executor=ray", "--workers=2")
    with launcher.command(options) as running:
        os.kill(running.until(lambda: writer_of(tmp_path / "out.shards")), signal.SIGKILL)
        status, output = running.finish()
    assert status == 0, output
    assert digest(tmp_path / "out") == undisturbed_long
    assert not left_overs(tmp_path)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_conversion_says_how_to_go_on(
    launcher: Launcher, with_long: Path, embodiment_file: Path, tmp_path: Path, number: int, expected: int
) -> None:
    with launcher.command(arguments(with_long, embodiment_file, tmp_path / "out", FAST)) as running:
        assert running.until(lambda: writer_of(tmp_path / "out.shards"))
        running.signal(number)
        status, output = running.finish()
        while running.processes():  # multiprocessing's own end a moment later; pytest's timeout ends a wait for ever
            time.sleep(0.01)
    assert status == expected
    assert f"what is done is kept in {tmp_path / 'out.shards'}: run the same command to go on" in output
    assert not (tmp_path / "out").exists()


def test_two_conversions_into_one_output_are_one_too_many(
    launcher: Launcher, with_long: Path, embodiment_file: Path, tmp_path: Path
) -> None:
    options = arguments(with_long, embodiment_file, tmp_path / "out", FAST)
    with launcher.command(options) as first:
        assert first.until(lambda: writer_of(tmp_path / "out.shards"))
        first.signal(signal.SIGSTOP)  # it holds its lock for as long as it takes
        status, output = launcher.run(options)
        assert status == 1
        assert f"another conversion is at work in {tmp_path / 'out.shards'}" in output
        first.signal(signal.SIGCONT)
        assert first.finish()[0] == 0


@pytest.fixture
def converted(bags: Path, embodiment_file: Path, undisturbed: Path, tmp_path: Path) -> Iterator[Path]:
    """The undisturbed dataset and its shards, to be converted again."""
    shutil.copytree(undisturbed, tmp_path / "out")
    shutil.copytree(undisturbed.with_name("out.shards"), tmp_path / "out.shards")
    yield tmp_path / "out"
    assert not left_overs(tmp_path)


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


def test_a_repeated_run_does_nothing_and_says_so(bags: Path, embodiment_file: Path, converted: Path) -> None:
    before = times(converted.parent)
    output, refused = shown(config_for(bags, embodiment_file, converted, verify="off"))
    assert "nothing has changed since it was made" in output
    assert refused == []
    assert times(converted.parent) == before


def test_a_stricter_check_is_made_up_for(bags: Path, embodiment_file: Path, converted: Path) -> None:
    output, _ = shown(config_for(bags, embodiment_file, converted, verify="sample"))
    assert "0 bags read" in output
    assert json.loads((converted / "conversion.json").read_text())["verified"]["mode"] == "sample"
    assert "nothing has changed" in shown(config_for(bags, embodiment_file, converted, verify="off"))[0]


def test_only_what_is_new_or_changed_is_converted(
    bags: Path, embodiment_file: Path, converted: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "bags"
    shutil.copytree(bags, copied)
    output, _ = shown(config_for(copied, embodiment_file, converted, verify="off"))
    assert "3 bags read" in output, "bags of the same bytes elsewhere are read, but not converted"
    before = times(converted.with_name("out.shards"))
    shutil.rmtree(copied / "b")
    toy_robot.write_bag(copied / "b", toy_robot.messages(2.4, "push the green block"))
    toy_robot.write_bag(copied / "d", toy_robot.messages(2.0, "push the white block"))
    output, _ = shown(config_for(copied, embodiment_file, converted, verify="off"))
    assert "2 of 4 bags done already, 2 to do" in output
    assert "1 shard that no bag needs any more" in output
    after = times(converted.with_name("out.shards"))
    assert {path for path in before if after.get(path) == before[path]} >= {
        path for path in before if Path(path).name == "info.json" and "/b-" not in path
    }
    tasks = json.loads((converted / "conversion.json").read_text())["bags"][1]["account"]["episodes"][0]["tasks"]
    assert tasks == [[0, "push the green block"]]


def test_changed_settings_convert_all_again_and_are_named(
    bags: Path, embodiment_file: Path, converted: Path, tmp_path: Path
) -> None:
    config = config_for(bags, embodiment_file, converted, verify="off")
    other = replace(config, video=replace(config.video, crf=20))
    output, _ = shown(other)
    assert "settings changed since an earlier run, so its shards do not serve: video.crf: 18 -> 20" in output
    assert "3 shards that no bag needs any more" in output

    slower = tmp_path / "slower.yaml"
    slower.write_text(embodiment_file.read_text().replace("fps: 10", "fps: 5") + "# a comment is no change\n")
    assert "embodiment: fps" in shown(replace(other, embodiment=slower))[0]
    commented = tmp_path / "commented.yaml"
    commented.write_text(slower.read_text() + "# nor is another\n")
    assert "nothing has changed" in shown(replace(other, embodiment=commented))[0]


def test_how_it_is_done_is_no_change(bags: Path, embodiment_file: Path, converted: Path) -> None:
    config = config_for(bags, embodiment_file, converted, verify="off")
    assert "nothing has changed" in shown(replace(config, workers=1))[0]


def test_a_refused_bag_is_tried_again_until_it_is_sound(
    bags: Path, embodiment_file: Path, tmp_path: Path, undisturbed: Path
) -> None:
    copied = tmp_path / "bags"
    shutil.copytree(bags, copied)
    (storage,) = (copied / "a").glob("*.mcap")
    whole = storage.read_bytes()
    storage.write_bytes(whole[: len(whole) // 2])
    config = config_for(copied, embodiment_file, tmp_path / "out", verify="off")
    for _ in range(2):
        output, refused = shown(config)
        assert [refusal.bag.name for refusal in refused] == ["a"]
        assert "refused" in output
    assert "nothing has changed" in output
    (record,) = (tmp_path / "out.shards" / "refused").iterdir()
    assert json.loads(record.read_text())["reason"] == refused[0].reason

    storage.write_bytes(whole)
    assert shown(config)[1] == []
    assert not list((tmp_path / "out.shards" / "refused").iterdir())
    made, expected = digest(tmp_path / "out"), digest(undisturbed)
    different = [name for name in made.keys() | expected.keys() if made.get(name) != expected.get(name)]
    assert set(different) <= {"conversion.json", "report.html", "report.json"}, "only the bags' paths may differ"


def test_the_same_recording_twice_is_refused_once(bags: Path, embodiment_file: Path, tmp_path: Path) -> None:
    shutil.copytree(bags, tmp_path / "bags")
    shutil.copytree(bags / "a", tmp_path / "bags" / "z")
    _, refused = shown(config_for(tmp_path / "bags", embodiment_file, tmp_path / "out", verify="off"))
    assert [refusal.bag.name for refusal in refused] == ["z"]
    assert refused[0].reason == f"a copy of {tmp_path / 'bags' / 'a'}, byte for byte; remove one of them"


def test_parts_by_several_runs_merge_to_the_same(
    bags: Path, embodiment_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Two parts into one folder, as jobs with one --output do it, and the third elsewhere."""
    config = config_for(bags, embodiment_file, tmp_path / "out", verify="off")
    elsewhere = replace(config, output=tmp_path / "elsewhere")
    folders = MergeConfig(tmp_path / "out", f"{tmp_path / 'out.shards'},{tmp_path / 'elsewhere.shards'}", verify="off")
    shown(replace(config, shard="1/3"))
    output, _ = shown(replace(config, shard="3/3"))
    assert "part 3/3: 1 of 1 bag converted" in output
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"--shard=2/3 not finished; run convert with it first"):
        shown(MergeConfig(tmp_path / "out"))
    shown(replace(elsewhere, shard="2/3"))
    output, _ = shown(folders)
    assert "3 from 3 bags" in output
    assert digest(tmp_path / "out") == digest(undisturbed)
    assert "nothing has changed" in shown(folders)[0]

    shown(replace(elsewhere, shard="2/3", video=VideoOptions(codec="h264", crf=30, preset="superfast")))
    with pytest.raises(ValueError, match=r"--shard=2/3 had other settings than 1/3: .*video\.crf: 18 -> 30"):
        shown(folders)


def test_merge_takes_what_the_last_run_of_each_part_made(bags: Path, embodiment_file: Path, tmp_path: Path) -> None:
    """Older shards of a bag that changed lie beside the new one, under names whose order says nothing."""
    mine = tmp_path / "bags"
    shutil.copytree(bags, mine)
    first, second, *_ = sorted(mine.iterdir())
    for other in sorted(mine.iterdir())[2:]:
        shutil.rmtree(other)
    config = config_for(mine, embodiment_file, tmp_path / "out", verify="off", workers=1)
    shown(replace(config, shard="2/2"))
    contents = [sorted(bags.iterdir())[number] for number in (0, 2, 0)]  # of the three shards any may be the last
    for content in contents:
        shutil.rmtree(first)
        shutil.copytree(content, first)
        shown(replace(config, shard="1/2"))
        shown(MergeConfig(tmp_path / "out", verify="off"))
        merged = json.loads((tmp_path / "out" / "conversion.json").read_text())["bags"]
        assert [bag["sha256"] for bag in merged] == [fingerprint(first), fingerprint(second)]
    for file in first.glob("*.mcap"):
        file.write_bytes(b"no bag")
    _, refused = shown(replace(config, shard="1/2"))
    assert refused
    output, refused = shown(MergeConfig(tmp_path / "out", verify="off"))
    assert refused, output


def test_copies_in_different_parts_are_refused_when_they_meet(
    bags: Path, embodiment_file: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "bags"
    for name in ("a", "b"):
        shutil.copytree(min(bags.iterdir()), mine / name)
    config = config_for(mine, embodiment_file, tmp_path / "out", verify="off", workers=1)
    for part in ("1/2", "2/2"):
        assert shown(replace(config, shard=part))[1] == []
    output, refused = shown(MergeConfig(tmp_path / "out", verify="off"))
    assert len(refused) == 1
    assert f"{mine / 'b'}: a copy of {mine / 'a'}, byte for byte" in output


def test_annotations_of_no_bag_are_told(bags: Path, embodiment_file: Path, tmp_path: Path) -> None:
    takes = tmp_path / "takes.csv"
    takes.write_text("bag,start,end,task\na,0.5,2.0,lift\nb,0.4,1.8,turn\nd,0.0,1.0,reach\n")
    episodes = EpisodeOptions(by="annotations", annotations=takes)
    output, refused = shown(config_for(bags, embodiment_file, tmp_path / "out", verify="off", episodes=episodes))
    assert "takes.csv, line 4: none of the bags is 'd'" in output
    assert [refusal.bag.name for refusal in refused] == ["c"]


def test_a_full_disk_stops_the_run_in_words(
    bags: Path, embodiment_file: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """On a file system of 100 kB in memory, where the machine lets a user mount one."""
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=100k tmpfs '{disk}'"
    if shutil.which("unshare") is None or subprocess.run([*mounted, mount], capture_output=True).returncode:
        pytest.skip("no mounts of one's own on this machine")
    options = arguments(bags, embodiment_file, disk / "out", FAST)
    quoted = " ".join(f"'{option}'" for option in options)
    script = f"{mount} && python -m dit_policy_training.convert {quoted}"
    ended = subprocess.run([*mounted, script], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "No space left on device; make room, then run the same command to go on" in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr


def test_a_disk_that_is_full_when_the_dataset_is_joined_is_named(
    bags: Path, embodiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's refusal, where the parts are copied together; with room again, the same command goes on."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = config_for(bags, embodiment_file, tmp_path / "out", verify="off")
    with monkeypatch.context() as patched:
        patched.setattr(merging, "merge_shards", full)
        with pytest.raises(ValueError, match=r"out: No space left on device; make room, then run the same command"):
            shown(config)
    assert left_overs(tmp_path) == []
    assert "0 bags read" in shown(config)[0]


def test_an_output_that_cannot_be_written_is_named(bags: Path, embodiment_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"file/out\.shards cannot be made: Not a directory; give an --output where"):
        shown(config_for(bags, embodiment_file, tmp_path / "file" / "out", verify="off"))
