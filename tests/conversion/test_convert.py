"""convert_, revert_: what is replaced, what is kept and why, and that nothing is lost on the way."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import midl
from midl.errors import MIDLError
from midl.layers.lowrank import truncated_svd

CONFIG = midl.MIDConfig(active=0.45, group_size=8, rank=2)


class Block(nn.Module):
    """A residual block with a grouped convolution, as ResNeXt has."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.grouped = nn.Conv2d(channels, channels, 3, padding=1, groups=4)

    def forward(self, x):
        return x + self.grouped(F.relu(self.bn(self.conv1(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding="valid")
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 10))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def test_converts_nested_modules_and_says_for_each_layer_what_happened():
    net = Net()
    report = midl.convert_(net, CONFIG)
    assert {c.name for c in report.changed} == {"stem", "blocks.0.conv1", "blocks.1.conv1", "head.0"}
    kept = {c.name: c.detail for c in report.kept}
    assert "grouped convolution (groups=4)" in kept["blocks.0.grouped"]
    assert "no MID-L counterpart of BatchNorm2d" in kept["blocks.0.bn"]
    assert "group_size=8 does not divide out_features=10" in kept["head.2"]
    assert isinstance(net.stem, midl.MIDConv2d)
    assert isinstance(net.head[0], midl.MIDLinear)
    assert net(torch.randn(2, 3, 9, 9)).shape == (2, 10)
    text = str(report)
    assert "stem" in text
    assert "fewer FLOPs in the changed layers" in text


def test_report_counts_parameters_and_flops_before_and_after():
    net, x = Net(), torch.randn(1, 3, 9, 9)
    parameters, flops = sum(p.numel() for p in net.parameters()), midl.count_flops(net, x)
    report = midl.convert_(net, CONFIG, example_inputs=x)
    assert report.parameters_before == parameters
    assert report.parameters_after == sum(p.numel() for p in net.parameters())
    assert report.flops_before == flops
    assert report.flops_after == midl.count_flops(net, x) < flops
    by_name = {c.name: c for c in report.changed}
    head = net.head[0]
    assert by_name["head.0"].flops_before == 2 * 16 * 64
    assert by_name["head.0"].flops_after == midl.count_flops(head, torch.zeros(1, 16))
    before, after = (sum(getattr(c, f) for c in report.changed) for f in ("flops_before", "flops_after"))
    assert report.flops_ratio == before / after > 1


def test_all_groups_and_hard_interpolation_give_the_dense_output():
    net, x = Net().eval(), torch.randn(2, 3, 9, 9)
    expected = net(x)
    midl.convert_(net, CONFIG.replace(active=1.0, rank=2, interpolation="hard"))
    torch.testing.assert_close(net(x), expected)


def test_revert_gives_back_the_very_same_parameters_and_outputs():
    net, x = Net().eval(), torch.randn(2, 3, 9, 9)
    expected, state = net(x), copy.deepcopy(net.state_dict())
    weight = net.stem.weight
    midl.convert_(net, CONFIG)
    report = midl.revert_(net)
    assert type(net.stem) is nn.Conv2d
    assert net.stem.weight is weight
    assert net.stem.padding == "valid"
    assert len(report.changed) == 4
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), state.values(), strict=True))
    assert torch.equal(net(x), expected)


def test_keeps_weight_and_bias_objects_training_flag_and_frozen_parameters():
    net = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64)).eval()
    net[1].requires_grad_(False)
    weights = [layer.weight for layer in net]
    midl.convert_(net, CONFIG)
    assert [layer.weight for layer in net] == weights
    assert not net[0].training
    assert all(p.requires_grad for p in net[0].parameters())
    assert not any(p.requires_grad for p in net[1].parameters())


def test_shared_module_is_converted_once_and_stays_shared():
    shared = nn.Linear(32, 32)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    report = midl.convert_(net, CONFIG)
    assert net["a"] is net["b"][0]
    assert isinstance(net["a"], midl.MIDLinear)
    assert len(report.changed) == 1
    midl.revert_(net)
    assert net["a"] is net["b"][0]


def test_tied_weights_stay_tied():
    net = nn.ModuleDict({"embed": nn.Embedding(64, 32), "out": nn.Linear(32, 64, bias=False)})
    net["out"].weight = net["embed"].weight
    midl.convert_(net, CONFIG)
    assert net["out"].weight is net["embed"].weight
    midl.revert_(net)
    assert net["out"].weight is net["embed"].weight


