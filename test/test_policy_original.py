"""The original's checkpoints (brysonjones/multitask_dit_policy): timm's vision tower and its other habits.

Its package is not a dependency, so its folder is made here: the vision tower is timm's own, the text tower
transformers', the rest LeRobot's policy, which descends from it, under the original's names.
"""

import json
import re

import pytest
import timm
import torch
from lerobot.policies.multi_task_dit import modeling_multi_task_dit as lerobot
from lerobot_fixtures import ACTIONS, CAMERAS, HORIZON, make_clip, their_config, their_policy, their_stats
from policy_fixtures import INSTRUCTIONS, make_batch, randomize
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

from dit_policy_ros.policy.checkpoint import load_checkpoint
from dit_policy_ros.policy.configuration import ClipVisionConfig
from dit_policy_ros.policy.interop import tensor_names
from dit_policy_ros.policy.interop.clip import infer_vision
from dit_policy_ros.policy.interop.fields import InteropError
from dit_policy_ros.policy.interop.options import Options
from dit_policy_ros.policy.interop.read import to_native
from dit_policy_ros.policy.vision import ClipVision

WIDTH = 128  # two heads of 64, so that the configuration can be inferred
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def timm_tower(activation="gelu"):
    """`vit_base_patch16_clip_224` in a tiny size: the original builds its tower by this function."""
    name = "vit_base_patch16_clip_quickgelu_224" if activation == "quick_gelu" else "vit_base_patch16_clip_224"
    tower = timm.create_model(
        name, pretrained=False, num_classes=0, img_size=32, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=2
    ).eval()
    randomize(tower, seed=5)
    return tower


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_timms_vision_weights_give_timms_features(activation):
    """The CLS token after the last norm; GELU or QuickGELU by the name of the backbone."""
    tower = timm_tower(activation)
    weights, dropped = tensor_names.from_original(
        {f"observation_encoder.vision_encoder.model.{name}": tensor for name, tensor in tower.state_dict().items()},
        use_rope=False,
    )
    assert not dropped
    ours = tensor_names.vision_tower(weights)
    described = infer_vision(ours, activation)
    encoder = ClipVision(ClipVisionConfig(use_post_layernorm=True, backbone_config=described), text_dim=8).eval()
    encoder.model.load_state_dict(ours, strict=True)
    pictures = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = tower.forward_features(pictures)[:, 0]
        torch.testing.assert_close(encoder(pictures, None), expected, atol=1e-5, rtol=0)
        assert expected.std() > 0.05
        encoder.use_post_layernorm = False  # LeRobot's way must be another
        assert (encoder(pictures, None) - expected).abs().max() > 0.01


class TimmEncoder(nn.Module):
    """The original's encoder in LeRobot's place."""

    def __init__(self, activation="gelu"):
        super().__init__()
        self.model = timm_tower(activation)
        self.embed_dim = WIDTH

    def forward(self, pictures):
        return self.model.forward_features(pictures)[:, 0].reshape(-1, WIDTH, 1, 1)

    def get_output_shape(self):
        return (WIDTH, 1, 1)


def original_policy(clip, monkeypatch, **changes):
    monkeypatch.setattr(lerobot, "CLIPVisionEncoder", lambda model_name: TimmEncoder())
    return their_policy(their_config(clip, **changes))


