# mypy: disable-error-code="no-untyped-def"
"""Products for a handful of rows: bound by the weights' bytes, so no Tensor Cores, but many programs and wide loads."""

import triton
import triton.language as tl

__all__ = ["interpolate_rows_kernel", "panels_kernel"]


@triton.jit
def load_code(code_ptr, row, rs, num_rows, rank, SPLITS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return code[row, rs], summed over the splits of the fan-in that computed it."""
    z = tl.zeros((BLOCK_R,), tl.float32)
    for split in tl.static_range(SPLITS):
        z += tl.load(code_ptr + (split * num_rows + row) * rank + rs, rs < rank, 0.0)
    return z


@triton.jit
def panels_kernel(
    x_ptr, weight_ptr, selected_ptr, out_ptr, num_rows, channels, width, stride_row, k, per_split,
    GATHER: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[split, row, neuron] = x[row] @ weight[neuron] over the split's inputs, for each row's selected neurons.

    Without ``GATHER``: for every neuron. ``per_split`` inputs, a multiple of BLOCK_K, belong to a split.
    """
    row, split = tl.program_id(0), tl.program_id(2)
    entries = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if GATHER:
        valid = entries < k * GROUP_SIZE
        group = tl.load(selected_ptr + row * k + entries // GROUP_SIZE, valid, 0)
        neurons = group * GROUP_SIZE + entries % GROUP_SIZE
    else:
        valid = entries < width
        neurons = entries
    panel = weight_ptr + neurons.to(tl.int64)[:, None] * channels
    begin = split * per_split
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(begin, tl.minimum(begin + per_split, channels), BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        w = tl.load(panel + ks[None, :], valid[:, None] & (ks < channels)[None, :], 0.0)
        a = tl.load(x_ptr + row.to(tl.int64) * stride_row + ks, ks < channels, 0.0)
        total += w.to(tl.float32) * a.to(tl.float32)[None, :]
    tl.store(out_ptr + (split * num_rows + row).to(tl.int64) * width + neurons, tl.sum(total, 1), valid)


@triton.jit
def interpolate_rows_kernel(
    code_ptr, up_ptr, bias_ptr, gates_ptr, full_ptr, y_ptr, num_rows, width, rank, num_groups,
    CODE_SPLITS: tl.constexpr, SPLITS: tl.constexpr, GROUP_SIZE: tl.constexpr, HARD: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[row] = l + bias, or l + a (f - l) + bias where the neuron's group is selected."""
    row = tl.program_id(0)
    neurons = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    neuron_ok = neurons < width
    light = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, rank, BLOCK_R):
        rs = start + tl.arange(0, BLOCK_R)
        z = load_code(code_ptr, row, rs, num_rows, rank, CODE_SPLITS, BLOCK_R)
        up = tl.load(
            up_ptr + neurons.to(tl.int64)[:, None] * rank + rs[None, :],
            neuron_ok[:, None] & (rs < rank)[None, :],
            0.0,
        )
        light += tl.sum(up.to(tl.float32) * z[None, :], 1)
    gate = tl.load(gates_ptr + row * num_groups + neurons // GROUP_SIZE, neuron_ok, -1.0)
    selected = gate != -1.0
    full = tl.zeros((BLOCK_N,), tl.float32)
    for split in tl.static_range(SPLITS):
        full += tl.load(full_ptr + (split * num_rows + row).to(tl.int64) * width + neurons, selected, 0.0)
    mixed = full if HARD else light + gate * (full - light)
    y = tl.where(selected, mixed, light)
    if HAS_BIAS:
        y += tl.load(bias_ptr + neurons, neuron_ok, 0.0).to(tl.float32)
    tl.store(y_ptr + row.to(tl.int64) * width + neurons, y.to(y_ptr.dtype.element_ty), neuron_ok)
