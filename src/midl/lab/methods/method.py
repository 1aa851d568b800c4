"""What a method is: how its network is built within a budget, and how it is taught."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

from torch import Tensor, nn

from midl.analysis import count_flops
from midl.conversion.convert import replace_modules
from midl.errors import MIDLError
from midl.lab.measure import layer_flops
from midl.lab.models import Architecture
from midl.layers import MIDLayer
from midl.serialization import load_

__all__ = ["NETWORK_RATIO", "Budget", "Method", "Substitute", "count_neurons", "load", "replace_layers"]

NETWORK_RATIO = 1.7
"""FLOPs of the dense network, divided by those of one that claims to save them, at least."""

# The low-rank code, the light path and the gate get at least this share of a layer's budget: where what must stay dense
# takes much of the network's FLOPs, the active share gives way.
_LIGHT_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Budget:
    """What the methods may spend in each layer that they replace.

    Args:
        active: fraction of the neurons on the full path.
        group_size: neurons selected together.
        flops_ratio: FLOPs of the dense layer, divided by those of its replacement, at least.
    """

    active: float = 0.45
    group_size: int = 16
    flops_ratio: float = 1.7

    @classmethod
    def for_network(
        cls, architecture: Architecture, group_size: int, *, active: float = 0.45, flops_ratio: float = NETWORK_RATIO
    ) -> Budget:
        """Return the layers' budget with which the whole network needs ``flops_ratio`` times fewer FLOPs.

        What is never replaced (stem, head, attention products) counts in the network's FLOPs, so the layers' own ratio
        is larger, and ``active`` is an upper limit.

        >>> from midl.lab.models import MLP
        >>> budget = Budget.for_network(MLP(784, (1024, 1024), 10), 16)
        >>> round(budget.flops_ratio, 3), budget.active
        (1.707, 0.45)

        Raises:
            MIDLError: what must stay dense alone is too much.
        """
        dense, example = architecture.build(), architecture.example()
        whole = count_flops(dense, example)
        layers = sum(layer_flops(dense, example, architecture.layer_names).values())
        left = Fraction(whole) / Fraction(str(flops_ratio)) - (whole - layers)
        if left <= 0:
            raise MIDLError(
                f"Budget: flops_ratio={flops_ratio} cannot be met: {whole - layers} of the network's {whole} FLOPs are "
                "in layers that stay dense"
            )
        ratio = float(layers / left)
        return cls(min(active, round((1 - _LIGHT_SHARE) / ratio, 3)), group_size, ratio)


Build = Callable[[Architecture, Budget, nn.Module | None], nn.Module]
"""From architecture, budget and, for methods with a teacher, the trained dense network, which may be changed in place
(a fresh one if None), to the untrained model; random choices follow from torch's random state."""

Fit = Callable[[nn.Module, Architecture, Budget, Sequence[Tensor]], None]
"""Changes the built model in place, from its architecture, the budget and batches of training inputs."""


def _count_all(model: nn.Module, architecture: Architecture) -> int:
    return count_flops(model, architecture.example())


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to spend the FLOPs of a network.

    Args:
        name: in files and on the command line.
        title: for readers.
        build: the untrained model.
        teacher: starts from the trained dense network and learns its answers, by the brief recipe; else it starts from
            scratch and learns the labels.
        long: has a teacher, but trains for as long as dense and the brief recipe together, at the learning rates of the
            former.
        meets_ratio: claims to need ``NETWORK_RATIO`` times fewer FLOPs than dense; checked before training.
        fit: called with what ``build`` made, before training; None: nothing.
        own_modules: trained weights load into what ``build`` makes; else they load into a dense network.
        flops: of the model on one example.
        before_step: called with the model before every training step.
        settle: called with the model after training, before it is scored and saved.
        settings: JSON values that the method's results depend on; change them when its code changes what it learns.
    """

    name: str
    title: str
    build: Build
    teacher: bool = False
    long: bool = False
    meets_ratio: bool = True
    fit: Fit | None = None
    own_modules: bool = False
    flops: Callable[[nn.Module, Architecture], int] = _count_all
    before_step: Callable[[nn.Module], None] | None = None
    settle: Callable[[nn.Module, Budget], None] | None = None
    settings: dict[str, object] = dataclasses.field(default_factory=dict)


class Substitute(nn.Module):
    """A layer that a method puts in the place of a dense one.

    Attributes:
        neurons: outputs of the layer.
        full_neurons: how many of them are computed from the full weight, for every input the same number.
    """

    neurons: int
    full_neurons: int


def replace_layers(model: nn.Module, names: list[str], make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Put ``make(layer)`` in the place of each named layer of ``model``, in place, and return the model."""
    replace_modules(model, {id(layer): make(layer) for layer in map(model.get_submodule, names)})
    return model


def load(method: Method, architecture: Architecture, budget: Budget, path: Path) -> nn.Module:
    """Return the trained model of a method that ``midl.save`` wrote, in evaluation mode."""
    model = method.build(architecture, budget, None) if method.own_modules else architecture.build()
    return load_(model, path).eval()


def count_neurons(model: nn.Module, names: list[str], fraction_active: dict[str, float]) -> tuple[float, int]:
    """Return how many neurons of the named layers take the full path, mean over inputs, and how many there are.

    Args:
        model: of any method.
        names: the architecture's ``layer_names``.
        fraction_active: measured, of each MID-L layer.
    """
    active, total = 0.0, 0
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, Substitute):
            active, total = active + layer.full_neurons, total + layer.neurons
            continue
        neurons = int(layer.weight.shape[0])  # type: ignore[union-attr, index]
        share = fraction_active[name] if isinstance(layer, MIDLayer) else 1.0
        active, total = active + share * neurons, total + neurons
    return active, total
