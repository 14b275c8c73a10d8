"""The policy as a lifecycle node: what each transition does, and which part talks to which.

Callbacks only store: an image or a joint state goes undecoded into the observation buffer. The beat's thread asks the
conductor whether a chunk is due and whether something is wrong (motion.py), the inference thread samples. Times are the
node clock's, so `use_sim_time` works.

configure loads the checkpoint, warms it up and subscribes, so that the observation history is there when activate
starts the motion. deactivate brings the arm to rest; cleanup frees the memory. A chunk sampled before a deactivation is
never sent after it.
"""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from diagnostic_msgs.msg import DiagnosticArray
from dit_policy_msgs.msg import ActionChunk, PolicyStatus
from rclpy.clock import Clock, ClockType
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_srvs.srv import Trigger

from dit_policy_ros.nodes.account import NOTHING_DONE, Account
from dit_policy_ros.nodes.arm import Arm
from dit_policy_ros.nodes.beat import Beat
from dit_policy_ros.nodes.clock_watch import ClockWatch
from dit_policy_ros.nodes.conversions import action_chunk_message, time_message
from dit_policy_ros.nodes.declaration import Value
from dit_policy_ros.nodes.diagnostics import beat_values, diagnostic_array, input_values, memory_values, path_values
from dit_policy_ros.nodes.execution import Execution
from dit_policy_ros.nodes.instructions import Instructions
from dit_policy_ros.nodes.motion import Motion, Watch
from dit_policy_ros.nodes.parameters import Parameters
from dit_policy_ros.nodes.qos import LATCHED, RELIABLE
from dit_policy_ros.nodes.robot_description import RobotDescription
from dit_policy_ros.nodes.session import Session, contradiction
from dit_policy_ros.nodes.telemetry import Telemetry
from dit_policy_ros.policy.engine import PathReport
from dit_policy_ros.runtime.decisions import Outcome
from dit_policy_ros.runtime.faults import Trouble
from dit_policy_ros.runtime.messages import stamp_ns
from dit_policy_ros.runtime.watch import InputWatch

_BEAT_HZ = 100.0
_STATUS_S = 1.0


