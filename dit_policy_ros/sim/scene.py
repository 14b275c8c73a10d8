"""The simulated world: a 7-joint arm of primitive shapes, a table with a line, three blocks, three cameras.

The arm's joints stand where the Franka Emika Panda's published Denavit-Hartenberg table puts them, with its published
limits of position, velocity, acceleration and torque; links and hand are capsules, cylinders and boxes, so that a
picture costs little.

The table top is z = 0, the arm's base the origin, x points away from the arm over the table (REP 103).
"""

from pathlib import Path

import mujoco
import numpy as np

ARM_JOINTS = tuple(f"panda_joint{i}" for i in range(1, 8))
GRIPPER_JOINT = "panda_finger_joint1"
JOINTS = (*ARM_JOINTS, GRIPPER_JOINT)
TOOL_SITE = "tool"
COLOURS = ("red", "green", "blue")
CAMERAS = ("workspace", "wrist", "overview")

# rad; from https://frankaemika.github.io/docs/control_parameters.html, as are the velocities and accelerations below.
LOWER = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])
UPPER = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])
VELOCITY = np.array([2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61])
ACCELERATION = np.array([15.0, 7.5, 10.0, 12.5, 15.0, 20.0, 20.0])

# The tool 0.2 m above the table at x = 0.35 m, pointing down.
HOME = np.array([0.0, -0.3905, 0.0, -2.8505, 0.0, 2.46, 0.7854])

LINE_X = 0.62  # m, the middle of the painted line
BLOCK_SIZE = 0.05  # m, edge of a block


def _joint(number: int) -> str:
    low, high = LOWER[number - 1], UPPER[number - 1]
    return f'<joint name="panda_joint{number}" axis="0 0 1" range="{low} {high}" class="arm"/>'


def _actuator(number: int) -> str:
    stiffness, force = (6000, 87) if number <= 4 else (2500, 12)
    return (
        f'<position name="panda_joint{number}" joint="panda_joint{number}" kp="{stiffness}" dampratio="1" '
        f'ctrlrange="{LOWER[number - 1]} {UPPER[number - 1]}" forcerange="{-force} {force}"/>'
    )


def _block_pos(index: int) -> str:
    return f"0.45 {0.16 * (index - 1)} {BLOCK_SIZE / 2}"


def _block(colour: str, index: int) -> str:
    half = BLOCK_SIZE / 2
    return f"""
    <body name="{colour}_block" pos="{_block_pos(index)}">
      <freejoint name="{colour}_block"/>
      <geom name="{colour}_block" type="box" size="{half} {half} {half}" mass="0.08" material="{colour}" class="block"/>
    </body>"""


_FINGER = """
      <geom type="box" size="0.009 0.010 0.019" pos="0 {y} 0.019" material="dark" class="visual"/>
      <geom type="box" size="0.010 0.011 0.028" pos="0 {y} 0.028" class="finger" material="rubber"/>"""

