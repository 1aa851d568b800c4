"""Adapting a trained model to a budget: calibrate, initialise, allocate, distil; ``midl.adapt`` does them in turn."""

from midl.adaptation.adapt import adapt
from midl.adaptation.allocate import Option, allocate
from midl.adaptation.calibrate import Moments, Principal, calibrate
from midl.adaptation.distil import distil, soft_cross_entropy, squared_error
from midl.adaptation.ffn import FFNStart, fit_ffn
from midl.adaptation.gate import captured_energy, fit_gate
from midl.adaptation.group import Chain, find_chains, group_neurons, order_neurons, permute
from midl.adaptation.initialise import Start, initialise
from midl.adaptation.light_path import LightPath, fit_light_path
from midl.adaptation.normalization import refresh_normalization
from midl.adaptation.report import AdaptedLayer, AdaptReport
from midl.adaptation.sensitivity import OutputRows, sample_outputs, weigh_outputs
from midl.adaptation.threshold import LayerThreshold, ThresholdReport, calibrate_threshold

__all__ = [
    "AdaptReport",
    "AdaptedLayer",
    "Chain",
    "FFNStart",
    "LayerThreshold",
    "LightPath",
    "Moments",
    "Option",
    "OutputRows",
    "Principal",
    "Start",
    "ThresholdReport",
    "adapt",
    "allocate",
    "calibrate",
    "calibrate_threshold",
    "captured_energy",
    "distil",
    "find_chains",
    "fit_ffn",
    "fit_gate",
    "fit_light_path",
    "group_neurons",
    "initialise",
    "order_neurons",
    "permute",
    "refresh_normalization",
    "sample_outputs",
    "soft_cross_entropy",
    "squared_error",
    "weigh_outputs",
]
