import numpy as np
import pytest

from dit_policy_ros.sim import scene
from dit_policy_ros.sim.kinematics import TOOL_DOWN, Kinematics, Unreachable

# Franka Emika's published table (Craig's convention): a, d, alpha of each joint, then the flange.
DH = [
    (0.0, 0.333, 0.0),
    (0.0, 0.0, -np.pi / 2),
    (0.0, 0.316, np.pi / 2),
    (0.0825, 0.0, np.pi / 2),
    (-0.0825, 0.384, -np.pi / 2),
    (0.0, 0.0, np.pi / 2),
    (0.088, 0.0, np.pi / 2),
    (0.0, 0.107, 0.0),
]
HAND_YAW, TOOL_LENGTH = -np.pi / 4, 0.1034  # Franka hand on the flange


def dh(a: float, d: float, alpha: float, theta: float) -> np.ndarray:
    ct, st, ca, sa = np.cos(theta), np.sin(theta), np.cos(alpha), np.sin(alpha)
    return np.array([[ct, -st, 0, a], [st * ca, ct * ca, -sa, -d * sa], [st * sa, ct * sa, ca, d * ca], [0, 0, 0, 1]])


def published_tool(q: np.ndarray) -> np.ndarray:
    pose = np.eye(4)
    for row, theta in zip(DH, [*q, 0.0], strict=True):
        pose = pose @ dh(*row, theta)
    return pose @ dh(0, TOOL_LENGTH, 0, HAND_YAW)


@pytest.fixture(scope="module")
def kinematics() -> Kinematics:
    return Kinematics(scene.build_model())


def random_joints(count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(scene.LOWER, scene.UPPER, (count, 7))


def test_the_tool_is_where_the_published_table_puts_it(kinematics):
    for q in random_joints(50):
        position, rotation = kinematics.forward(q)
        expected = published_tool(q)
        np.testing.assert_allclose(position, expected[:3, 3], atol=1e-7)
        np.testing.assert_allclose(rotation, expected[:3, :3], atol=1e-7)


def test_the_jacobian_is_the_derivative_of_the_published_table(kinematics):
    for q in random_joints(5):
        jacobian = kinematics.jacobian(q)
        for joint in range(7):
            step = 1e-6 * np.eye(7)[joint]
            ahead, behind = published_tool(q + step), published_tool(q - step)
            np.testing.assert_allclose(jacobian[:3, joint], (ahead - behind)[:3, 3] / 2e-6, atol=1e-6)
            turn = (ahead - behind)[:3, :3] / 2e-6 @ published_tool(q)[:3, :3].T
            np.testing.assert_allclose(jacobian[3:, joint], [turn[2, 1], turn[0, 2], turn[1, 0]], atol=1e-6)


@pytest.mark.parametrize("x", [0.32, 0.45, 0.70])
@pytest.mark.parametrize("y", [-0.25, 0.0, 0.25])
@pytest.mark.parametrize("z", [0.022, 0.15])
def test_solve_reaches_the_whole_table_within_the_limits(kinematics, x, y, z):
    q = kinematics.solve(scene.HOME, np.array([x, y, z]))
    tool = published_tool(q)
    np.testing.assert_allclose(tool[:3, 3], [x, y, z], atol=2e-4)
    np.testing.assert_allclose(tool[:3, :3], TOOL_DOWN, atol=2e-4)
    assert (q >= scene.LOWER).all()
    assert (q <= scene.UPPER).all()


def test_solve_says_how_far_off_it_stays(kinematics):
    with pytest.raises(Unreachable, match=r"cannot reach \[1.5, 0.0, 0.1\] m: 0\.\d+ m"):
        kinematics.solve(scene.HOME, np.array([1.5, 0.0, 0.1]))


def test_move_carries_the_tool_and_rights_it(kinematics):
    tilted = scene.HOME + np.array([0, 0, 0.05, 0, -0.04, 0.06, 0.05])
    velocity = np.array([0.10, -0.05, -0.02])
    q, _ = kinematics.move(tilted, velocity, 0.1)
    np.testing.assert_allclose(published_tool(q)[:3, 3], published_tool(tilted)[:3, 3] + 0.1 * velocity, atol=5e-4)

    def tilt(joints: np.ndarray) -> float:
        return float(np.linalg.norm(published_tool(joints)[:3, :3] - TOOL_DOWN))

    # An error decays at 2/s: by a fifth in 0.1 s.
    assert tilt(q) / tilt(tilted) == pytest.approx(np.exp(-0.2), abs=0.05)
    assert abs(q[2]) < 0.05
    assert abs(q[4]) < 0.04


def test_a_joint_stops_at_its_limit(kinematics):
    nearly_out = scene.HOME.copy()
    nearly_out[3] = scene.LOWER[3] + 0.01
    q, _ = kinematics.move(nearly_out, np.array([-0.5, 0.0, 0.0]), 0.2)
    assert q[3] == pytest.approx(scene.LOWER[3])


def test_another_model_without_the_tool_is_named():
    with pytest.raises(ValueError, match=r"'sim_arm' has no site 'gripper'; it has: tool"):
        Kinematics(scene.build_model(), site="gripper")
