"""FFNs as blocks: two (or, gated, three) dense layers and an activation that one MIDFFN replaces, and back.

In the model the MIDFFN stands where the up-projection was; the modules whose work it does, too, are replaced by
:class:`Absorbed` ones, so that the code around them, whatever its classes, runs as before.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from midl.config import MIDConfig
from midl.conversion.families import family_by_name, family_of, has_hooks, why_not
from midl.errors import MIDLError
from midl.layers import MIDFFN
from midl.layers.ffn import dense_ffn
from midl.ops.reference_ffn import ACTIVATIONS, activate

__all__ = [
    "Absorbed",
    "FFNBlock",
    "absolute",
    "absorb",
    "dense_parts",
    "find_blocks",
    "make_ffn",
    "parts_of",
    "why_no_ffn",
]


@dataclasses.dataclass(frozen=True)
class FFNBlock:
    """The modules of a two-layer FFN, by qualified name: ``down(act(up(x)))``, gated ``down(act(up(x)) * value(x))``.

    >>> FFNBlock(up="mlp.gate_proj", value="mlp.up_proj", activation="mlp.act_fn", down="mlp.down_proj").roles
    {'up': 'mlp.gate_proj', 'activation': 'mlp.act_fn', 'down': 'mlp.down_proj', 'value': 'mlp.up_proj'}

    Attributes:
        up: the dense layer whose output is activated.
        activation: a module that computes GELU (exact or tanh), ReLU or SiLU.
        down: the dense layer from the hidden units to the output.
        value: gated FFNs: the dense layer whose output the activated one multiplies.
    """

    up: str
    activation: str
    down: str
    value: str | None = None

    @property
    def roles(self) -> dict[str, str]:
        """The names by role."""
        return {role: name for role, name in dataclasses.asdict(self).items() if name is not None}


class Absorbed(nn.Module):
    """Stands where a module was whose work a MIDFFN does; passes its input on, or ones where it was a factor.

    Args:
        role: ``"activation"``, ``"down"`` or ``"value"``.
        original: of an activation, the module to put back; the layers' weights are in the MIDFFN.
    """

    def __init__(self, role: str, original: nn.Module | None = None) -> None:
        super().__init__()
        self.role, self.original = role, original

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, or one for a factor."""
        return x.new_ones(()) if self.role == "value" else x

    def extra_repr(self) -> str:
        """Return the role."""
        return self.role


def activation_of(module: nn.Module) -> str | None:
    """Return which of the FFN op's activations ``module`` computes, found by trying, or None.

    >>> activation_of(nn.GELU(approximate="tanh")), activation_of(nn.Tanh())
    ('gelu_tanh', None)
    """
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return None
    if any(True for _ in module.children()) or isinstance(module, Absorbed):
        return None
    x = torch.linspace(-6, 6, 97, dtype=torch.float64).view(1, 97)
    try:
        with torch.no_grad():
            y = module(x.clone())
    except Exception:
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    # tanh and exact GELU differ by 5e-4; formulas of the same one only by rounding.
    return next((name for name in ACTIVATIONS if torch.allclose(activate(x, name), y.double(), atol=1e-6)), None)


def make_ffn(parts: Mapping[str, nn.Module], config: MIDConfig) -> MIDFFN:
    """Return the MIDFFN for the modules of a block, by role; light path and gate hold no values yet.

    Raises:
        MIDLError: they don't fit together or with the configuration.
    """
    linears = {}
    for role in ("up", "value", "down"):
        if role in parts:
            family = family_of(parts[role])
            if family is None or family.to_linear is None:
                raise MIDLError(f"MIDFFN: {role} is a {type(parts[role]).__name__}, expected a linear layer")
            linears[role] = family.to_linear(parts[role])
    activation = activation_of(parts["activation"])
    if activation is None:
        kind = type(parts["activation"]).__name__
        raise MIDLError(f"MIDFFN: activation is a {kind}, expected a module that computes one of {ACTIVATIONS}")
    twin = dense_ffn(linears["up"], linears["down"], activation, linears.get("value"))
    ffn: Any = family_by_name("ffn").like(twin, config)
    dense = {id(p) for linear in linears.values() for p in linear.parameters()}
    for parameter in ffn.parameters():
        if id(parameter) not in dense:  # a frozen layer stays frozen
            parameter.requires_grad_(ffn.weight.requires_grad)
    return ffn  # type: ignore[no-any-return]


