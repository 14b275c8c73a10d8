"""Checkpoints: the same policy back, with no network, and damage named."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from policy_fixtures import INSTRUCTIONS, demo_config, make_batch, make_stats, randomize
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from dit_policy_ros.policy import checkpoint
from dit_policy_ros.policy.checkpoint import CheckpointError, load_checkpoint, load_config, save_checkpoint
from dit_policy_ros.policy.configuration import (
    ClipTextConfig,
    ClipVisionConfig,
    DinoV3VisionConfig,
    Feature,
    NoTextConfig,
    ObservationEncoderConfig,
    ResNetConfig,
    TransformerConfig,
)
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.tiny_clip import make_tiny_clip

EMBODIMENT = "name: arm\nfps: 10\n"
TINY_VIT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "hidden_act": "gelu",
}


def make_policy(folder: Path, vision=None) -> MultitaskDiTPolicy:
    make_tiny_clip(folder)
    config = demo_config(str(folder), tasks=INSTRUCTIONS)
    if vision is not None:
        config.observation_encoder = ObservationEncoderConfig(vision, ClipTextConfig(str(folder)))
    policy = MultitaskDiTPolicy(config, make_stats(config)).eval()
    randomize(policy.noise_predictor)
    shutil.rmtree(folder)  # whatever a checkpoint needs, it must hold
    return policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("tiny_clip"))


@pytest.fixture
def folder(policy, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", policy, EMBODIMENT, "# A policy\n")
    return tmp_path / "checkpoint"


def predict(policy):
    noise = torch.randn(1, 16, 7, generator=torch.Generator().manual_seed(4))
    return policy.predict_chunk(make_batch(policy.config, 1), noise=noise)


def test_a_checkpoint_gives_the_same_policy_back(policy, folder):
    loaded = load_checkpoint(folder)
    assert not loaded.training
    assert torch.equal(predict(loaded), predict(policy))
    assert loaded.config.tasks == INSTRUCTIONS
    assert loaded.stats == policy.stats
    assert (folder / "embodiment.yaml").read_text() == EMBODIMENT
    assert (folder / "model_card.md").read_text() == "# A policy\n"
    names = {path.name for path in folder.iterdir()}
    expected = {
        "model.safetensors",
        "config.json",
        "tokenizer",
        "dataset_stats.json",
        "embodiment.yaml",
        "model_card.md",
    }
    assert names == expected


def test_the_demos_checkpoint_is_small(folder):
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 10e6


def test_saving_again_is_the_same_and_replaces(policy, folder):
    first = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "stray").write_text("x")
    save_checkpoint(folder, load_checkpoint(folder), EMBODIMENT, "# A policy\n")
    second = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert second == first
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_clip_vision_is_rebuilt_from_its_stored_configuration(tmp_path):
    backbone = tmp_path / "backbone"
    CLIPVisionModel(CLIPVisionConfig(**TINY_VIT)).save_pretrained(backbone)
    vision = ClipVisionConfig(resize_shape=(36, 36), crop_shape=(32, 32), backbone=str(backbone))
    policy = make_policy(tmp_path / "tiny_clip", vision)
    save_checkpoint(tmp_path / "checkpoint", policy, EMBODIMENT, "")
    shutil.rmtree(backbone)
    assert policy.config.observation_encoder.vision.backbone_config is None  # saving changes nothing
    loaded = load_checkpoint(tmp_path / "checkpoint")
    stored = loaded.config.observation_encoder.vision.backbone_config
    assert (stored["hidden_act"], stored["patch_size"]) == ("gelu", 8)
    assert torch.equal(predict(loaded), predict(policy))


OFFLINE = """
import os, socket, sys
def refuse(*arguments, **named):
    os._exit(3)  # an exception might be caught and forgotten
