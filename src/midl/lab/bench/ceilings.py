"""The machine's ceilings, measured: multiply-adds per second in registers and bytes read from memory per second."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from midl.lab.bench.machine import last_level_cache

__all__ = ["Ceilings", "measure_ceilings", "roofline"]

# Independent chains of fused multiply-adds, enough to hide their latency and few enough for the registers;
# and a read of memory in as many streams.
_SOURCE = r"""
#ifdef __AVX512F__
#define BYTES 64
#define CHAINS 20
#else
#define BYTES 32
#define CHAINS 12
#endif
typedef float vec __attribute__((vector_size(BYTES)));

double multiply_add(long steps) {
    vec a[CHAINS], b = (vec){} + 0.999f, c = (vec){} + 0.001f;
    for (int j = 0; j < CHAINS; ++j) a[j] = (vec){} + (j + 0.5f);
    for (long i = 0; i < steps; ++i)
#pragma GCC unroll 32
        for (int j = 0; j < CHAINS; ++j) a[j] = a[j] * b + c;
    float sum = 0;
    for (int j = 0; j < CHAINS; ++j) sum += a[j][0];
    return sum;
}

long flops_per_step(void) { return 2L * CHAINS * BYTES / sizeof(float); }

double read_memory(const vec *data, long count) {
    vec sum[8] = {};
    for (long i = 0; i + 8 <= count; i += 8)
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) sum[j] += data[i + j];
    for (int j = 1; j < 8; ++j) sum[0] += sum[j];
    return sum[0][0];
}

long vector_bytes(void) { return BYTES; }
"""


@dataclass(frozen=True)
class Ceilings:
    """Peak rates of ``threads`` threads.

    ``fma_gflops`` is None where there is no C compiler; the large matrix products are then the ceiling.
    """

    threads: int
    fma_gflops: float | None
    gemm_gflops: float
    gemm_bf16_gflops: float
    read_gbs: float
    read_by: str

    @property
    def gflops(self) -> float:
        """The fp32 ceiling in 1e9 operations per second; a multiply-add is two."""
        return max(self.fma_gflops or 0.0, self.gemm_gflops)

    def peak_gflops(self, dtype: torch.dtype) -> float:
        """Return the compute ceiling for weights of ``dtype``: bfloat16 may also be multiplied as float32."""
        return max(self.gflops, self.gemm_bf16_gflops if dtype == torch.bfloat16 else 0.0)

    def best_of(self, other: Ceilings) -> Ceilings:
        """Return the higher rates of two measurements: a ceiling measured beside other work is too low."""
        fma = [rate for rate in (self.fma_gflops, other.fma_gflops) if rate is not None]
        return Ceilings(
            threads=self.threads,
            fma_gflops=max(fma, default=None),
            gemm_gflops=max(self.gemm_gflops, other.gemm_gflops),
            gemm_bf16_gflops=max(self.gemm_bf16_gflops, other.gemm_bf16_gflops),
            read_gbs=max(self.read_gbs, other.read_gbs),
            read_by=max(self, other, key=lambda c: c.read_gbs).read_by,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)


def measure_ceilings(*, quick: bool = False) -> Ceilings:
    """Measure the ceilings with torch's current number of threads, each as the best of several tries.

    Args:
        quick: fewer tries and smaller matrices.
    """
    threads, tries = torch.get_num_threads(), 5 if quick else 20
    size = 1024 if quick else 2048
    sweep = torch.ones(max(2**26, 4 * last_level_cache()) // 4)
    readers: dict[str, Callable[[], object]] = {"torch.sum": sweep.sum, "torch.max": sweep.max}
    fma = None
    with tempfile.TemporaryDirectory() as folder:
        native = _build(Path(folder))
        if native is not None:
            fma = _fma_gflops(native, threads, tries)
            readers["C loop"] = lambda: _read_all(native, sweep, threads)
        rates = {name: 4 * sweep.numel() / _best_seconds(read, tries) / 1e9 for name, read in readers.items()}
    fastest = max(rates, key=lambda name: rates[name])
    return Ceilings(
        threads=threads,
        fma_gflops=fma,
        gemm_gflops=_gemm_gflops(size, torch.float32, tries),
        gemm_bf16_gflops=_gemm_gflops(size // 2, torch.bfloat16, tries),
        read_gbs=rates[fastest],
        read_by=fastest,
    )


def roofline(flops: float, read_bytes: float, seconds: float, gflops: float, gbs: float) -> dict[str, Any]:
    """Return achieved rates and the share of the ceiling that binds.

    >>> line = roofline(flops=2e9, read_bytes=1e6, seconds=0.02, gflops=200, gbs=20)
    >>> line["bound"], round(line["share"], 3)
    ('compute', 0.5)

    Args:
        flops: operations the layer needs.
        read_bytes: bytes it must move at least.
        seconds: what it took.
        gflops: ceiling, 1e9 operations per second.
        gbs: ceiling, 1e9 bytes per second.
    """
    compute, memory = flops / gflops / 1e9, read_bytes / gbs / 1e9
    return {
        "gflops": flops / seconds / 1e9,
        "gbs": read_bytes / seconds / 1e9,
        "bound": "compute" if compute >= memory else "memory",
        "share": max(compute, memory) / seconds,
    }


def _best_seconds(call: Callable[[], object], tries: int) -> float:
    call()
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _gemm_gflops(size: int, dtype: torch.dtype, tries: int) -> float:
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: F.linear(a, b), tries) / 1e9


def _build(folder: Path) -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    source, library = folder / "ceilings.c", folder / "ceilings.so"
    source.write_text(_SOURCE)
    command = [
        compiler,
        "-O3",
        "-march=native",
        "-ffp-contract=fast",
        "-shared",
        "-fPIC",
        str(source),
        "-o",
        str(library),
    ]
    if subprocess.run(command, capture_output=True).returncode:
        return None
    native = ctypes.CDLL(str(library))
    for name in ("multiply_add", "read_memory"):
        getattr(native, name).restype = ctypes.c_double
    for name in ("flops_per_step", "vector_bytes"):
        getattr(native, name).restype = ctypes.c_long
    return native


def _fma_gflops(native: ctypes.CDLL, threads: int, tries: int) -> float:
    steps = 2_000_000  # a few milliseconds

    def run() -> None:
        with ThreadPoolExecutor(threads) as pool:  # ctypes releases the interpreter lock
            list(pool.map(native.multiply_add, [ctypes.c_long(steps)] * threads))

    return threads * steps * native.flops_per_step() / _best_seconds(run, tries) / 1e9


def _read_all(native: ctypes.CDLL, sweep: torch.Tensor, threads: int) -> None:
    vector = native.vector_bytes()
    share = 4 * sweep.numel() // vector // threads

    def read(thread: int) -> None:
        native.read_memory(ctypes.c_void_p(sweep.data_ptr() + thread * share * vector), ctypes.c_long(share))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))
