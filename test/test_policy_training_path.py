"""What training does faster or besides: a CLS token alone, cameras together, each sample's own window and colours."""

import pytest
import torch
import torchvision.transforms.v2.functional as oracle
from policy_fixtures import demo_config, make_batch, make_stats, randomize
from test_policy_encoders import TINY_DINO, TINY_VIT
from transformers import CLIPVisionConfig, CLIPVisionModel

from dit_policy_ros.policy.checkpoint import ALIGNMENT
from dit_policy_ros.policy.configuration import (
    ClipVisionConfig,
    ConfigurationError,
    DinoV3VisionConfig,
    Feature,
    NoTextConfig,
    ObservationEncoderConfig,
    PolicyConfig,
    ResNetConfig,
)
from dit_policy_ros.policy.draws import Draws
from dit_policy_ros.policy.jitter import Jitter, shift_hue
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.preprocessing import Preprocessor
from dit_policy_ros.policy.vision import ClipVision, DinoV3Vision


def seeded(seed=0):
    return Draws(torch.Generator().manual_seed(seed))


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


VITS = {
    **{f"clip, {act}": (ClipVision, {"hidden_act": act}) for act in ("quick_gelu", "gelu", "silu")},
    "dinov3": (DinoV3Vision, {}),
    "dinov3, gated": (DinoV3Vision, {"use_gated_mlp": True}),
    "dinov3, no registers": (DinoV3Vision, {"num_register_tokens": 0}),
}


@pytest.mark.parametrize("post_layernorm", [False, True])
@pytest.mark.parametrize("name", VITS)
def test_the_cls_token_and_its_gradients_are_the_towers(name, post_layernorm):
    kind, changes = VITS[name]
    if kind is ClipVision:
        backbone = CLIPVisionConfig(**TINY_VIT | changes).to_dict()
        vision = ClipVision(ClipVisionConfig(backbone_config=backbone, use_post_layernorm=post_layernorm), 8)
    else:
        vision = DinoV3Vision(DinoV3VisionConfig(backbone_config=TINY_DINO | changes), 8)
    randomize(vision)
    vision.train()
    images, weights = torch.randn(3, 3, 32, 32), torch.randn(3, vision.features_dim)
    (vision.tokens(images)[0] * weights).sum().backward()
    expected, token = gradients(vision), vision.tokens(images)[0]
    vision.zero_grad()
    (vision(images, None) * weights).sum().backward()
    actual = gradients(vision)
    torch.testing.assert_close(vision(images, None), token, atol=1e-5, rtol=1e-5)
    for each in expected:
        torch.testing.assert_close(actual.get(each, torch.zeros(())), expected[each], atol=1e-5, rtol=1e-4, msg=each)
    assert sum(grad.norm() > 1e-3 for grad in expected.values()) > 15  # the comparison is of something


def test_of_the_last_layer_only_the_cls_token_is_computed():
    vision = ClipVision(ClipVisionConfig(backbone_config=CLIPVisionConfig(**TINY_VIT).to_dict()), 8)
    seen = []
    for layer in vision.model.encoder.layers:
        layer.mlp.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    vision(torch.randn(2, 3, 32, 32), None)
    assert seen == [17, 1]


