"""The policy as a lifecycle node: camera, joint-state and instruction topics in, checked trajectories out.

Design. Callbacks only store: an image or a joint state goes undecoded into the observation buffer. A 10 ms timer asks
whether the next chunk is due; if so the inference thread samples it (`runtime.pipeline`), and what the gate accepts is
published from there. Times are the node clock's, so `use_sim_time` works.

States. configure loads the checkpoint, warms it up and subscribes, so that the observation history is there when
activate starts the motion. deactivate brings the arm to rest where it is; cleanup frees the memory. A chunk sampled
before a deactivation is never sent after it.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diagnostic_msgs.msg import DiagnosticArray
from dit_policy_msgs.msg import ActionChunk, PolicyStatus
from dit_policy_msgs.srv import SetInstruction
from rclpy.clock import Clock, ClockType
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleNode, LifecyclePublisher, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.nodes.conversions import action_chunk_message, time_message, trajectory_message
from dit_policy_ros.nodes.declaration import Value
from dit_policy_ros.nodes.diagnostics import Tally, diagnostic_array, path_values
from dit_policy_ros.nodes.parameters import Parameters
from dit_policy_ros.nodes.spin import run_node
from dit_policy_ros.policy.checkpoint import load_checkpoint
from dit_policy_ros.policy.engine import PathReport, PolicyEngine, Precision
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.sampling import Sampling
from dit_policy_ros.runtime.gate import Decision, Gate, Verdict
from dit_policy_ros.runtime.inference import InferenceWorker
from dit_policy_ros.runtime.messages import MessageError, stamp_ns
from dit_policy_ros.runtime.observations import ObservationBuffer, ObservationError
from dit_policy_ros.runtime.pipeline import ChunkPipeline, Outcome, Request
from dit_policy_ros.runtime.trajectory import Point, stop

_TICK_S = 0.01  # how exactly a due chunk is started; each tick costs some 50 us
_STATUS_S = 1.0
_LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
_RELIABLE = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)
_ACK_TIMEOUT = Duration(seconds=0.5)


@dataclass
class Session:
    """What configure loads and cleanup drops, all of it."""

    policy: MultitaskDiTPolicy
    embodiment: Embodiment
    checkpoint: Path
    observations: ObservationBuffer
    gate: Gate
    pipeline: ChunkPipeline
    worker: InferenceWorker
    commands: dict[str, LifecyclePublisher] = field(default_factory=dict)  # by action group
    subscriptions: list[Subscription] = field(default_factory=list)


@dataclass
class Motion:
    """Where the sampling of chunks stands between an activate and the next deactivate."""

    running: bool = False
    epoch: int = 0  # grows at each start and stop: an outcome of an earlier epoch is not sent
    sequence: int = 0
    in_flight: bool = False
    next_due_ns: int = 0
    last_tick_ns: int = 0


class PolicyNode(LifecycleNode):
    """`dit_policy`: parameters, topics and services are listed in the README."""

    def __init__(self) -> None:
        super().__init__("dit_policy")
        self._session: Session | None = None
        self._motion = Motion()
        self._lock = threading.Lock()  # around every publication to a controller and every change of _motion
        self._tally = Tally()
        self._instruction = ""
        # Not _parameters: rclpy keeps its own there.
        self._settings = Parameters(self, self._contradiction, self._parameters_changed)
        self._chunk_publisher = self.create_publisher(ActionChunk, "~/action_chunk", _RELIABLE)
        self._status_publisher = self.create_publisher(PolicyStatus, "~/status", _RELIABLE)
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", _RELIABLE)
        self.create_service(SetInstruction, "~/set_instruction", self._serve_instruction)
        steady = Clock(clock_type=ClockType.STEADY_TIME)  # the node's clock may stand still or jump under use_sim_time
        self.create_timer(_TICK_S, self._tick, clock=steady)
        self.create_timer(_STATUS_S, self._publish_status, clock=steady)

    # --- transitions -------------------------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load and warm up the checkpoint, subscribe; FAILURE (still unconfigured) with the reason logged."""
        return self._transition("configure", self._configure, undo=self._release) or super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Start sampling chunks."""
        done = super().on_activate(state)
        return self._transition("activate", self._start) or done

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Bring the arm to rest where it is, then stop sampling."""
        return self._transition("deactivate", self._stop) or super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the model and the subscriptions."""
        return self._transition("cleanup", self._release) or super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """From any state: the arm stops, the memory is freed."""
        return self._transition("shutdown", self.finish) or super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """After an error in a transition: the arm stops and the node is unconfigured again."""
        return self._transition("error handling", self.finish) or super().on_error(state)

    def finish(self) -> None:
        """Stop the arm if it moves and free everything, whatever the state."""
        self._stop()
        self._release()

    def _transition(
        self, name: str, work: Callable[[], None], undo: Callable[[], None] | None = None
    ) -> TransitionCallbackReturn | None:
        # rclpy swallows an exception raised in a transition, so it is caught and told here.
        try:
            work()
        except Exception as error:
            self.get_logger().error(f"{name} failed: {error}")
            self.get_logger().debug(traceback.format_exc())
            if undo is not None:
                undo()
            return TransitionCallbackReturn.FAILURE
        return None

    # --- configure and cleanup ---------------------------------------------------------------------------------------

    def _configure(self) -> None:
        folder = self._settings.text("checkpoint")
        if not folder:
            raise ValueError(
                "parameter 'checkpoint' is empty; expected the folder of a trained policy "
                "(-p checkpoint:=FOLDER, or in the parameter file)"
            )
        checkpoint = Path(folder)
        # Not mapped: a file that is copied over while the arm moves would end the process.
        policy = load_checkpoint(checkpoint, device=self._device(), mapped=False)
        embodiment = self._embodiment(checkpoint)
        reason = self._contradiction(self._settings.values, policy)
        if reason is not None:
            raise ValueError(reason)
        engine = PolicyEngine(
            policy,
            cast(Precision, self._settings.text("precision")),
            compile=bool(self._settings["compile"]),
        )
        observations = ObservationBuffer(embodiment, policy.config.n_obs_steps)
        gate = Gate(embodiment)
        pipeline = ChunkPipeline(engine, embodiment, observations, gate, self._now_ns)
        session = Session(
            policy, embodiment, checkpoint, observations, gate, pipeline, worker=InferenceWorker(self._on_result)
        )
        self._session = session
        self._parameters_changed(())
        sampling = _sampling(self._settings.values)
        seconds = pipeline.warm_up(self._settings.integer("warmup_chunks"), sampling)
        self._tell_paths(pipeline.path_reports)
        self._connect(session)
        self._tally = Tally()
        self.get_logger().info(
            f"loaded {checkpoint} for {embodiment.name} on {self._device()}: a chunk takes {seconds * 1e3:.0f} ms"
        )

    def _tell_paths(self, reports: Iterable[PathReport]) -> None:
        for report in reports:
            line = f"fast path {report.name} is {report}"
            if report.failed:
                self.get_logger().warning(line)
            else:
                self.get_logger().info(line)

    def _device(self) -> str:
        device = self._settings.text("device")
        if device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return device

    def _embodiment(self, checkpoint: Path) -> Embodiment:
        trained_on = Embodiment.load(checkpoint / "embodiment.yaml")
        path = self._settings.text("embodiment")
        if not path:
            return trained_on
        here = Embodiment.load(path)
        differences = here.differences(trained_on)
        if differences:
            raise ValueError(
                f"{path} is not the embodiment that {checkpoint} was trained on: "
                + "; ".join(differences)
                + ". Use the embodiment of the training, or train for this one"
            )
        return here

    def _connect(self, session: Session) -> None:
        embodiment = session.embodiment
        for camera in embodiment.cameras:
            kind = Image if camera.transport == "raw" else CompressedImage
            self._subscribe(kind, camera.topic, qos_profile_sensor_data, partial(self._on_stream, camera.topic))
        topic = embodiment.state.topic
        self._subscribe(JointState, topic, qos_profile_sensor_data, partial(self._on_stream, topic))
        self._subscribe(String, embodiment.instruction_topic, _LATCHED, self._on_instruction)
        for group in embodiment.action_groups:
            publisher = self.create_lifecycle_publisher(JointTrajectory, group.topic, _RELIABLE)
            session.commands[group.name] = publisher

    def _subscribe(self, kind: type, topic: str, qos: QoSProfile, callback: Callable[[object], None]) -> None:
        assert self._session is not None
        self._session.subscriptions.append(self.create_subscription(kind, topic, callback, qos))

    def _release(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        session.worker.close()
        for subscription in session.subscriptions:
            self.destroy_subscription(subscription)
        for publisher in session.commands.values():
            self.destroy_lifecycle_publisher(publisher)
        self._instruction = ""
        del session
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # --- inputs ------------------------------------------------------------------------------------------------------

    def _on_stream(self, topic: str, message: object) -> None:
        if self._session is not None:
            self._session.observations.add(topic, stamp_ns(message), message)

    def _on_instruction(self, message: String) -> None:
        reason = self._accept_instruction(message.data)
        if reason is not None:
            self.get_logger().error(reason)

    def _serve_instruction(
        self, request: SetInstruction.Request, response: SetInstruction.Response
    ) -> SetInstruction.Response:
        reason = self._accept_instruction(request.instruction)
        response.success = reason is None
        response.message = reason or f"instruction: {self._instruction}"
        return response

    def _accept_instruction(self, text: str) -> str | None:
        """Take the instruction, or say in a sentence why not."""
        instruction = text.strip()
        if not instruction:
            kept = f"'{self._instruction}' stays in force" if self._instruction else "there is none in force"
            return f"an empty instruction is refused; {kept}. To stop the arm, deactivate the node"
        if self._session is None:
            return "no instruction can be taken before the node is configured"
        self._instruction = instruction
        if not self._instruction_known():
            tasks = ", ".join(f"'{task}'" for task in self._session.policy.config.tasks)
            self.get_logger().warning(f"the policy was not trained on '{instruction}', only on {tasks}; it runs anyway")
        return None

    def _instruction_known(self) -> bool:
        return self._session is not None and self._instruction in self._session.policy.config.tasks

    # --- motion ------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._session is None:
            raise RuntimeError("nothing is loaded")
        self._session.worker.reset_latency()
        with self._lock:
            self._tally = Tally()
            self._motion = Motion(running=True, epoch=self._motion.epoch + 1)

    def _stop(self) -> None:
        with self._lock:
            if not self._motion.running:
                return
            self._motion = Motion(epoch=self._motion.epoch + 1)
            if self._tally.sent:
                self._publish_stop()

    def _publish_stop(self) -> None:
        session = self._session
        assert session is not None
        try:
            joints = session.embodiment.action_joints
            position, velocity = session.observations.measured(joints, self._now_ns())
        except (ObservationError, MessageError) as error:
            # Without a measured state a stop would be a guess; the last chunk ends at rest by itself.
            self.get_logger().error(f"no stop trajectory sent, the arm runs out its last chunk: {error}")
            return
        where = dict(zip(joints, position, strict=True))
        speed = dict(zip(joints, velocity, strict=True)) if velocity is not None else dict.fromkeys(joints, 0.0)
        for group in session.embodiment.action_groups:
            names = tuple(group.joints)
            start = Point(0, np.array([where[n] for n in names]), np.array([speed[n] for n in names]))
            trajectory = stop(names, start, group.joints)
            publisher = session.commands[group.name]
            publisher.publish(trajectory_message(trajectory))
            publisher.wait_for_all_acked(_ACK_TIMEOUT)  # the process may end right after

    def _tick(self) -> None:
        session = self._session
        with self._lock:
            motion = self._motion
            if session is None or not motion.running:
                return
            now_ns = self._now_ns()
            if now_ns < motion.last_tick_ns:
                self.get_logger().warning("the clock went backwards; the next chunk starts afresh")
                motion.next_due_ns = now_ns
            motion.last_tick_ns = now_ns
            if motion.in_flight or now_ns < motion.next_due_ns:
                return
            motion.in_flight = True
            epoch, sequence = motion.epoch, motion.sequence
            motion.sequence += 1
        sampling = _sampling(self._settings.values)
        request = Request(sequence, self._instruction, self._n_action_steps(), sampling)
        if not request.instruction:
            topic = session.embodiment.instruction_topic
            reason = f"no instruction yet: publish one on '{topic}' or call ~/set_instruction"
            self._conclude(Outcome(request, Decision(Verdict.INPUT_MISSING, reason)), epoch)
            return
        session.worker.submit(lambda: (session.pipeline.next_chunk(request), epoch))

    def _on_result(self, result: object, error: BaseException | None) -> None:
        """In the inference thread: what came of a request."""
        if error is None:
            outcome, epoch = cast(tuple[Outcome, int], result)
            self._conclude(outcome, epoch)
            return
        # The pipeline turns what can go wrong into an outcome; this is a defect, and the next tick tries again.
        self.get_logger().error(f"the inference thread failed: {error!r}")
        with self._lock:
            self._motion.in_flight = False

    def _conclude(self, outcome: Outcome, epoch: int) -> None:
        session = self._session
        with self._lock:
            motion = self._motion
            if session is None or not motion.running or motion.epoch != epoch:
                return
            now_ns = self._now_ns()
            for group, trajectory in outcome.trajectories.items():
                session.commands[group].publish(trajectory_message(trajectory))
            motion.in_flight = False
            motion.next_due_ns = self._next_due_ns(session, outcome, now_ns)
            self._tell(outcome.decision)
            self._tally.add(outcome.decision)
            self._chunk_publisher.publish(action_chunk_message(outcome, now_ns))

    def _next_due_ns(self, session: Session, outcome: Outcome, now_ns: int) -> int:
        step_ns = round(1e9 / session.embodiment.fps)
        if outcome.chunk is None or not outcome.trajectories:
            return now_ns + step_ns  # try again one step later; meanwhile the arm follows the last chunk's tail to rest
        return outcome.chunk.observation_stamp_ns + outcome.request.n_action_steps * step_ns

    def _tell(self, decision: Decision) -> None:
        if decision.verdict is self._tally.last.verdict:
            return  # said once when it begins; the counts are in /diagnostics
        if decision.verdict is Verdict.ACCEPTED:
            self.get_logger().info("chunks are sent again")
        else:
            self.get_logger().warning(f"no chunk sent ({decision.verdict.name.lower()}): {decision.reason}")

    # --- parameters and status ---------------------------------------------------------------------------------------

    def _contradiction(self, values: Mapping[str, Value], policy: MultitaskDiTPolicy | None = None) -> str | None:
        if policy is None and self._session is not None:
            policy = self._session.policy
        if policy is None:
            return None
        config = policy.config
        wanted = int(values["n_action_steps"])
        if wanted > config.max_action_steps:
            return (
                f"n_action_steps {wanted} is more than this checkpoint holds: horizon {config.horizon} - n_obs_steps "
                f"{config.n_obs_steps} + 1 = {config.max_action_steps} at most"
            )
        try:
            _sampling(values).resolve(config)
        except ValueError as error:
            return str(error)
        return None

    def _parameters_changed(self, names: Iterable[str]) -> None:
        if self._session is not None:
            self._session.gate.max_start_distance = self._settings.number("max_start_distance")
            self._session.gate.max_chunk_age = self._settings.number("max_chunk_age")

    def _n_action_steps(self) -> int:
        assert self._session is not None
        return self._settings.integer("n_action_steps") or self._session.policy.config.n_action_steps

    def _publish_status(self) -> None:
        label = self._state_machine.current_state[1]
        stamp = time_message(self._now_ns())
        status = PolicyStatus(instruction=self._instruction, instruction_known=self._instruction_known())
        status.header.stamp = stamp
        status.chunks_sent, status.chunks_rejected = self._tally.sent, self._tally.rejected
        status.observations_stale = self._tally.stale
        status.last_verdict, status.last_reason = int(self._tally.last.verdict), self._tally.last.reason
        session = self._session
        if session is not None:
            status.checkpoint, status.embodiment = str(session.checkpoint), session.embodiment.name
            status.device = self._device()
            status.n_action_steps = self._n_action_steps()
            status.denoising_steps = self._settings.integer("denoising_steps")
            status.inference_p50, status.inference_p95 = session.worker.latency(50), session.worker.latency(95)
        self._status_publisher.publish(status)
        values = {
            name: str(getattr(status, name))
            for name in ("checkpoint", "embodiment", "device", "instruction", "n_action_steps", "inference_p95")
        }
        if session is not None:
            values |= path_values(session.pipeline.path_reports)
        self._diagnostics_publisher.publish(
            diagnostic_array(stamp, self.get_fully_qualified_name(), label, self._tally, values)
        )

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)


def _sampling(values: Mapping[str, Value]) -> Sampling:
    """How a chunk is sampled, by the parameters; what they leave open is as the checkpoint says."""
    return Sampling(
        sampler=str(values["sampler"]) or None,
        denoising_steps=int(values["denoising_steps"]) or None,
        guidance_scale=float(values["guidance_scale"]) or None,
    )


def _finish(node: Node) -> None:
    assert isinstance(node, PolicyNode)
    node.finish()


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `ros2 run dit_policy_ros policy_node`."""
    run_node(PolicyNode, _finish, args)


if __name__ == "__main__":
    main()