def test_filter_fn_sees_module_and_qualified_name():
    net, seen = Net(), {}
    report = midl.convert_(net, CONFIG, lambda module, name: seen.setdefault(name, module) is None or "head" in name)
    assert {c.name for c in report.changed} == {"head.0"}
    assert seen["blocks.1.conv1"] is net.blocks[1].conv1
    assert "filter_fn returned False" in {c.detail for c in report.kept}
    assert "blocks.0.grouped" not in seen


def test_overrides_by_name_and_pattern():
    net = Net()
    midl.convert_(
        net, CONFIG, overrides={"blocks.0.*": None, "blocks.*": {"active": 0.25}, "head.0": CONFIG.replace(rank=3)}
    )
    assert type(net.blocks[0].conv1) is nn.Conv2d
    assert net.blocks[1].conv1.active == 0.25
    assert net.blocks[1].conv1.config.group_size == 8
    assert net.head[0].rank == 3


def test_an_override_that_matches_nothing_is_an_error_and_nothing_changes():
    net = Net()
    with pytest.raises(MIDLError, match=r"overrides: 'blocks.9.\*' matches no dense layer.*blocks"):
        midl.convert_(net, CONFIG, overrides={"blocks.9.*": None})
    with pytest.raises(MIDLError, match="matches no dense layer"):
        midl.convert_(net, CONFIG, overrides={"blocks.0.bn": None})
    assert not any(isinstance(m, midl.MIDConv2d) for m in net.modules())


def test_an_override_that_does_not_fit_its_layer_is_an_error_and_nothing_changes():
    net = Net()
    with pytest.raises(MIDLError, match=r"head\.2: MIDLinear: group_size=8 does not divide out_features=10"):
        midl.convert_(net, CONFIG, overrides={"head.2": {"active": 0.5}})
    assert type(net.stem) is nn.Conv2d


def test_converting_nothing_is_an_error_that_says_why():
    with pytest.raises(MIDLError, match=r"nothing in the Sequential could be converted: 0: group_size=8 does not"):
        midl.convert_(nn.Sequential(nn.Linear(8, 10)), CONFIG)
    with pytest.raises(MIDLError, match="it has no parameters"):
        midl.convert_(nn.Sequential(nn.ReLU()), CONFIG)
    with pytest.raises(MIDLError, match="has no MID-L layers"):
        midl.revert_(nn.Sequential(nn.Linear(8, 8)))


def test_an_impossible_budget_keeps_the_layer_and_the_report_says_so():
    net = nn.Sequential(nn.Linear(4, 16), nn.Linear(256, 256))
    report = midl.convert_(net, midl.MIDConfig(active=0.45))
    assert [c.name for c in report.changed] == ["1"]
    assert "rank='auto' finds no rank for active=0.45" in report.kept[0].detail


@pytest.mark.parametrize("model", [nn.Linear(8, 8), "no module"])
def test_wrong_root_is_an_error(model):
    with pytest.raises(MIDLError, match="convert_: model is"):
        midl.convert_(model, CONFIG)


def test_wrong_config_type_is_an_error():
    with pytest.raises(MIDLError, match="config is a dict, expected MIDConfig"):
        midl.convert_(Net(), {"active": 0.3})


def test_root_that_is_a_layer_cannot_be_reverted_in_place():
    with pytest.raises(MIDLError, match="use its to_linear"):
        midl.revert_(midl.MIDLinear(8, 8, rank=1))


def test_parametrized_hooked_and_subclassed_layers_are_kept():
    class MyLinear(nn.Linear):
        pass

    hooked = nn.Linear(16, 16)
    hooked.register_forward_hook(lambda *_: None)
    net = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), hooked, MyLinear(16, 16), nn.Linear(16, 16),
        nn.MultiheadAttention(16, 2), nn.Linear(16, 16, device="meta"), midl.MIDLinear(16, 16, rank=1),
    )  # fmt: skip
    report = midl.convert_(net, CONFIG)
    details = {c.name: c.detail for c in report.kept}
    assert [c.name for c in report.changed] == ["3"]
    assert "parametrized (weight)" in details["0"]
    assert "has hooks" in details["1"]
    assert "MyLinear is a subclass of nn.Linear" in details["2"]
    assert "no MID-L counterpart of MultiheadAttention" in details["4"]
    assert "subclass of nn.Linear" in details["4.out_proj"]
    assert "meta device" in details["5"]
    assert "is a MIDLinear already" in details["6"]