_XML = f"""
<mujoco model="sim_arm">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="0.002" integrator="implicitfast" cone="elliptic" impratio="10"/>
  <statistic center="0.4 0 0.2" extent="1.2"/>
  <visual>
    <headlight ambient="0.38 0.38 0.40" diffuse="0.22 0.22 0.22" specular="0.05 0.05 0.05"/>
    <map znear="0.01" zfar="8" shadowclip="0.8" shadowscale="0.9"/>
    <global offwidth="1920" offheight="1080"/>
  </visual>

  <asset>
    <texture name="sky" type="skybox" builtin="gradient" rgb1="0.93 0.95 0.97" rgb2="0.62 0.67 0.73"
             width="64" height="384"/>
    <material name="white" rgba="0.93 0.94 0.95 1" specular="0.45" shininess="0.55"/>
    <material name="dark" rgba="0.16 0.17 0.19 1" specular="0.5" shininess="0.5"/>
    <material name="rubber" rgba="0.10 0.10 0.11 1" specular="0.15" shininess="0.1"/>
    <material name="accent" rgba="0.98 0.60 0.12 1" specular="0.4" shininess="0.5"/>
    <material name="steel" rgba="0.62 0.64 0.67 1" specular="0.8" shininess="0.7"/>
    <material name="floor" rgba="0.80 0.81 0.83 1" specular="0" shininess="0"/>
    <material name="line" rgba="0.98 0.98 0.97 1" specular="0.1" shininess="0.1"/>
    <material name="red" rgba="0.86 0.13 0.12 1" specular="0.3" shininess="0.4"/>
    <material name="green" rgba="0.10 0.62 0.25 1" specular="0.3" shininess="0.4"/>
    <material name="blue" rgba="0.10 0.32 0.86 1" specular="0.3" shininess="0.4"/>
  </asset>

  <default>
    <default class="visual">
      <geom contype="0" conaffinity="0" mass="0" group="1"/>
    </default>
    <default class="arm">
      <joint damping="1" armature="0.1"/>
      <geom contype="0" conaffinity="0" density="800" material="white"/>
    </default>
    <default class="finger">
      <geom contype="1" conaffinity="1" density="1200" friction="0.3 0.005 0.0001"/>
      <joint type="slide" range="0 0.04" damping="5" armature="0.05"/>
    </default>
    <default class="block">
      <geom contype="1" conaffinity="1" friction="0.5 0.005 0.0001" solref="0.005 1" condim="4"/>
    </default>
  </default>

  <worldbody>
    <light name="key" type="directional" pos="0.9 -0.9 2.2" dir="-0.35 0.5 -1.2"
           diffuse="0.50 0.49 0.47" specular="0.3 0.3 0.3" castshadow="true"/>
    <light name="fill" type="directional" pos="0.3 1.6 1.6" dir="0.1 -0.9 -1"
           diffuse="0.14 0.15 0.17" specular="0 0 0" castshadow="false"/>

    <camera name="workspace" pos="1.10 0 0.68" xyaxes="0 1 0 -0.695 0 0.719" fovy="41"/>
    <camera name="overview" pos="1.50 -1.06 0.92" xyaxes="0.680 0.733 0 -0.290 0.269 0.919" fovy="36"/>

    <geom name="floor" type="plane" size="4 4 0.1" pos="0 0 -0.75" material="floor" class="visual"/>
    <geom name="table" type="box" size="0.62 0.60 0.02" pos="0.36 0 -0.02" material="wood" friction="0.5 0.005 0.0001"/>
    <geom name="line" type="box" size="0.010 0.40 0.0004" pos="{LINE_X} 0 0.0004" material="line" class="visual"/>
    <geom type="cylinder" fromto="-0.18 -0.5 -0.75 -0.18 -0.5 -0.04" size="0.025" material="dark" class="visual"/>
    <geom type="cylinder" fromto="-0.18 0.5 -0.75 -0.18 0.5 -0.04" size="0.025" material="dark" class="visual"/>
    <geom type="cylinder" fromto="0.9 -0.5 -0.75 0.9 -0.5 -0.04" size="0.025" material="dark" class="visual"/>
    <geom type="cylinder" fromto="0.9 0.5 -0.75 0.9 0.5 -0.04" size="0.025" material="dark" class="visual"/>

    <body name="link0" childclass="arm" gravcomp="1">
      <geom type="cylinder" fromto="0 0 0 0 0 0.012" size="0.105" material="dark"/>
      <geom type="cylinder" fromto="0 0 0.012 0 0 0.13" size="0.075"/>
      <geom type="cylinder" fromto="0 0 0.13 0 0 0.142" size="0.072" material="dark"/>
      <body name="link1" pos="0 0 0.333" gravcomp="1">
        {_joint(1)}
        <geom type="capsule" fromto="0 0 -0.191 0 0 -0.02" size="0.066"/>
        <body name="link2" quat="0.70710678 -0.70710678 0 0" gravcomp="1">
          {_joint(2)}
          <geom type="cylinder" fromto="0 0 -0.072 0 0 0.072" size="0.066"/>
          <geom type="cylinder" fromto="0 0 -0.080 0 0 0.080" size="0.050" material="dark"/>
          <geom type="capsule" fromto="0 0 0 0 -0.14 0" size="0.060"/>
          <body name="link3" pos="0 -0.316 0" quat="0.70710678 0.70710678 0 0" gravcomp="1">
            {_joint(3)}
            <geom type="cylinder" fromto="0 0 -0.172 0 0 -0.160" size="0.064" material="dark"/>
            <geom type="capsule" fromto="0 0 -0.150 0 0 -0.05" size="0.060"/>
            <geom type="capsule" fromto="0 0 -0.05 0.0825 0 0" size="0.058"/>
            <body name="link4" pos="0.0825 0 0" quat="0.70710678 0.70710678 0 0" gravcomp="1">
              {_joint(4)}
              <geom type="cylinder" fromto="0 0 -0.066 0 0 0.066" size="0.060"/>
              <geom type="cylinder" fromto="0 0 -0.074 0 0 0.074" size="0.045" material="dark"/>
              <geom type="capsule" fromto="0 0 0 -0.0825 0.09 0" size="0.056"/>
              <body name="link5" pos="-0.0825 0.384 0" quat="0.70710678 -0.70710678 0 0" gravcomp="1">
                {_joint(5)}
                <geom type="cylinder" fromto="0 0 -0.278 0 0 -0.266" size="0.060" material="dark"/>
                <geom type="capsule" fromto="0 0 -0.262 0 0 -0.20" size="0.056"/>
                <geom type="capsule" fromto="0 0 -0.20 0 0 -0.02" size="0.048"/>
                <body name="link6" quat="0.70710678 0.70710678 0 0" gravcomp="1">
                  {_joint(6)}
                  <geom type="cylinder" fromto="0 0 -0.056 0 0 0.056" size="0.050"/>
                  <geom type="cylinder" fromto="0 0 -0.063 0 0 0.063" size="0.037" material="dark"/>
                  <geom type="capsule" fromto="0 0 0 0.088 0 0" size="0.044"/>
                  <body name="link7" pos="0.088 0 0" quat="0.70710678 0.70710678 0 0" gravcomp="1">
                    {_joint(7)}
                    <geom type="cylinder" fromto="0 0 -0.052 0 0 0.076" size="0.046"/>
                    <geom type="cylinder" fromto="0 0 0.076 0 0 0.084" size="0.0455" material="dark"/>
                    <geom type="cylinder" fromto="0 0 0.084 0 0 0.107" size="0.040" material="steel"/>
                    <body name="hand" pos="0 0 0.107" quat="0.92387953 0 0 -0.38268343" gravcomp="1">
                      <geom type="capsule" fromto="0 -0.068 0.030 0 0.068 0.030" size="0.030"/>
                      <geom type="box" size="0.0225 0.085 0.010" pos="0 0 0.052" material="dark"/>
                      <geom type="box" size="0.024 0.022 0.013" pos="0.050 0 0.012" material="dark"/>
                      <geom type="cylinder" fromto="0.062 0 0.024 0.062 0 0.030" size="0.010" material="steel"/>
                      <camera name="wrist" pos="0.066 0 0.032" xyaxes="0 1 0 0.985 0 0.174" fovy="76"/>
                      <site name="{TOOL_SITE}" pos="0 0 0.1034" size="0.004" group="4"/>
                      <body name="left_finger" pos="0 0 0.0584" childclass="finger" gravcomp="1">
                        <joint name="panda_finger_joint1" axis="0 1 0"/>
                        {_FINGER.format(y="0.011")}
                      </body>
                      <body name="right_finger" pos="0 0 0.0584" childclass="finger" gravcomp="1">
                        <joint name="panda_finger_joint2" axis="0 -1 0"/>
                        {_FINGER.format(y="-0.011")}
                      </body>
                    </body>
                  </body>
                </body>
              </body>
            </body>
          </body>
        </body>
      </body>
    </body>
    {"".join(_block(colour, i) for i, colour in enumerate(COLOURS))}
  </worldbody>

  <contact>
    <exclude body1="left_finger" body2="right_finger"/>
  </contact>
  <equality>
    <joint joint1="panda_finger_joint2" joint2="panda_finger_joint1" polycoef="0 1 0 0 0"/>
  </equality>
  <actuator>
    {"".join(_actuator(i) for i in range(1, 8))}
    <position name="{GRIPPER_JOINT}" joint="{GRIPPER_JOINT}" kp="800" dampratio="1"
              ctrlrange="0 0.04" forcerange="-60 60"/>
  </actuator>
  <keyframe>
    <key name="home"
         qpos="{" ".join(map(str, HOME))} 0 0 {" ".join(f"{_block_pos(i)} 1 0 0 0" for i in range(len(COLOURS)))}"
         ctrl="{" ".join(map(str, HOME))} 0"/>
  </keyframe>
</mujoco>
"""