def camera_config(vision, separate=False, shapes=((40, 40), (40, 40), (48, 36))):
    vision.use_separate_encoder_per_camera = separate
    features = {f"observation.images.{i}": Feature("VISUAL", (3, *shape)) for i, shape in enumerate(shapes)}
    return PolicyConfig(
        horizon=8,
        n_action_steps=4,
        input_features=features | {"observation.state": Feature("STATE", (3,))},
        output_features={"action": Feature("ACTION", (3,))},
        observation_encoder=ObservationEncoderConfig(vision, NoTextConfig()),
    )


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(
    "vision",
    [
        lambda: ResNetConfig(resize_shape=None, crop_shape=(32, 32), film=False),
        lambda: ClipVisionConfig(resize_shape=(36, 36), crop_shape=(32, 32), backbone_config=TINY_VIT),
        lambda: DinoV3VisionConfig(resize_shape=(36, 36), crop_shape=(32, 32), backbone_config=TINY_DINO),
    ],
    ids=["resnet", "clip", "dinov3"],
)
def test_cameras_that_share_an_encoder_go_through_it_together(vision, separate):
    config = camera_config(vision(), separate)
    torch.manual_seed(0)
    policy = MultitaskDiTPolicy(config, make_stats(config)).train()
    encoder, batch = policy.observation_encoder, make_batch(config, 3)
    calls = []
    for each in encoder.vision_encoders:
        each.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    pictures = {key: batch[key] for key in config.cameras}
    together = encoder.frame_features(pictures, None, seeded())
    assert calls == ([6, 6, 6] if separate else [18])
    draws = seeded()
    for index, key in enumerate(config.cameras):
        single = encoder.vision_encoders[index if separate else 0]
        alone = single(encoder.pictures(key, batch[key], draws).flatten(0, 1), None)
        torch.testing.assert_close(together[key].flatten(0, 1), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_samples_window_is_one_of_the_pictures_with_its_edges_repeated(dtype):
    config = ResNetConfig(resize_shape=None, crop_shape=(5, 6), random_shift=3, crop_is_random=True)
    preprocessor = Preprocessor(config, (9, 11), normalize=False).train()
    images = (torch.rand(40, 2, 3, 9, 11) * 255).to(dtype)
    cut = preprocessor.cut(images, seeded())
    widened = oracle.pad(images.flatten(0, 1), [3, 3, 3, 3], padding_mode="edge").unflatten(0, (40, 2))
    starts = set()
    for sample in range(40):
        found = [
            (top, left)
            for top in range(9 + 6 - 5 + 1)
            for left in range(11 + 6 - 6 + 1)
            if torch.equal(widened[sample, :, :, top : top + 5, left : left + 6], cut[sample])
        ]
        assert found
        starts.add(found[0])
    assert len(starts) > 20
    assert max(top for top, _ in starts) > 6 > 3 > min(top for top, _ in starts)


JITTERS = {
    "brightness": oracle.adjust_brightness,
    "contrast": oracle.adjust_contrast,
    "saturation": oracle.adjust_saturation,
    "hue": oracle.adjust_hue,
}
FACTORS = {"brightness": [0.3, 0.8, 1.7], "contrast": [0.0, 0.6, 1.9], "saturation": [0.0, 1.4, 2.0]}
FACTORS["hue"] = [-0.5, 0.07, 0.41]


def coloured():
    """(3, 2, 3, 16, 16) in [0, 1]; grey, black, white and equal channels among the colours."""
    images = torch.rand(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images[..., 0, :] = 0.5
    images[..., 1, :4], images[..., 1, 4:8] = 0.0, 1.0
    for pair, column in (((0, 1), 2), ((1, 2), 3), ((0, 2), 4)):
        images[:, :, pair[0], :, column] = images[:, :, pair[1], :, column]
    return images


@pytest.mark.parametrize("names", [*([name] for name in JITTERS), list(JITTERS)], ids=lambda names: "+".join(names))
def test_colours_change_as_torchvisions(names):
    images = coloured()
    jittered = Jitter(**{name: torch.tensor(FACTORS[name]) for name in names})(images)
    for sample in range(3):
        expected = images[sample]
        for name in names:
            expected = JITTERS[name](expected, FACTORS[name][sample])
        torch.testing.assert_close(jittered[sample], expected, atol=2e-5, rtol=0)
        assert (expected - images[sample]).abs().max() > 0.05


def test_a_third_of_a_turn_brings_red_to_green_to_blue():
    red, green, blue = torch.eye(3).view(3, 1, 3, 1, 1)
    third = torch.tensor([1 / 3])
    torch.testing.assert_close(shift_hue(red[None], third)[0], green)
    torch.testing.assert_close(shift_hue(green[None], third)[0], blue)
    torch.testing.assert_close(shift_hue(blue[None], third)[0], red)


def jittering(**changes):
    return ResNetConfig(resize_shape=None, random_shift=0, crop_is_random=False, **changes)


@pytest.mark.parametrize("name", JITTERS)
def test_each_sample_gets_a_factor_of_its_own_within_the_configured_range(name):
    config = jittering(**{name: 0.4})
    drawn = getattr(Jitter.drawn(config, 4000, torch.device("cpu"), seeded()), name)
    low, high = (-0.4, 0.4) if name == "hue" else (0.6, 1.4)
    assert drawn.min() >= low
    assert drawn.max() <= high
    assert drawn.mean().item() == pytest.approx((low + high) / 2, abs=0.02)
    assert drawn.std().item() == pytest.approx((high - low) / 12**0.5, rel=0.05)
    wide = Jitter.drawn(jittering(brightness=1.5), 4000, torch.device("cpu"), seeded()).brightness
    assert 0 <= wide.min() < 0.05
    assert wide.max() > 2.4


def test_pictures_are_jittered_in_training_only_and_a_samples_steps_alike():
    config = jittering(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    preprocessor = Preprocessor(config, (16, 16), normalize=True)
    images = (coloured() * 255).to(torch.uint8)
    images[:, 1] = images[:, 0]
    plain = (images.float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(preprocessor.eval()(images, seeded()), plain)
    changed = preprocessor.train()(images, seeded())
    assert torch.equal(changed[:, 0], changed[:, 1])
    difference = (changed - plain).flatten(1)
    assert (difference.abs().amax(1) > 0.05).all()
    assert not torch.allclose(difference[0], difference[1])
    assert not torch.equal(preprocessor(images, seeded(1)), changed)
    assert torch.equal(preprocessor(images, seeded()), changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"brightness": -0.1}, "vision.brightness must be at least 0, got -0.1"),
        ({"hue": 0.6}, r"vision.hue must be in \[0, 0.5\] turns, got 0.6"),
        ({"hue": -0.1}, r"vision.hue must be in \[0, 0.5\] turns, got -0.1"),
    ],
)
def test_impossible_jitter_is_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        demo_config("x", observation_encoder=ObservationEncoderConfig(ResNetConfig(**changes), NoTextConfig()))


def test_a_backbones_weights_are_aligned_as_a_checkpoints_are(tmp_path):
    """As mapped from a file they are not, and a run that goes on from its checkpoint would differ in the last bits."""
    CLIPVisionModel(CLIPVisionConfig(**TINY_VIT)).save_pretrained(tmp_path)
    vision = ClipVision(ClipVisionConfig(backbone=str(tmp_path)), 8)
    assert not [name for name, weight in vision.named_parameters() if weight.data_ptr() % ALIGNMENT]
