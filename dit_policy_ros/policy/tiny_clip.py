"""A tiny CLIP text tower with a tokenizer, made from nothing: for tests, the demo and machines without a network.

    python -m dit_policy_ros.policy.tiny_clip --output=DIR [--instructions='["push the red block", ...]']

What a policy needs of a frozen text tower is that different instructions give clearly different features,
which the trained projection then learns to read. Random weights nearly do that; `_spread_out` does the rest.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import draccus
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # type: ignore[import-untyped]
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

DEMO_INSTRUCTIONS = [f"push the {colour} block over the line" for colour in ("red", "green", "blue")]


@dataclass
class TinyClipArguments:
    """Where to put the folder, the words that get a token of their own, and the size of the tower."""

    output: Path
    instructions: list[str] = field(default_factory=lambda: list(DEMO_INSTRUCTIONS))
    hidden_size: int = 64
    num_layers: int = 2
    seed: int = 0


def make_tokenizer(instructions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer: one token for each word of the instructions, bytes for whatever else is written."""
    end = "</w>"
    trainee = Tokenizer(models.BPE(end_of_word_suffix=end))
    trainee.pre_tokenizer = pre_tokenizers.Whitespace()
    # With no bound on the vocabulary the trainer merges until every word is one token.
    trainee.train_from_iterator(
        (text.lower() for text in instructions),
        trainers.BpeTrainer(vocab_size=2**20, end_of_word_suffix=end, show_progress=False),
    )
    merges = [tuple(pair) for pair in json.loads(trainee.to_str())["model"]["merges"]]
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [
        *characters,
        *(character + end for character in characters),
        *("".join(pair) for pair in merges),
    ]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges=merges)


def make_tiny_clip(
    folder: Path,
    instructions: list[str] | None = None,
    hidden_size: int = 64,
    num_layers: int = 2,
    seed: int = 0,
) -> None:
    """Writes a folder that `text.model` may name: config.json, model.safetensors and the tokenizer's files."""
    instructions = instructions or DEMO_INSTRUCTIONS
    tokenizer = make_tokenizer(instructions)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=4.0,  # sharper attention than CLIP's own initialisation, so that single words count
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPTextModel(config)
    _spread_out(model, tokenizer, instructions)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def _spread_out(model: CLIPTextModel, tokenizer: CLIPTokenizer, instructions: list[str]) -> None:
    """Sets the last norm so that the instructions' features have zero mean and unit deviation.

    Sentences that share most words have almost the same feature in a random tower (cosines up to 0.99): what
    they share is their mean, and it is taken out.
    """
    if len(set(instructions)) < 2:
        return
    model.eval()
    features = model(**tokenizer(instructions, padding=True, return_tensors="pt")).pooler_output
    mean = features.mean(dim=0)
    scale = 1 / (features - mean).std()
    norm = model.text_model.final_layer_norm
    norm.weight.copy_(norm.weight * scale)
    norm.bias.copy_((norm.bias - mean) * scale)


@draccus.wrap()
def main(arguments: TinyClipArguments) -> None:
    """Makes the folder and says what was made."""
    make_tiny_clip(
        arguments.output, arguments.instructions, arguments.hidden_size, arguments.num_layers, arguments.seed
    )
    size = sum(file.stat().st_size for file in arguments.output.iterdir())
    print(f"{arguments.output}: a CLIP text tower and its tokenizer, {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
