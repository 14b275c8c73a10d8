"""Encoders: pictures cut as they should be, words that reach the pixels, a text tower that runs once."""

import copy
import dataclasses
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torchvision.transforms.v2 as transforms
import torchvision.transforms.v2.functional as oracle
from policy_fixtures import INSTRUCTIONS, demo_config, make_batch, randomize
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from dit_policy_ros.policy.configuration import (
    ClipTextConfig,
    ClipVisionConfig,
    ConfigurationError,
    DinoV3VisionConfig,
    Feature,
    NoTextConfig,
    ObservationEncoderConfig,
    ResNetConfig,
)
from dit_policy_ros.policy.encoders import ObservationEncoder
from dit_policy_ros.policy.preprocessing import Preprocessor
from dit_policy_ros.policy.recent import Recent
from dit_policy_ros.policy.resnet import ResNet, spatial_soft_argmax
from dit_policy_ros.policy.text import ClipText
from dit_policy_ros.policy.tiny_clip import make_tiny_clip
from dit_policy_ros.policy.vision import ClipVision, DinoV3Vision, TextPooling, make_vision_encoder

TINY_VIT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TINY_DINO = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "num_register_tokens": 3,
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


@pytest.mark.parametrize("shape", [(40, 48), (90, 50), (60, 90)])  # smaller, one side larger, the same
def test_stretching_keeps_no_aspect_ratio(shape):
    config = ClipVisionConfig(resize_shape=shape, crop_shape=(32, 28), resize_mode="stretch")
    preprocessor = Preprocessor(config, (60, 90), normalize=False).eval()
    images = torch.randint(0, 256, (2, 2, 3, 60, 90), dtype=torch.uint8)
    expected = transforms.Resize(shape, antialias=True)(images.flatten(0, 1) / 255)
    expected = oracle.center_crop(expected, [32, 28])
    torch.testing.assert_close(preprocessor(images).flatten(0, 1), expected, atol=1e-5, rtol=0)


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


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_clip_is_what_its_configuration_says(activation):
    """The original's timm weights were trained with the exact GELU, OpenAI's with the quick one."""
    fields = TINY_VIT | {"hidden_act": activation, "layer_norm_eps": 1e-3}
    model = CLIPVisionModel(CLIPVisionConfig(**fields)).eval()
    randomize(model)
    encoder = ClipVision(ClipVisionConfig(backbone_config=fields), text_dim=16).eval()
    encoder.model.load_state_dict(model.vision_model.state_dict())
    images = 10 * torch.randn(2, 3, 32, 32)
    expected = model(images).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(images, None), expected)
    other = CLIPVisionModel(CLIPVisionConfig(**fields | {"hidden_act": "relu"})).eval()
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(other(images).last_hidden_state[:, 0], expected, atol=1e-3)


def make_dino(tmp_path=None, **changes):
    torch.manual_seed(0)
    model = DINOv3ViTModel(DINOv3ViTConfig(**TINY_DINO)).eval()
    randomize(model)
    if tmp_path is None:
        encoder = DinoV3Vision(DinoV3VisionConfig(backbone_config=TINY_DINO, **changes), text_dim=16)
        encoder.model.load_state_dict(model.state_dict())
    else:
        model.save_pretrained(tmp_path)
        encoder = DinoV3Vision(DinoV3VisionConfig(backbone=str(tmp_path), **changes), text_dim=16)
    return model, encoder.eval()


