"""The architectures: sizes, names, budgets, and that every named layer can be replaced."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import midl
from midl.config import num_active_groups
from midl.errors import MIDLError
from midl.lab.data.sets import imdb
from midl.lab.measure import layer_flops
from midl.lab.models import MLP, VGG, Architecture, ResNet, Transformer, architecture_for
from midl.lab.recipes import group_size_for

SMALL: list[Architecture] = [
    MLP(64, (32, 48), 10),
    ResNet(10, widths=(8, 16, 32)),
    VGG(10, widths=(8, 16, 32), depths=(1, 1, 2)),
    Transformer(vocabulary=50, tokens=16, num_classes=2, width=32, inner=64, blocks=2, window=8),
]
small = pytest.mark.parametrize("architecture", SMALL, ids=lambda a: type(a).__name__)


def test_each_data_set_gets_its_architecture() -> None:
    mnist = architecture_for("mnist", (1, 28, 28), 10)
    assert mnist == MLP(784, (1024, 1024), 10)
    assert mnist.build()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    for name, classes in (("cifar10", 10), ("cifar100", 100), ("svhn", 10)):
        assert architecture_for(name, (3, 32, 32), classes) == ResNet(classes)
    transformer = architecture_for("imdb", (imdb.TOKENS,), 2)
    assert isinstance(transformer, Transformer)
    assert transformer.vocabulary == imdb.VOCABULARY


@small
def test_the_same_seed_builds_the_same_network(architecture: Architecture) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(architecture.build())
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert models[0](architecture.example(3)).shape == (3, architecture.num_classes)


@pytest.mark.parametrize(
    ("name", "shape"), [("cifar10", (3, 32, 32)), ("cifar100", (3, 32, 32)), ("imdb", (256,))], ids=str
)
def test_the_named_layers_carry_the_flops_and_suit_their_groups(name: str, shape: tuple[int, ...]) -> None:
    architecture = architecture_for(name, shape, 10)
    group_size = 8 if name == "imdb" else group_size_for(name)
    model = architecture.build()
    flops = layer_flops(model, architecture.example(), architecture.layer_names)
    assert sum(flops.values()) > 0.9 * midl.count_flops(model, architecture.example())
    for layer_name in architecture.layer_names:
        layer = model.get_submodule(layer_name)
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        groups, rest = divmod(layer.weight.shape[0], group_size)
        assert rest == 0
        assert num_active_groups(0.45, groups) / groups < 0.455


@small
def test_every_named_layer_and_no_other_can_become_a_mid_layer(architecture: Architecture) -> None:
    model = architecture.build()
    names = architecture.layer_names
    config = midl.MIDConfig(active=0.5, group_size=8, rank=2)
    midl.convert_(model, config, filter_fn=lambda module, name: name in names)
    converted = [n for n, m in model.named_modules() if isinstance(m, (midl.MIDLinear, midl.MIDConv2d))]
    assert converted == names
    loss = model(architecture.example(4)).square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@small
@pytest.mark.parametrize("ratio", [1.7, 3.0])
def test_narrow_is_within_the_budget_and_uses_it(architecture: Architecture, ratio: float) -> None:
    budget = int(midl.count_flops(architecture.build(), architecture.example()) / ratio)
    narrow = architecture.narrow(budget)
    flops = midl.count_flops(narrow.build(), narrow.example())
    assert 0.85 * budget < flops <= budget
    assert narrow.layer_names == architecture.layer_names


@small
def test_the_full_budget_changes_nothing_and_an_impossible_one_is_an_error(architecture: Architecture) -> None:
    assert architecture.narrow(midl.count_flops(architecture.build(), architecture.example())) == architecture
    with pytest.raises(MIDLError, match=rf"{type(architecture).__name__}\.narrow: flops=10, expected at least \d+"):
        architecture.narrow(10)


@pytest.mark.parametrize("flops", [5_000, 60_000, 168_960])
def test_a_narrow_mlp_is_the_widest_that_fits(flops: int) -> None:
    narrow = MLP(64, (256, 256), 10).narrow(flops)
    (width, same) = narrow.hidden
    assert width == same

    def cost(w: int) -> int:
        return 2 * (64 * w + w * w + w * 10)

    assert cost(width) <= flops
    assert width == 256 or cost(width + 1) > flops
    assert midl.count_flops(narrow.build(), narrow.example()) == cost(width)


@small
def test_dropout_acts_in_training_alone_and_keeps_the_state_dict(architecture: Architecture) -> None:
    dropped = dataclasses.replace(architecture, dropout=0.5)
    model, plain = dropped.build(), architecture.build()
    model.load_state_dict(plain.state_dict())
    x = torch.ones_like(architecture.example(4))
    assert torch.equal(model.eval()(x), plain.eval()(x))
    torch.manual_seed(0)
    assert not torch.equal(model.train()(x), model(x))


def test_padding_changes_nothing_for_the_tokens_before_it() -> None:
    torch.manual_seed(0)
    model = Transformer(vocabulary=50, tokens=16, num_classes=2, width=32, inner=64, window=8).build().eval()
    model.requires_grad_(False)
    ids = torch.randint(2, 50, (1, 16))
    ids[:, 5:] = 0
    expected = model(ids)
    model.embedding.weight[0] = 7.0  # what padding's vector is must not matter
    assert torch.allclose(model(ids), expected, atol=1e-6)
    model.position[5:] = 3.0
    assert torch.allclose(model(ids), expected, atol=1e-6)


def test_a_row_of_padding_alone_is_finite_and_gives_finite_gradients() -> None:
    model = Transformer(vocabulary=50, tokens=16, num_classes=2, width=32, inner=64, window=8).build()
    ids = torch.zeros(2, 16, dtype=torch.long)
    ids[1, :3] = 7
    output = model(ids)
    output.sum().backward()
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_tokens_see_their_window_and_nothing_beyond() -> None:
    torch.manual_seed(0)
    model = Transformer(vocabulary=50, tokens=16, num_classes=2, width=32, inner=64, window=8).build()
    block = model.block1
    x = torch.randn(1, 16, 32, requires_grad=True)
    block(x, torch.ones(1, 16, dtype=torch.bool))[0, 9].sum().backward()
    assert x.grad is not None
    assert (x.grad[0].abs().sum(-1) > 0).nonzero().flatten().tolist() == list(range(8, 16))
