# Every target sets the project up first; once that is done it takes a second.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-train bench-demo bench-samplers bench-joining bench-policy bench-gpu bench-node bench-delay bench-convert bench-memory bench-listening bench-train bench-trainers test test-faults test-kills lint

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

setup: ## set up: Python 3.12, packages, the colcon build, graphics
	@tools/setup.sh

demo: setup ## run the demo: a policy drives a simulated arm over DDS (ARGS=... are passed on)
	@tools/run.sh python -m dit_policy_ros.nodes.demo $(ARGS)

demo-train: setup ## make the demo's checkpoint: expert, bags, dataset, training, evaluation (ARGS go to training)
	@tools/run.sh tools/demo_train.sh $(ARGS)

bench-demo: setup ## three training seeds of the demo, 20 unseen scenes and two controls each (after demo-train; an hour)
	@tools/run.sh python test/bench_demo.py

bench-samplers: setup ## each sampler's cost and error on the demo's policies (after demo-train; --plot by ARGS)
	@tools/run.sh python test/bench_samplers.py $(ARGS)

bench-joining: setup ## how well a chunk goes on from the one in motion, by each way (after demo-train)
	@tools/run.sh python test/bench_joining.py

bench-policy: setup ## the engine against LeRobot's multi_task_dit on the CPU (ARGS=--quick: a trial; ten minutes without)
	@tools/run.sh python test/bench_policy.py $(ARGS)

bench-gpu: setup ## the same on CUDA, with graphs and without (where a GPU is at hand)
	@tools/run.sh python test/bench_gpu.py $(ARGS)

bench-node: setup ## the node's own cost, its threads' lateness, its memory and seams, over DDS (half an hour; ARGS=--minutes=0: less)
	@tools/run.sh python test/bench_node.py $(ARGS)

bench-delay: setup ## success and smoothness with slow inference, by way of joining, in simulated time (ARGS=--plot draws it)
	@OMP_NUM_THREADS=1 tools/run.sh python test/bench_delay.py $(ARGS)

bench-convert: setup ## what it costs to make datasets of bags, against LeRobot's own ways (twenty minutes; ARGS=--quick: two)
	@OMP_NUM_THREADS=1 tools/run.sh python test/bench_convert.py $(ARGS)

bench-memory: setup ## what training takes of a GPU's memory, by preset (counted; no GPU needed; minutes)
	@tools/run.sh python test/bench_memory.py

bench-listening: setup ## what cures a policy that does not listen, on the demo's task (after demo-train; an hour)
	@tools/run.sh python test/bench_listening.py

bench-train: setup ## our trainer against lerobot-train, in turns (a quarter of an hour; ARGS=--quick: a trial, --device=cuda: a GPU)
	@tools/run.sh python test/bench_train.py $(ARGS)

bench-trainers: setup ## the demo's policy trained by our trainer and by lerobot-train, run alike (after demo-train; two hours)
	@OMP_NUM_THREADS=1 tools/run.sh python test/bench_trainers.py

test: setup ## run the tests (ARGS=... are passed to pytest; ROS=jazzy: those that ROS touches, on Jazzy)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} tools/run.sh python -m pytest $(if $(filter-out kilted,$(ROS)),-m ros) $(ARGS)

test-faults: setup ## what goes wrong around a moving arm, between the real processes: a table (ARGS=--only=camera: some)
	@tools/run.sh python test/faults.py $(ARGS)

test-kills: setup ## convert killed at 20 moments and train at 10, and run again: the same dataset, the same policy (minutes)
	@OMP_NUM_THREADS=1 CONVERT_KILLS=20 TRAIN_KILLS=10 tools/run.sh python -m pytest \
		training/test/test_resume.py training/test/test_training_resume.py -k killed $(ARGS)

lint: setup ## run ruff, mypy and import-linter
	@tools/run.sh python -m pytest -q test/test_lint.py
