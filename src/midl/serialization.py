"""save and load_: one safetensors file with the weights and, in its header, a JSON description of the MID-L layers."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from torch import Tensor, nn

from midl.checks import check_module, uncompiled
from midl.config import MIDConfig
from midl.conversion.blocks import FFNBlock, absolute, absorb, dense_parts, make_ffn, remember
from midl.conversion.convert import make_layer, replace_modules
from midl.conversion.families import family_of, family_of_layer, has_hooks
from midl.errors import CheckpointError, MIDLError
from midl.layers import MIDFFN, Factors, MIDLayer

__all__ = ["load_", "save"]

FORMAT_VERSION = 2
# The first version that knows the type of an entry; files without it can be read by older code.
_SINCE = {"Factors": 2}
_KEY = "midl"


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the weights and the MID-L layers' configurations of ``model`` to one safetensors file, atomically.

    >>> import tempfile
    >>> from midl import MIDLinear
    >>> folder = tempfile.mkdtemp()
    >>> save(nn.Sequential(MIDLinear(8, 16, rank=2)), f"{folder}/model.safetensors")
    >>> dense = load_(nn.Sequential(nn.Linear(8, 16)), f"{folder}/model.safetensors")
    >>> type(dense[0]).__name__
    'MIDLinear'

    Tied tensors are stored once. The file appears complete or not at all. Needs ``safetensors``
    (``pip install 'midl[save]'``).

    Args:
        model: dense, converted or mixed.
        path: of the file; its folder must exist.

    Raises:
        MIDLError: the model has state that is not a tensor (``get_extra_state``).
        OSError: the file cannot be written.
    """
    model = uncompiled(model)
    check_module("save", model)
    safetensors = _safetensors()
    tensors, aliases = _unique_tensors(model.state_dict())
    layers = {
        name: {
            "type": type(layer).__name__,
            "dense": family_of_layer(layer).name,
            "bias": layer.bias is not None,
            "config": layer.config.to_dict(),
            **_block_entry(layer),
        }
        for name, layer in _described_layers(model).items()
    }
    version = max([1, *(_SINCE.get(str(entry["type"]), 1) for entry in layers.values())])
    description = {"version": version, "layers": layers, "aliases": aliases, "sha256": _digest(tensors)}
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        safetensors.torch.save_file(tensors, temporary, {"format": "pt", _KEY: json.dumps(description)})
        with open(temporary, "r+b") as file:
            _sort_header(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except safetensors.SafetensorError as error:
        os.unlink(temporary)
        raise OSError(f"save: {str(path)!r} could not be written: {error}") from error
    except BaseException:
        os.unlink(temporary)
        raise


def load_(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a file of :func:`save` into ``model``, in place, and return it.

    ``model`` may be dense or converted, in any way, but of the architecture that was saved: its layers become MID-L or
    dense as they were in the file, with the file's configurations. Parameters that stay keep their identity, dtype
    and device. The file is checked as a whole before anything changes: on an error the model is as it was.

    Args:
        model: receives the weights.
        path: of a file that :func:`save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, of another kind or a newer version, or does not fit the model; the
            message says what came and what was expected.
    """
    wrapped, model = model, uncompiled(model)
    check_module("load_", model)
    tensors, layers = _read(Path(path))
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise CheckpointError(
                f"load_: the model's {name} is on the meta device, expected model.to_empty(device=...)"
            )
    planned = _plan(model, layers, path)
    _check_fit(model, planned, tensors, path)
    replace_modules(model, {id(module): layer for module, layer in planned.values()})
    model.load_state_dict(tensors)
    for name, layer in _mid_layers(model).items():
        layer.config = layers[name]["config"]
    return wrapped


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MIDLError("save and load_ need safetensors: pip install 'midl[save]'") from error
    return safetensors


def _sort_header(file: IO[bytes]) -> None:
    """Put the header's entries in order: safetensors writes them as they hash, each time anew.

    So equal models make equal files.
    """
    size = int.from_bytes(file.read(8), "little")
    text = json.dumps(json.loads(file.read(size)), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) <= size:
        file.seek(8)
        file.write(text.ljust(size))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _mid_layers(model: nn.Module) -> dict[str, MIDLayer]:
    """Return the MID-L layers under every name they have; a shared layer has several."""
    return {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, MIDLayer)}


def _described_layers(model: nn.Module) -> dict[str, MIDLayer | Factors]:
    """Return what the description names: the MID-L layers, and what :func:`midl.serving.factor_` left of others."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, (MIDLayer, Factors))}


def _block_entry(layer: MIDLayer | Factors) -> dict[str, Any]:
    """Return what a converted FFN block has in the description beside what every layer has."""
    if not isinstance(layer, MIDFFN) or layer.places is None:
        return {}
    return {"places": layer.places, "parts": layer.part_families}


def _unique_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return contiguous tensors that share no memory, and for each tied name the name it is stored under."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise MIDLError(f"save: {name} is a {type(value).__name__}, expected tensors only (get_extra_state?)")
        if value.is_meta:
            raise MIDLError(f"save: {name} is on the meta device and has no data, expected a materialised model")
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        stored = value.detach().cpu().contiguous()
        # A clone, so that views into one storage (which safetensors refuses) become tensors of their own.
        storage = stored.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != stored.numel() * stored.element_size():
            stored = stored.clone()
        storages.add(stored.untyped_storage().data_ptr())
        tensors[name] = stored
    return tensors, aliases


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes: safetensors itself does not notice flipped bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)};".encode())
        if t.numel():
            digest.update((ctypes.c_char * (t.numel() * t.element_size())).from_address(t.data_ptr()))
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return every tensor of the file, tied names included, and the description of its MID-L layers."""
    safetensors = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"load_: path={str(path)!r} is not a file")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"load_: {str(path)!r} is damaged or no safetensors file: {error}") from error
    if _KEY not in metadata:
        raise CheckpointError(
            f"load_: {str(path)!r} is a safetensors file without a {_KEY!r} entry, expected one written by midl.save"
        )
    try:
        description = json.loads(metadata[_KEY])
        version = description["version"]
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"load_: {str(path)!r} has format version {version}, expected at most {FORMAT_VERSION}: update midl"
            )
        layers, aliases, digest = description["layers"], description["aliases"], description["sha256"]
        for entry in layers.values():
            entry["config"] = MIDConfig.from_dict(entry["config"])
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"load_: {str(path)!r} has a damaged description: {error!r}") from error
    if _digest(tensors) != digest:
        raise CheckpointError(
            f"load_: {str(path)!r} is damaged: its tensors do not have the checksum it was saved with"
        )
    missing = [original for original in aliases.values() if original not in tensors]
    if missing:
        raise CheckpointError(f"load_: {str(path)!r} has a damaged description: no tensor {missing[0]!r}")
    return tensors | {name: tensors[original] for name, original in aliases.items()}, layers


def _plan(
    model: nn.Module, layers: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str]
) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Return, by name, each module to be replaced and its replacement; the model is not touched."""
    modules = dict(model.named_modules(remove_duplicate=False))
    stay = {name for name, entry in layers.items() if _same(modules.get(name), entry)}
    places = {place for name, entry in layers.items() if name not in stay for place in _places(name, entry).values()}
    for name in places | (_mid_layers(model).keys() - stay):
        if name in modules and has_hooks(modules[name]):
            raise CheckpointError(
                f"load_: the model's {name} has hooks (spectral or weight norm of the old kind?), which would be lost "
                "when it becomes what the file has; expected them removed first"
            )
    leave = _dense_modules(model, stay)
    dense = {**modules, **leave}
    wanted: dict[str, nn.Module] = {}
    made: dict[int, dict[str, nn.Module]] = {}  # by the module that is replaced: what stands for it, by role
    for name, entry in layers.items():
        module = modules.get(name)
        if name in stay:
            continue
        if module is model:
            raise CheckpointError(
                f"load_: the model is itself a {type(model).__name__} and cannot be replaced in place; "
                f"expected a {entry['type']} with {entry['config']}"
            )
        if id(module) not in made:
            made[id(module)] = _build(dense, modules, entry, name, path)
        wanted.update({place: made[id(module)][role] for role, place in _places(name, entry).items()})
    known = {place for name, entry in layers.items() for place in _places(name, entry).values()}
    for name, module in leave.items():
        if name not in known:
            if not name:
                raise CheckpointError(f"load_: {os.fspath(path)!r} holds a dense layer, the model is a MID-L layer")
            wanted[name] = made.setdefault(id(modules[name]), {"up": module})["up"]
    return {name: (modules[name], module) for name, module in wanted.items()}


def _dense_modules(model: nn.Module, stay: set[str]) -> dict[str, nn.Module]:
    """Return by name the dense modules that the MID-L layers of ``model`` would go back to, but for those that stay."""
    dense: dict[str, nn.Module] = {}
    for name, layer in _mid_layers(model).items():
        if name in stay:
            continue
        if isinstance(layer, MIDFFN) and layer.places is not None:
            dense.update(dense_parts(model, name, layer))
        else:
            dense[name] = family_of_layer(layer).to_dense(layer)
    return dense


def _places(name: str, entry: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of the modules that a layer of the file stands for, by role; most stand for one."""
    return {"up": name, **{role: absolute(name, place) for role, place in entry.get("places", {}).items()}}


def _same(module: nn.Module | None, entry: Mapping[str, Any]) -> bool:
    """Return whether ``module`` has the entry's parameters; the rest of the configuration can be set as it is."""
    if not isinstance(module, (MIDLayer, Factors)) or module.dense_family != entry["dense"]:
        return False
    if isinstance(module, Factors) or entry["type"] == Factors.__name__:
        return isinstance(module, Factors) and entry["type"] == Factors.__name__ and module.config == entry["config"]
    if isinstance(module, MIDFFN) and (module.places or {}) != entry.get("places", {}):
        return False
    config: MIDConfig = entry["config"]
    return all(getattr(module.config, f) == getattr(config, f) for f in ("rank", "group_size", "gate"))


def _build(
    dense: Mapping[str, nn.Module], modules: Mapping[str, nn.Module], entry: Mapping[str, Any], name: str,
    path: str | os.PathLike[str],
) -> dict[str, nn.Module]:  # fmt: skip
    """Return the MID-L layer for dense ones, and what stands beside it; the file has the values."""
    places = _places(name, entry)
    families = {"up": entry["dense"], **entry.get("parts", {})}
    for role, place in places.items():
        family = family_of(dense[place]) if place in dense else None
        wanted = families.get(role)
        # A Conv1D that was converted may meet its twin, a plain linear layer, where transformers is absent.
        accepted = (wanted, "linear" if wanted == "conv1d" else wanted)
        if place not in dense or (wanted is not None and (family is None or family.name not in accepted)):
            kind = "no module" if place not in modules else f"a {type(modules[place]).__name__}"
            where = "there" if place == name else f"at {place!r}"
            raise CheckpointError(
                f"load_: {os.fspath(path)!r} has a {entry['type']} at {name!r}, the model has {kind} {where}; "
                f"expected a {entry['type']} or its dense layer ({wanted or role})"
            )
    parts = {role: dense[place] for role, place in places.items()}
    training = modules[name].training
    try:
        if "places" in entry:
            ffn = make_ffn(parts, entry["config"])
            remember(ffn, FFNBlock(**places), parts)
            replacements = absorb(parts, ffn.train(training))
            return {role: replacements[id(module)] for role, module in parts.items()}
        layer = make_layer(parts["up"], entry["config"])
    except MIDLError as error:
        raise CheckpointError(f"load_: {os.fspath(path)!r} does not fit the model at {name!r}: {error}") from error
    layer.dense_family = entry["dense"]
    layer.train(training)
    return {"up": Factors.of(layer) if entry["type"] == Factors.__name__ else layer}


def _check_fit(
    model: nn.Module,
    planned: Mapping[str, tuple[nn.Module, nn.Module]],
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
) -> None:
    """Raise unless the names and shapes of the file are those the model will have."""
    prefixes = tuple(f"{name}." for name in planned)
    expected = {k: v.shape for k, v in model.state_dict().items() if not (prefixes and k.startswith(prefixes))}
    for name, (_, layer) in planned.items():
        expected |= {f"{name}.{k}": v.shape for k, v in layer.state_dict().items()}
    file = os.fspath(path)
    for what, names in (
        ("lacks", sorted(expected.keys() - tensors.keys())),
        ("has the unexpected", sorted(tensors.keys() - expected.keys())),
    ):
        if names:
            raise CheckpointError(f"load_: {file!r} {what} {names[:5]} ({len(names)} in all); expected the same model")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"load_: {file!r} has {name} of shape {tuple(tensors[name].shape)}, expected {tuple(shape)}"
            )