def absorb(parts: Mapping[str, nn.Module], ffn: nn.Module) -> dict[int, nn.Module]:
    """Return what replaces each module of a block: id to the MIDFFN for the up-projection, to Absorbed for the rest."""
    replacements = {
        id(module): Absorbed(role, module if role == "activation" else None)
        for role, module in parts.items()
        if role != "up"
    }
    for module in replacements.values():
        module.training = ffn.training
    return {id(parts["up"]): ffn, **replacements}


def remember(ffn: MIDFFN, block: FFNBlock, parts: Mapping[str, nn.Module]) -> None:
    """Let ``ffn`` know where the other modules stood, relative to itself, and of which kinds its layers were."""
    ffn.places = {role: _relative(block.up, name) for role, name in block.roles.items() if role != "up"}
    ffn.part_families = {
        role: family.name
        for role, module in parts.items()
        if role != "activation" and (family := family_of(module)) is not None
    }


def block_of(ffn: MIDFFN, name: str) -> FFNBlock:
    """Return the names of a converted block whose MIDFFN is called ``name``."""
    assert ffn.places is not None
    return FFNBlock(up=name, **{role: absolute(name, place) for role, place in ffn.places.items()})


def dense_parts(model: nn.Module, name: str, ffn: MIDFFN) -> dict[str, nn.Module]:
    """Return the dense modules of a converted block by qualified name, with the MIDFFN's very weights.

    Raises:
        MIDLError: the modules that stand for the other layers are not where they were.
    """
    block = block_of(ffn, name)
    modules = dict(model.named_modules(remove_duplicate=False))
    for role, other in block.roles.items():
        if role != "up" and not isinstance(modules.get(other), Absorbed):
            raise MIDLError(f"revert_: {name} is a block whose {role} stood at {other!r}, which is not there any more")
    ffn._check_plain("revert_")
    linears = {
        "up": _linear(ffn.weight, ffn.bias), "down": _linear(ffn.down_weight, ffn.down_bias),
        **({} if ffn.value_weight is None else {"value": _linear(ffn.value_weight, ffn.value_bias)}),
    }  # fmt: skip
    dense = {
        block.roles[role]: family_by_name(ffn.part_families[role]).from_linear(linear).train(ffn.training)  # type: ignore[misc]
        for role, linear in linears.items()
    }
    activation: Any = modules[block.activation]
    return {**dense, block.activation: activation.original}


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = weight
    linear.register_parameter("bias", bias)
    return linear


def _relative(start: str, name: str) -> str:
    """Return ``name`` seen from ``start``: one dot per level up, then the path down."""
    a, b = start.split("."), name.split(".")
    common = next((i for i, (u, v) in enumerate(zip(a, b, strict=False)) if u != v), min(len(a), len(b)))
    return "." * (len(a) - common) + ".".join(b[common:])


def absolute(start: str, place: str) -> str:
    """Return the qualified name of ``place``, given as seen from ``start`` (``MIDFFN.places``)."""
    path = place.lstrip(".")
    return ".".join([*start.split(".")[: -(len(place) - len(path))], path])


