"""What can be asked of a conversion; `--help` prints these comments, docs/convert.md explains them."""

from dataclasses import dataclass, field
from pathlib import Path

STAMPS = ("header", "receive")
SAMPLINGS = ("as_of", "nearest", "interpolate")
ON_GAP = ("split", "drop", "refuse")
EPISODES_BY = ("bag", "instruction", "events", "service", "annotations")
ACTIONS_FROM = ("commands", "next_state")
ACTION_MODES = ("absolute", "relative")
EXECUTORS = ("local", "ray")
VERIFY = ("full", "sample", "off")


class OptionError(ValueError):
    """An option that makes no sense; the message names it, what was given and what is expected."""


@dataclass
class TimeOptions:
    """By which clock messages are known, and what becomes of times without data."""

    stamps: dict[str, str] = field(default_factory=dict)  # by topic: header (default where there is one) or receive
    sampling: dict[str, str] = field(default_factory=dict)  # by camera, or state: as_of (default), nearest, interpolate
    max_skew: float = 1.0  # s that a header stamp and its receive time may differ
    on_gap: str = "split"  # a stream older than its max_age: split the episode, drop it, or refuse the bag


@dataclass
class EpisodeOptions:
    """Where episodes begin and end, and what their task is."""

    by: str = "bag"  # or instruction (its changes), events, service (a call in the bag), annotations
    task: str = ""  # of bags without an instruction topic; never guessed
    topic: str = ""  # by events: std_msgs/String of start, stop, discard, rerecord; by service: the service's name
    annotations: Path | None = None  # CSV or YAML of bag, start, end (s from the bag's first message), task
    min_seconds: float = 0.5  # shorter episodes are left out and reported
    idle_speed: float = 0.02  # rad/s or m/s: below it, every joint, a frame counts as idle
    trim_idle: bool = False  # leave out the idle frames at an episode's ends, but idle_margin of them
    idle_margin: float = 0.3  # s


@dataclass
class Source:
    """Part of a state or action vector: some fields of a topic's messages.

    By the message's type in the bag: JointState, JointTrajectory, Float64MultiArray, controller state, gripper command,
    pose, twist and their stamped kinds, or transform.
    """

    topic: str  # as in the bag
    fields: list[str] = field(default_factory=list)  # of the type, such as position, velocity; none: the type's usual
    joints: list[str] = field(default_factory=list)  # by name where messages have names, else names for the values
    sampling: str = "as_of"  # or nearest, interpolate
    stamp: str = ""  # header or receive; empty: header where there is one
    max_age: float = 0.5  # s; older at a frame: a gap


@dataclass
class VectorOptions:
    """What the state and the action are made of beside, or in place of, what the embodiment says."""

    state_fields: list[str] = field(default_factory=lambda: ["position"])  # also velocity, effort
    state: list[Source] = field(default_factory=list)  # sources (see below) that go behind the embodiment's joints
    action_from: str = "commands"  # or next_state: the action joints' measured positions one frame later
    action: list[Source] = field(default_factory=list)  # sources that take the place of the embodiment's action groups
    action_mode: str = "absolute"  # or relative: less the joints measured at the frame


@dataclass
class DepthCamera:
    """A depth stream: raw 16UC1 (mm) or 32FC1 (m), or compressedDepth. Kept in metres, in a lossless 12-bit video."""

    topic: str  # as in the bag
    transport: str  # raw or compressed
    width: int  # pixels
    height: int  # pixels
    max_age: float  # s; older at a frame: a gap
    depth_min: float = 0.01  # m
    depth_max: float = 10.0  # m; farther reads back as this; no measurement as depth_min, or 0 without videos


@dataclass
class ControllerOptions:
    """The parameters, with the defaults, of the joint_trajectory_controller that the recorded commands went to."""

    interpolate_from_desired_state: bool = False  # a new command starts from the last reference, not the measured arm
    allow_partial_joints_goal: bool = False  # joints left out of a command stay where they are
    allow_nonzero_velocity_at_trajectory_end: bool = False  # else such a command is refused


@dataclass
class VideoOptions:
    """How videos are encoded. `gop` 2 makes any frame quick to reach.

    4:2:0 halves the colour's resolution: where small coloured things matter, take h264 and yuv444p.
    """

    use_videos: bool = True  # false: lossless PNG pictures inside the table
    codec: str = "libsvtav1"  # or h264, hevc, auto (a hardware encoder, if there is one), or its name
    crf: int = 30  # lower is better and larger; 18 for h264
    preset: str = "12"  # the codec's name for its effort: a number for libsvtav1, superfast ... for h264
    pix_fmt: str = "yuv420p"  # or yuv444p: all of the colour, with h264
    gop: int = 2  # frames from one whole picture to the next


@dataclass
class ConvertConfig:
    """Bags to a dataset. Exit status: 0 if every bag was converted, 1 if any was refused (the rest is written)."""

    bags: str  # a bag, a folder of bags, or a glob pattern
    embodiment: Path  # the robot's description (YAML)
    output: Path  # folder of the dataset; appears only when complete. Beside it OUTPUT.shards keeps each bag's part
    fps: int | None = None  # of the dataset, where not the embodiment's
    workers: int = 0  # processes; 0: one for each core
    executor: str = "local"  # or ray: a task for each bag on the cluster of RAY_ADDRESS
    shard: str = ""  # i/n: only every n-th bag, from the i-th of 1..n, and no dataset: `merge` makes it of all shards
    overwrite: bool = False  # replace an `output` that this command did not make
    recover: bool = False  # use what can be read of a damaged mcap file
    verify: str = "sample"  # or full: every picture; off
    time: TimeOptions = field(default_factory=TimeOptions)
    episodes: EpisodeOptions = field(default_factory=EpisodeOptions)
    vectors: VectorOptions = field(default_factory=VectorOptions)
    depth: dict[str, DepthCamera] = field(default_factory=dict)  # depth cameras (see below) by name; best in a file
    controller: ControllerOptions = field(default_factory=ControllerOptions)
    video: VideoOptions = field(default_factory=VideoOptions)