def wood(size: int = 512, planks: int = 6) -> np.ndarray:
    """A pale planked wood texture, (size, size, 3) uint8, the grain along the first axis; the same on each call."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[0:size, 0:size] / size
    plank = np.minimum((x * planks).astype(int), planks - 1)
    phase, tone = rng.uniform(0, 20, planks), rng.uniform(-0.018, 0.018, planks)
    bend = 0.05 * np.sin(2 * np.pi * (y + phase[plank])) + 0.02 * np.sin(2 * np.pi * (3 * y + phase[plank]))
    rings = np.sin(2 * np.pi * (9 * (x * planks % 1) * (1 + 0.3 * np.sin(phase[plank])) + 5 * bend + phase[plank]))
    fibre = rng.normal(size=(1, size)).repeat(size, axis=0) + 0.4 * rng.normal(size=(size, size))
    light = 1 + tone[plank] + 0.018 * rings + 0.008 * fibre
    light[:, np.abs((x[0] * planks + 0.5) % 1 - 0.5) < 0.008] *= 0.88  # seams
    return np.clip(light[..., None] * np.array([216, 194, 163]), 0, 255).astype(np.uint8)


def _own_scene(pretty: bool) -> mujoco.MjSpec:
    spec = mujoco.MjSpec.from_string(_XML)
    if pretty:
        _soften(spec)
    pixels = wood()
    texture = spec.add_texture(name="wood", type=mujoco.mjtTexture.mjTEXTURE_2D, nchannel=3)
    texture.height, texture.width = pixels.shape[:2]
    texture.data = pixels.tobytes()
    material = spec.add_material(name="wood", specular=0.12, shininess=0.2, texrepeat=[1, 1])
    material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "wood"
    return spec


def _soften(spec: mujoco.MjSpec, count: int = 4, spread: float = 0.03) -> None:
    """Split the key light into several in a small ring, so that their shadows blur into a penumbra."""
    key = spec.light("key")
    for angle in np.arange(count) * 2 * np.pi / count:
        part = spec.worldbody.add_light(
            pos=key.pos,
            dir=key.dir + spread * np.array([np.cos(angle), np.sin(angle), 0]),
            type=key.type,
            diffuse=key.diffuse / count,
            specular=key.specular / count,
        )
        part.castshadow = True
    spec.delete(key)


def build_model(path: str | Path | None = None, pretty: bool = False) -> mujoco.MjModel:
    """The model of the scene above, or of the MJCF file at `path`.

    `pretty` turns on shadows and antialiasing, for pictures made at leisure; without it a picture costs a few
    milliseconds on a CPU. Raises FileNotFoundError for a path that is no file, ValueError for one MuJoCo rejects.
    """
    if path is None:
        model = _own_scene(pretty).compile()
    elif not Path(path).is_file():
        raise FileNotFoundError(f"no MJCF file at {path}")
    else:
        try:
            model = mujoco.MjModel.from_xml_path(str(path))
        except ValueError as error:
            raise ValueError(f"{path} is no MJCF that MuJoCo {mujoco.__version__} can compile: {error}") from error
    quality = model.vis.quality
    quality.shadowsize, quality.offsamples = (1024, 4) if pretty else (0, 0)
    quality.numslices, quality.numstacks = (32, 16) if pretty else (12, 6)
    return model


def names(model: mujoco.MjModel, kind: str) -> list[str]:
    """The names of the model's elements of one kind: "joint", "camera", "body", "site" ..."""
    count = {
        "body": model.nbody,
        "joint": model.njnt,
        "camera": model.ncam,
        "site": model.nsite,
        "actuator": model.nu,
    }
    return [name for i in range(count[kind]) if (name := getattr(model, kind)(i).name)]


def find(model: mujoco.MjModel, kind: str, name: str) -> int:
    """The index of a named element; a ValueError that lists what the model has if there is none of that name."""
    known = names(model, kind)
    if name not in known:
        listed = ", ".join(known) or "none with a name"
        raise ValueError(f"the model {model_name(model)!r} has no {kind} {name!r}; it has: {listed}")
    return int(getattr(model, kind)(name).id)


def model_name(model: mujoco.MjModel) -> str:
    """What the MJCF's <mujoco model="..."> says."""
    return bytes(model.names).split(b"\0", 1)[0].decode()
