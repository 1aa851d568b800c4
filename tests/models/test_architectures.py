"""Each architecture end to end: convert, run, train, record, save, copy, revert."""

from __future__ import annotations

import copy

import pytest
import torch

import midl
from midl.layers import MIDLayer

pytest.importorskip("transformers")
from architectures import BUILDERS, CONFIG, build, inputs, output

each_model = pytest.mark.parametrize("name", list(BUILDERS))

# Layers whose width the groups of four do not divide, and what has no MID-L counterpart; all else is converted.
KEPT = {
    "bert": {"LayerNorm", "Embedding"},
    "gpt2": {"LayerNorm", "Embedding"},
    "llama": {"LlamaRMSNorm", "Embedding"},
    "vit": {"LayerNorm", "ViTEmbeddings", "Linear"},
    "resnet": {"BatchNorm2d", "Linear"},
    "convnext": {"ConvNextLayerNorm", "ConvNextLayer", "LayerNorm", "Conv2d", "Linear"},
}


def converted(name, **changes):
    model = build(name)
    midl.convert_(model, CONFIG.replace(**changes))
    return model


def mid_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, MIDLayer)}


@each_model
def test_every_dense_layer_converts_and_the_report_says_why_the_others_did_not(name):
    model = build(name)
    dense = {n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D", "Conv2d")}
    report = midl.convert_(model, CONFIG, example_inputs=inputs(name))
    assert {c.name for c in report.changed} == set(mid_layers(model))
    assert {c.kind for c in report.kept} == KEPT[name]
    kept_dense = {c.name: c.detail for c in report.kept if c.name in dense}
    assert dense == kept_dense.keys() | {c.name for c in report.changed}
    for layer, detail in kept_dense.items():
        assert "does not divide out_features=10" in detail or ("dwconv" in layer and "grouped convolution" in detail)
    assert all("no MID-L counterpart" in c.detail for c in report.kept if c.name not in dense)
    assert report.flops_after < report.flops_before


@each_model
@torch.no_grad()
def test_all_groups_give_the_dense_output_and_revert_gives_the_model_back_bit_for_bit(name):
    model, given = build(name), inputs(name)
    expected, state = output(model, given), copy.deepcopy(model.state_dict())
    midl.convert_(model, CONFIG)
    assert not torch.allclose(output(model, given), expected, rtol=1e-3, atol=1e-3)
    midl.set_active(model, 1.0)
    torch.testing.assert_close(output(model, given), expected, rtol=1e-4, atol=1e-5)
    midl.revert_(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert torch.equal(output(model, given), expected)


@each_model
def test_training_reaches_every_parameter_of_every_layer_and_the_recording_sees_all(name):
    model = converted(name, gate="projection", interpolation="sigmoid", noise=0.1).train()
    layers = mid_layers(model)
    with midl.record_activity(model) as activity:
        out = model(**inputs(name))
    # BERT's pooler and the others' heads are all behind one of these.
    loss = sum(t.square().sum() for t in (out[0], out.get("pooler_output")) if t is not None)
    loss.backward()
    assert activity.keys() == layers.keys()
    for layer_name, layer in layers.items():
        assert activity[layer_name].fraction_active == pytest.approx(layer.num_selected / layer.num_groups)
        for parameter_name, parameter in layer.named_parameters():
            # A key's bias shifts all scores of a query alike, so its gradient is zero; the rest must move.
            assert parameter.grad.isfinite().all(), f"{layer_name}.{parameter_name}"
            assert parameter.grad.any() or parameter_name in ("bias", "gate_bias"), f"{layer_name}.{parameter_name}"


@each_model
@torch.no_grad()
def test_saved_converted_models_load_into_fresh_dense_ones_and_copies_are_equal(name, tmp_path):
    model, given = converted(name), inputs(name)
    expected = output(model, given)
    torch.testing.assert_close(output(copy.deepcopy(model), given), expected)
    midl.save(model, tmp_path / "model.safetensors")
    with torch.random.fork_rng():
        fresh = BUILDERS[name]().eval()
    midl.load_(fresh, tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True))
    torch.testing.assert_close(output(fresh, given), expected)


@pytest.mark.parametrize(
    "name", ["gpt2", "convnext", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "llama", "vit", "resnet"))]
)
@torch.no_grad()
def test_torch_compile_traces_the_whole_model_as_one_graph(name):
    model, given = converted(name), inputs(name)
    expected = output(model, given)
    torch._dynamo.reset()
    torch.testing.assert_close(output(torch.compile(model, fullgraph=True, backend="eager"), given), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_inductor_compiles_forward_and_backward(name):
    model, given = converted(name), inputs(name)
    output(model, given).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    output(torch.compile(model, fullgraph=True), given).square().sum().backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    # A compiled graph gives zeros where the loss does not reach (BERT's pooler), eager torch gives None.
    assert not any(got.pop(n).any() for n in got.keys() - expected.keys())
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_generation_with_and_without_a_cache_gives_the_same_tokens(name):
    model = converted(name)
    prompt = inputs(name)["input_ids"][:1]
    arguments = {
        "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt),
    }  # fmt: skip
    cached = model.generate(prompt, use_cache=True, **arguments)
    assert cached.shape == (1, 14)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **arguments))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradient_checkpointing_recomputes_the_same_selection(name):
    def gradients(model):
        model.train()
        output(model, inputs(name)).square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    model = converted(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable()
    with midl.kernels("dense"):
        torch.testing.assert_close(gradients(checkpointed), gradients(model))


@torch.no_grad()
def test_flops_of_bert_equal_the_hand_count():
    batch, tokens, width, hidden, blocks = 2, 8, 32, 64, 2
    rank, rows = CONFIG.rank, batch * tokens
    groups = {32: 4, 64: 7}  # round(0.45 * n / 4) of n / 4

    def layer(rows, d, n):
        return 2 * rows * (rank * d + rank * n + groups[n] * 4 * d)

    attention = 2 * (2 * batch * tokens * tokens * width)
    block = 4 * layer(rows, width, width) + attention + layer(rows, width, hidden) + layer(rows, hidden, width)
    assert midl.count_flops(converted("bert"), inputs("bert")) == blocks * block + layer(batch, width, width)
