"""Swapping the layers of a model in place: dense to MID-L and back."""

from midl.conversion.convert import convert_, revert_
from midl.conversion.report import ConversionReport, LayerChange

__all__ = ["ConversionReport", "LayerChange", "convert_", "revert_"]
