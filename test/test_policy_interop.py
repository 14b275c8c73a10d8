"""Other people's checkpoints: LeRobot's read and written, with LeRobot's own code on the other side."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.multi_task_dit.configuration_multi_task_dit import MultiTaskDiTConfig
from lerobot.policies.multi_task_dit.modeling_multi_task_dit import MultiTaskDiTPolicy
from lerobot_fixtures import (
    CAMERAS,
    make_clip,
    make_observations,
    save_theirs,
    their_actions,
    their_config,
    their_policy,
    their_stats,
)
from policy_fixtures import INSTRUCTIONS, randomize
from safetensors.torch import load_file, save_file

from dit_policy_ros.embodiment import Embodiment, EmbodimentError
from dit_policy_ros.policy.checkpoint import load_checkpoint, save_checkpoint
from dit_policy_ros.policy.configuration import (
    ClipTextConfig,
    ClipVisionConfig,
    DiffusionConfig,
    Feature,
    FlowMatchingConfig,
    NoTextConfig,
    ObservationEncoderConfig,
    PolicyConfig,
    ResNetConfig,
    TransformerConfig,
)
from dit_policy_ros.policy.interop import tensor_names
from dit_policy_ros.policy.interop.__main__ import main
from dit_policy_ros.policy.interop.configurations import to_lerobot as config_to_lerobot
from dit_policy_ros.policy.interop.fields import LEROBOT, LEROBOT_DEFAULTS, LEROBOT_OBJECTIVE, InteropError
from dit_policy_ros.policy.interop.folder import find_checkpoint
from dit_policy_ros.policy.interop.options import Options
from dit_policy_ros.policy.interop.read import to_native
from dit_policy_ros.policy.interop.write import to_lerobot
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy

EMBODIMENT = "name: arm\nfps: 10\n"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def theirs(clip):
    return their_policy(their_config(clip))


@pytest.fixture
def folder(theirs, tmp_path):
    return save_theirs(tmp_path / "pretrained_model", theirs, their_stats())


def actions_of(folder, observations, seed=9):
    policy = load_checkpoint(folder)
    torch.manual_seed(seed)
    return policy.predict_chunk(observations)


def loaded_by_lerobot(folder):
    """LeRobot's policy and processors, by its own loaders, strict, from nothing but the folder."""
    policy = MultiTaskDiTPolicy.from_pretrained(folder, strict=True)
    return policy, make_pre_post_processors(policy.config, str(folder))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_a_lerobot_folder_acts_as_it_does_in_lerobot(clip, tmp_path, separate, flat):
    """With the tensor names of transformers 5.5, and with those of 5.6 and later."""
    other = their_policy(their_config(clip, use_separate_rgb_encoder_per_camera=separate))
    folder = save_theirs(tmp_path / "pretrained_model", other, their_stats())
    if flat:
        weights = load_file(folder / "model.safetensors")
        save_file(
            {tensor_names.without_wrapper(name): tensor for name, tensor in weights.items()},
            folder / "model.safetensors",
        )
    summary = to_native(folder, tmp_path / "native")
    assert summary.tensors == len(other.state_dict())
    assert not summary.dropped
    observations = make_observations(other.config)
    expected = their_actions(other, make_pre_post_processors(other.config, str(folder)), observations, 9)
    torch.testing.assert_close(actions_of(tmp_path / "native", observations), expected, atol=1e-5, rtol=0)


