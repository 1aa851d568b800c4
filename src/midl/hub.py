"""MIDHubMixin: save_pretrained and from_pretrained for models that convert_ has changed. Imports huggingface_hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download

from midl.serialization import load_, save

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MIDHubMixin"]

_FILE = "model.safetensors"


class MIDHubMixin(PyTorchModelHubMixin):
    """huggingface_hub's PyTorchModelHubMixin, with :func:`midl.save` and :func:`midl.load_` for the weights.

    The plain mixin builds a dense model and drops the weights that it doesn't know, so a converted model would come
    back dense without a word. Here the file says which layers are MID-L. It is the usual ``model.safetensors``.

    >>> import tempfile
    >>> import midl
    >>> from torch import nn
    >>> class Net(nn.Module, MIDHubMixin):
    ...     def __init__(self, width: int = 32):
    ...         super().__init__()
    ...         self.layer = nn.Linear(16, width)
    >>> net = Net(width=64)
    >>> _ = midl.convert_(net, midl.MIDConfig(rank=2))
    >>> folder = tempfile.mkdtemp()
    >>> net.save_pretrained(folder)
    >>> Net.from_pretrained(folder).layer
    MIDLinear(16, 64, bias=True, active=0.45, rank=2)

    Not needed for models whose constructor builds the MID-L layers itself: there PyTorchModelHubMixin will do.

    Raises:
        CheckpointError: ``from_pretrained`` of a file that :func:`midl.save` did not write, or of another model.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self, save_directory / _FILE)  # type: ignore[arg-type]

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls, *, model_id: str, map_location: str = "cpu", strict: bool = True, revision: str | None = None,
        cache_dir: str | Path | None = None, force_download: bool = False, local_files_only: bool = False,
        token: str | bool | None = None, **model_kwargs: Any,
    ) -> Self:  # fmt: skip
        model: Any = cls(**model_kwargs)
        if os.path.isdir(model_id):
            path = os.path.join(model_id, _FILE)
        else:
            path = hf_hub_download(
                model_id, _FILE, revision=revision, cache_dir=cache_dir, force_download=force_download,
                token=token, local_files_only=local_files_only,
            )  # fmt: skip
        return load_(model, path).to(map_location).eval()  # type: ignore[return-value]
