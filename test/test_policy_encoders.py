"""Encoders: pictures cut as they should be, words that reach the pixels, a text tower that runs once."""

import copy
import logging

import pytest
import torch
import torchvision.transforms.v2.functional as oracle
from policy_fixtures import INSTRUCTIONS, demo_config, make_batch, randomize
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from dit_policy_ros.policy import text as text_module
from dit_policy_ros.policy.configuration import (
    ClipTextConfig,
    ClipVisionConfig,
    ConfigurationError,
    ObservationEncoderConfig,
    ResNetConfig,
)
from dit_policy_ros.policy.encoders import ObservationEncoder
from dit_policy_ros.policy.preprocessing import Preprocessor
from dit_policy_ros.policy.resnet import ResNet, spatial_soft_argmax
from dit_policy_ros.policy.text import ClipText
from dit_policy_ros.policy.tiny_clip import make_tiny_clip
from dit_policy_ros.policy.vision import ClipVision, make_vision_encoder

TINY_VIT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_clip")
    make_tiny_clip(folder)
    return folder


@pytest.fixture
def text(tiny_clip):
    return ClipText(ClipTextConfig(str(tiny_clip)), 16, None)


# -- pictures


def test_short_side_is_scaled_and_the_centre_cut():
    config = ClipVisionConfig(resize_shape=(40, 40), crop_shape=(32, 28))
    preprocessor = Preprocessor(config, (60, 90), normalize=True).eval()
    images = torch.randint(0, 256, (2, 3, 3, 60, 90), dtype=torch.uint8)
    expected = oracle.resize(images.flatten(0, 1) / 255, [40, 60], antialias=True)
    expected = oracle.normalize(oracle.center_crop(expected, [32, 28]), config.image_mean, config.image_std)
    torch.testing.assert_close(preprocessor(images).flatten(0, 1), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(preprocessor(images / 255).flatten(0, 1), expected, atol=1e-5, rtol=0)


def test_without_resize_and_crop_the_picture_passes():
    preprocessor = Preprocessor(ResNetConfig(resize_shape=None, random_shift=0), (5, 7), normalize=False)
    images = torch.rand(2, 1, 3, 5, 7)
    for module in (preprocessor.train(), preprocessor.eval()):
        assert torch.equal(module(images), images)


def coordinates(batch, steps, height, width):
    """Pictures whose channels say where a pixel was: row, column, and observation step."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    picture = torch.stack([y, x, torch.zeros_like(x)]).float() / 100
    images = picture.expand(batch, steps, 3, height, width).clone()
    images[:, :, 2] = torch.arange(steps).view(1, -1, 1, 1) / 100
    return images


def test_random_crop_is_of_each_sample_and_the_same_for_its_steps():
    config = ClipVisionConfig(resize_shape=None, crop_shape=(6, 6))
    preprocessor = Preprocessor(config, (12, 16), normalize=False).train()
    torch.manual_seed(0)
    cut = (preprocessor(coordinates(200, 2, 12, 16)) * 100).round()
    assert torch.equal(cut[:, 0, :2], cut[:, 1, :2])
    assert set(cut[:, 1, 2].flatten().tolist()) == {1.0}
    tops, lefts = cut[:, 0, 0, 0, 0], cut[:, 0, 1, 0, 0]
    assert set(tops.tolist()) == set(range(7))
    assert set(lefts.tolist()) == set(range(11))
    for sample in range(200):
        assert torch.equal(cut[sample, 0, 0, :, 0], tops[sample] + torch.arange(6))
        assert torch.equal(cut[sample, 0, 1, 0], lefts[sample] + torch.arange(6))


def test_random_shift_repeats_the_edge():
    preprocessor = Preprocessor(ResNetConfig(resize_shape=None, random_shift=2), (8, 8), normalize=False).train()
    torch.manual_seed(0)
    rows = (preprocessor(coordinates(100, 1, 8, 8)) * 100).round()[:, 0, 0, :, 0].int()
    expected = {tuple(min(max(i + shift, 0), 7) for i in range(8)) for shift in range(-2, 3)}
    assert {tuple(row.tolist()) for row in rows} == expected
    still = preprocessor.eval()(coordinates(1, 1, 8, 8))
    assert torch.equal(still, coordinates(1, 1, 8, 8))


def test_a_cache_of_scaled_pictures_gives_the_same():
    preprocessor = Preprocessor(ResNetConfig(), (128, 128), normalize=True).eval()
    images = torch.randint(0, 256, (2, 1, 3, 128, 128), dtype=torch.uint8)
    cached = preprocessor.resize(images.flatten(0, 1)).view(2, 1, 3, 64, 64)
    assert torch.equal(preprocessor(cached), preprocessor(images))


# -- vision


def test_soft_argmax_finds_the_peak():
    maps = torch.zeros(1, 3, 5, 9)
    maps[0, 0, 0, 8] = 100  # top right
    maps[0, 1, 4, 4] = 100  # bottom centre
    expected = torch.tensor([[[1.0, -1.0], [0.0, 1.0], [0.0, 0.0]]])  # the third map is flat: the middle
    torch.testing.assert_close(spatial_soft_argmax(maps), expected)


def test_resnet_of_the_demo_has_the_published_shapes():
    net = ResNet(ResNetConfig(), text_dim=16)
    shapes = []
    net.keypoint_maps.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    assert net(torch.randn(2, 3, 64, 64), torch.randn(2, 16)).shape == (2, 64)
    assert shapes == [(2, 32, 16, 16)]
    assert net.stem[0].weight.shape == (32, 3, 6, 6)
    assert net.layers[0].conv.weight.shape == (48, 32, 3, 3)


def test_resnet_may_be_deep_and_halves_the_maps_at_each_stage():
    config = ResNetConfig(widths=(16, 32, 64), blocks_per_stage=2, num_keypoints=8)
    net = ResNet(config, text_dim=16)
    shapes = []
    net.keypoint_maps.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    assert net(torch.randn(2, 3, 96, 128), torch.randn(2, 16)).shape == (2, 16)
    assert shapes == [(2, 8, 6, 8)]
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) == 1 + 3 * (1 + 2 * 2) + 1


def test_words_move_the_keypoints_only_with_film():
    images, words = torch.randn(1, 3, 64, 64), torch.randn(2, 16)
    for film in (True, False):
        net = ResNet(ResNetConfig(film=film), text_dim=16)
        first, second = (net(images, words[i : i + 1]) for i in range(2))
        assert ((first - second).abs().max() > 1e-3).item() is film


@pytest.mark.parametrize("post_layernorm", [False, True])
def test_clip_is_the_cls_token_of_the_backbone(tmp_path, post_layernorm):
    model = CLIPVisionModel(CLIPVisionConfig(**TINY_VIT)).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    expected = model.vision_model.post_layernorm if post_layernorm else nn.Identity()
    expected = expected(model(images).last_hidden_state[:, 0])
    config = ClipVisionConfig(backbone=str(tmp_path), use_post_layernorm=post_layernorm)
    encoder = ClipVision(config, text_dim=16).eval()
    torch.testing.assert_close(encoder(images, torch.empty(2, 0)), expected)
    assert encoder.model.post_layernorm.weight.requires_grad is post_layernorm


def test_clip_refuses_what_it_cannot_load(tmp_path):
    with pytest.raises(ConfigurationError, match="takes pictures of 32x32, it would get 30x32"):
        make_vision_encoder(ClipVisionConfig(backbone_config=TINY_VIT), [(32, 32), (30, 32)], 16)
    with pytest.raises(ConfigurationError, match="cannot load CLIPVisionModel from"):
        ClipVision(ClipVisionConfig(backbone=str(tmp_path)), 16)


def test_a_folder_without_the_towers_weights_is_refused(tiny_clip, tmp_path):
    """transformers fills missing weights at random, with a warning only."""
    deeper = CLIPTextModel.from_pretrained(tiny_clip).config
    deeper.num_hidden_layers = 3
    AutoTokenizer.from_pretrained(tiny_clip).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tiny_clip / "model.safetensors").read_bytes())
    deeper.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"lacks weights of CLIPTextModel.*layers\.2"):
        ClipText(ClipTextConfig(str(tmp_path)), 16, None)


# -- words


def test_tiny_clip_tells_the_instructions_apart(text):
    features = nn.functional.normalize(text.pooled(INSTRUCTIONS), dim=-1)
    cosines = features @ features.T
    assert cosines[~torch.eye(3, dtype=torch.bool)].max() < 0.7
    with_full_stop = nn.functional.normalize(text.pooled([INSTRUCTIONS[0] + "."]), dim=-1)
    assert (with_full_stop @ features.T).argmax() == 0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_tiny_clip_does_so_for_any_seed(tmp_path, seed):
    make_tiny_clip(tmp_path, seed=seed)
    other = ClipText(ClipTextConfig(str(tmp_path)), 16, None)
    features = nn.functional.normalize(other.pooled(INSTRUCTIONS), dim=-1)
    assert (features @ features.T)[~torch.eye(3, dtype=torch.bool)].max() < 0.7


def test_tiny_clip_is_reproducible_and_its_tokenizer_reads_anything(tiny_clip, tmp_path):
    make_tiny_clip(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (tiny_clip / "model.safetensors").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip)
    assert tokenizer.tokenize(INSTRUCTIONS[2]) == [word + "</w>" for word in INSTRUCTIONS[2].split()]
    for words in ("Grüße, 押す! 🤖", "pushes redder 42 blocks", "a" * 200):
        tokens = tokenizer(words)["input_ids"]
        assert tokens[-1] == tokenizer.eos_token_id
        # The end token doubles as the unknown one, and CLIP pools at the first: it must not occur earlier.
        assert tokenizer.eos_token_id not in tokens[:-1]


def test_pooled_feature_is_the_towers(tiny_clip, text):
    tokens = AutoTokenizer.from_pretrained(tiny_clip)(INSTRUCTIONS, padding=True, return_tensors="pt")
    expected = CLIPTextModel.from_pretrained(tiny_clip)(**tokens).pooler_output
    torch.testing.assert_close(text.pooled(INSTRUCTIONS), expected, atol=1e-5, rtol=0)


def test_tower_is_frozen_and_runs_once_an_instruction(text, monkeypatch):
    calls = []
    text.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    text.train()
    assert not text.text_encoder.training
    for _ in range(3):
        features = text([INSTRUCTIONS[0], INSTRUCTIONS[1], INSTRUCTIONS[0]])
    assert len(calls) == 2
    assert torch.equal(features[0], features[2])
    features.sum().backward()
    assert all(parameter.grad is None for parameter in text.text_encoder.parameters())
    assert text.projection.weight.grad is not None

    monkeypatch.setattr(text_module, "TEXT_CACHE_SIZE", 2)
    text([INSTRUCTIONS[0]])
    text([INSTRUCTIONS[2]])  # the least recently used, 1, is forgotten
    calls.clear()
    text([INSTRUCTIONS[0]])
    assert not calls
    text([INSTRUCTIONS[1]])
    assert len(calls) == 1


def test_cache_is_no_weight_and_does_not_outlive_the_weights_it_came_from(text):
    names = set(text.state_dict())
    before = text.pooled(INSTRUCTIONS)
    assert set(text.state_dict()) == names
    changed = {name: tensor * 1.5 for name, tensor in text.state_dict().items()}
    text.load_state_dict(changed)
    assert not torch.allclose(text.pooled(INSTRUCTIONS), before)
    assert text.to(torch.float64).pooled(INSTRUCTIONS).dtype == torch.float64


def test_features_cached_at_inference_serve_training(text):
    with torch.inference_mode():
        text(INSTRUCTIONS)
    text(INSTRUCTIONS).sum().backward()
    assert text.projection.weight.grad is not None


@pytest.mark.parametrize("task", ["", "  ", None, 3])
def test_an_instruction_without_words_is_refused(text, task):
    with pytest.raises(ValueError, match=r"task 1 of the batch is .* expected an instruction in words"):
        text([INSTRUCTIONS[0], task])


def test_a_long_instruction_is_cut_with_a_warning(text, caplog):
    with caplog.at_level(logging.WARNING):
        feature = text.pooled(["push " * 100])
    assert feature.isfinite().all()
    assert "77 tokens" in caplog.text


# -- all together


@pytest.mark.parametrize("separate", [False, True])
def test_conditioning_is_state_cameras_words_step_by_step(tiny_clip, separate):
    vision = ResNetConfig(use_separate_encoder_per_camera=separate, num_keypoints=4)
    config = demo_config(
        str(tiny_clip),
        n_obs_steps=2,
        observation_encoder=ObservationEncoderConfig(vision, ClipTextConfig(str(tiny_clip))),
    )
    encoder = ObservationEncoder(config).eval()
    assert len(encoder.vision_encoders) == (2 if separate else 1)
    batch = make_batch(config, size=2)
    images = {key: batch[key] for key in reversed(config.cameras)}  # the order of the dict must not matter
    words = encoder.text_features(batch["task"])
    frames = {key: encoder.image_features(key, pictures, words) for key, pictures in images.items()}
    conditioning = encoder.assemble([batch["observation.state"]], frames, words)
    assert conditioning.shape == (2, encoder.conditioning_dim) == (2, 2 * (7 + 2 * 8 + 128))
    for sample in range(2):
        for step in range(2):
            parts = [batch["observation.state"][sample, step]]
            for camera, key in enumerate(config.cameras):
                picture = batch[key][sample, step]
                picture = oracle.resize(picture / 255, [64, 64], antialias=True) * 2 - 1
                net = encoder.vision_encoders[camera if separate else 0]
                parts.append(net(picture[None], words[sample : sample + 1])[0])
            parts.append(words[sample])
            expected = torch.cat(parts)
            actual = conditioning[sample].view(2, -1)[step]
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_encoder_survives_a_copy(tiny_clip):
    """Training keeps an averaged copy of the policy."""
    encoder = ObservationEncoder(demo_config(str(tiny_clip)))
    encoder.text_encoder(INSTRUCTIONS)
    twin = copy.deepcopy(encoder)
    assert torch.equal(twin.text_encoder(INSTRUCTIONS), encoder.text_encoder(INSTRUCTIONS))
