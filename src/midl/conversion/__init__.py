"""Swapping the layers of a model in place: dense to MID-L and back."""

from midl.conversion.blocks import FFNBlock
from midl.conversion.convert import convert_, revert_
from midl.conversion.report import ConversionReport, LayerChange

__all__ = ["ConversionReport", "FFNBlock", "LayerChange", "convert_", "revert_"]
