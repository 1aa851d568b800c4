"""Panels lie in huge pages where the system has them for the asking, and anywhere else work without."""

from __future__ import annotations

import copy
import gc
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from midl import MIDConv2d, MIDLinear
from midl.ops import huge_pages
from midl.ops.dispatch import unavailable_reason
from midl.ops.native_packing import clear_packed

MIB = 2**20


@pytest.fixture
def pages_of_2_mib(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A system with huge pages, as far as alignment and sizes go."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("no madvise here")
    monkeypatch.setattr(huge_pages, "page_size", lambda: 2 * MIB)
    yield
    clear_packed()


def settings(folder: Path, enabled: str, size: str = str(2 * MIB)) -> Path:
    (folder / "enabled").write_text(enabled)
    (folder / "hpage_pmd_size").write_text(size)
    return folder


@pytest.mark.parametrize(
    ("enabled", "size", "expected"),
    [
        ("always [madvise] never\n", "2097152\n", 2 * MIB),
        ("[always] madvise never\n", "2097152\n", 2 * MIB),
        ("always madvise [never]\n", "2097152\n", 0),
        ("always [madvise] never\n", "", 0),
        ("always [madvise] never\n", "1000\n", 0),
    ],
)
def test_the_page_size_is_the_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enabled: str, size: str, expected: int
) -> None:
    monkeypatch.setattr(huge_pages, "_SETTINGS", settings(tmp_path, enabled, size))
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    assert huge_pages.page_size.__wrapped__() == expected


def test_there_are_none_where_the_system_has_no_such_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path / "absent")
    assert huge_pages.page_size.__wrapped__() == 0


@pytest.mark.usefixtures("pages_of_2_mib")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beyond", [0, 1, 4096])
def test_memory_of_a_page_and_more_begins_with_a_page(dtype: torch.dtype, beyond: int) -> None:
    count = 2 * MIB // dtype.itemsize + beyond
    tensor = huge_pages.empty(count, dtype)
    assert tensor.shape == (count,)
    assert tensor.dtype == dtype
    assert tensor.data_ptr() % (2 * MIB) == 0
    values = torch.arange(count).to(dtype)
    assert tensor.copy_(values).equal(values)


@pytest.mark.usefixtures("pages_of_2_mib")
def test_a_view_keeps_the_memory_and_its_end_frees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Memory(mmap.mmap):
        def __del__(self) -> None:
            closed.append(True)

    monkeypatch.setattr(mmap, "mmap", Memory)
    view = huge_pages.empty(MIB, torch.float32).fill_(3)[10:20]
    gc.collect()
    assert not closed
    assert view.sum() == 30
    del view
    gc.collect()
    assert closed


@pytest.mark.parametrize("size", [0, 2 * MIB])
def test_less_than_a_page_and_systems_without_get_ordinary_memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("asked for pages")

    monkeypatch.setattr(huge_pages, "page_size", lambda: size)
    monkeypatch.setattr(mmap, "mmap", never)
    assert huge_pages.empty(MIB if size == 0 else 100, torch.float32).fill_(1).sum() > 0
    assert huge_pages.empty(0, torch.bfloat16).numel() == 0


@pytest.mark.usefixtures("pages_of_2_mib")
def test_a_system_that_refuses_leaves_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("not today")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert huge_pages.empty(MIB, torch.float32).fill_(1).sum() == MIB


@pytest.mark.usefixtures("pages_of_2_mib")
def test_only_what_malloc_would_map_every_time_lies_in_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_ALWAYS_MAPPED", 4 * MIB)
    for rows in (1023, 1024):
        tensor = huge_pages.empty_where_mapped((rows, 1024), torch.float32)
        assert tensor.shape == (rows, 1024)
        assert tensor.is_contiguous()
        assert tensor.fill_(1).sum() == rows * 1024
    assert tensor.data_ptr() % (2 * MIB) == 0


@pytest.mark.skipif(bool(unavailable_reason("native")), reason="no native kernels")
@pytest.mark.usefixtures("pages_of_2_mib", "native_kernels")
def test_a_gradient_on_them_is_the_parameters_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_ALWAYS_MAPPED", 2 * MIB)
    layer, x = MIDLinear(1024, 1024, group_size=32), torch.randn(3, 1024)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.data_ptr() % (2 * MIB) == 0  # not copied
    once = layer.weight.grad.clone()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * once)
    monkeypatch.setattr(huge_pages, "page_size", lambda: 0)
    layer.weight.grad = None
    layer(x).sum().backward()
    in_ordinary_memory = layer.weight.grad
    assert in_ordinary_memory is not None
    torch.testing.assert_close(in_ordinary_memory, once)


@pytest.mark.skipif(bool(unavailable_reason("native")), reason="no native kernels")
@pytest.mark.usefixtures("pages_of_2_mib", "native_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_compute_the_same_on_them(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = MIDLinear(1000, 1536, group_size=32).to(dtype).eval()
    x = torch.randn(5, 1000, dtype=dtype)
    made, empty = [], huge_pages.empty

    def watch(count: int, dtype: torch.dtype) -> torch.Tensor:
        made.append(empty(count, dtype))
        return made[-1]

    monkeypatch.setattr(huge_pages, "empty", watch)
    with torch.no_grad():
        first = layer(x)  # nothing is packed yet
        packed = [layer(x) for _ in range(3)]
        assert any(t.data_ptr() % (2 * MIB) == 0 for t in made)
        monkeypatch.setattr(huge_pages, "page_size", lambda: 0)
        clear_packed()
        ordinary = [layer(x) for _ in range(3)]
        copied = copy.deepcopy(layer)(x)
    for y in (*packed, *ordinary):
        assert y.equal(packed[0])
    torch.testing.assert_close(first, packed[0])
    torch.testing.assert_close(copied, packed[0])


@pytest.mark.skipif(bool(unavailable_reason("native")), reason="no native kernels")
@pytest.mark.usefixtures("pages_of_2_mib", "native_kernels")
@pytest.mark.parametrize("bytes_of_y", [32 * MIB - 4096, 32 * MIB])
@pytest.mark.parametrize(
    "layer", [MIDLinear(8, 1024, group_size=32), MIDConv2d(8, 1024, 1, group_size=32)], ids=["linear", "conv"]
)
def test_large_outputs_of_every_call_lie_on_them(
    layer: MIDLinear | MIDConv2d, bytes_of_y: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = bytes_of_y // 4096
    x = torch.randn(rows, 8)
    if isinstance(layer, MIDConv2d):
        x = x.T.reshape(1, 8, rows, 1)
    with torch.no_grad():
        outputs = [layer(x) for _ in range(3)]  # the later ones by a prepared call
        monkeypatch.setattr(huge_pages, "page_size", lambda: 0)
        in_ordinary_memory = layer(x)
    for y in outputs:
        assert y.equal(in_ordinary_memory)
        assert bytes_of_y < 32 * MIB or y.data_ptr() % (2 * MIB) == 0
