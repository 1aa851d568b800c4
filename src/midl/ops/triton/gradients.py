# mypy: disable-error-code="no-untyped-def"
"""Gradients in Triton for ``ste="selected"``: the products with weight and x touch the selected groups alone."""

import triton
import triton.language as tl

from midl.ops.triton.products import block_of, block_size, input_offsets

__all__ = ["code_grad_kernel", "input_grad_kernel", "light_up_grad_kernel", "weight_grad_kernel"]


@triton.jit
def gate_of(gates_ptr, rows, valid, group, num_groups, positions, blocks, SPAN: tl.constexpr):
    """Return the gate of each row for ``group``."""
    block = block_of(rows, positions, blocks, SPAN).to(tl.int64)
    return tl.load(gates_ptr + block * num_groups + group, valid, 0.0)


@triton.jit
def input_grad_kernel(
    grad_y_ptr, x_ptr, weight_ptr, code_ptr, up_ptr, gates_ptr, grad_x_ptr, grad_logits_ptr,
    rows_ptr, starts_ptr, tile_group_ptr, tile_begin_ptr, num_tiles_ptr,
    channels, width, rank, num_groups, stride_row, positions, blocks,
    GROUP_SIZE: tl.constexpr, SPAN: tl.constexpr, HARD: tl.constexpr, NEED_X: tl.constexpr,
    TAPS: tl.constexpr, GEOMETRY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gradients of x and of the gate logits from one tile of the rows that selected a group.

    With p = grad_y[rows, group] @ weight[group], x gets a p, and because grad_y . f = p . x the same product gives the
    gate's gradient grad_y . (f - l) without computing f again. Groups of a row meet in x by float32 atomics.
    """
    tile = tl.program_id(0)
    if tile >= tl.load(num_tiles_ptr):
        return
    group = tl.load(tile_group_ptr + tile)
    places = tl.load(tile_begin_ptr + tile) + tl.arange(0, BLOCK_M)
    valid = places < tl.load(starts_ptr + group + 1)
    rows = tl.load(rows_ptr + places, valid, 0)
    grad_row = grad_y_ptr + rows.to(tl.int64)[:, None] * width
    gate = gate_of(gates_ptr, rows, valid, group, num_groups, positions, blocks, SPAN)

    grad_gate = tl.zeros((BLOCK_M,), tl.float32)
    steps_per_tap = tl.cdiv(channels, BLOCK_K)
    for step in range(0, steps_per_tap * TAPS):
        tap = step // steps_per_tap
        ks = step % steps_per_tap * BLOCK_K + tl.arange(0, BLOCK_K)
        product = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for start in range(0, GROUP_SIZE, BLOCK_N):
            lanes = start + tl.arange(0, BLOCK_N)
            neurons = group * GROUP_SIZE + lanes
            grad = tl.load(grad_row + neurons[None, :], valid[:, None] & (lanes < GROUP_SIZE)[None, :], 0.0)
            w = tl.load(
                weight_ptr + (neurons.to(tl.int64)[:, None] * TAPS + tap) * channels + ks[None, :],
                (lanes < GROUP_SIZE)[:, None] & (ks < channels)[None, :],
                0.0,
            )
            product = tl.dot(grad, w, product, input_precision=PRECISION)
        offsets, inside = input_offsets(rows, valid, tap, stride_row, GEOMETRY)
        mask = inside[:, None] & (ks < channels)[None, :]
        x = tl.load(x_ptr + offsets[:, None] + ks[None, :], mask, 0.0)
        grad_gate += tl.sum(product * x.to(tl.float32), 1)
        if NEED_X:
            # grad_x is dense in memory whatever the strides of x are.
            to, _ = input_offsets(rows, valid, tap, channels, GEOMETRY)
            part = product if HARD else product * gate[:, None]
            tl.atomic_add(grad_x_ptr + to[:, None] + ks[None, :], part, mask, sem="relaxed")

    # Likewise grad_y . l = (grad_y @ light_up[group]) . z, with the code z in float32.
    for begin in range(0, rank, BLOCK_R):
        rs = begin + tl.arange(0, BLOCK_R)
        product = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for start in range(0, GROUP_SIZE, BLOCK_N):
            lanes = start + tl.arange(0, BLOCK_N)
            neurons = group * GROUP_SIZE + lanes
            grad = tl.load(grad_row + neurons[None, :], valid[:, None] & (lanes < GROUP_SIZE)[None, :], 0.0)
            up = tl.load(
                up_ptr + neurons.to(tl.int64)[:, None] * rank + rs[None, :],
                (lanes < GROUP_SIZE)[:, None] & (rs < rank)[None, :],
                0.0,
            )
            product = tl.dot(grad, up, product, input_precision=PRECISION)
        z = tl.load(
            code_ptr + rows.to(tl.int64)[:, None] * rank + rs[None, :], valid[:, None] & (rs < rank)[None, :], 0.0
        )
        grad_gate -= tl.sum(product * z, 1)
    grad_logits = grad_gate * gate * (1.0 - gate)
    block = block_of(rows, positions, blocks, SPAN).to(tl.int64)
    out = grad_logits_ptr + block * num_groups + group
    if SPAN == 1:
        tl.store(out, grad_logits, valid)
    else:
        tl.atomic_add(out, grad_logits, valid, sem="relaxed")


@triton.jit
def weight_grad_kernel(
    grad_y_ptr, x_ptr, gates_ptr, grad_weight_ptr, rows_ptr, starts_ptr,
    channels, width, num_groups, stride_row, positions, blocks,
    GROUP_SIZE: tl.constexpr, SPAN: tl.constexpr, HARD: tl.constexpr,
    TAPS: tl.constexpr, GEOMETRY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_weight[group] = (a grad_y)[rows, group].T @ x[rows] over the rows that selected the group."""
    lane_blocks: tl.constexpr = (GROUP_SIZE + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // lane_blocks
    lanes = tl.program_id(0) % lane_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    lane_ok = lanes < GROUP_SIZE
    neurons = group * GROUP_SIZE + lanes
    steps_per_tap = tl.cdiv(channels, BLOCK_K)
    tap = tl.program_id(1) // steps_per_tap
    ks = tl.program_id(1) % steps_per_tap * BLOCK_K + tl.arange(0, BLOCK_K)
    end = tl.load(starts_ptr + group + 1)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for begin in range(tl.load(starts_ptr + group), end, BLOCK_M):
        places = begin + tl.arange(0, BLOCK_M)
        valid = places < end
        rows = tl.load(rows_ptr + places, valid, 0)
        grad = tl.load(
            grad_y_ptr + rows.to(tl.int64)[:, None] * width + neurons[None, :], valid[:, None] & lane_ok[None, :], 0.0
        )
        if not HARD:
            gate = gate_of(gates_ptr, rows, valid, group, num_groups, positions, blocks, SPAN)
            grad = (grad.to(tl.float32) * gate[:, None]).to(grad.dtype)
        offsets, inside = input_offsets(rows, valid, tap, stride_row, GEOMETRY)
        x = tl.load(x_ptr + offsets[:, None] + ks[None, :], inside[:, None] & (ks < channels)[None, :], 0.0)
        total = tl.dot(tl.trans(grad), x, total, input_precision=PRECISION)
    out = grad_weight_ptr + (neurons.to(tl.int64)[:, None] * TAPS + tap) * channels + ks[None, :]
    tl.store(out, total.to(grad_weight_ptr.dtype.element_ty), lane_ok[:, None] & (ks < channels)[None, :])


@triton.jit
def light_grad_tile(
    grad_y_ptr, gates_ptr, grad_logits_ptr, rows, valid, neurons, neuron_ok, width, num_groups, positions, blocks,
    GROUP_SIZE: tl.constexpr, SPAN: tl.constexpr, HARD: tl.constexpr, LIGHT_GATE: tl.constexpr,
):  # fmt: skip
    """Return the light path's gradient of a tile, and the bias's: grad_y, and what the light gate adds to both."""
    inside = valid[:, None] & neuron_ok[None, :]
    grad = tl.load(grad_y_ptr + rows.to(tl.int64)[:, None] * width + neurons[None, :], inside, 0.0).to(tl.float32)
    block = block_of(rows, positions, blocks, SPAN).to(tl.int64)
    group = block[:, None] * num_groups + (neurons // GROUP_SIZE)[None, :]
    gates = tl.load(gates_ptr + group, inside, -1.0)
    share = 0.0 if HARD else 1.0 - gates
    light = tl.where(gates != -1.0, grad * share, grad)
    if LIGHT_GATE:
        spread = tl.load(grad_logits_ptr + group, inside, 0.0) / GROUP_SIZE
        spread = spread / block_size(rows, positions, SPAN)[:, None]
        light += spread
        grad += spread
    return light, grad


@triton.jit
def code_grad_kernel(
    grad_y_ptr, gates_ptr, grad_logits_ptr, up_ptr, gate_weight_ptr, grad_code_ptr,
    num_rows, width, rank, num_groups, positions, blocks,
    GROUP_SIZE: tl.constexpr, SPAN: tl.constexpr, HARD: tl.constexpr, LIGHT_GATE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """grad_code = grad_light @ light_up, plus grad_logits @ gate_weight for the projection gate."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rs = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid, rank_ok = rows < num_rows, rs < rank
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, width, BLOCK_K):
        neurons = start + tl.arange(0, BLOCK_K)
        neuron_ok = neurons < width
        light, _ = light_grad_tile(
            grad_y_ptr, gates_ptr, grad_logits_ptr, rows, valid, neurons, neuron_ok, width, num_groups, positions,
            blocks, GROUP_SIZE, SPAN, HARD, LIGHT_GATE,
        )  # fmt: skip
        up = tl.load(
            up_ptr + neurons.to(tl.int64)[:, None] * rank + rs[None, :], neuron_ok[:, None] & rank_ok[None, :], 0.0
        )
        total = tl.dot(light.to(up.dtype), up, total, input_precision=PRECISION)
    if not LIGHT_GATE:
        block = block_of(rows, positions, blocks, SPAN).to(tl.int64)
        size = block_size(rows, positions, SPAN)[:, None]
        for start in range(0, num_groups, BLOCK_G):
            groups = start + tl.arange(0, BLOCK_G)
            grad = tl.load(
                grad_logits_ptr + block[:, None] * num_groups + groups[None, :],
                valid[:, None] & (groups < num_groups)[None, :],
                0.0,
            )
            gate_weight = tl.load(
                gate_weight_ptr + groups[:, None] * rank + rs[None, :],
                (groups < num_groups)[:, None] & rank_ok[None, :],
                0.0,
            )
            # In float32: a scaled loss could overflow half precision in a sum over d products.
            total = tl.dot(grad / size, gate_weight.to(tl.float32), total, input_precision="ieee")
    out = grad_code_ptr + rows.to(tl.int64)[:, None] * rank + rs[None, :]
    tl.store(out, total, valid[:, None] & rank_ok[None, :])


@triton.jit
def light_up_grad_kernel(
    grad_y_ptr, gates_ptr, grad_logits_ptr, code_ptr, grad_up_ptr, grad_bias_ptr,
    num_rows, width, rank, num_groups, positions, blocks,
    GROUP_SIZE: tl.constexpr, SPAN: tl.constexpr, HARD: tl.constexpr, LIGHT_GATE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """grad_light_up = grad_light.T @ code, and the bias's gradient from the same read of grad_y."""
    neurons = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rs = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    neuron_ok, rank_ok = neurons < width, rs < rank
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    grad_bias = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, num_rows, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        valid = rows < num_rows
        light, grad = light_grad_tile(
            grad_y_ptr, gates_ptr, grad_logits_ptr, rows, valid, neurons, neuron_ok, width, num_groups, positions,
            blocks, GROUP_SIZE, SPAN, HARD, LIGHT_GATE,
        )  # fmt: skip
        grad_bias += tl.sum(grad, 0)
        z = tl.load(code_ptr + rows.to(tl.int64)[:, None] * rank + rs[None, :], valid[:, None] & rank_ok[None, :], 0.0)
        dtype = grad_up_ptr.dtype.element_ty
        total = tl.dot(tl.trans(light).to(dtype), z.to(dtype), total, input_precision=PRECISION)
    out = grad_up_ptr + neurons.to(tl.int64)[:, None] * rank + rs[None, :]
    tl.store(out, total.to(grad_up_ptr.dtype.element_ty), neuron_ok[:, None] & rank_ok[None, :])
    if tl.program_id(1) == 0:
        tl.store(grad_bias_ptr + neurons, grad_bias.to(grad_bias_ptr.dtype.element_ty), neuron_ok)
