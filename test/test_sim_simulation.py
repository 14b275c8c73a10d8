import re
import subprocess
import sys

import numpy as np
import pytest

from dit_policy_ros.sim import offscreen, scene
from dit_policy_ros.sim.simulation import OffscreenError, Simulation

OTHER_ARM = """
<mujoco model="other">
  <worldbody>
    <light pos="0 0 2"/>
    <camera name="top" pos="0 0 1.5"/>
    <body name="upper"><joint name="swing" axis="0 1 0"/>
      <geom name="rod" type="capsule" fromto="0 0 0 .3 0 0" size=".03"/>
      <body name="lower" pos=".3 0 0"><joint name="slider" type="slide" axis="1 0 0" range="0 .2" limited="true"/>
        <geom type="box" size=".05 .05 .05" rgba="1 0 0 1"/></body></body>
    <body name="red_block" pos=".5 .5 .07"><freejoint/><geom type="box" size=".03 .03 .03"/></body>
  </worldbody>
  <actuator><position name="a" joint="swing" kp="50"/><position name="b" joint="slider" kp="50"/></actuator>
</mujoco>
"""


@pytest.fixture(scope="module")
def simulation():
    with Simulation() as simulation:
        yield simulation


def test_a_seed_decides_the_start_and_the_whole_run(simulation):
    def run(seed: int) -> np.ndarray:
        simulation.reset(seed)
        simulation.set_disturbance(0.01, seed)
        start = simulation.q
        simulation.set_targets(scene.ARM_JOINTS, scene.HOME + 0.1)
        simulation.step(0.2)
        return np.concatenate([start, simulation.q, simulation.qd, *map(np.array, simulation.blocks().values())])

    first, other, again = run(4), run(5), run(4)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


def test_time_and_steps(simulation):
    simulation.reset(0)
    assert simulation.time_ns == 0
    simulation.step(0.1)
    assert simulation.time_ns == 100_000_000
    with pytest.raises(ValueError, match=r"0\.003 s is no multiple of the model's time step, 0\.002 s"):
        simulation.step(0.003)


def test_blocks_rest_where_they_are_put(simulation):
    simulation.reset(8)
    before = simulation.blocks()
    simulation.step(0.5)
    for colour, place in simulation.blocks().items():
        np.testing.assert_allclose(place, before[colour], atol=1e-4)


def test_servos_hold_against_gravity_and_track_with_a_small_lag(simulation):
    simulation.reset(1)
    start = simulation.q[:7]
    simulation.step(0.5)
    np.testing.assert_allclose(simulation.q[:7], start, atol=1e-4)
    speed = np.array([0.5, 0.5, 0.3, 0.5, 0.5, -0.5, 0.5])
    for tick in range(60):
        simulation.set_targets(scene.ARM_JOINTS, start + speed * 0.01 * (tick + 1))
        simulation.step(0.01)
    lag = (start + speed * 0.6 - simulation.q[:7]) / speed
    assert (np.abs(lag) < 0.04).all(), lag  # s
    np.testing.assert_allclose(simulation.qd[:7], speed, atol=0.1)


def test_the_gripper_opens_both_fingers_and_is_told_by_name(simulation):
    simulation.reset(0)
    simulation.set_targets(["panda_finger_joint1"], [0.03])
    simulation.step(1.0)
    assert simulation.q[simulation.joint_names.index("panda_finger_joint1")] == pytest.approx(0.03, abs=1e-3)
    assert simulation.data.joint("panda_finger_joint2").qpos[0] == pytest.approx(0.03, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "position", "message"),
    [
        ("panda_joint9", 0.0, "no driven joint 'panda_joint9'; it has: panda_joint1, "),
        ("panda_joint1", 3.0, "joint 'panda_joint1': 3.0, expected -2.8973 to 2.8973"),
        ("panda_joint2", np.nan, "joint 'panda_joint2': nan, expected -1.7628"),
    ],
)
def test_targets_that_cannot_be_are_refused_whole(simulation, name, position, message):
    simulation.reset(0)
    start = simulation.q
    with pytest.raises(ValueError, match=re.escape(message)):
        simulation.set_targets(["panda_joint7", name], [0.0, position])
    simulation.step(0.2)
    np.testing.assert_allclose(simulation.q, start, atol=1e-3)


def test_the_disturbance_pushes_the_arm_smoothly_by_about_its_amplitude(simulation):
    simulation.reset(2)
    start = simulation.q
    simulation.set_disturbance(0.01, seed=3)
    path = []
    for _ in range(2000):
        simulation.step(0.01)
        path.append(simulation.q - start)
    pushed = np.array(path)
    assert np.sqrt((pushed[:, :7] ** 2).mean(axis=0)) == pytest.approx(0.01, rel=0.3)
    assert np.abs(np.diff(pushed, axis=0)).max() < 0.0025  # 0.25 rad/s
    assert np.abs(pushed[:, 7]).max() < 1e-3  # the gripper is left alone
    simulation.set_disturbance(0.0)
    simulation.step(0.5)
    np.testing.assert_allclose(simulation.q, start, atol=1e-3)


def test_a_trace_is_replayed_where_it_was(simulation):
    simulation.reset(3)
    simulation.set_targets(scene.ARM_JOINTS, scene.HOME + 0.2)
    simulation.step(0.5)
    joints, blocks = dict(zip(simulation.joint_names, simulation.q, strict=True)), simulation.blocks()
    picture = simulation.render("workspace")
    simulation.reset(4)
    simulation.set_configuration(joints, blocks)
    np.testing.assert_allclose(simulation.q, list(joints.values()))
    assert simulation.blocks()["blue"] == pytest.approx(blocks["blue"])
    assert np.abs(simulation.render("workspace").astype(int) - picture).mean() < 0.5
    with pytest.raises(ValueError, match="no yellow block in the model; it has: red, green, blue"):
        simulation.set_configuration({}, {"yellow": (0.0, 0.0, 0.0)})