def native_policy(clip, constant_dimension=None, **changes):
    """A policy of ours that LeRobot can express; one dimension of state and action may never have moved from 0.25."""
    vision = ClipVisionConfig(
        resize_shape=(36, 36), resize_mode="stretch", crop_shape=(32, 32), backbone=str(clip), random_shift=2, hue=0.1
    )
    settings = {
        "horizon": 8,
        "n_action_steps": 4,
        "input_features": {key: Feature("VISUAL", (3, 40, 40)) for key in CAMERAS[:2]}
        | {"observation.state": Feature("STATE", (7,))},
        "output_features": {"action": Feature("ACTION", (5,))},
        "observation_encoder": ObservationEncoderConfig(vision, ClipTextConfig(str(clip))),
        "transformer": TransformerConfig(hidden_dim=32, num_layers=2, num_heads=4, timestep_embed_dim=32),
        "objective": DiffusionConfig(timestep_spacing="leading", noise_draws=2),
        "tasks": INSTRUCTIONS,
        "state_noise": 0.01,
    }
    config = PolicyConfig(**(settings | changes))
    stats = {key: {name: value.tolist() for name, value in entry.items()} for key, entry in their_stats(0).items()}
    if constant_dimension is not None:
        for entry in stats.values():
            entry["min"][constant_dimension] = entry["max"][constant_dimension] = 0.25
    policy = MultitaskDiTPolicy(config, stats).eval()
    randomize(policy.noise_predictor)
    policy.noise_predictor.output_proj.weight.data.mul_(0.3)
    return policy


