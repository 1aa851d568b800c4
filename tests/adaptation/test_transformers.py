"""midl.adapt on transformers' models, built from configurations with random weights."""

import pytest
import torch

import midl

transformers = pytest.importorskip("transformers")


def bert():
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=256
        )
    )


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=100, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0
        )
    )  # fmt: skip


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_meets_the_budget_on_batches_of_keyword_arguments(make):
    model = make().eval()
    data = [{"input_ids": torch.randint(0, 100, (32, 12))} for _ in range(3)]
    before = midl.count_flops(model, data[0])
    report = midl.adapt(model, data, 1.3, group_size=8)
    assert before / midl.count_flops(model, data[0]) == pytest.approx(report.flops_ratio)
    assert report.flops_ratio >= 1.3
    assert report.error < 0.2
