"""Looking at a model: who was active, and how much it computes."""

from midl.analysis.activity import Activity, LayerActivity, record_activity
from midl.analysis.flops import count_flops

__all__ = ["Activity", "LayerActivity", "count_flops", "record_activity"]