VARIANTS = {
    "diffusion": {},
    "flow": {"objective": FlowMatchingConfig(sampler="rk4", denoising_steps=5)},
    "minus one": {"normalized_constant": -1.0},
    "no cameras": {"input_features": {"observation.state": Feature("STATE", (7,))}},
    "learned positions": {
        "transformer": TransformerConfig(
            hidden_dim=32, num_layers=2, num_heads=4, use_rope=False, use_positional_encoding=True
        )
    },
    "mean and deviation": {"normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_lerobot_loads_the_export_and_the_way_back_is_exact(clip, tmp_path, changes):
    policy = native_policy(clip, **changes)
    save_checkpoint(tmp_path / "native", policy, EMBODIMENT, "# Card\n")
    summary = to_lerobot(tmp_path / "native", tmp_path / "lerobot")
    (of_training,) = [note for note in summary.notes if "of no effect on actions" in note]
    assert "vision.random_shift, vision.hue" in of_training

    other, processors = loaded_by_lerobot(tmp_path / "lerobot")
    observations = make_observations(other.config)
    expected = actions_of(tmp_path / "native", observations)[:, : other.config.n_action_steps]
    torch.testing.assert_close(their_actions(other, processors, observations, 9), expected, atol=1e-5, rtol=0)

    to_native(tmp_path / "lerobot", tmp_path / "again")
    before, after = load_checkpoint(tmp_path / "native"), load_checkpoint(tmp_path / "again")
    assert after.config == before.config
    assert after.stats == before.stats
    assert after.state_dict().keys() == before.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    for name in ("embodiment.yaml", "model_card.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "native" / name).read_bytes()


@pytest.mark.parametrize("normalized_constant", [0.0, -1.0])
def test_constant_dimensions_survive_the_export(clip, tmp_path, normalized_constant):
    """LeRobot would give -1 where we give 0: its statistics are written so that it gives what the policy learned."""
    policy = native_policy(clip, constant_dimension=2, normalized_constant=normalized_constant)
    save_checkpoint(tmp_path / "native", policy, EMBODIMENT, "")
    to_lerobot(tmp_path / "native", tmp_path / "lerobot")
    other, processors = loaded_by_lerobot(tmp_path / "lerobot")
    observations = make_observations(other.config)
    observations["observation.state"][..., 2] = 0.25
    expected = actions_of(tmp_path / "native", observations)[:, : other.config.n_action_steps]
    torch.testing.assert_close(their_actions(other, processors, observations, 9), expected, atol=1e-5, rtol=0)


def test_what_lerobot_cannot_express_is_refused_by_name_all_at_once(clip, tmp_path):
    config = native_policy(clip).config
    vision = dataclasses.replace(
        config.observation_encoder.vision, text_pooling=True, use_post_layernorm=True, resize_mode="cover"
    )
    features = config.input_features | {"observation.images.wide": Feature("VISUAL", (3, 48, 64))}
    bad = dataclasses.replace(
        config,
        action_mode="relative",
        action_state_indices=[0, 1, 2, 3, 4],
        input_features=features | {"observation.environment_state": Feature("ENV", (2,))},
        observation_encoder=ObservationEncoderConfig(vision, ClipTextConfig(str(clip))),
        objective=DiffusionConfig(prediction_type="v_prediction", sampler="dpm_solver++"),
        instruction_dropout=0.1,
        guidance_scale=2.0,
        max_delay=2,
        normalized_constant=0.5,
    )
    with pytest.raises(InteropError) as caught:
        config_to_lerobot(bad, {}, "clip")
    for part in (
        "action_mode relative",
        "observation.environment_state",
        "instruction_dropout and guidance_scale",
        "max_delay",
        "normalized_constant 0.5",
        "vision.text_pooling",
        "vision.use_post_layernorm",
        "cameras of different sizes",
        "vision.resize_mode cover: observation.images.wide of (48, 64)",
        "objective.sampler dpm_solver++",
        "prediction_type v_prediction",
        "timestep_spacing trailing with 10 of 100 steps",
    ):
        assert part in str(caught.value), part
    other = dataclasses.replace(
        config,
        observation_encoder=ObservationEncoderConfig(ResNetConfig(film=False), NoTextConfig()),
        objective=FlowMatchingConfig(sampler="heun", timestep_scale=1000.0),
    )
    with pytest.raises(InteropError) as caught:
        config_to_lerobot(other, {}, "clip")
    for part in ("vision resnet", "text none", "objective.sampler heun", "objective.timestep_scale 1000"):
        assert part in str(caught.value), part


def test_a_sampler_that_lerobot_has_may_be_chosen_for_the_export(clip, tmp_path):
    policy = native_policy(clip, objective=DiffusionConfig(sampler="dpm_solver++"))
    save_checkpoint(tmp_path / "native", policy, EMBODIMENT, "")
    with pytest.raises(InteropError, match=r"export with --sampler ddim"):
        to_lerobot(tmp_path / "native", tmp_path / "lerobot")
    assert not (tmp_path / "lerobot").exists()
    to_lerobot(tmp_path / "native", tmp_path / "lerobot", Options(sampler="ddim", steps=5))
    config = json.loads((tmp_path / "lerobot" / "config.json").read_text())
    assert (config["noise_scheduler_type"], config["num_inference_steps"]) == ("DDIM", 5)
    to_native(tmp_path / "lerobot", tmp_path / "again")
    objective = load_checkpoint(tmp_path / "again").config.objective
    assert (objective.sampler, objective.denoising_steps, objective.timestep_spacing) == ("ddim", 5, "leading")


def test_a_changed_export_is_not_taken_for_the_checkpoint_it_came_from(clip, tmp_path):
    save_checkpoint(tmp_path / "native", native_policy(clip), EMBODIMENT, "")
    to_lerobot(tmp_path / "native", tmp_path / "lerobot")
    edit_json(tmp_path / "lerobot" / "config.json", clip_sample_range=2.0)
    with pytest.raises(InteropError, match="does not fit it any more"):
        to_native(tmp_path / "lerobot", tmp_path / "again")
    shutil.rmtree(tmp_path / "lerobot" / "native")
    to_native(tmp_path / "lerobot", tmp_path / "again")
    assert load_checkpoint(tmp_path / "again").config.objective.clip_range == 2.0


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def test_averaged_weights_and_the_last_step_are_preferred_and_said(theirs, tmp_path):
    for step in ("000500", "010000", "002000"):
        save_theirs(tmp_path / "run" / "checkpoints" / step / "pretrained_model", theirs, their_stats())
    last = tmp_path / "run" / "checkpoints" / "010000"
    assert find_checkpoint(tmp_path / "run") == (
        last / "pretrained_model",
        ["step 010000, the last of 3", "the last weights: there is no pretrained_model_ema"],
    )
    shutil.copytree(last / "pretrained_model", last / "pretrained_model_ema")
    found, notes = find_checkpoint(tmp_path / "run")
    assert found == last / "pretrained_model_ema"
    assert "averaged weights" in notes[1]
    found, notes = find_checkpoint(last / "pretrained_model")  # as named
    assert found == last / "pretrained_model"
    assert "averaged ones are in pretrained_model_ema" in notes[0]
    with pytest.raises(InteropError, match=r"expected config\.json and model\.safetensors"):
        find_checkpoint(tmp_path)


def damage_processor(folder, change):
    path = folder / "policy_preprocessor.json"
    content = json.loads(path.read_text())
    change(content["steps"])
    path.write_text(json.dumps(content))


def change_stats(folder, change):
    path = folder / "policy_preprocessor_step_4_normalizer_processor.safetensors"
    stats = load_file(path)
    change(stats)
    save_file(stats, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit_json(f / "config.json", surprise=1), "surprise: a field this reader does not know"),
        (lambda f: edit_json(f / "config.json", beta_schedule="linear"), "beta_schedule linear: expected squaredcos"),
        (lambda f: edit_json(f / "config.json", type="act"), "neither a LeRobot multi_task_dit .*type 'act'"),
        (
            lambda f: edit_json(f / "config.json", hidden_dim=64),
            r"noise_predictor.input_proj.weight: \(32, 5\), expected",
        ),
        (lambda f: edit_json(f / "config.json", num_layers=3), "missing: noise_predictor.transformer_blocks.2"),
        (lambda f: edit_json(f / "config.json", num_layers=1), "unexpected: noise_predictor.transformer_blocks.1"),
        (lambda f: edit_json(f / "config.json", tokenizer_padding_side="left"), "tokenizer_padding_side left"),
        (
            lambda f: edit_json(f / "config.json", text_encoder_name="no/clip"),
            "no tokenizer from 'no/clip'.*--clip=FOLDER",
        ),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: (f / "policy_preprocessor.json").unlink(), "cannot read .*policy_preprocessor.json"),
        (
            lambda f: damage_processor(f, lambda s: s[4]["config"]["norm_map"].update(STATE="QUANTILES")),
            "normalization of STATE is QUANTILES",
        ),
        (lambda f: damage_processor(f, lambda s: s.append({"registry_name": "magic"})), "a processing step magic"),
        (lambda f: damage_processor(f, lambda s: s[0]["config"].update(rename_map={"a": "b"})), "rename_map"),
        (
            lambda f: change_stats(f, lambda s: s.update({f"{CAMERAS[1]}.mean": torch.zeros(3, 1, 1)})),
            "the cameras' statistics differ",
        ),
        (
            lambda f: change_stats(f, lambda s: s["action.min"].fill_(-7)),
            "normalised in one way and un-normalised in anot",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "lacks model.safetensors; pytorch_model.bin",
        ),
        (lambda f: torch.save({}, f / "model.safetensors"), "is a pickle"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x10"), "the file is damaged"),
    ],
)
def test_what_cannot_be_read_is_named(folder, tmp_path, capsys, damage, message):
    damage(folder)
    assert main([str(folder), str(tmp_path / "native"), "--to", "native"]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "native").exists()


def remove(folder, *names, file="config.json"):
    content = json.loads((folder / file).read_text())
    for name in names:
        del content[name]
    (folder / file).write_text(json.dumps(content))


def edit_tokenizer(folder, **changes):
    damage_processor(folder, lambda steps: steps[2]["config"].update(changes))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").write_text("[1]"), r"config.json holds a list, expected an object"),
        (lambda f: (f / "config.json").write_text("null"), r"config.json holds a NoneType, expected an object"),
        (lambda f: remove(f, "input_features"), "input_features is missing"),
        (lambda f: remove(f, "output_features"), "output_features is missing"),
        (lambda f: edit_json(f / "config.json", input_features=[]), "input_features is missing or no object"),
        (
            lambda f: edit_json(f / "config.json", input_features={"observation.state": {"type": "STATE"}}),
            "input_features.observation.state is .*expected a type and a shape",
        ),
        (lambda f: edit_json(f / "config.json", text_encoder_name=None), "text_encoder_name is None, expected a value"),
        (lambda f: edit_json(f / "config.json", image_crop_shape=5), "image_crop_shape is 5, expected a value like"),
        (lambda f: edit_json(f / "config.json", objective=["diffusion"]), r"objective is \['diffusion'\], expected"),
        (lambda f: edit_json(f / "config.json", num_inference_steps="ten"), "num_inference_steps is 'ten'"),
        (
            lambda f: truncate(f / "policy_preprocessor_step_4_normalizer_processor.safetensors"),
            "normalizer_processor.safetensors cannot be read .* the file is damaged",
        ),
        (
            lambda f: (f / "policy_postprocessor_step_0_unnormalizer_processor.safetensors").unlink(),
            "lacks policy_postprocessor_step_0_unnormalizer_processor.safetensors",
        ),
        (lambda f: (f / "policy_preprocessor.json").write_text("[]"), "policy_preprocessor.json holds a list"),
        (lambda f: remove(f, "steps", file="policy_postprocessor.json"), "policy_postprocessor.json has no list of st"),
        (lambda f: damage_processor(f, lambda s: s.append("step")), "policy_preprocessor.json has no list of steps"),
        (lambda f: damage_processor(f, lambda s: s[0].update(registry_name=["a"])), r"a processing step \['a'\]"),
        (lambda f: damage_processor(f, lambda s: s.pop(2)), "expected one tokenizer_processor, found 0"),
        (lambda f: edit_tokenizer(f, max_length=6), "tokenizer_max_length 77 in config.json but 6 in policy_prepro"),
        (lambda f: edit_tokenizer(f, truncation=False), "tokenizer_truncation True in config.json but False in"),
        (lambda f: edit_tokenizer(f, padding_side="left"), "tokenizer_padding_side right in config.json but left in"),
        (
            lambda f: edit_tokenizer(f, max_length=78) or edit_json(f / "config.json", tokenizer_max_length=78),
            "tokenizer_max_length 78: expected 2 to 77, the positions of the text tower",
        ),
    ],
)
def test_broken_files_are_one_sentence_and_no_traceback(folder, tmp_path, capsys, damage, message):
    test_what_cannot_be_read_is_named(folder, tmp_path, capsys, damage, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "native", "--steps", "5"], "--steps is of no use with --to native"),
        (["--to", "native", "--sampler=ddim", "--flat-names"], "--sampler, --flat-names is of no use with --to native"),
        (["--to", "lerobot", "--clip=x", "--embodiment=y"], "--clip, --embodiment is of no use with --to lerobot"),
        (["--to", "native", "--embodiment=absent.yaml"], "cannot read --embodiment=absent.yaml"),
        (["--to", "native", "--clip=absent"], "no tokenizer from 'absent'"),
        (["--to", "banana"], "invalid choice: 'banana'.*see --help"),
        (["--to", "lerobot", "--steps", "few"], "invalid int value: 'few'; see --help"),
        (["--to", "native", "--unknown"], "unrecognized arguments: --unknown"),
        ([], "required: --to"),
    ],
)
def test_bad_options_are_one_sentence_and_no_traceback(folder, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert main([str(folder), str(tmp_path / "target"), *options]) == 1
    said = capsys.readouterr().err
    assert re.search("^not converted: .*" + message, said, re.DOTALL), said
    assert not (tmp_path / "target").exists()


def test_bad_choices_for_an_export_are_one_sentence_and_no_traceback(clip, tmp_path, capsys):
    save_checkpoint(tmp_path / "native", native_policy(clip), EMBODIMENT, "")
    for options, message in (
        (["--steps", "0"], "denoising_steps.*0"),
        (["--steps", "-3"], "denoising_steps.*-3"),
        (["--steps", "1000"], "denoising_steps.*1000"),
        (["--sampler", "banana"], "sampler.*banana"),
        (["--sampler", "rk4"], "sampler.*rk4"),
    ):
        assert main([str(tmp_path / "native"), str(tmp_path / "lerobot"), "--to", "lerobot", *options]) == 1
        assert re.search("not converted: .*" + message, capsys.readouterr().err, re.DOTALL), options
        assert not (tmp_path / "lerobot").exists()


def test_a_field_that_is_missing_has_lerobots_default():
    theirs = {entry.name: entry for entry in dataclasses.fields(MultiTaskDiTConfig)}
    for name, value in LEROBOT_DEFAULTS.items():
        assert theirs[name].default == value, name
    read = {*LEROBOT, *(name for table in LEROBOT_OBJECTIVE.values() for name in table)}
    assert read <= LEROBOT_DEFAULTS.keys()


def test_a_short_configuration_acts_as_it_does_in_lerobot(clip, tmp_path):
    """Everything that is LeRobot's default left out of config.json, which LeRobot's own loader allows."""
    other = their_policy(their_config(clip, num_inference_steps=None, num_train_timesteps=100))
    folder = save_theirs(tmp_path / "pretrained_model", other, their_stats())
    content = json.loads((folder / "config.json").read_text())
    left_out = [name for name, value in LEROBOT_DEFAULTS.items() if content[name] == value]
    assert {"num_inference_steps", "image_resize_shape", "do_mask_loss_for_padding", "objective"} <= {*left_out}
    remove(folder, *left_out)
    again = MultiTaskDiTPolicy.from_pretrained(folder, strict=True)
    to_native(folder, tmp_path / "native")
    config = load_checkpoint(tmp_path / "native").config
    assert config.objective.denoising_steps == 100
    assert config.do_mask_loss_for_padding is again.config.do_mask_loss_for_padding is False
    assert config.observation_encoder.vision.resize_shape is again.config.image_resize_shape is None
    observations = make_observations(again.config)
    expected = their_actions(again, make_pre_post_processors(again.config, str(folder)), observations, 9)
    torch.testing.assert_close(
        actions_of(tmp_path / "native", observations)[:, : again.config.n_action_steps], expected, atol=1e-5, rtol=0
    )


def test_long_instructions_are_cut_where_lerobot_cuts_them(clip, tmp_path):
    """There, back and there again: the tokenizer's files keep the length."""
    other = their_policy(their_config(clip, tokenizer_max_length=6, prediction_type="sample"))
    folder = save_theirs(tmp_path / "pretrained_model", other, their_stats())
    summary = to_native(folder, tmp_path / "native")
    assert "instructions are cut after 6 tokens, as there (kept in the tokenizer's files)" in summary.notes
    observations = make_observations(other.config)
    observations["task"] = ["push the red block over the line"] * 2
    expected = their_actions(other, make_pre_post_processors(other.config, str(folder)), observations, 9)
    torch.testing.assert_close(actions_of(tmp_path / "native", observations), expected, atol=1e-5, rtol=0)

    to_lerobot(tmp_path / "native", tmp_path / "lerobot")
    exported, processors = loaded_by_lerobot(tmp_path / "lerobot")
    assert exported.config.tokenizer_max_length == 6
    torch.testing.assert_close(their_actions(exported, processors, observations, 9), expected, atol=1e-5, rtol=0)
    to_native(tmp_path / "lerobot", tmp_path / "again")
    assert torch.equal(actions_of(tmp_path / "again", observations), actions_of(tmp_path / "native", observations))
    whole = load_checkpoint(tmp_path / "native")
    whole.observation_encoder.text_encoder.tokenizer.model_max_length = 77
    torch.manual_seed(9)
    assert (whole.predict_chunk(observations) - expected).abs().max() > 0.1  # the end does matter


def test_without_truncation_all_words_count(clip, tmp_path):
    config = their_config(clip, tokenizer_max_length=6, tokenizer_truncation=False, prediction_type="sample")
    other = their_policy(config)
    folder = save_theirs(tmp_path / "pretrained_model", other, their_stats())
    to_native(folder, tmp_path / "native")
    observations = make_observations(other.config)
    observations["task"] = ["push the red block over the line"] * 2
    expected = their_actions(other, make_pre_post_processors(other.config, str(folder)), observations, 9)
    torch.testing.assert_close(actions_of(tmp_path / "native", observations), expected, atol=1e-5, rtol=0)


def test_weights_that_are_not_finite_are_named(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights["noise_predictor.output_proj.bias"][0] = float("nan")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InteropError, match=r"not finite: noise_predictor\.output_proj\.bias"):
        to_native(folder, tmp_path / "native")


def test_narrow_weights_become_float32_exactly(folder, tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    summary = to_native(folder, tmp_path / "native")
    assert any("bfloat16" in note for note in summary.notes)
    name = "noise_predictor.output_proj.weight"
    assert torch.equal(load_checkpoint(tmp_path / "native").state_dict()[name], weights[name].float())


def test_the_target_is_replaced_only_if_told(folder, tmp_path, capsys):
    arguments = [str(folder), str(tmp_path / "native"), "--to", "native"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "LeRobot multi_task_dit" in said
    assert "105 carried over, 0 left out" in said
    assert "post_layernorm is kept but not applied" in said
    assert main(arguments) == 1
    assert "exists: name another folder, or say --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_the_embodiment_is_a_form_that_no_reader_accepts_or_the_file_given(folder, tmp_path):
    to_native(folder, tmp_path / "native")
    form = (tmp_path / "native" / "embodiment.yaml").read_text()
    with pytest.raises(EmbodimentError) as caught:
        Embodiment.from_yaml(form, "form")
    for key in ("fps", "instruction.topic", "cameras.wrist.topic", "cameras.front.max_age", "state", "action_groups"):
        assert key in str(caught.value), key
    assert "width: 40" in form
    (tmp_path / "arm.yaml").write_text(EMBODIMENT)
    to_native(folder, tmp_path / "given", Options(embodiment=tmp_path / "arm.yaml"))
    assert (tmp_path / "given" / "embodiment.yaml").read_text() == EMBODIMENT


def test_towers_of_published_sizes_need_only_a_tokenizer(tmp_path, monkeypatch):
    """Heads of width 64, QuickGELU for OpenAI's: all else is told by shapes."""
    clip = make_clip(tmp_path / "clip", hidden_size=128, num_attention_heads=2, intermediate_size=256)
    edit_json(clip / "config.json", text_config=text_config(clip, num_attention_heads=1))
    other = their_policy(their_config(clip))
    folder = save_theirs(tmp_path / "pretrained_model", other, their_stats())
    observations = make_observations(other.config)
    before, _ = make_pre_post_processors(other.config, str(folder))
    with torch.no_grad():  # the towers' output, of size 16: a chunk would magnify its rounding
        expected = other.observation_encoder.encode(other._prepare_batch(before(dict(observations))))
    edit_json(folder / "config.json", vision_encoder_name="openai/clip-vit-x", text_encoder_name="openai/clip-vit-x")
    tokenizer = tmp_path / "openai"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(clip / name, tokenizer / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InteropError, match=r"which activation .* cannot be told"):
        to_native(folder, tmp_path / "native", Options(clip=str(tokenizer)))
    (tokenizer / "clip-vit-x").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(clip / name, tokenizer / "clip-vit-x" / name)
    summary = to_native(folder, tmp_path / "native", Options(clip="openai/clip-vit-x"))
    assert sum("inferred from its tensors" in note for note in summary.notes) == 2
    with torch.no_grad():
        actual = load_checkpoint(tmp_path / "native").encode(observations)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def text_config(clip, **changes):
    return json.loads((clip / "config.json").read_text())["text_config"] | changes
