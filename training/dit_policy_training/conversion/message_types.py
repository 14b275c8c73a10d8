"""How a recording's messages are decoded: by the definitions in the bag, else by its ROS distribution's, else by ours.

Bags of before Iron carry no definitions. Those of ROS's common interfaces come with rosbags for each distribution;
control_msgs and std_srvs do not, so that the fields of those that robots record stand here, as the repositories
ros-controls/control_msgs and ros2/common_interfaces have them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rosbags.interfaces import Nodetype
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from dit_policy_training.conversion.message import BagError, MessageKind, Raw

_SEPARATOR = "=" * 80 + "\n"


@dataclass(frozen=True)
class Definition:
    """A type's definition as a bag carries it; `encoding` is ros2msg or ros2idl."""

    encoding: str
    text: str


_POINTS = "trajectory_msgs/JointTrajectoryPoint"
_MULTI_DOF = "trajectory_msgs/MultiDOFJointTrajectoryPoint"
_UUID = "unique_identifier_msgs/UUID goal_id\n"


def _fields(kind: str, *names: str) -> str:
    return "".join(f"{kind} {name}\n" for name in names)


_STATE_HEAD = "std_msgs/Header header\nstring[] joint_names\n"
_STATE_NOW = ("reference", "feedback", "error", "output", "desired", "actual")
_HUMBLE_STATE = (
    _STATE_HEAD
    + _fields(_POINTS, *_STATE_NOW)
    + "string[] multi_dof_joint_names\n"
    + _fields(_MULTI_DOF, *(f"multi_dof_{name}" for name in _STATE_NOW))
)
_FOXY_FEEDBACK = _STATE_HEAD + _fields(_POINTS, "desired", "actual", "error")
_MULTI_DOF_FEEDBACK = "string[] multi_dof_joint_names\n" + _fields(
    _MULTI_DOF, "multi_dof_desired", "multi_dof_actual", "multi_dof_error"
)
_GRIPPER_STATE = _fields("float64", "position", "effort") + _fields("bool", "stalled", "reached_goal")


def _action_feedback(action: str, *feedbacks: str) -> dict[str, list[str]]:
    """The type of an action's feedback topic, one text for each form that the feedback has had."""
    inner = f"{action}_Feedback"
    return {
        f"{action}_FeedbackMessage": [
            f"{_UUID}{inner} feedback\n{_SEPARATOR}MSG: {inner}\n{feedback}" for feedback in feedbacks
        ]
    }


def _service_event(service: str, request: str, response: str) -> dict[str, list[str]]:
    """The type of a service's introspection topic, `_service_event`."""
    event = f"service_msgs/ServiceEventInfo info\n{service}_Request[<=1] request\n{service}_Response[<=1] response\n"
    parts = f"{_SEPARATOR}MSG: {service}_Request\n{request}{_SEPARATOR}MSG: {service}_Response\n{response}"
    return {f"{service}_Event": [event + parts]}


_NOTHING = "uint8 structure_needs_at_least_one_member\n"
_ANSWER = "bool success\nstring message\n"

# Newest form first; a message is taken by the first that it fits to the last byte.
_DEFINITIONS: dict[str, list[str]] = {
    "control_msgs/msg/JointTrajectoryControllerState": [
        _HUMBLE_STATE + "float64 speed_scaling_factor\n",
        _HUMBLE_STATE,
        _FOXY_FEEDBACK,
    ],
    "control_msgs/msg/DynamicJointState": [
        f"{_STATE_HEAD}control_msgs/InterfaceValue[] interface_values\n{_SEPARATOR}MSG: control_msgs/InterfaceValue\n"
        "string[] interface_names\nfloat64[] values\n"
    ],
    "control_msgs/msg/GripperCommand": [_fields("float64", "position", "max_effort")],
    "control_msgs/msg/JointJog": [
        _STATE_HEAD + _fields("float64[]", "displacements", "velocities") + "float64 duration\n"
    ],
    "control_msgs/msg/SingleDOFStateStamped": [
        "std_msgs/Header header\ncontrol_msgs/SingleDOFState dof_state\n"
        f"{_SEPARATOR}MSG: control_msgs/SingleDOFState\nstring name\n"
        + _fields("float64", "reference", "feedback", "feedback_dot", "error", "error_dot", "time_step", "output")
    ],
    **_action_feedback(
        "control_msgs/action/FollowJointTrajectory",
        _FOXY_FEEDBACK + "int32 index\n" + _MULTI_DOF_FEEDBACK + "int32 multi_dof_index\n",
        _FOXY_FEEDBACK + _MULTI_DOF_FEEDBACK,
        _FOXY_FEEDBACK,
    ),
    **_action_feedback("control_msgs/action/GripperCommand", _GRIPPER_STATE),
    **_action_feedback("control_msgs/action/ParallelGripperCommand", "sensor_msgs/JointState state\n"),
    **_service_event("std_srvs/srv/Trigger", _NOTHING, _ANSWER),
    **_service_event("std_srvs/srv/SetBool", "bool data\n", _ANSWER),
    **_service_event("std_srvs/srv/Empty", _NOTHING, _NOTHING),
    **_service_event("dit_policy_msgs/srv/SetInstruction", "string instruction\n", _ANSWER),
}

_FOLLOWING = "control_msgs/action/FollowJointTrajectory_FeedbackMessage"
_WRITTEN = {_FOLLOWING: _DEFINITIONS[_FOLLOWING][1]}  # as Humble to Kilted have it