class PolicyNode(LifecycleNode):
    """`dit_policy`: parameters, topics, services and actions are listed in docs/node.md."""

    def __init__(self) -> None:
        super().__init__("dit_policy")
        self._session: Session | None = None
        self._motion: Motion | None = None
        self._subscriptions_of_session: list[Subscription] = []
        self._instructions = Instructions(self)
        # Not _parameters: rclpy keeps its own there.
        self._settings = Parameters(self, self._contradiction, self._parameters_changed)
        self._description: RobotDescription | None = None
        if self._settings.text("limits_from") == "robot_description":
            self._description = RobotDescription(self, self._description_changed)
        self._chunk_publisher = self.create_publisher(ActionChunk, "~/action_chunk", RELIABLE)
        self._status_publisher = self.create_publisher(PolicyStatus, "~/status", LATCHED)
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", RELIABLE)
        self._telemetry = Telemetry(self, self._settings.number("heartbeat_rate"))
        self._execution = Execution(self, self._instructions, lambda: self._motion, self._faults_last, self._now_ns)
        self.create_service(Trigger, "~/resume", self._serve_resume)
        steady = Clock(clock_type=ClockType.STEADY_TIME)  # the node's clock may stand still or jump under use_sim_time
        self.create_timer(_STATUS_S, self._report_and_write_back, clock=steady)
        self._report_now = self.create_guard_condition(self._report)
        rate = max(_BEAT_HZ, self._settings.number("command_rate"))
        self._beat = Beat(1 / rate, self._on_beat, self._inference_runs, self._beat_failed)

    # --- transitions -------------------------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load and warm up the checkpoint, subscribe; FAILURE (still unconfigured) with the reason logged."""
        return self._transition("configure", self._configure, undo=self._release) or super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Start sampling chunks."""
        done = super().on_activate(state)
        return self._transition("activate", self._start) or done

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Bring the arm to rest, then stop sampling."""
        return self._transition("deactivate", self._stop) or super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the model and the subscriptions."""
        return self._transition("cleanup", self._release) or super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """From any state: the arm stops, the memory is freed."""
        return self._transition("shutdown", self._stop_and_release) or super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """After an error in a transition: the arm stops and the node is unconfigured again."""
        return self._transition("error handling", self._stop_and_release) or super().on_error(state)

    def finish(self) -> None:
        """Stop the arm if it moves and free everything, whatever the state; the node is of no more use."""
        try:
            self._stop_and_release()
        except Exception as error:
            self.get_logger().error(f"on the way out: {error}")
        self._beat.close()
        self._telemetry.live(self._now_ns(), moving=False)  # the last word: there is nothing for the guard to stop
        self._execution.close()

    def _stop_and_release(self) -> None:
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

    def _configure(self) -> None:
        session = self._session = Session.load(self._settings, self._now_ns)
        self._tell_differences(session)
        seconds = session.pipeline.warm_up(
            self._settings.integer("warmup_chunks"), session.settings(self._settings).sampling
        )
        self._tell_paths(session.pipeline.path_reports)
        if self._description is not None:
            self._description_changed()
        self._motion = self._make_motion(session)
        self._connect(session, self._motion)
        # The interpreter would else look through all of torch for garbage, again and again, while the arm moves.
        gc.collect()
        gc.freeze()
        self.get_logger().info(
            f"loaded {session.checkpoint} for {session.embodiment.name} on {session.device}: "
            f"a chunk takes {seconds * 1e3:.0f} ms"
        )

    def _make_motion(self, session: Session) -> Motion:
        arm = Arm(self, session.embodiment.action_groups, self._settings.number("command_rate"))
        watches: list[Watch] = [_ClockOfNode(self), InputWatch(session.embodiment, session.observations)]
        return Motion(
            session,
            arm,
            watches,
            self._settings,
            tell=self._tell_outcome,
            on_fault=self._report_now.trigger,
            now_ns=self._now_ns,
            log=self.get_logger(),
        )

    def _connect(self, session: Session, motion: Motion) -> None:
        embodiment = session.embodiment
        for camera in embodiment.cameras:
            kind = Image if camera.transport == "raw" else CompressedImage
            self._subscribe(kind, camera.topic, partial(self._on_image, session, motion, camera.topic))
        topic = embodiment.state.topic
        self._subscribe(JointState, topic, partial(self._on_joints, session, topic))
        self._instructions.open(embodiment.instruction_topic, session.policy.config.tasks, motion.instruct)
        self._instruct_by_parameter()

    def _subscribe(self, kind: type, topic: str, callback: Callable[[object], None]) -> None:
        # Best effort matches any publisher, so there is no event to wait for; each would make every wait longer.
        quiet = SubscriptionEventCallbacks(use_default_callbacks=False)
        subscription = self.create_subscription(kind, topic, callback, qos_profile_sensor_data, event_callbacks=quiet)
        self._subscriptions_of_session.append(subscription)

    def _start(self) -> None:
        motion, session = self._motion, self._session
        if motion is None or session is None:
            raise RuntimeError("nothing is loaded")
        if self._description is not None:
            session.gate.limits = self._description.limits(session.embodiment)
        self._beat.forget()
        motion.start()

    def _stop(self) -> None:
        if self._motion is not None and self._motion.running:
            self._motion.stop()
            self._execution.deactivated()

    def _release(self) -> None:
        motion, self._motion = self._motion, None
        self._session = None
        self._instructions.close()
        for subscription in self._subscriptions_of_session:
            self.destroy_subscription(subscription)
        self._subscriptions_of_session = []
        if motion is not None:
            motion.close()
        gc.unfreeze()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _tell_differences(self, session: Session) -> None:
        for difference in session.differences:
            self.get_logger().info(f"unlike at the training, which is this robot's business: {difference}")

    def _tell_paths(self, reports: Iterable[PathReport]) -> None:
        for report in reports:
            line = f"fast path {report.name} is {report}"
            if report.failed:
                self.get_logger().warning(line)
            else:
                self.get_logger().info(line)

    # --- inputs ------------------------------------------------------------------------------------------------------

    def _on_image(self, session: Session, motion: Motion, topic: str, message: object) -> None:
        session.observations.add(topic, stamp_ns(message), message)
        motion.image_arrived()

    def _on_joints(self, session: Session, topic: str, message: object) -> None:
        session.observations.add(topic, stamp_ns(message), message)

    def _description_changed(self) -> None:
        session = self._session
        if session is None or self._description is None:
            return
        try:
            session.gate.limits = self._description.limits(session.embodiment)
        except ValueError as error:
            self.get_logger().error(f"{error}; the limits stay as they were")

    def _serve_resume(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        reason = "the node is not active" if self._motion is None or not self._motion.running else self._motion.resume()
        response.success = reason is None
        response.message = reason or "the fault is over"
        return response

    # --- the beat ----------------------------------------------------------------------------------------------------

    def _on_beat(self) -> None:
        session, motion = self._session, self._motion
        if motion is not None:
            motion.beat()
        conductor = session.conductor if session is not None else None
        self._telemetry.beat(self._now_ns(), time.monotonic_ns(), conductor)

    def _inference_runs(self) -> bool:
        motion = self._motion
        return motion is not None and motion.worker.busy

    def _beat_failed(self, error: Exception) -> None:
        self.get_logger().error(
            f"the beat failed: {error!r}\n{''.join(traceback.format_exception(error))}", throttle_duration_sec=1.0
        )

    def _tell_outcome(self, outcome: Outcome, now_ns: int) -> None:
        self._chunk_publisher.publish(action_chunk_message(outcome, now_ns))
        self._execution.hear(outcome)

    # --- parameters --------------------------------------------------------------------------------------------------

    def _contradiction(self, values: Mapping[str, Value]) -> str | None:
        instruction = str(values["instruction"])
        changed = instruction != self._settings.text("instruction")
        # Empty is what the parameter is while no instruction is in force, so then it may be set, and loaded, as such.
        if changed and not instruction.strip() and (instruction or self._instructions.text):
            return self._instructions.refusal_of_nothing()
        if self._session is None:
            return None
        return contradiction(values, self._session.policy, self._session.gate.limits)

    def _parameters_changed(self, names: Iterable[str]) -> None:
        if self._motion is not None:
            self._motion.apply(self._settings)
            if "instruction" in names:
                self._instruct_by_parameter()

    def _instruct_by_parameter(self) -> None:
        text = self._settings.text("instruction")
        if text:
            self._instructions.accept(text)

    def _write_back_instruction(self) -> None:
        if self._motion is None or self._settings.text("instruction") == self._instructions.text:
            return
        self.set_parameters([Parameter("instruction", value=self._instructions.text)])

    def _faults_last(self) -> bool:
        return self._settings.text("recovery") == "manual"

    # --- status ------------------------------------------------------------------------------------------------------

    def _report_and_write_back(self) -> None:
        self._write_back_instruction()
        self._report()

    def _report(self) -> None:
        stamp = time_message(self._now_ns())
        account = self._motion.account() if self._motion is not None else NOTHING_DONE
        status = self._status(account)
        status.header.stamp = stamp
        self._status_publisher.publish(status)
        values = {
            name: str(getattr(status, name))
            for name in (
                "checkpoint",
                "embodiment",
                "device",
                "instruction",
                "n_action_steps",
                "denoising_steps",
                "joining",
                "dry_run",
            )
        }
        if self._session is not None:
            values |= input_values(self._session.observations.statistics(self._now_ns()))
            values |= path_values(self._session.pipeline.path_reports) | memory_values(self._session.device)
        values |= beat_values(self._beat)
        label = self._state_machine.current_state[1]
        name = self.get_fully_qualified_name()
        self._diagnostics_publisher.publish(diagnostic_array(stamp, name, label, account, values))

    def _status(self, account: Account) -> PolicyStatus:
        status = PolicyStatus(instruction=self._instructions.text, instruction_known=self._instructions.known)
        status.dry_run = self._settings.flag("dry_run")
        status.joining = self._settings.text("joining")
        status.moving = account.moving
        status.chunks_sent, status.chunks_rejected = account.accepted, account.refused
        status.observations_stale = account.stale
        status.consecutive_rejections = account.consecutive_rejections
        status.deadlines_missed = account.deadlines_missed
        status.budget_steps = account.budget_steps
        status.inference_p50, status.inference_p95 = _or_zero(account.latency_p50), _or_zero(account.latency_p95)
        status.inference_p99, status.own_cpu_p50 = _or_zero(account.latency_p99), _or_zero(account.own_cpu_p50)
        status.last_verdict, status.last_reason = int(account.last.verdict), account.last.reason
        if account.fault is not None:
            status.fault, status.fault_reason = int(account.fault.fault), account.fault.reason
        session = self._session
        if session is not None:
            status.checkpoint, status.embodiment = str(session.checkpoint), session.embodiment.name
            status.device = session.device
            settings = session.settings(self._settings)
            status.n_action_steps = settings.n_action_steps
            status.denoising_steps = settings.sampling.resolve(session.policy.config).denoising_steps
        return status

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)


class _ClockOfNode:
    """The clock watch, as the other watchdogs are asked."""

    def __init__(self, node: LifecycleNode) -> None:
        self._watch = ClockWatch(simulated=bool(node.get_parameter("use_sim_time").value))

    def check(self, now_ns: int) -> list[Trouble]:
        return self._watch.check(now_ns, time.monotonic_ns())


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