@pytest.mark.parametrize("from_folder", [False, True])
def test_dinov3_is_the_cls_token_of_the_backbone(tmp_path, from_folder):
    model, encoder = make_dino(tmp_path if from_folder else None)
    for shape in ((32, 32), (24, 40)):
        images = torch.randn(2, 3, *shape)
        expected = model(images)
        torch.testing.assert_close(encoder(images, None), expected.last_hidden_state[:, 0])
        patches = encoder.tokens(images)[1]
        assert patches.shape == (2, shape[0] * shape[1] // 64, 24)  # neither the CLS token nor the registers
        assert torch.equal(patches, expected.last_hidden_state[:, 4:])
    assert not encoder.model.embeddings.mask_token.requires_grad


def test_dinov3_trains_with_the_positions_it_acts_with():
    model, encoder = make_dino()
    images = torch.randn(1, 3, 32, 32)
    expected = encoder(images, None)
    assert not torch.equal(model.train()(images).last_hidden_state[:, 0], expected)  # transformers' way
    assert torch.equal(encoder.train()(images, None), expected)
    assert encoder.model.model.training
    fresh = DinoV3Vision(DinoV3VisionConfig(backbone_config=TINY_DINO), text_dim=16)  # never told a mode
    assert torch.equal(fresh(images, None), fresh(images, None))


def test_dinov3_may_train_after_it_acted():
    """transformers keeps the patches' coordinates for later calls, also those made in inference mode."""
    encoder = make_dino()[1]
    images = torch.randn(1, 3, 40, 24)  # a shape that no other test uses: kept coordinates are shared
    with torch.inference_mode():
        encoder(images, None)
    encoder.train()(images, None).sum().backward()
    assert encoder.model.embeddings.cls_token.grad.abs().sum() > 0


def test_dinov3_refuses_pictures_that_its_patches_do_not_cover():
    with pytest.raises(ConfigurationError, match="sides are multiples of 8, it would get 32x36"):
        make_vision_encoder(DinoV3VisionConfig(backbone_config=TINY_DINO), [(32, 32), (32, 36)], 16)


def test_pooling_is_cross_attention_of_the_words_to_the_patches():
    torch.manual_seed(0)
    pooling = TextPooling(24, 16, num_heads=4)
    randomize(pooling)
    reference = nn.MultiheadAttention(24, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([torch.eye(24), pooling.key_value.weight]))
        reference.in_proj_bias.copy_(torch.cat([torch.zeros(24), pooling.key_value.bias]))
        reference.out_proj.load_state_dict(pooling.out_proj.state_dict())
    patches, words = 10 * torch.randn(3, 9, 24), torch.randn(3, 16)
    normed = nn.functional.layer_norm(patches, (24,), pooling.norm.weight, pooling.norm.bias)
    expected = reference(pooling.query(words).unsqueeze(1), normed, normed)[0][:, 0]
    torch.testing.assert_close(pooling(patches, words), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        ClipVisionConfig(backbone_config=TINY_VIT, text_pooling=True, text_pooling_heads=4),
        DinoV3VisionConfig(backbone_config=TINY_DINO, text_pooling=True, text_pooling_heads=4),
    ],
)
def test_words_choose_what_is_pooled_beside_the_cls_token(config):
    torch.manual_seed(0)
    encoder = make_vision_encoder(config, [(32, 32)], 16).eval()
    assert config.is_modulated_by_text
    assert encoder.features_dim == 48
    randomize(encoder.model)
    images, words = 10 * torch.randn(2, 3, 32, 32), torch.randn(2, 16)
    features, others = encoder(images, words), encoder(images, words.flip(0))
    assert torch.equal(features[:, :24], encoder.tokens(images)[0])
    assert torch.equal(others[:, :24], features[:, :24])
    assert (others[:, 24:] - features[:, 24:]).abs().amax() > 1e-4
    torch.testing.assert_close(features[:, 24:], encoder.text_pooling(encoder.tokens(images)[1], words))


def test_pooling_heads_must_divide_a_width_known_only_from_the_backbone(tmp_path):
    DINOv3ViTModel(DINOv3ViTConfig(**TINY_DINO)).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="text_pooling_heads 7 does not divide the backbone's width 24"):
        DinoV3Vision(DinoV3VisionConfig(backbone=str(tmp_path), text_pooling=True, text_pooling_heads=7), 16)


def test_clip_refuses_what_it_cannot_load(tmp_path):
    with pytest.raises(ConfigurationError, match="takes pictures of 32x32, it would get 30x32"):
        make_vision_encoder(ClipVisionConfig(backbone_config=TINY_VIT), [(32, 32), (30, 32)], 16)
    with pytest.raises(ConfigurationError, match=r"cannot load a tokenizer from text.model '.*': give a local folder"):
        ClipText(ClipTextConfig(str(tmp_path)), 16, None)
    with pytest.raises(ConfigurationError, match=r"tiny_clip --output=DIR\. There is no such folder\.$"):
        ClipText(ClipTextConfig("outputs/demo-train/absent"), 16, None)
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

    monkeypatch.setattr(text, "_cache", Recent(2))
    text([INSTRUCTIONS[1]])
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


