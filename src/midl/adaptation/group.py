"""group: neurons that matter together share a group, in models where nobody can see the order of the neurons."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from midl.adaptation.calibrate import Moments, weight_of
from midl.adaptation.light_path import fit_light_path, middle_rank
from midl.adaptation.measure import output_error
from midl.adaptation.sensitivity import sample_outputs

__all__ = ["Chain", "find_chains", "group_neurons", "order_neurons", "permute"]

_CHANNELWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Softplus, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d,
    nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


# Relative squared change of the output that rounding can explain, in half precision too; a neuron out of place changes
# it by orders of magnitude more.
_ROUNDING = 1e-4


class Chain(NamedTuple):
    """A layer whose neurons can change places: all that reads them is a norm per channel and one following layer."""

    layer: nn.Module
    norms: tuple[nn.Module, ...]
    following: nn.Module


def find_chains(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Chain]:
    """Return the chains of those ``layers`` whose order of neurons is invisible from outside, by structure.

    That is where a plain nn.Sequential holds the layer, then only modules that treat every channel alike or, batch
    normalisation, by parameters of its own, and then an nn.Linear or nn.Conv2d that mixes them; each of them once in
    the model and with parameters and hooks of nobody else's.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> list(find_chains(model, {"0": model[0], "2": model[2]}))
    ['0']
    """
    names = {id(module): name for name, module in layers.items()}
    uses = collections.Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    holders = collections.Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))

    def alone(module: nn.Module) -> bool:
        parameters = (holders[id(p)] == 1 for p in module.parameters(recurse=False))
        return uses[id(module)] == 1 and all(parameters) and not module._forward_hooks and not module._forward_pre_hooks

    chains = {}
    for container in model.modules():
        if type(container) is not nn.Sequential:
            continue
        children = list(container)
        for i, layer in enumerate(children):
            if id(layer) in names and alone(layer):
                chain = _follow(layer, children[i + 1 :])
                if chain is not None and all(alone(m) for m in (*chain.norms, chain.following)):
                    chains[names[id(layer)]] = chain
    return chains


def _follow(layer: Any, behind: list[nn.Module]) -> Chain | None:
    """Return the chain from ``layer`` through the modules ``behind`` it, or None."""
    norms: list[nn.Module] = []
    flat = type(layer) is nn.Linear
    n = layer.weight.shape[0]
    for module in behind:
        if type(module) in _CHANNELWISE:
            continue
        if type(module) in _NORMS and module.num_features == n:  # type: ignore[comparison-overlap]
            norms.append(module)
        elif type(module) is nn.Flatten and not flat and module.start_dim == 1 and module.end_dim == -1:
            flat = True
        elif _mixes(module, n, flat):
            return Chain(layer, tuple(norms), module)
        else:
            return None
    return None


def _mixes(module: nn.Module, n: int, flat: bool) -> bool:
    """Return whether ``module`` reads n channels (flattened: equal blocks of inputs) through one weight matrix."""
    if type(module) is nn.Linear:
        return flat and module.in_features % n == 0
    return type(module) is nn.Conv2d and not flat and module.groups == 1


@torch.no_grad()
def permute(chain: Chain, order: Tensor) -> None:
    """Put the neurons of a chain's layer into ``order``, in place; the chain's output stays the same.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> x = torch.randn(5, 4)
    >>> y = model(x)
    >>> permute(Chain(model[0], (), model[2]), torch.tensor([2, 0, 1]))
    >>> torch.allclose(model(x), y, atol=1e-6)
    True
    """
    for module in (chain.layer, *chain.norms):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.dim():
                tensor.copy_(tensor[order])
    weight: Any = chain.following.weight
    blocks = weight.view(weight.shape[0], len(order), -1)  # a flattened channel is a block of inputs
    weight.copy_(blocks[:, order].reshape(weight.shape))
    torch.clear_autocast_cache()  # which has the weights as they were


def order_neurons(energy: Tensor, group_size: int) -> Tensor:
    """Return an order of the neurons in which each run of ``group_size`` tends to matter in the same rows.

    Greedy: the neuron of largest total energy that is left, then those whose energies over the rows are most like its
    own (cosine of their roots), until the group is full.

    >>> energy = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 2.0, 0.0, 2.0]])
    >>> order_neurons(energy, 2).tolist()
    [1, 3, 0, 2]

    Args:
        energy: (rows, n), at least 0.
        group_size: divides n.
    """
    vectors = energy.float().sqrt()
    size = vectors.norm(dim=0)
    similarity = (vectors / size.clamp(min=1e-30)).T @ (vectors / size.clamp(min=1e-30))
    similarity.fill_diagonal_(torch.inf)
    left = torch.ones(len(size), dtype=torch.bool, device=size.device)
    order = []
    for _ in range(len(size) // group_size):
        leader = int(torch.where(left, size, -1).argmax())
        members = torch.where(left, similarity[leader], -1).topk(group_size).indices
        left[members] = False
        order.append(members)
    return torch.cat(order)


def group_neurons(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    moments: dict[str, Moments],
    batches: Sequence[Any],
    expected: Sequence[Tensor],
    *,
    group_size: int,
    seed: int = 0,
) -> set[str]:
    """Permute the neurons of every layer where it cannot be seen from outside, in place; return the layers' names.

    Afterwards neurons that tend to lose much on the light path in the same rows share a group. The model computes what
    it did: a permutation that changes its output, because something reads the neurons past the structure, is undone.

    Args:
        model: dense; its weights change places.
        layers: name to layer.
        moments: of every layer; those of the permuted ones are replaced.
        batches: inputs of the model.
        expected: its outputs on the first of them.
        group_size: divides the layers' widths.
        seed: of the random choices.
    """
    permuted = set()
    for name, chain in find_chains(model, layers).items():
        weight = weight_of(chain.layer)
        path = fit_light_path(weight, moments[name].principal_outputs(), middle_rank(weight))
        rows = sample_outputs(model, name, chain.layer, path, batches, seed=seed)
        if not rows.weight.any():
            continue
        light = rows.full @ (path.up @ path.reader).T.to(rows.full.dtype)
        order = order_neurons(rows.energy(light, 1), group_size)
        permute(chain, order)
        if output_error(model, batches[:1], expected[:1]) > _ROUNDING:
            permute(chain, order.argsort())
            continue
        moments[name] = moments[name].permuted(order)
        permuted.add(name)
    return permuted