def parts_of(model: nn.Module, block: FFNBlock) -> dict[str, nn.Module]:
    """Return the modules of ``block`` by role.

    Raises:
        MIDLError: ``model`` has no module of such a name.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for role, name in block.roles.items():
        if name not in modules:
            raise MIDLError(f"ffn: {role}={name!r} is no module of the {type(model).__name__}")
    return {role: modules[name] for role, name in block.roles.items()}


def why_no_ffn(model: nn.Module, block: FFNBlock, shared_parameters: set[int]) -> str | None:
    """Return why ``block`` cannot become a MIDFFN, or None; what can be run is compared with the original."""
    parts = parts_of(model, block)
    for role, module in parts.items():
        if role == "activation":
            reason = "has hooks, which the conversion would lose" if has_hooks(module) else None
        else:
            reason = why_not(module, shared_parameters)
        if reason is not None:
            return f"its {role} layer {block.roles[role]} {reason}"
    holders = [m for _, m in model.named_modules(remove_duplicate=False) if m is parts["activation"]]
    if len(holders) > 1:
        return f"its activation {block.activation} stands in {len(holders)} places of the model"
    if parts["up"] is parts["down"] or parts.get("value") in (parts["up"], parts["down"]):
        return "one layer has several roles"
    try:
        ffn = make_ffn(parts, _EVERYTHING)
    except MIDLError as error:
        return str(error).partition(": ")[2]
    with torch.no_grad():
        for tensor in (*(getattr(ffn, n) for n in _LIGHT), ffn.gate_weight, ffn.gate_bias):
            tensor.zero_()  # type: ignore[union-attr]
    return _differs(model, block, parts, ffn)


# Every unit on the full path: the block must compute what the layers did.
_EVERYTHING = MIDConfig(active=1.0, rank=1, interpolation="hard")
_LIGHT = ("light_down", "light_up", "light_hidden", "light_bias")
_LIMIT = {torch.float64: 1e-9, torch.float32: 1e-4}


@torch.no_grad()
def _differs(model: nn.Module, block: FFNBlock, parts: Mapping[str, nn.Module], ffn: MIDFFN) -> str | None:
    """Return how the block's surroundings change on random input when the MIDFFN stands in it, or None."""
    from midl.conversion.convert import replace_modules

    around = _surroundings(model, block)
    training = [m for m in around.modules() if m.training]
    around.eval()
    try:
        tried = _try(around, ffn)
        if isinstance(tried, str):
            return tried
        x, expected = tried
        replacements = absorb(parts, ffn)
        replace_modules(around, replacements)
        try:
            actual = _tensors(around(x))
        except Exception as error:
            return f"with a MIDFFN in their place {type(around).__name__} fails ({error})"
        finally:
            back = {id(new): parts[role] for role in parts if (new := replacements[id(parts[role])]) is not None}
            replace_modules(around, back)
    finally:
        for module in training:
            module.training = True
    if [t.shape for t in expected] != [t.shape for t in actual]:
        return "they do not compute down(act(up(x))), or something else reads the hidden units"
    for before, after in zip(expected, actual, strict=True):
        before, after = before.double(), after.double()
        spread = before.std() if before.numel() > 1 else before.abs().sum()
        change = float((after - before).square().mean().sqrt() / spread.clamp(min=1e-30)) if before.numel() else 0.0
        if not change < _LIMIT.get(ffn.weight.dtype, 0.05):
            return f"they do not compute down(act(up(x))): a relative difference of {change:.1e} on random input"
    return None


def _try(around: nn.Module, ffn: MIDFFN) -> tuple[Tensor, list[Tensor]] | str:
    """Return a random input, a sequence or an image, and all outputs for it, or why there are none."""
    random = torch.Generator().manual_seed(0)
    for shape in ((2, 5, ffn.in_features), (2, ffn.in_features, 8, 8)):
        x = torch.randn(shape, generator=random).to(ffn.weight)
        try:
            return x, _tensors(around(x))
        except Exception as error:
            reason = f"{type(around).__name__} does not take a sequence or an image alone ({error})"
    return f"{_UNTRIED}: {reason}"


_UNTRIED = "could not be compared with the original"


def was_not_tried(reason: str) -> bool:
    """Return whether ``reason``, from :func:`why_no_ffn`, is that nothing could be compared."""
    return reason.startswith(_UNTRIED)


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors of a module's output, at least one."""
    found = [t for t in tree_leaves(dict(output) if isinstance(output, Mapping) else output) if isinstance(t, Tensor)]
    if not found:
        raise MIDLError(f"no tensor in its output, a {type(output).__name__}")
    return found