socket.socket.__init__ = refuse
socket.getaddrinfo = refuse
sys.path[:0] = sys.argv[2:]
import torch
from dit_policy_ros.policy.checkpoint import load_checkpoint
from policy_fixtures import make_batch
policy = load_checkpoint(sys.argv[1])
noise = torch.randn(1, 16, 7, generator=torch.Generator().manual_seed(4))
torch.save(policy.predict_chunk(make_batch(policy.config, 1), noise=noise), sys.argv[1] + "/chunk.pt")
"""


def test_loading_needs_no_network_and_no_hub_cache(policy, folder, tmp_path):
    """In a fresh process with an empty hub cache, not told to be offline, where opening a socket is the end."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HOME": str(tmp_path / "empty"), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    here = Path(__file__).parent
    command = [sys.executable, "-c", OFFLINE, str(folder), str(here.parent), str(here)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(torch.load(folder / "chunk.pt"), predict(policy).clone(), atol=1e-5, rtol=0)


IMPORTS = """
import sys
sys.path[:0] = sys.argv[2:]
from dit_policy_ros.policy.checkpoint import load_checkpoint
load_checkpoint(sys.argv[1])
print([name for name in ("clip.modeling_clip", "dinov3_vit") if any(name in module for module in sys.modules)])
"""


def test_loading_a_resnet_without_words_imports_no_tower(tmp_path):
    config = demo_config(
        "unused", observation_encoder=ObservationEncoderConfig(ResNetConfig(film=False), NoTextConfig())
    )
    save_checkpoint(tmp_path / "checkpoint", MultitaskDiTPolicy(config, make_stats(config)), EMBODIMENT, "")
    command = [sys.executable, "-c", IMPORTS, str(tmp_path / "checkpoint"), str(Path(__file__).parent.parent)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (0, "[]\n"), run.stderr


TINY_DINO = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
    "num_register_tokens": 2,
}


@pytest.mark.parametrize("kind", ["dinov3", "pooling", "separate", "without cameras", "without words", "dropout"])
def test_every_kind_of_policy_comes_back(tmp_path, kind):
    """Every weight and every table that no file holds, bit for bit."""
    text = ClipTextConfig(str(tmp_path / "tiny_clip"))
    make_tiny_clip(tmp_path / "tiny_clip")
    shapes = {"resize_shape": (36, 36), "crop_shape": (32, 32)}
    vision, changes = ResNetConfig(), {}
    if kind == "dinov3":
        vision = DinoV3VisionConfig(**shapes, backbone_config=TINY_DINO)
    elif kind in ("pooling", "separate"):
        vision = ClipVisionConfig(
            **shapes,
            backbone_config=TINY_VIT,
            text_pooling=kind == "pooling",
            text_pooling_heads=2,
            use_separate_encoder_per_camera=kind == "separate",
        )
    elif kind == "without cameras":
        changes["input_features"] = {"observation.state": Feature("STATE", (7,))}
    elif kind == "without words":
        vision, text = ResNetConfig(film=False), NoTextConfig()
    else:
        changes["instruction_dropout"] = 0.1
    config = demo_config("unused", observation_encoder=ObservationEncoderConfig(vision, text), **changes)
    policy = MultitaskDiTPolicy(config, make_stats(config)).eval()
    randomize(policy.noise_predictor)
    save_checkpoint(tmp_path / "checkpoint", policy, EMBODIMENT, "")
    shutil.rmtree(tmp_path / "tiny_clip")
    assert (tmp_path / "checkpoint" / "tokenizer").exists() == (kind != "without words")

    loaded = load_checkpoint(tmp_path / "checkpoint")
    for find in ("named_parameters", "named_buffers"):
        before, after = dict(getattr(policy, find)()), dict(getattr(loaded, find)())
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor), name
            assert (after[name].device, after[name].dtype) == (tensor.device, tensor.dtype), name
            assert after[name].requires_grad == tensor.requires_grad, name
    assert torch.equal(predict(loaded), predict(policy))


def test_a_mapped_policy_trains_and_leaves_its_file_alone(folder):
    loaded = load_checkpoint(folder)
    before, weights = predict(loaded), (folder / "model.safetensors").read_bytes()
    loaded.train().loss(make_batch(loaded.config)).backward()
    torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=1.0).step()
    assert not torch.equal(predict(loaded.eval()), before)
    assert (folder / "model.safetensors").read_bytes() == weights


