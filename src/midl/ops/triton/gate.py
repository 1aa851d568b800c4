# mypy: disable-error-code="no-untyped-def"
"""Gate logits and exact Top-k selection in Triton, with the tie rule of :func:`midl.selection.topk_groups`."""

import triton
import triton.language as tl

from midl.ops.triton.few_rows import load_code

__all__ = ["gate_logits_kernel", "gates_of_selected_kernel", "select_code_kernel", "select_groups_kernel"]


@triton.jit
def gate_logits_kernel(
    code_ptr, gate_weight_ptr, gate_bias_ptr, logits_ptr, num_blocks, num_groups, rank,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """logits = code @ gate_weight.T + gate_bias, all of it in float32: choices should not depend on the dtype."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    groups = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid, group_ok = rows < num_blocks, groups < num_groups
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, rank, BLOCK_R):
        rs = start + tl.arange(0, BLOCK_R)
        z = tl.load(
            code_ptr + rows.to(tl.int64)[:, None] * rank + rs[None, :], valid[:, None] & (rs[None, :] < rank), 0.0
        )
        gate = tl.load(
            gate_weight_ptr + groups[None, :] * rank + rs[:, None], group_ok[None, :] & (rs[:, None] < rank), 0.0
        )
        total = tl.dot(z, gate.to(tl.float32), total, input_precision=PRECISION)
    total += tl.load(gate_bias_ptr + groups, group_ok, 0.0).to(tl.float32)[None, :]
    out = logits_ptr + rows.to(tl.int64)[:, None] * num_groups + groups[None, :]
    tl.store(out, total, valid[:, None] & group_ok[None, :])


@triton.jit
def topk_mask(scores, real, k, ROWS: tl.constexpr):
    """Return the mask of the ``k`` largest scores of each row, ties to the lowest index and NaN as -inf.

    A search for the k-th largest key bit by bit, 32 counts whatever k is: no sort, no host, and exact.
    """
    # -0.0 and 0.0 tie, so they need one key. ``real`` is false for lanes past the last group: they get the lowest key.
    scores = tl.where(scores == scores, tl.where(scores == 0, 0.0, scores), float("-inf"))
    bits = scores.to(tl.int32, bitcast=True)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    keys = tl.where(real, keys, 0)
    threshold = tl.zeros((ROWS,), tl.uint32)
    for i in range(32):
        bit = tl.full((ROWS,), 1, tl.uint32) << (31 - i)
        candidate = threshold | bit
        count = tl.sum((keys >= candidate[:, None]).to(tl.int32), 1)
        threshold = tl.where(count >= k, candidate, threshold)
    above = keys > threshold[:, None]
    equal = keys == threshold[:, None]
    missing = k - tl.sum(above.to(tl.int32), 1)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= missing[:, None]))


@triton.jit
def store_selection(logits, selection, rows, groups, valid, real, gates_ptr, selected_ptr, num_groups, k):
    """Write the selected groups in ascending order, and the gate of each group: -1 where it is not selected."""
    chosen = selection & valid[:, None]
    place = tl.cumsum(selection.to(tl.int32), 1) - 1
    row64 = rows.to(tl.int64)[:, None]
    ids = tl.zeros_like(place) + groups[None, :]
    tl.store(selected_ptr + row64 * k + place, ids, chosen)
    gates = tl.where(selection, tl.sigmoid(logits), -1.0)
    tl.store(gates_ptr + row64 * num_groups + groups[None, :], gates, valid[:, None] & real)


@triton.jit
def select_groups_kernel(
    logits_ptr, noise_ptr, gates_ptr, selected_ptr, num_blocks, num_groups, k,
    HAS_NOISE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Select the k largest of logits + noise per row."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    groups = tl.arange(0, GROUPS)
    valid = rows < num_blocks
    real = (groups < num_groups)[None, :]
    offsets = rows.to(tl.int64)[:, None] * num_groups + groups[None, :]
    logits = tl.load(logits_ptr + offsets, valid[:, None] & real, 0.0)
    scores = logits
    if HAS_NOISE:
        scores += tl.load(noise_ptr + offsets, valid[:, None] & real, 0.0).to(tl.float32)
    selection = topk_mask(scores, real, k, ROWS)
    store_selection(logits, selection, rows, groups, valid, real, gates_ptr, selected_ptr, num_groups, k)


@triton.jit
def select_code_kernel(
    code_ptr, gate_weight_ptr, gate_bias_ptr, noise_ptr, gates_ptr, selected_ptr, num_rows, num_groups, rank, k,
    SPLITS: tl.constexpr, HAS_NOISE: tl.constexpr, GROUPS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gate logits and selection of one row in one program: two launches fewer where a few rows are all there is."""
    row = tl.program_id(0)
    groups = tl.arange(0, GROUPS)
    real = groups < num_groups
    logits = tl.load(gate_bias_ptr + groups, real, 0.0).to(tl.float32)
    for start in range(0, rank, BLOCK_R):
        rs = start + tl.arange(0, BLOCK_R)
        z = load_code(code_ptr, row, rs, num_rows, rank, SPLITS, BLOCK_R)
        gate = tl.load(
            gate_weight_ptr + groups[:, None] * rank + rs[None, :], real[:, None] & (rs[None, :] < rank), 0.0
        )
        logits += tl.sum(gate.to(tl.float32) * z[None, :], 1)
    logits = tl.expand_dims(logits, 0)
    scores = logits
    if HAS_NOISE:
        scores += tl.load(noise_ptr + row * num_groups + groups, real, 0.0).to(tl.float32)[None, :]
    rows = row + tl.arange(0, 1)
    selection = topk_mask(scores, real[None, :], k, 1)
    store_selection(
        logits, selection, rows, groups, rows >= 0, real[None, :], gates_ptr, selected_ptr, num_groups, k
    )  # fmt: skip


@triton.jit
def gates_of_selected_kernel(logits_ptr, selected_ptr, gates_ptr, num_entries, num_groups, k, BLOCK: tl.constexpr):
    """gates[row, g] = sigmoid(logits[row, g]) for the groups that the forward pass selected; the rest stay."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = entries < num_entries
    group = tl.load(selected_ptr + entries, valid, 0)
    offsets = (entries // k).to(tl.int64) * num_groups + group
    tl.store(gates_ptr + offsets, tl.sigmoid(tl.load(logits_ptr + offsets, valid, 0.0)), valid)