def test_transformer_encoder_evaluates_the_converted_ffn_and_not_torchs_fused_kernel():
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 32)
    with torch.no_grad():
        dense = encoder(x)
        midl.convert_(encoder, midl.MIDConfig(active=0.25, group_size=8))
        with midl.record_activity(encoder) as activity:
            sparse = encoder(x)
        assert activity.fraction_active == 0.25
        assert not torch.allclose(dense, sparse, atol=1e-4)
        midl.revert_(encoder)
        assert encoder.layers[0].activation_relu_or_gelu == 1
        torch.testing.assert_close(encoder(x), dense)


def test_huggingface_conv1d_converts_and_reverts():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    net, x = nn.Sequential(Conv1D(64, 32), nn.GELU(), Conv1D(32, 64)), torch.randn(3, 32)
    expected, state = net(x), copy.deepcopy(net.state_dict())
    midl.convert_(net, midl.MIDConfig(active=1.0, rank=2, interpolation="hard"))
    assert isinstance(net[0], midl.MIDLinear)
    torch.testing.assert_close(net(x), expected)
    midl.revert_(net)
    assert isinstance(net[0], Conv1D)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in state.items())
    assert torch.equal(net(x), expected)


def test_huggingface_conv1d_with_a_tied_weight_is_kept():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    net = nn.ModuleDict({"a": Conv1D(32, 32), "b": nn.Linear(32, 32), "c": nn.Linear(32, 32)})
    net["b"].weight = net["a"].weight
    report = midl.convert_(net, CONFIG)
    assert {c.name: c.detail for c in report.kept} == {
        "a": "its weight is tied to another module's, and Conv1D stores it transposed"
    }


def test_gpt2_converts_end_to_end():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.arange(8)[None]
    report = midl.convert_(model, CONFIG, overrides={"lm_head": None})
    assert sum(c.kind == "Conv1D" for c in report.changed) == 8
    assert model.lm_head.weight is model.transformer.wte.weight
    model(tokens, labels=tokens).loss.backward()
    assert model.transformer.h[0].mlp.c_fc.light_up.grad is not None


def test_light_path_of_a_converted_layer_is_the_truncated_svd_of_its_weight():
    dense = nn.Linear(24, 40, dtype=torch.float64)
    layer = midl.MIDLinear.from_linear(dense, rank=5)
    u, s, vh = torch.linalg.svd(dense.weight)
    best = u[:, :5] * s[:5] @ vh[:5]
    torch.testing.assert_close(layer.light_up @ layer.light_down, best)


def test_conversion_does_not_touch_the_random_state():
    net = nn.Sequential(nn.Linear(1100, 1100))
    state = torch.get_rng_state()
    midl.convert_(net, midl.MIDConfig(rank=8, group_size=10))
    assert torch.equal(torch.get_rng_state(), state)


def test_reverting_a_parametrized_layer_is_an_error_that_says_what_to_do():
    net, x = nn.Sequential(nn.Linear(16, 32), nn.Conv2d(8, 16, 1)), torch.randn(3, 16)
    midl.convert_(net, CONFIG)
    expected = net[0](x)
    for layer in net:
        nn.utils.parametrizations.weight_norm(layer)
    torch.testing.assert_close(net[0](x), expected)
    with pytest.raises(MIDLError, match=r"weight is parametrized, expected .*remove_parametrizations first"):
        midl.revert_(net)
    with pytest.raises(MIDLError, match=r"MIDConv2d\.to_conv2d"):
        net[1].to_conv2d()
    for layer in net:
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
    midl.revert_(net)
    assert type(net[0]) is nn.Linear


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_light_path_of_a_large_weight_is_within_a_hundredth_of_the_best_fit(decay):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1100, 1100, generator=generator)
    weight += decay * torch.randn(1100, 32, generator=generator) @ torch.randn(32, 1100, generator=generator)
    down, up = truncated_svd(weight, 24)
    best = torch.linalg.svdvals(weight)[24:].square().sum().sqrt()
    assert best * 0.999 <= (weight - up @ down).norm() <= best * 1.01
