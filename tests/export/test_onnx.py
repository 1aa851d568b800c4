"""midl.export.onnx_translations: onnxruntime computes what the layers compute, from the same groups."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from exporting import WithSelections, conv_layers, converted_network, dynamic_sizes, ffns, linear_layers, small_integers

import midl
import midl.export
from midl.errors import MIDLError

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def run_in_onnxruntime(model, x, path, *dynamic):
    """Export ``model`` and return a function that runs it in onnxruntime, with outputs as a flat list."""
    table = midl.export.onnx_translations()
    shapes = dynamic_sizes(*(dynamic or (0,)))
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    torch.onnx.export(program, f=path, custom_translation_table=table, verbose=False)
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(out) for out in session.run(None, {name: x.numpy()})]


def assert_equal_runs(run, model, x):
    with midl.kernels("reference"):
        outputs, selections = model(x)
    got = run(x)
    got_outputs, got_selections = got[: len(outputs)], got[len(outputs) :]
    assert all(torch.equal(a, b) for a, b in zip(got_selections, selections, strict=True))
    assert all(selected.dtype == torch.int32 for selected in got_selections)
    torch.testing.assert_close(got_outputs, outputs, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(
    ("layers", "shapes", "dynamic"),
    [
        (linear_layers, [(4, 7, 12), (3, 8, 12)], (0, 1)),
        (ffns, [(4, 7, 12), (3, 8, 12)], (0, 1)),
        (conv_layers, [(4, 3, 7, 9), (3, 3, 8, 11)], (0, 2, 3)),
    ],
)
def test_outputs_and_selected_groups_equal_the_layers(tmp_path, layers, shapes, dynamic):
    model = layers()
    run = run_in_onnxruntime(model, small_integers(*shapes[0]), tmp_path / "m.onnx", *dynamic)
    for shape in shapes:
        assert_equal_runs(run, model, small_integers(*shape))


def test_ties_go_to_the_lowest_index_and_nan_ranks_last(tmp_path):
    def layer(active):
        layer = midl.MIDLinear(4, 512, active=active, rank=1, gate="light", interpolation="hard", bias=False)
        with torch.no_grad():
            layer.weight.zero_()
            layer.light_down.zero_()[0, 0] = 1
            layer.light_up.copy_(torch.randint(0, 3, (512, 1)))  # three values: hundreds of ties
        return layer

    model = WithSelections(*(layer(active) for active in (0.002, 0.1, 0.5, 1.0))).eval()
    x = torch.ones(3, 4)
    x[1] = float("nan")
    run = run_in_onnxruntime(model, x, tmp_path / "m.onnx")
    assert_equal_runs(run, model, x)
    assert run(x)[5][1].tolist() == list(range(51))


def test_a_converted_network_keeps_its_choices_in_operators_of_the_standard(tmp_path):
    model = WithSelections(converted_network())
    run = run_in_onnxruntime(model, torch.randn(4, 3, 8, 8), tmp_path / "m.onnx")
    for batch in (1, 6):
        assert_equal_runs(run, model, torch.randn(batch, 3, 8, 8))
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert {node.domain for node in graph.node} == {""}
    assert any(node.op_type == "TopK" for node in graph.node)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.float16])
def test_other_precisions(tmp_path, dtype):
    layer = midl.MIDLinear(12, 32, rank=2, group_size=4, dtype=dtype).eval()
    x = torch.randn(5, 12, dtype=dtype)
    (y,) = run_in_onnxruntime(layer, x, tmp_path / "m.onnx")(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, layer(x))


def test_exploration_noise_is_an_error_that_names_eval(tmp_path):
    layer = midl.MIDLinear(12, 32, rank=2, noise=1.0)
    with pytest.raises(Exception, match="ONNX") as error:
        run_in_onnxruntime(layer, torch.randn(5, 12), tmp_path / "m.onnx")
    assert "expected model.eval() before the export" in str(error.getrepr(chain=True))


def test_without_onnxscript_the_error_names_the_extra():
    code = "import sys; sys.modules['onnxscript'] = None; import midl.export; midl.export.onnx_translations()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert MIDLError.__name__ in done.stderr
    assert "pip install 'midl[export]'" in done.stderr
