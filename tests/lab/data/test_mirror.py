"""Reading a mirror: what is right arrives exactly, what is wrong is a DataError that says where and what."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab_rows import adult_rows, mnist_rows, png
from PIL import Image

from midl.errors import DataError
from midl.lab import data

Make = Callable[[str, Any], Path]


def test_images_and_labels_arrive_exactly(make_mirror: Make) -> None:
    rows = mnist_rows()
    make_mirror("mnist", rows)
    mnist = data.load("mnist")
    assert mnist.input_shape == (1, 28, 28)
    assert mnist.train.y.tolist() == rows["train"]["label"]
    for i, cell in enumerate(rows["train"]["image"]):
        assert np.array_equal(mnist.train.x[i, 0].numpy(), np.asarray(Image.open(io.BytesIO(cell["bytes"]))))
    x, _ = mnist.batch(mnist.train, slice(None))
    assert x.dtype == torch.float32
    assert abs(x.mean().item()) < 1e-5
    assert abs(x.std(correction=0).item() - 1) < 1e-5


def test_a_second_load_does_not_decode_again(make_mirror: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    make_mirror("mnist", mnist_rows())
    first = data.load("mnist")
    monkeypatch.setattr("midl.lab.data.mirror.read_tables", lambda *args: pytest.fail("decoded again"))
    second = data.load("mnist")
    assert torch.equal(first.train.x, second.train.x)
    assert first.fingerprint == second.fingerprint


def test_changed_content_is_decoded_anew(make_mirror: Make) -> None:
    rows = mnist_rows()
    make_mirror("mnist", rows)
    first = data.load("mnist")
    rows["train"]["label"][0] = 8
    make_mirror("mnist", rows)
    second = data.load("mnist")
    assert second.train.y[0] == 8
    assert first.fingerprint != second.fingerprint


def test_a_damaged_cache_is_rebuilt(make_mirror: Make, tmp_path: Path) -> None:
    make_mirror("mnist", mnist_rows())
    first = data.load("mnist").train.x.clone()
    (file,) = (tmp_path / "cache" / "data").glob("*/train_x.npy")
    file.write_bytes(file.read_bytes()[:200])
    assert torch.equal(data.load("mnist").train.x, first)


def test_writing_to_a_batch_leaves_the_cache_as_it_was(make_mirror: Make) -> None:
    make_mirror("mnist", mnist_rows())
    before = data.load("mnist").train.x.clone()
    data.load("mnist").train.x.zero_()
    assert torch.equal(data.load("mnist").train.x, before)


def test_unknown_data_set() -> None:
    with pytest.raises(
        DataError, match=r"dataset='mnits' is unknown, expected one of \['adult', .*'digits', .*'mnist'"
    ):
        data.load("mnits")


def test_mirror_that_is_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MIDL_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"MIDL_DATA='.*nowhere' is no folder, expected one with"):
        data.load("mnist")


@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_file(make_mirror: Make, split: str) -> None:
    folder = make_mirror("mnist", mnist_rows())
    (folder / "mnist" / f"{split}.parquet").unlink()
    with pytest.raises(
        DataError, match=rf"{split}\.parquet is missing: MIDL_DATA names a mirror that must hold mnist/"
    ):
        data.load("mnist")


def test_file_that_differs_from_the_listed_hash(make_mirror: Make) -> None:
    folder = make_mirror("mnist", mnist_rows())
    file = folder / "mnist" / "train.parquet"
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  mnist/train.parquet\n")
    data.load("mnist")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        DataError, match=r"train\.parquet is corrupted: its SHA-256 is .*, expected .* as in .*SHA256SUMS"
    ):
        data.load("mnist")


def test_a_damaged_list_of_hashes_is_named(make_mirror: Make) -> None:
    (make_mirror("mnist", mnist_rows()) / "SHA256SUMS").write_text("abc\n")
    with pytest.raises(DataError, match="SHA256SUMS has a line without a file's name"):
        data.load("mnist")


@pytest.mark.parametrize("damage", ["truncated", "no parquet"])
def test_unreadable_parquet(make_mirror: Make, damage: str) -> None:
    file = make_mirror("mnist", mnist_rows()) / "mnist" / "test.parquet"
    file.write_bytes(file.read_bytes()[:-50] if damage == "truncated" else b"not a parquet file")
    with pytest.raises(DataError, match=r"test\.parquet is corrupted: not readable as parquet"):
        data.load("mnist")


def test_wrong_columns(make_mirror: Make) -> None:
    rows = mnist_rows()
    rows["test"]["labels"] = rows["test"].pop("label")
    make_mirror("mnist", rows)
    expected = r"test\.parquet: columns \['label'\] are missing .*'labels'.*, expected \['image', 'label'\]"
    with pytest.raises(DataError, match=expected):
        data.load("mnist")


def test_empty_split(make_mirror: Make) -> None:
    folder = make_mirror("adult", adult_rows())
    import datasets

    table = datasets.Dataset.from_parquet(str(folder / "adult" / "test.parquet"), cache_dir=str(folder / "hf"))
    table.select([]).to_parquet(folder / "adult" / "test.parquet")
    with pytest.raises(DataError, match=r"test\.parquet: no rows, expected at least one|not readable as parquet"):
        data.load("adult")


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("label", 2, 10, r"row 2 has label=10, expected a class from 0 to 9"),
        ("label", 1, -1, r"row 1 has label=-1, expected a class from 0 to 9"),
        ("label", 0, None, r"row 0 has label=None, expected an integer"),
        ("image", 1, {"bytes": b"no image", "path": None}, r"row 1 of 'image' is no readable image"),
        ("image", 1, None, r"row 1 of 'image' is no readable image"),
        ("image", 0, png(0, (28, 27)), r"row 0 of 'image' is 28 x 27 pixels, expected 28 x 28"),
    ],
)
def test_wrong_row(make_mirror: Make, column: str, row: int, value: object, message: str) -> None:
    rows = mnist_rows()
    rows["train"][column][row] = value
    make_mirror("mnist", rows)
    with pytest.raises(DataError, match=rf"train\.parquet: {message}"):
        data.load("mnist")


def test_column_of_another_kind(make_mirror: Make) -> None:
    rows = mnist_rows()
    rows["train"]["image"] = [1.5] * 6
    make_mirror("mnist", rows)
    with pytest.raises(DataError, match=r"train\.parquet: column 'image' is .*, expected encoded images"):
        data.load("mnist")


def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(
        DataError, match=r"download from the hub data set ylecun/mnist failed .*no route.*MIDL_DATA naming"
    ):
        data.load("mnist")


def test_the_hub_is_read_where_no_mirror_is_set(make_mirror: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = mnist_rows()

    def hub(repository: str, configuration: str | None, *, split: str, cache_dir: str) -> Any:
        assert (repository, configuration) == ("ylecun/mnist", None)
        return datasets.Dataset.from_dict(rows[split])

    monkeypatch.setattr(datasets, "load_dataset", hub)
    from_hub = data.load("mnist")
    make_mirror("mnist", rows)
    assert torch.equal(from_hub.train.x, data.load("mnist").train.x)


@pytest.mark.parametrize("missing", ["mean", "test_y"])
def test_a_cache_with_a_missing_array_is_rebuilt(missing: str, make_mirror: Make, tmp_path: Path) -> None:
    make_mirror("mnist", mnist_rows())
    first = data.load("mnist").fingerprint
    (file,) = (tmp_path / "cache" / "data").glob(f"*/{missing}.npy")
    file.unlink()
    assert data.load("mnist").fingerprint == first


def test_a_cache_that_is_no_folder_is_named(make_mirror: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_mirror("mnist", mnist_rows())
    (tmp_path / "file").touch()
    for value, found in (("file", r"is no folder"), ("file/below", r"cannot be used \(.*Not a directory")):
        monkeypatch.setenv("MIDL_CACHE", str(tmp_path / value))
        with pytest.raises(
            DataError, match=rf"MIDL_CACHE='.*{value}' {found}.*, expected a folder that can be read and written"
        ):
            data.load("mnist")
    assert data.load("digits").num_classes == 10  # needs no cache


# Whoever runs the tests may be allowed everything, so the system's refusals are made here.
def test_a_cache_that_may_not_be_written_is_named(
    make_mirror: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    make_mirror("mnist", mnist_rows())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(
            DataError, match=r"MIDL_CACHE='.*cache' cannot be used \(.*denied.*\), expected a folder that can"
        ):
            data.load("mnist")
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkdtemp", refuse)
        patch.delenv("MIDL_CACHE")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path))
        with pytest.raises(DataError, match=r"the cache .* \(MIDL_CACHE is not set\) cannot be used \(.*denied"):
            data.load("mnist")


def test_a_cache_that_may_not_be_read_is_named(make_mirror: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    make_mirror("mnist", mnist_rows())
    data.load("mnist")
    monkeypatch.setattr("numpy.load", refuse)
    with pytest.raises(DataError, match=r"MIDL_CACHE='.*cache' cannot be used \(.*denied.*train_x\.npy"):
        data.load("mnist")


def _real_mirror() -> Path | None:
    named = os.environ.get("MIDL_DATA")
    beside = Path(__file__).resolve().parents[4] / "shared" / "data"
    return Path(named) if named else beside if beside.is_dir() else None


_MIRROR = _real_mirror()


@pytest.mark.slow
@pytest.mark.skipif(_MIRROR is None, reason="no mirror: set MIDL_DATA, or put one at ../shared/data")
@pytest.mark.parametrize(
    ("name", "train", "test", "shape"),
    [
        ("mnist", 60_000, 10_000, (1, 28, 28)),
        ("adult", 32_561, 16_281, (108,)),
        ("cifar10", 50_000, 10_000, (3, 32, 32)),
        ("cifar100", 50_000, 10_000, (3, 32, 32)),
        ("imdb", 25_000, 25_000, (256,)),
    ],
)
def test_the_real_data_has_the_official_sizes(
    name: str, train: int, test: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIDL_DATA", str(_MIRROR))
    dataset = data.load(name)
    assert (len(dataset.train), len(dataset.test), dataset.input_shape) == (train, test, shape)
