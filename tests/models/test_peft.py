"""LoRA beside and on MID-L layers, with peft."""

from __future__ import annotations

import copy

import pytest
import torch

import midl

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from architectures import CONFIG, build, inputs  # noqa: E402

ADAPTER = {"r": 2, "lora_alpha": 4}


@pytest.fixture
def model():
    """A LLaMA whose FFNs are converted and whose attention is dense."""
    model = build("llama")
    midl.convert_(model, CONFIG, overrides={"*self_attn*": None, "lm_head": None})
    return model


def train_a_step(model):
    """Move every adapter away from its start, where it adds nothing."""
    given = inputs("llama")
    model(**given, labels=given["input_ids"]).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.sign(), alpha=0.05)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_adapters_on_the_dense_layers_of_a_converted_model_train_and_merge(model, targets):
    given = inputs("llama")
    expected = model(**given).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **ADAPTER))
    assert not any("mlp" in name for name, p in adapted.named_parameters() if p.requires_grad)
    torch.testing.assert_close(adapted(**given).logits, expected)
    train_a_step(adapted)
    moved = adapted(**given).logits
    assert not torch.allclose(moved, expected, atol=1e-3)
    with midl.record_activity(adapted) as activity:
        adapted(**given)
    assert len(activity) == 6
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**given).logits, moved, rtol=1e-3, atol=1e-4)


def test_naming_a_mid_layer_as_target_is_pefts_error(model):
    with pytest.raises(ValueError, match=r"MIDLinear.* is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"], **ADAPTER))


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_a_mid_layer_takes_an_adapter_beside_it_once_registered(model):
    given, config = inputs("llama"), peft.LoraConfig(target_modules=["up_proj"], **ADAPTER)
    expected = model(**given).logits
    config._register_custom_module({midl.MIDLinear: peft.tuners.lora.Linear})
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    torch.testing.assert_close(adapted(**given).logits, expected)
    train_a_step(adapted)
    assert not torch.allclose(adapted(**given).logits, expected, atol=1e-4)
    assert {n.split(".")[-3] for n, p in adapted.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_converting_after_lora_keeps_the_adapters_where_they_are_excluded():
    given = inputs("llama")
    adapted = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["up_proj"], **ADAPTER))
    train_a_step(adapted)
    expected = adapted(**given).logits
    report = midl.convert_(adapted, CONFIG.replace(active=1.0), overrides={"*lora_*": None})
    assert any(c.name.endswith("up_proj.base_layer") for c in report.changed)
    assert all(c.detail == "kept dense by overrides" for c in report.kept if "lora" in c.name)
    torch.testing.assert_close(adapted(**given).logits, expected, rtol=1e-3, atol=1e-4)