def _surroundings(model: nn.Module, block: FFNBlock) -> nn.Module:
    """Return the smallest part of the model that runs the whole block: a slice of an nn.Sequential, or a module."""
    paths = [name.split(".") for name in block.roles.values()]
    common = list(itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False)))
    parent = model.get_submodule(".".join(level[0] for level in common))
    if type(parent) is nn.Sequential and all(len(path) == len(common) + 1 for path in paths):
        names = list(parent._modules)
        inside = [names.index(path[-1]) for path in paths]
        return parent[min(inside) : max(inside) + 1]
    return parent


def find_blocks(model: nn.Module, shared_parameters: set[int]) -> tuple[list[FFNBlock], dict[str, str]]:
    """Return the FFNs of ``model``, and why each pair of layers that looked like one is none, by the up layer's name.

    Looked at are the modules from the innermost outwards. Candidates are pairs of linear layers, the second as wide
    inside as the first outside, with an activation between them (in an nn.Sequential) or beside them; outside an
    nn.Sequential only where the hidden width is the larger. Whether it is an FFN is decided by comparing outputs.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    >>> find_blocks(model, set())[0]
    [FFNBlock(up='0', activation='1', down='2', value=None)]
    """
    found: list[FFNBlock] = []
    reasons: dict[str, str] = {}
    taken: set[int] = set()
    modules = [(name, module) for name, module in model.named_modules() if any(True for _ in module.children())]
    for name, container in sorted(modules, key=lambda item: -item[0].count(".") - bool(item[0])):
        for block in _candidates(name, container, taken):
            parts = parts_of(model, block)
            if any(id(module) in taken for module in parts.values()):
                continue
            reason = why_no_ffn(model, block, shared_parameters)
            if reason is None:
                found.append(block)
                reasons.pop(block.up, None)
                taken.update(id(module) for module in parts.values())
            else:
                reasons.setdefault(block.up, reason)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda block: order[block.up]), reasons


def _candidates(name: str, container: nn.Module, taken: set[int]) -> Iterator[FFNBlock]:
    prefix = f"{name}." if name else ""
    if type(container) is nn.Sequential:
        yield from _in_sequence(prefix, list(container.named_children()))
        return
    if isinstance(container, (nn.ModuleList, nn.ModuleDict)):
        return
    inside = [(n, m) for n, m in container.named_modules() if n and id(m) not in taken]
    linears = {n: shape for n, m in inside if (shape := _linear_shape(m)) is not None}
    if not 2 <= len(linears) <= _MOST_LINEARS:
        return
    activations = [n for n, m in inside if activation_of(m) is not None]
    for activation, (down, (n_out, hidden)) in itertools.product(activations, linears.items()):
        ups = [u for u, (rows, d) in linears.items() if rows == hidden and d < hidden and n_out < hidden and u != down]
        for up in ups:
            yield FFNBlock(prefix + up, prefix + activation, prefix + down)
        for up, value in itertools.permutations(ups, 2):
            if linears[up] == linears[value]:
                yield FFNBlock(prefix + up, prefix + activation, prefix + down, prefix + value)


# More candidates than a block has are the layers of several blocks, which were looked at by themselves.
_MOST_LINEARS = 12


def _in_sequence(prefix: str, children: list[tuple[str, nn.Module]]) -> Iterator[FFNBlock]:
    """Yield the runs linear, activation, linear; dropout and nn.Identity may stand between them."""
    pattern: list[tuple[Literal["linear", "activation"], str, int]] = []
    for name, module in children:
        shape = _linear_shape(module)
        if shape is not None:
            last = [kind for kind, _, _ in pattern[-2:]]
            if last == ["linear", "activation"] and pattern[-2][2] == shape[1]:
                yield FFNBlock(prefix + pattern[-2][1], prefix + pattern[-1][1], prefix + name)
            pattern = [("linear", name, shape[0])]
        elif activation_of(module) is not None:
            pattern.append(("activation", name, 0))
        elif not isinstance(module, (nn.Dropout, nn.Identity)):
            pattern = []


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (outputs, inputs) of a linear layer of a known kind, or None."""
    family = family_of(module)
    if family is None or family.to_linear is None:
        return None
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    return (rows, columns) if family.name == "linear" else (columns, rows)