def test_a_feature_does_not_depend_on_who_asks_first(tiny_clip):
    """A run in half precision that goes on would take another than the one it began with, and so would the node."""
    first, second = (ClipText(ClipTextConfig(str(tiny_clip)), 16, None) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = first.pooled(INSTRUCTIONS)
    assert torch.equal(found, second.pooled(INSTRUCTIONS))


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


def two_sizes(tiny_clip, vision, shapes=((32, 48), (64, 40)), text=True):
    cameras = {f"observation.images.{i}": Feature("VISUAL", (3, *shape)) for i, shape in enumerate(shapes)}
    words = ClipTextConfig(str(tiny_clip)) if text else NoTextConfig()
    return demo_config(
        str(tiny_clip),
        input_features=cameras,
        action_mode="absolute",
        observation_encoder=ObservationEncoderConfig(vision, words),
    )


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(
    "vision",
    [
        ResNetConfig(resize_shape=None),
        DinoV3VisionConfig(backbone_config=TINY_DINO, resize_shape=None, crop_shape=None),
        ClipVisionConfig(backbone_config=TINY_VIT, resize_shape=None, crop_shape=(32, 32)),
    ],
)
def test_each_camera_has_its_own_image_size(tiny_clip, vision, separate):
    vision = dataclasses.replace(vision, use_separate_encoder_per_camera=separate)
    config = two_sizes(tiny_clip, vision)
    encoder = ObservationEncoder(config).eval()
    batch = make_batch(config)
    words = encoder.text_features(batch["task"])
    assert [preprocessor.shape for preprocessor in encoder.preprocessors] == (
        [(32, 48), (64, 40)] if vision.crop_shape is None else [(32, 32), (32, 32)]
    )
    for i, key in enumerate(config.cameras):
        picture = encoder.preprocessors[i](batch[key])[:, 0]
        expected = encoder.vision_encoders[i if separate else 0](picture, words)
        torch.testing.assert_close(encoder.image_features(key, batch[key], words)[:, 0], expected)


@pytest.mark.parametrize("separate", [False, True])
def test_every_camera_must_fit_the_backbone(tiny_clip, tmp_path, separate):
    CLIPVisionModel(CLIPVisionConfig(**TINY_VIT)).save_pretrained(tmp_path)
    vision = ClipVisionConfig(
        backbone=str(tmp_path), resize_shape=None, crop_shape=None, use_separate_encoder_per_camera=separate
    )
    with pytest.raises(ConfigurationError, match="takes pictures of 32x32, it would get 32x40"):
        ObservationEncoder(two_sizes(tiny_clip, vision, shapes=((32, 32), (32, 40))))


def test_threads_share_the_cache_of_instructions(text, monkeypatch):
    """A tokenizer must not be used by two threads at once, nor the cache change under one that reads it."""
    monkeypatch.setattr(text, "_cache", Recent(2))
    tasks = [f"push block {i}" for i in range(6)]
    expected = {task: text.pooled([task])[0] for task in tasks}
    inside = []
    encode = text._encode

    def watched(task):
        inside.append(task)
        assert len(inside) == 1
        feature = encode(task)
        inside.remove(task)
        return feature

    monkeypatch.setattr(text, "_encode", watched)

    def ask(seed):
        chosen = [tasks[i] for i in torch.randint(6, (4,), generator=torch.Generator().manual_seed(seed)).tolist()]
        return chosen, text.pooled(chosen)

    with ThreadPoolExecutor(4) as pool:
        for chosen, features in pool.map(ask, range(40)):
            assert torch.equal(features, torch.stack([expected[task] for task in chosen]))


def test_a_policy_without_towers_needs_no_transformers():
    program = """
import sys
from dit_policy_ros.policy.configuration import *
from dit_policy_ros.policy.encoders import ObservationEncoder
inputs = {"observation.images.top": Feature("VISUAL", (3, 64, 64))}
described = ObservationEncoderConfig(ResNetConfig(film=False), NoTextConfig())
ObservationEncoder(PolicyConfig(input_features=inputs, observation_encoder=described))
import dit_policy_ros.policy.modeling
print([name for name in sys.modules if name.split(".")[0] == "transformers"])
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed == "[]\n"


def test_encoder_survives_a_copy(tiny_clip):
    """Training keeps an averaged copy of the policy."""
    encoder = ObservationEncoder(demo_config(str(tiny_clip)))
    encoder.text_encoder(INSTRUCTIONS)
    twin = copy.deepcopy(encoder)
    assert torch.equal(twin.text_encoder(INSTRUCTIONS), encoder.text_encoder(INSTRUCTIONS))