def coloured(picture: np.ndarray) -> dict[str, int]:
    """Pixels in which one channel is far above the others."""
    channels = dict(zip(("red", "green", "blue"), picture.astype(int).transpose(2, 0, 1), strict=True))
    return {
        name: int(np.sum([own - other > 55 for key, other in channels.items() if key != name], axis=0).__eq__(2).sum())
        for name, own in channels.items()
    }


@pytest.mark.parametrize("seed", range(6))
def test_the_workspace_camera_sees_all_three_blocks(simulation, seed):
    simulation.reset(seed)
    picture = simulation.render("workspace")
    assert picture.shape == (128, 128, 3)
    assert picture.dtype == np.uint8
    assert min(coloured(picture).values()) >= 30, coloured(picture)


def test_the_block_is_on_the_side_of_the_picture_where_it_stands(simulation):
    simulation.reset(0)
    places = {"red": (0.43, 0.18, 0.0), "green": (0.43, 0.0, 0.0), "blue": (0.43, -0.18, 0.0)}
    simulation.set_configuration({}, places)
    picture = simulation.render("workspace").astype(int)
    column = np.arange(128)[None]
    redness = np.clip(picture[..., 0] - picture[..., 1:].max(axis=-1) - 55, 0, None)
    blueness = np.clip(picture[..., 2] - picture[..., :2].max(axis=-1) - 55, 0, None)
    # The camera looks back at the arm, so the arm's left, +y, is the picture's right.
    assert (redness * column).sum() / redness.sum() > 85
    assert (blueness * column).sum() / blueness.sum() < 43


def test_the_wrist_camera_sees_the_block_under_the_hand(simulation):
    simulation.reset(0)
    away = {"green": (0.5, 0.4, 0.0), "blue": (0.5, -0.4, 0.0)}
    home = dict(zip(scene.ARM_JOINTS, scene.HOME, strict=True))
    simulation.set_configuration(home, {"red": (0.40, 0.0, 0.0), **away})
    seen = coloured(simulation.render("wrist"))
    assert seen["red"] > 100
    simulation.set_configuration(home, {"red": (0.40, 0.40, 0.0), **away})
    assert coloured(simulation.render("wrist"))["red"] == 0


def test_pretty_pictures_of_any_size():
    with Simulation(camera_size=(90, 160), pretty=True) as simulation:
        picture = simulation.render("overview")
    assert picture.shape == (90, 160, 3)
    assert picture.std() > 20


def test_another_mjcf_brings_its_joints_cameras_and_blocks(tmp_path):
    path = tmp_path / "arm.xml"
    path.write_text(OTHER_ARM)
    with Simulation(path, camera_size=32) as simulation:
        assert simulation.joint_names == ("swing", "slider")
        assert simulation.blocks().keys() == {"red"}
        simulation.set_targets(["slider"], [0.1])
        simulation.step(0.5)
        assert simulation.q[1] > 0.05
        assert simulation.render("top").std() > 1
        with pytest.raises(ValueError, match="'other' has no camera 'wrist'; it has: top"):
            simulation.render("wrist")
        with pytest.raises(ValueError, match="'other' has no driven joint 'panda_joint1'; it has: swing, slider"):
            simulation.set_targets(["panda_joint1"], [0.0])
        with pytest.raises(ValueError, match=r"joint 'slider': 0.3, expected 0.0000 to 0.2000"):
            simulation.set_targets(["slider"], [0.3])


def test_mjcf_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no MJCF file at .*/nowhere.xml"):
        Simulation(tmp_path / "nowhere.xml")
    broken = tmp_path / "broken.xml"
    broken.write_text("<mujoco><worldbody><oops/></worldbody></mujoco>")
    with pytest.raises(ValueError, match=r"broken.xml is no MJCF that MuJoCo .* can compile: XML Error"):
        Simulation(broken)
    still = tmp_path / "still.xml"
    still.write_text('<mujoco model="still"><worldbody><geom size=".1"/></worldbody></mujoco>')
    with pytest.raises(ValueError, match="'still' has no joint with a position actuator"):
        Simulation(still)
    pinned = tmp_path / "pinned.xml"
    pinned.write_text(OTHER_ARM.replace("<freejoint/>", ""))
    with pytest.raises(ValueError, match=r"'red_block' of the model needs a <freejoint/>"):
        Simulation(pinned)


@pytest.mark.parametrize(
    ("libraries", "expected"),
    [({"libEGL.so.1", "libOSMesa.so.8"}, "egl"), ({"libOSMesa.so.6"}, "osmesa"), (set(), None)],
)
def test_the_drawing_library_is_chosen_by_what_loads(monkeypatch, libraries, expected):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(offscreen, "_loads", lambda library: library in libraries)
    assert offscreen.choose_backend() == expected


def test_a_choice_made_outside_is_kept(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(offscreen, "_loads", lambda library: True)
    assert offscreen.choose_backend() == "osmesa"


def test_no_drawing_library_is_explained_with_the_packages_to_install(monkeypatch):
    def fail(*_: object) -> None:
        raise ImportError("no EGL device")

    monkeypatch.setattr("mujoco.Renderer", fail)
    with Simulation() as simulation, pytest.raises(OffscreenError, match=r"no EGL device.*apt-get install libegl1"):
        simulation.render("workspace")


def test_a_program_that_forgets_to_close_ends_quietly():
    code = """if True:
        from dit_policy_ros.sim.simulation import Simulation
        simulation = Simulation(camera_size=16)
        simulation.render("wrist")
        print(1)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "1\n"
    assert done.stderr == ""
