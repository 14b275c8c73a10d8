import numpy as np
import pytest

from dit_policy_ros.sim import scene, task
from dit_policy_ros.sim.expert import PERIOD, Expert, Stage
from dit_policy_ros.sim.kinematics import Kinematics
from dit_policy_ros.sim.simulation import Simulation


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    return Simulation()


def run(simulation: Simulation, colour: str, seed: int, disturbance: float) -> tuple[task.TaskResult, np.ndarray, list]:
    """The result, the commanded joints each PERIOD (n, 7), and the stages in order."""
    simulation.reset(seed)
    simulation.set_disturbance(disturbance, seed)
    start = simulation.blocks()
    expert = Expert(Kinematics(simulation.model), colour)
    commanded, stages = [simulation.q[:7]], []
    while (trajectory := expert.command(simulation.q[:7], simulation.blocks())) and simulation.time_ns < 12e9:
        for part in np.linspace(0.1, 1.0, 10):
            target = commanded[-1] + part * (trajectory.positions[0] - commanded[-1])
            simulation.set_targets(scene.ARM_JOINTS, target)
            simulation.step(PERIOD / 10)
        commanded.append(trajectory.positions[0])
        stages.append(expert.stage)
    simulation.step(0.4)
    return task.judge(colour, start, simulation.blocks()), np.array(commanded), stages


@pytest.mark.parametrize("seed", range(20))
def test_an_undisturbed_expert_succeeds_in_one_sweep_within_the_limits(simulation, seed):
    result, commanded, stages = run(simulation, scene.COLOURS[seed % 3], 700 + seed, 0.0)
    assert result.success, result
    assert max(result.moved[c] for c in scene.COLOURS if c != scene.COLOURS[seed % 3]) < 0.005
    assert stages == sorted(stages)
    assert {Stage.LOWER, Stage.PUSH, Stage.RETREAT} <= set(stages)  # a block close to home needs no approach
    assert 3.5 < PERIOD * len(stages) < 7.0
    velocity = np.diff(commanded, axis=0) / PERIOD
    acceleration = np.diff(velocity, axis=0) / PERIOD
    assert (np.abs(velocity) < 0.7 * scene.VELOCITY).all()
    assert (np.abs(acceleration) < 0.7 * scene.ACCELERATION).all()
    assert (commanded > scene.LOWER + 0.05).all()
    assert (commanded < scene.UPPER - 0.05).all()
    # An idle frame teaches a policy to idle.
    assert np.abs(velocity).max(axis=1).min() > 0.03


def test_a_disturbed_expert_steers_back(simulation):
    results = [run(simulation, scene.COLOURS[seed % 3], 900 + seed, 0.008)[0] for seed in range(20)]
    assert sum(result.success for result in results) >= 19, results


def test_a_block_that_slips_aside_is_approached_again(simulation):
    simulation.reset(2)
    kinematics = Kinematics(simulation.model)
    expert = Expert(kinematics, "red")
    expert.stage = Stage.PUSH
    q = kinematics.solve(scene.HOME, np.array([0.45, 0.0, 0.022]))
    expert.command(q, {"red": (0.50, 0.0, 0.0)})
    assert expert.stage is Stage.PUSH
    expert.command(q, {"red": (0.50, 0.05, 0.0)})
    assert expert.stage is Stage.APPROACH


def test_the_command_is_one_that_a_controller_takes_and_ends_at_rest(simulation):
    simulation.reset(2)
    trajectory = Expert(Kinematics(simulation.model), "green").command(simulation.q[:7], simulation.blocks())
    assert trajectory is not None
    assert trajectory.joint_names == scene.ARM_JOINTS
    assert trajectory.times.tolist() == [0.1, 0.2]
    assert trajectory.velocities is not None
    assert np.abs(trajectory.velocities[0]).max() > 0.01
    assert np.abs(trajectory.velocities[1]).max() == 0.0