def original_config(theirs):
    """The original's config.json for a policy of LeRobot's."""
    objective = {
        "type": "diffusion",
        "objective_name": "diffusion",
        "noise_scheduler_type": theirs.noise_scheduler_type,
        "num_train_timesteps": 100,
        "beta_schedule": "squaredcos_cap_v2",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "prediction_type": "epsilon",
        "clip_sample": False,  # stored, but what runs is diffusers' default
        "clip_sample_range": 3.0,
        "num_inference_steps": theirs.num_inference_steps,
    }
    if theirs.objective == "flow_matching":
        objective = {
            "type": "flow_matching",
            "objective_name": "flow_matching",
            "sigma_min": 0.0,
            "num_integration_steps": theirs.num_integration_steps,
            "integration_method": theirs.integration_method,
            "timestep_sampling": {"type": "beta", "strategy_name": "beta", "s": 0.999, "alpha": 1.5, "beta": 1.0},
        }
    return {
        "n_obs_steps": theirs.n_obs_steps,
        "horizon": theirs.horizon,
        "n_action_steps": theirs.n_action_steps,
        "normalization_mapping": {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
        "drop_n_last_frames": 0,
        "observation_encoder": {
            "vision": {
                "type": "clip",
                "use_separate_encoder_per_camera": theirs.use_separate_rgb_encoder_per_camera,
                "lr_multiplier": 0.1,
                "resize_shape": None,
                "crop_shape": [32, 32],
                "crop_is_random": True,
                "backbone": "vit_base_patch16_clip_224.openai",
            },
            "text": {"type": "clip", "model": theirs.text_encoder_name},
        },
        "transformer": {
            "hidden_dim": 32,
            "num_layers": 2,
            "num_heads": 4,
            "dropout": 0.1,
            "use_positional_encoding": theirs.use_positional_encoding,
            "diffusion_step_embed_dim": 32,
            "use_rope": theirs.use_rope,
            "rope_base": 10000.0,
        },
        "objective": objective,
        "do_mask_loss_for_padding": False,
        "optimizer_lr": 2e-05,
        "optimizer_betas": [0.95, 0.999],
        "optimizer_eps": 1e-08,
        "optimizer_weight_decay": 0.0,
        "input_features": {
            **{key: {"type": "VISUAL", "shape": [3, 40, 40]} for key in theirs.image_features},
            "observation.state": {"type": "STATE", "shape": [7]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [ACTIONS]}},
        "device": "cpu",
    }


def save_original(folder, policy):
    """The folder as the original's `save_policy` leaves it."""
    folder.mkdir()
    weights = {
        re.sub(r"(transformer_blocks\.\d+)\.multihead_attn\.", r"\1.attn.", name): tensor
        for name, tensor in policy.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(original_config(policy.config)))
    stats = {
        key: {name: value.tolist() for name, value in entry.items()} | {"count": [1000]}
        for key, entry in their_stats(len(policy.config.image_features)).items()
    }
    (folder / "dataset_stats.json").write_text(json.dumps(stats))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rope": False, "use_positional_encoding": True},  # the original's default
        {"use_rope": True, "noise_scheduler_type": "DDIM"},
        {"objective": "flow_matching", "integration_method": "rk4", "use_separate_rgb_encoder_per_camera": True},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_the_originals_checkpoint_acts_as_it_did(clip, monkeypatch, tmp_path, changes):
    policy = original_policy(clip, monkeypatch, **changes)
    folder = save_original(tmp_path / "original", policy)
    summary = to_native(folder, tmp_path / "native")
    assert any("inferred from its tensors" in note for note in summary.notes)
    ours = load_checkpoint(tmp_path / "native")

    batch = make_batch(ours.config, size=2)
    stats = their_stats()
    low, high = stats["observation.state"]["min"], stats["observation.state"]["max"]
    tokens = ours.observation_encoder.text_encoder.tokenizer(INSTRUCTIONS[:2], padding=True, return_tensors="pt")
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    pictures = [(batch[key].float() / 255 - mean) / (std + 1e-8) for key in CAMERAS[:2]]
    with torch.no_grad():
        conditioning = policy.observation_encoder.encode(
            {
                "observation.state": 2 * (batch["observation.state"] - low) / (high - low) - 1,
                "observation.images": torch.stack(pictures, dim=2),
                "observation.language.tokens": tokens["input_ids"],
                "observation.language.attention_mask": tokens["attention_mask"],
            }
        )
        torch.testing.assert_close(ours.encode(batch), conditioning, atol=1e-5, rtol=0)
        torch.manual_seed(9)
        expected = policy.objective.conditional_sample(policy.noise_predictor, 2, conditioning)[:, 1:]
    low, high = stats["action"]["min"], stats["action"]["max"]
    torch.manual_seed(9)
    actions = ours.predict_chunk(batch)
    assert actions.shape == (2, HORIZON - 1, ACTIONS)
    torch.testing.assert_close(actions, (expected + 1) / 2 * (high - low) + low, atol=1e-5, rtol=0)


def edit(folder, path, value):
    content = json.loads((folder / "config.json").read_text())
    *parents, last = path.split(".")
    inner = content
    for name in parents:
        inner = inner[name]
    inner[last] = value
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit(f, "observation_encoder.vision.type", "dinov3"), "vision.type must be clip"),
        (lambda f: edit(f, "transformer.surprise", 1), r"transformer.surprise: a field this reader does not know"),
        (
            lambda f: edit(f, "objective.type", "magic"),
            "objective.type is 'magic', expected diffusion or flow_matching",
        ),
        (lambda f: edit(f, "objective.beta_schedule", "linear"), "beta_schedule linear"),
        (lambda f: edit(f, "observation_encoder.vision.crop_shape", [24, 24]), "takes pictures of 32x32"),
        (lambda f: edit(f, "transformer", None), "transformer.hidden_dim is missing"),
        (lambda f: edit(f, "observation_encoder.text", {}), "observation_encoder.text.model is missing"),
        (lambda f: edit(f, "observation_encoder.vision.backbone", 3), "vision.backbone is 3, expected a name"),
        (lambda f: edit(f, "input_features", {}), "input_features is missing or no object with features"),
        (lambda f: edit(f, "normalization_mapping", None), "normalization_mapping is missing or no object"),
        (lambda f: (f / "dataset_stats.json").write_text('{"action": [1]}'), "no statistics of action"),
        (
            lambda f: (f / "dataset_stats.json").write_text('{"action": {"min": "x"}}'),
            "min of action is no list",
        ),
        (lambda f: (f / "dataset_stats.json").unlink(), r"cannot read .*dataset_stats.json"),
        (lambda f: rename(f, "blocks.1.norm1.weight", "blocks.1.norm9.weight"), "norm9.*"),
    ],
)
def test_what_cannot_be_read_is_named(clip, monkeypatch, tmp_path, damage, message):
    folder = save_original(tmp_path / "original", original_policy(clip, monkeypatch))
    damage(folder)
    with pytest.raises(InteropError, match=message):
        to_native(folder, tmp_path / "native")


def rename(folder, old, new):
    weights = load_file(folder / "model.safetensors")
    save_file({name.replace(old, new): tensor for name, tensor in weights.items()}, folder / "model.safetensors")


def test_the_text_tower_may_come_from_a_folder(clip, monkeypatch, tmp_path):
    folder = save_original(tmp_path / "original", original_policy(clip, monkeypatch))
    edit(folder, "observation_encoder.text.model", "openai/clip-vit-base-patch16")
    with pytest.raises(InteropError, match=r"no tokenizer from 'openai/clip-vit-base-patch16'.*--clip=FOLDER"):
        to_native(folder, tmp_path / "native")
    to_native(folder, tmp_path / "native", Options(clip=str(clip)))
    tower = CLIPTextModel.from_pretrained(clip)
    ours = load_checkpoint(tmp_path / "native").observation_encoder.text_encoder.text_encoder
    tokens = torch.tensor([[3, 5, 7]])
    with torch.no_grad():
        assert torch.equal(ours(input_ids=tokens).last_hidden_state, tower(input_ids=tokens).last_hidden_state)
