"""The fast ViT gives transformers' CLS and patch tokens, for CLIP and DINOv3 and every choice of theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, DINOv3ViTConfig, DINOv3ViTModel, ViTConfig, ViTModel

from dit_policy_ros.policy.fast_vision import FastViT, Unsupported

SIZE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def jittered(model: torch.nn.Module) -> Any:
    """Norms and biases other than one and zero: a forgotten one then shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def clip(**changes: Any) -> Any:
    model = jittered(CLIPVisionModel(CLIPVisionConfig(**(SIZE | changes))))
    return getattr(model, "vision_model", model)


def dino(**changes: Any) -> Any:
    return jittered(DINOv3ViTModel(DINOv3ViTConfig(**(SIZE | {"num_register_tokens": 3} | changes))))


@pytest.mark.parametrize("patches", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@torch.inference_mode()
def test_clip_tokens_are_those_of_transformers(act: str, norm: bool, patches: bool) -> None:
    tower = clip(hidden_act=act)
    pixels = torch.randn(2, 3, 32, 32)
    expected = tower(pixel_values=pixels)
    cls = expected.pooler_output if norm else expected.last_hidden_state[:, 0]
    tokens = FastViT(tower, torch.float32, norm_cls=norm, patches=patches)(pixels)
    torch.testing.assert_close(tokens[:, 0], cls, atol=2e-5, rtol=1e-5)
    assert tokens.shape[1] == (17 if patches else 1)
    torch.testing.assert_close(
        tokens[:, 1:], expected.last_hidden_state[:, 1:][:, : 16 * patches], atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("patches", [False, True])
@pytest.mark.parametrize("changes", [{}, {"use_gated_mlp": True, "hidden_act": "silu"}, {"key_bias": True}])
@torch.inference_mode()
def test_dinov3_tokens_are_those_of_transformers_for_any_picture(changes: dict[str, Any], patches: bool) -> None:
    tower = dino(**changes)
    fast = FastViT(tower, torch.float32, norm_cls=True, norm_patches=True, patches=patches)
    for shape in ((32, 32), (16, 40), (32, 32)):  # its positions are those of each picture's shape
        pixels = torch.randn(2, 3, *shape)
        expected = tower(pixel_values=pixels).last_hidden_state
        tokens = fast(pixels)
        torch.testing.assert_close(tokens[:, 0], expected[:, 0], atol=2e-5, rtol=1e-5)
        if patches:
            torch.testing.assert_close(tokens[:, 1:], expected[:, 4:], atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_picture_that_is_no_whole_number_of_patches_loses_what_the_convolution_leaves_out() -> None:
    tower = clip(image_size=37)
    pixels = torch.randn(1, 3, 37, 37)
    expected = tower(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(FastViT(tower, torch.float32, norm_cls=False)(pixels)[:, 0], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("make", [clip, dino])
@torch.inference_mode()
def test_bf16_errs_by_its_rounding(make: Any) -> None:
    tower = make()
    norm = make is dino
    pixels = torch.randn(2, 3, 32, 32)
    expected = FastViT(tower, torch.float32, norm_cls=norm)(pixels)
    got = FastViT(tower, torch.bfloat16, norm_cls=norm)(pixels)
    assert got.dtype == torch.float32
    assert 0 < (got - expected).abs().max() / expected.abs().max() < 3e-2


def test_another_tower_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match=r"vit.*clip_vision_model and dinov3_vit"):
        FastViT(ViTModel(ViTConfig(**SIZE)), torch.float32, norm_cls=False)
    with pytest.raises(Unsupported, match="activation tanh"):
        FastViT(clip(hidden_act="tanh"), torch.float32, norm_cls=False)