def message_kind(msgtype: str, definition: Definition | None, digest: str, distro: str | None) -> MessageKind:
    """What decodes messages of `msgtype` in a bag of the ROS distribution `distro` (None: not known).

    `digest` is the type's RIHS01 hash in the bag, or empty. Raises BagError if the type is defined nowhere, or its
    definition in the bag is damaged.
    """
    stores = (_defined_in_bag(msgtype, definition, digest),) if definition else _defined_elsewhere(msgtype, distro)
    if not stores:
        raise BagError(
            f"type {msgtype}: the bag does not carry its definition (those of before Iron do not), nor do ROS's common "
            "interfaces have it; record again with Iron or later, or `ros2 bag convert` the bag where the type is known"
        )
    name = _name_in(stores[0], msgtype)
    fields = stores[0].fielddefs[name][1]
    stamped = bool(fields) and fields[0][1] == (Nodetype.NAME, "std_msgs/msg/Header")

    def decode(raw: Raw) -> Any:
        for store in stores[:-1]:
            try:
                return store.deserialize_cdr(raw, name)
            except Exception:  # it has another form: the next
                continue
        return stores[-1].deserialize_cdr(raw, name)

    return MessageKind(msgtype, stamped, decode)


def _name_in(store: Typestore, msgtype: str) -> str:
    """rosbags knows pkg/srv/Type_Event as pkg/srv/msg/Type_Event."""
    return msgtype if msgtype in store.fielddefs else msgtype.replace("/srv/", "/srv/msg/")


# A pure function of its arguments, and parsing takes tens of milliseconds: once a process, not once a bag.
@lru_cache(maxsize=256)
def _defined_in_bag(msgtype: str, definition: Definition, digest: str) -> Typestore:
    try:
        if definition.encoding == "ros2idl":
            types = _types_from_idl(definition.text)
        else:
            types = get_types_from_msg(definition.text, msgtype)
        store = get_typestore(Stores.EMPTY)
        store.register(types)
        name = _name_in(store, msgtype)
        found = store.hash_rihs01(name) if digest.startswith("RIHS01_") and name == msgtype else digest
        store.get_msgdef(name)  # compiles it, so that a type missing from the definition shows here
    except Exception as error:  # the parser raises anything on damaged text
        raise BagError(
            f"type {msgtype}: its definition in the bag is damaged, {type(error).__name__}: {error}"
        ) from error
    if found != digest:
        raise BagError(f"type {msgtype}: its definition in the bag is damaged: its hash is {found}, expected {digest}")
    return store


def _types_from_idl(text: str) -> dict[str, Any]:
    types: dict[str, Any] = {}
    parts = text.split(_SEPARATOR)[1:] if text.startswith(f"{_SEPARATOR}IDL: ") else [f"\n{text}"]
    for part in parts:
        types.update(get_types_from_idl(part.partition("\n")[2]))
    return types


@lru_cache(maxsize=64)
def _defined_elsewhere(msgtype: str, distro: str | None) -> tuple[Typestore, ...]:
    known = {store.value.removeprefix("ros2_"): store for store in Stores if store.value.startswith("ros2_")}
    which = known.get(distro or "", Stores.ROS2_KILTED)
    common = get_typestore(which)
    if msgtype in common.fielddefs:
        return (common,)
    return tuple(_registered(which, msgtype, text) for text in _DEFINITIONS.get(msgtype, ()))


@lru_cache(maxsize=64)
def types_to_write(msgtype: str) -> Typestore:
    """The types with which messages of `msgtype` are made and written: as of Kilted, of control_msgs as of Jazzy.

    Raises KeyError for a type that is defined nowhere.
    """
    if msgtype in _kilted().fielddefs:
        return _kilted()
    if msgtype not in _DEFINITIONS:
        raise KeyError(msgtype)
    return _registered(Stores.ROS2_KILTED, msgtype, _WRITTEN.get(msgtype, _DEFINITIONS[msgtype][0]))


def definition_to_write(msgtype: str) -> tuple[str, str]:
    """The definition and the RIHS01 hash of a type of `types_to_write` as a bag carries them, with all that it uses."""
    store = types_to_write(msgtype)
    if msgtype in _kilted().fielddefs:
        return store.generate_msgdef(msgtype, ros_version=2)[0], store.hash_rihs01(msgtype)
    # rosbags does not write definitions with types of actions in them.
    own = _WRITTEN.get(msgtype, _DEFINITIONS[msgtype][0])
    parts = own.split(_SEPARATOR)
    for used in sorted(store.fielddefs.keys() & set(_used(store, _name_in(store, msgtype)))):
        if used in _kilted().fielddefs:
            head = store.generate_msgdef(used, ros_version=2)[0].split(_SEPARATOR)[0]
            parts.append(f"MSG: {used.replace('/msg/', '/')}\n{head}")
    return _SEPARATOR.join(parts), store.hash_rihs01(_name_in(store, msgtype))


def _used(store: Typestore, name: str) -> Iterator[str]:
    """The types of a type's fields, and of theirs."""
    for _, (node, described) in store.fielddefs[name][1]:
        inner = described
        while node in (Nodetype.ARRAY, Nodetype.SEQUENCE):
            node, inner = inner[0]
        if node == Nodetype.NAME:
            yield inner
            yield from _used(store, inner)


@lru_cache(maxsize=1)
def _kilted() -> Typestore:
    return get_typestore(Stores.ROS2_KILTED)


def _registered(distro: Stores, msgtype: str, text: str) -> Typestore:
    store = get_typestore(distro)
    if "service_msgs/" in text and "service_msgs/msg/ServiceEventInfo" not in store.fielddefs:
        store = get_typestore(Stores.ROS2_KILTED)  # services were not recorded before
    store.register(get_types_from_msg(text, msgtype))
    return store
