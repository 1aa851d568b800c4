"""The public names, frozen: adding one is a decision, removing one breaks users."""

from __future__ import annotations

import inspect

import pytest

import midl
from midl import errors

NAMES = [
    "ConversionReport",
    "MIDConfig",
    "MIDConv2d",
    "MIDFFN",
    "MIDLinear",
    "adapt",
    "convert_",
    "count_flops",
    "kernels",
    "load_",
    "record_activity",
    "revert_",
    "save",
    "set_active",
]


def test_the_public_names_are_these():
    assert sorted(midl.__all__) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_documented_with_an_example(name):
    documented = inspect.getdoc(getattr(midl, name))
    assert documented
    # A report and a loader have theirs where they come from: convert_ and save.
    assert ">>> " in documented or name in ("ConversionReport", "load_")


def test_every_error_is_a_midl_error_and_a_value_error():
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.MIDLError)
    assert issubclass(errors.MIDLError, ValueError)
    assert issubclass(errors.DTypeError, TypeError)
    assert issubclass(errors.KernelError, RuntimeError)


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert midl.__version__ == version("midl")
