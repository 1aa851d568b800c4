"""The FFNs of each transformer as blocks: found, run, trained, saved, compiled, reverted."""

from __future__ import annotations

import pytest
import torch

import midl
from midl import MIDFFN

pytest.importorskip("transformers")
from architectures import CONFIG, build, inputs, output

BLOCKS = {
    "bert": "encoder.layer.{}.intermediate.dense",
    "gpt2": "transformer.h.{}.mlp.c_fc",
    "llama": "model.layers.{}.mlp.gate_proj",
    "vit": "vit.layers.{}.mlp.fc1",
    "convnext": "convnext.encoder.stages.{}.layers.0.pwconv1",
}
each_model = pytest.mark.parametrize("name", list(BLOCKS))


def converted(name, **changes):
    model = build(name)
    midl.convert_(model, CONFIG.replace(**changes), ffn=True)
    return model


@each_model
def test_every_ffn_is_found_and_everything_active_is_the_dense_output(name):
    model, given = build(name), inputs(name)
    expected = output(model, given)
    found = {BLOCKS[name].format(i) for i in (0, 1)}
    report = midl.convert_(
        model, CONFIG.replace(active=1.0), lambda module, where: where in found, ffn=True, example_inputs=given
    )
    assert {n for n, m in model.named_modules() if isinstance(m, MIDFFN)} == found
    assert {c.name for c in report.changed if c.detail.startswith("FFN: ")} == found
    torch.testing.assert_close(output(model, given), expected, rtol=1e-4, atol=1e-5)
    midl.set_active(model, 0.25)
    assert midl.count_flops(model, given) < report.flops_before
    midl.revert_(model)
    assert torch.equal(output(model, given), expected)
    assert [type(m) for m in model.modules()] == [type(m) for m in build(name).modules()]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("bert", "llama") else pytest.mark.slow) for name in BLOCKS]
)
def test_training_reaches_every_parameter_and_the_file_carries_the_blocks(name, tmp_path):
    model, given = converted(name), inputs(name)
    with midl.record_activity(model) as activity:
        output(model, given).float().square().mean().backward()
    for i in (0, 1):
        block = model.get_submodule(BLOCKS[name].format(i))
        assert all(p.grad is not None for p in block.parameters())
        assert activity[BLOCKS[name].format(i)].fraction_active == block.num_selected / block.num_groups
    midl.save(model, tmp_path / "m.safetensors")
    assert torch.equal(output(midl.load_(build(name), tmp_path / "m.safetensors"), given), output(model, given))


@pytest.mark.parametrize("name", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_the_whole_model_compiles_as_one_graph(name):
    torch._dynamo.reset()
    model, given = converted(name), inputs(name)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(output(compiled, given), output(model, given), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
