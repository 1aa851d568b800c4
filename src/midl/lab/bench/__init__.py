"""The benchmark harness: a registry of cases, honest dense baselines, JSON out (``midl bench``)."""

from midl.lab.bench.runner import list_benchmarks, run_bench

__all__ = ["list_benchmarks", "run_bench"]
