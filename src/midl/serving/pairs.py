"""Pairs of a layer and what alone takes its output, which serving makes one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from torch import fx, nn

from midl.conversion.families import has_hooks
from midl.errors import MIDLError

__all__ = ["find_pairs", "named_pairs"]


class _Tracer(fx.Tracer):
    """Follows no module further than it takes to see which modules call which."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not m._modules or super().is_leaf_module(m, module_qualified_name)


def find_pairs(
    caller: str, model: nn.Module, modules: Mapping[str, nn.Module], fit: Callable[[nn.Module, nn.Module], bool]
) -> list[tuple[str, str]]:
    """Return the names of pairs that ``fit``: called once each, without hooks, where nothing comes in between.

    Nothing else takes the first one's output or parameters.

    Args:
        caller: name of the public function, for the error.
        model: whose forward torch.fx follows.
        modules: the model's, by name.
        fit: whether a module and the one that takes its output are such a pair.

    Raises:
        MIDLError: torch.fx cannot follow the model.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise MIDLError(
            f"{caller}: torch.fx cannot follow the model's forward ({error}), expected the names of layers and of what "
            'takes their outputs: pairs=[("conv1", "bn1"), ...]'
        ) from error
    calls = [node for node in graph.nodes if node.op == "call_module"]
    count = Counter(id(modules[node.target]) for node in calls)
    # A parameter that the forward also takes from outside its module counts as another call of it.
    count.update(id(modules[node.target.rpartition(".")[0]]) for node in graph.nodes if node.op == "get_attr")
    pairs = []
    for node in calls:
        before = node.args[0] if len(node.args) == 1 else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        pair = modules[str(before.target)], modules[node.target]
        if fit(*pair) and all(count[id(m)] == 1 and not has_hooks(m) for m in pair):
            pairs.append((str(before.target), str(node.target)))
    return pairs


def named_pairs(
    caller: str, modules: Mapping[str, nn.Module], pairs: Iterable[tuple[str, str]]
) -> list[tuple[str, str]]:  # fmt: skip
    """Return ``pairs`` as a list.

    Raises:
        MIDLError: a name is not one of ``modules``, or there twice.
    """
    pairs = list(pairs)
    named = Counter(name for pair in pairs for name in pair)
    if unknown := [name for name in named if name not in modules]:
        raise MIDLError(f"{caller}: the model has no module {unknown[0]!r}, expected one of {list(modules)}")
    if twice := [name for name, times in named.items() if times > 1]:
        raise MIDLError(f"{caller}: pairs name {twice} more than once, expected each module in one pair")
    return pairs
