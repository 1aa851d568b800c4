"""midl.export.decompositions: exported programs in plain aten, equal to the layer, ties and selection included."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from exporting import conv_layers, converted_network, dynamic_sizes, ffns, linear_layers, small_integers

import midl
from midl.export import decompositions


def ops(program):
    return {str(node.target).rpartition(".")[0] for node in program.graph.nodes if node.op == "call_function"} - {""}


def exported(model, x, *dynamic):
    return torch.export.export(model, (x,), dynamic_shapes=dynamic_sizes(*(dynamic or (0,))))


@pytest.mark.parametrize(
    ("layers", "shapes", "dynamic"),
    [
        (linear_layers, [(4, 7, 12), (3, 8, 12)], (0, 1)),
        (ffns, [(4, 7, 12), (3, 8, 12)], (0, 1)),
        (conv_layers, [(4, 3, 7, 9), (2, 3, 7, 9)], (0,)),
        pytest.param(conv_layers, [(4, 3, 7, 9), (3, 3, 8, 11)], (0, 2, 3), marks=pytest.mark.slow),
    ],
)
def test_the_decomposed_program_equals_the_layers(layers, shapes, dynamic):
    model = layers()
    program = exported(model, small_integers(*shapes[0]), *dynamic)
    assert any("midl" in op for op in ops(program))
    program = program.run_decompositions(decompositions())
    assert not any("midl" in op for op in ops(program))
    for shape in shapes:
        x = small_integers(*shape)
        with midl.kernels("reference"):
            outputs, selections = model(x)
        got_outputs, got_selections = program.module()(x)
        assert all(torch.equal(a, b) for a, b in zip(got_selections, selections, strict=True))
        torch.testing.assert_close(got_outputs, outputs)


def test_the_op_is_kept_without_decompositions_and_runs_for_any_batch():
    model = converted_network()
    program = exported(model, torch.randn(4, 3, 8, 8))
    assert {"midl.conv2d", "midl.linear"} <= ops(program)
    for batch in (1, 5):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(program.module()(x), model(x))


def test_the_table_joins_torchs_core_decompositions():
    model, x = converted_network(), torch.randn(4, 3, 8, 8)
    table = torch.export.default_decompositions()
    table.update(decompositions())
    program = exported(model, x).run_decompositions(table)
    assert not any("midl" in op or "repeat_interleave" in op for op in ops(program))
    torch.testing.assert_close(program.module()(x), model(x))


def test_half_precision_accumulates_in_float32_and_returns_half():
    model, x = converted_network().bfloat16(), torch.randn(4, 3, 8, 8, dtype=torch.bfloat16)
    program = exported(model, x).run_decompositions(decompositions())
    with midl.kernels("reference"):
        expected = model(x)
    assert program.module()(x).dtype == torch.bfloat16
    torch.testing.assert_close(program.module()(x), expected)


def run_without_midl(folder, load):
    """Compare, in a process that cannot import midl, ``load`` (an expression) with what xy.pt holds."""
    code = (
        "import sys, torch; sys.modules['midl'] = None; x, y = torch.load('xy.pt'); "
        f"torch.testing.assert_close({load}(x), y)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=folder, check=True)


def test_a_saved_decomposed_program_runs_where_midl_is_not_installed(tmp_path):
    model = converted_network()
    program = exported(model, torch.randn(4, 3, 8, 8)).run_decompositions(decompositions())
    torch.export.save(program, tmp_path / "model.pt2")
    x = torch.randn(6, 3, 8, 8)
    torch.save((x, model(x)), tmp_path / "xy.pt")
    run_without_midl(tmp_path, "torch.export.load('model.pt2').module()")


@pytest.mark.slow
@pytest.mark.parametrize("decompose", [True, False], ids=["decomposed", "op-kept"])
def test_aotinductor_compiles_and_runs(tmp_path, decompose):
    model = converted_network()
    program = exported(model, torch.randn(4, 3, 8, 8))
    if decompose:
        program = program.run_decompositions(decompositions())
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for batch in (2, 6):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(compiled(x), model(x))
    if decompose:
        torch.save((x, model(x)), tmp_path / "xy.pt")
        run_without_midl(tmp_path, "torch._inductor.aoti_load_package('model.pt2')")