def test_a_policy_that_is_not_mapped_outlives_its_file(policy, folder):
    loaded = load_checkpoint(folder, mapped=False)
    path = folder / "model.safetensors"
    with path.open("r+b") as file:  # in place, as cp does
        file.truncate(0)
    assert torch.equal(predict(loaded), predict(policy))


def test_the_file_is_one_of_safetensors_and_fit_to_be_mapped(policy, folder):
    found = load_file(folder / "model.safetensors")
    expected = policy.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    loaded = load_checkpoint(folder)
    assert {parameter.data_ptr() % 64 for parameter in loaded.parameters()} == {0}


def test_a_file_that_is_not_aligned_gives_the_same_actions(policy, folder):
    edit_weights(folder, lambda weights: None)  # as safetensors itself writes it
    assert torch.equal(predict(load_checkpoint(folder)), predict(policy))


@pytest.mark.parametrize("mapped", ["mapped", ""])
def test_no_weight_is_allocated_twice(tmp_path, mapped):
    """Peak memory of loading beyond what was used before it, in a fresh process: at most 1.3 times the weights."""
    config = demo_config(
        "unused",
        observation_encoder=ObservationEncoderConfig(ResNetConfig(film=False), NoTextConfig()),
        transformer=TransformerConfig(hidden_dim=512, num_layers=6, num_heads=8),
    )
    save_checkpoint(tmp_path / "checkpoint", MultitaskDiTPolicy(config, make_stats(config)), EMBODIMENT, "")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "checkpoint"), mapped, str(Path(__file__).parent.parent)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    weights, peak = (int(number) for number in run.stdout.split())
    assert weights > 100e6
    assert peak < 1.3 * weights


PEAK = """
import sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
from dit_policy_ros.policy.checkpoint import load_checkpoint
def memory(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
before = memory("VmRSS")
policy = load_checkpoint(sys.argv[1], mapped=bool(sys.argv[2]))
print(sum(tensor.nbytes for tensor in policy.state_dict().values()), memory("VmHWM") - before)
"""


class Trap:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", ["torch", "torch, old format", "pickle"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pickle_is_refused_and_never_read(folder, tmp_path, write, name):
    trap = {"weights": Trap(tmp_path / "sprung")}
    (folder / "model.safetensors").unlink()
    if write == "pickle":
        (folder / name).write_bytes(pickle.dumps(trap))
    else:
        torch.save(trap, folder / name, _use_new_zipfile_serialization=write == "torch")
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} (is|may be) a pickle, which can run any code"):
        load_checkpoint(folder)
    assert not (tmp_path / "sprung").exists()
    if write == "pickle":  # the trap does work
        pickle.loads((folder / name).read_bytes())
    else:
        torch.load(folder / name, weights_only=False)
    assert (tmp_path / "sprung").exists()


