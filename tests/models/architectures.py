"""Small models of the architectures people have, with random weights and inputs for each."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

import midl

CONFIG = midl.MIDConfig(active=0.45, rank=2, group_size=4, gate="light", interpolation="hard")

_TEXT = {"vocab_size": 96, "max_position_embeddings": 32}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def bert() -> nn.Module:
    return hf.BertModel(hf.BertConfig(**_SIZES, **_TEXT))


def gpt2() -> nn.Module:
    config = hf.GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=96, n_positions=32, **_TOKENS)
    return hf.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES, **_TEXT, **_TOKENS, num_key_value_heads=2))


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**_SIZES, image_size=16, patch_size=4, num_labels=10))


def resnet() -> nn.Module:
    config = hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=10
    )  # fmt: skip
    return hf.ResNetForImageClassification(config)


def convnext() -> nn.Module:
    config = hf.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, num_labels=10)
    return hf.ConvNextForImageClassification(config)


BUILDERS = {f.__name__: f for f in (bert, gpt2, llama, vit, resnet, convnext)}


def build(name: str) -> nn.Module:
    """Return the model in evaluation mode, the same weights every time."""
    torch.manual_seed(0)
    return BUILDERS[name]().eval()


def inputs(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name in ("bert", "gpt2", "llama"):
        return {"input_ids": torch.randint(3, 96, (2, 8), generator=generator)}
    size = 16 if name == "vit" else 32
    return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}


def output(model: nn.Module, given: dict[str, Any]) -> torch.Tensor:
    return model(**given)[0]