def test_a_header_that_begins_like_a_pickle_is_none(tmp_path):
    """A header of 640 bytes begins with 0x80 0x02, as does a pickle of protocol 2."""
    save_file({"x" * 581: torch.zeros(1)}, tmp_path / "model.safetensors")
    start = (tmp_path / "model.safetensors").read_bytes()[:2]
    assert start == b"\x80\x02"
    checkpoint.refuse_pickle(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("banana", "device 'banana'.*this machine has cpu"),
        ("cuda:99", "device 'cuda:99'.*this machine has cpu"),
        ("meta", "device 'meta'"),
    ],
)
def test_a_device_that_does_not_exist_is_named(folder, device, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda_is_named(folder):
    with pytest.raises(CheckpointError, match=r"device 'cuda'.*this machine has cpu"):
        load_checkpoint(folder, "cuda")


def test_the_weights_of_another_policy_are_refused(folder, tmp_path):
    config = demo_config(
        "unused", observation_encoder=ObservationEncoderConfig(ResNetConfig(film=False), NoTextConfig())
    )
    save_checkpoint(tmp_path / "other", MultitaskDiTPolicy(config, make_stats(config)), EMBODIMENT, "")
    shutil.copyfile(tmp_path / "other" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert "missing: observation_encoder.text_encoder" in str(caught.value)
    assert "noise_predictor.transformer_blocks.0.adaLN_modulation.1.weight: float32" in str(caught.value)


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_every_wrong_tensor_is_named(folder):
    def change(weights):
        del weights["noise_predictor.input_proj.bias"]
        weights["noise_predictor.extra"] = torch.zeros(1)
        weights["noise_predictor.output_proj.weight"] = torch.zeros(6, 128)
        weights["noise_predictor.output_proj.bias"] = torch.zeros(7, dtype=torch.float16)
        weights["noise_predictor.time_mlp.1.bias"][3] = float("nan")
        weights["noise_predictor.time_mlp.3.bias"][0] = float("inf")

    edit_weights(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    for part in (
        "missing: noise_predictor.input_proj.bias",
        "unexpected: noise_predictor.extra",
        "noise_predictor.output_proj.weight: float32 (6, 128) in the file, float32 (7, 128) in the model",
        "noise_predictor.output_proj.bias: float16 (7,) in the file, float32 (7,) in the model",
        "not finite: noise_predictor.time_mlp.1.bias, noise_predictor.time_mlp.3.bias",
    ):
        assert part in str(caught.value), part


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer", "dataset_stats.json", "embodiment.yaml"]
)
def test_a_missing_file_is_named(folder, name):
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {re.escape(name)}; copy the whole folder"):
        load_checkpoint(folder)


def test_a_missing_folder_says_what_is_wanted(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere: the folder does not exist; give"):
        load_checkpoint(tmp_path / "nowhere")


def damage_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda folder: damage_config(folder, format_version=2), "format_version is 2, this version .* reads 1"),
        (lambda folder: damage_config(folder, surprise=1), "config.json is not a policy's configuration.*surprise"),
        (lambda folder: damage_config(folder, n_action_steps=17), "n_action_steps 17 exceeds"),
        (lambda folder: (folder / "dataset_stats.json").write_text("{}"), "statistics lack min of observation.state"),
        (
            lambda folder: shutil.rmtree(folder / "tokenizer") or (folder / "tokenizer").mkdir(),
            "no tokenizer that transformers can read",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:1000]
            ),
            "cannot be read .* the file is damaged",
        ),
    ],
)
def test_damage_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_weights_that_are_not_finite_are_not_saved(policy, folder):
    weight = policy.noise_predictor.input_proj.weight
    kept = weight.detach().clone()
    before = (folder / "model.safetensors").read_bytes()
    try:
        weight.data[0, 0] = float("nan")
        with pytest.raises(CheckpointError, match=r"not finite: noise_predictor\.input_proj\.weight"):
            save_checkpoint(folder, policy, EMBODIMENT, "")
    finally:
        weight.data.copy_(kept)
    assert (folder / "model.safetensors").read_bytes() == before


def test_an_interrupted_save_leaves_the_old_checkpoint(policy, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(folder, policy, EMBODIMENT, "")
    assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_all_is_on_the_disk_before_the_old_one_goes(policy, folder, monkeypatch):
    """A power cut loses what was not waited for, but keeps a folder's new name."""
    waited, renamed = [], []
    sync, rename = os.fsync, Path.rename

    def synced(descriptor):
        waited.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def moved(self, to):
        if self == folder:
            renamed.extend(waited)
        return rename(self, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", moved)
    save_checkpoint(folder, policy, EMBODIMENT, "")
    assert {path.stat().st_ino for path in (folder, *folder.rglob("*"))} <= set(renamed)
    assert waited[-1] == folder.parent.stat().st_ino


def test_configuration_can_be_read_alone(folder):
    (folder / "model.safetensors").unlink()
    assert load_config(folder).tasks == INSTRUCTIONS
