# mypy: disable-error-code="no-untyped-def"
"""Forward products in Triton: code, light path, and the full path of the selected groups."""

import triton
import triton.language as tl

__all__ = ["full_path_kernel", "light_path_kernel", "project_kernel"]


@triton.jit
def block_of(rows, positions, blocks, SPAN: tl.constexpr):
    """Return the selection block of each row: ``SPAN`` neighbouring of ``positions`` rows share one."""
    if SPAN == 1:
        return rows
    return rows // positions * blocks + rows % positions // SPAN


@triton.jit
def block_size(rows, positions, SPAN: tl.constexpr):
    """Return how many rows share each row's selection, as a float: the last block of a sequence may be short."""
    if SPAN == 1:
        return tl.full(rows.shape, 1.0, tl.float32)
    first = rows % positions // SPAN * SPAN
    return tl.minimum(positions - first, SPAN).to(tl.float32)


@triton.jit
def input_offsets(rows, valid, tap, stride_row, GEOMETRY: tl.constexpr):
    """Return where each row's inputs under filter ``tap`` start, and whether they lie inside the image.

    ``GEOMETRY`` is None for a linear layer, else (H, W, H', W', kw, stride, padding, dilation), each pair as (y, x):
    a row is then an output position of a channels-last image and ``stride_row`` the channels of a pixel.
    """
    if GEOMETRY is None:
        return rows.to(tl.int64) * stride_row, valid
    else:  # noqa: RET505 - Triton compiles one branch only, and needs the else to know
        out_x = rows % GEOMETRY[3]
        out_y = rows // GEOMETRY[3] % GEOMETRY[2]
        image = rows // (GEOMETRY[2] * GEOMETRY[3])
        y = out_y * GEOMETRY[5] - GEOMETRY[7] + tap // GEOMETRY[4] * GEOMETRY[9]
        x = out_x * GEOMETRY[6] - GEOMETRY[8] + tap % GEOMETRY[4] * GEOMETRY[10]
        inside = valid & (y >= 0) & (y < GEOMETRY[0]) & (x >= 0) & (x < GEOMETRY[1])
        pixel = (image.to(tl.int64) * GEOMETRY[0] + y) * GEOMETRY[1] + x
        return pixel * stride_row, inside


@triton.jit
def project_kernel(
    x_ptr, filter_ptr, out_ptr, num_rows, channels, width, stride_row, steps_per_split,
    TAPS: tl.constexpr, GEOMETRY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[split, rows, width] = x (rows, taps * channels) @ filter (width, taps * channels).T, in float32.

    Split over the fan-in: each program sums ``steps_per_split`` steps of ``BLOCK_K`` channels.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    steps_per_tap = tl.cdiv(channels, BLOCK_K)
    begin = split * steps_per_split
    end = tl.minimum(begin + steps_per_split, steps_per_tap * TAPS)
    filter_row = columns.to(tl.int64)[None, :] * (channels * TAPS)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(begin, end):
        tap = step // steps_per_tap
        ks = step % steps_per_tap * BLOCK_K + tl.arange(0, BLOCK_K)
        starts, inside = input_offsets(rows, rows < num_rows, tap, stride_row, GEOMETRY)
        a = tl.load(x_ptr + starts[:, None] + ks[None, :], inside[:, None] & (ks[None, :] < channels), 0.0)
        b = tl.load(
            filter_ptr + filter_row + tap * channels + ks[:, None],
            (columns[None, :] < width) & (ks[:, None] < channels),
            0.0,
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    out = out_ptr + (split.to(tl.int64) * num_rows + rows[:, None]) * width + columns[None, :]
    tl.store(out, total, (rows[:, None] < num_rows) & (columns[None, :] < width))


@triton.jit
def light_tile(
    total, share, code_ptr, up_ptr, rows, valid, neurons, neuron_ok, rank,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return total + share * code[rows] @ light_up[neurons].T, the code rounded to the weights' dtype."""
    code_row = rows.to(tl.int64)[:, None] * rank
    up_row = neurons.to(tl.int64)[None, :] * rank
    for start in range(0, rank, BLOCK_R):
        rs = start + tl.arange(0, BLOCK_R)
        z = tl.load(code_ptr + code_row + rs[None, :], valid[:, None] & (rs[None, :] < rank), 0.0)
        up = tl.load(up_ptr + up_row + rs[:, None], neuron_ok[None, :] & (rs[:, None] < rank), 0.0)
        total = tl.dot((z * share).to(up.dtype), up, total, input_precision=PRECISION)
    return total


@triton.jit
def light_path_kernel(
    code_ptr, up_ptr, bias_ptr, y_ptr, num_rows, width, rank, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y = code @ light_up.T + bias for every row and neuron."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    neurons = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid, neuron_ok = rows < num_rows, neurons < width
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    y = light_tile(y, 1.0, code_ptr, up_ptr, rows, valid, neurons, neuron_ok, rank, PRECISION, BLOCK_R)
    if HAS_BIAS:
        y += tl.load(bias_ptr + neurons, neuron_ok, 0.0).to(tl.float32)[None, :]
    out = y_ptr + rows.to(tl.int64)[:, None] * width + neurons[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), valid[:, None] & neuron_ok[None, :])


@triton.jit
def full_path_kernel(
    x_ptr, weight_ptr, bias_ptr, code_ptr, up_ptr, gates_ptr, y_ptr,
    rows_ptr, starts_ptr, tile_group_ptr, tile_begin_ptr, num_tiles_ptr,
    channels, width, rank, num_groups, stride_row, positions, blocks,
    GROUP_SIZE: tl.constexpr, SPAN: tl.constexpr, HARD: tl.constexpr, HAS_BIAS: tl.constexpr,
    TAPS: tl.constexpr, GEOMETRY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[rows, group] = l + a (f - l) + bias, or f + bias, for one tile of the rows that selected a group.

    The grid is an upper bound that the host knows; programs past the last tile leave at once.
    """
    tile = tl.program_id(0)
    if tile >= tl.load(num_tiles_ptr):
        return
    group = tl.load(tile_group_ptr + tile)
    places = tl.load(tile_begin_ptr + tile) + tl.arange(0, BLOCK_M)
    valid = places < tl.load(starts_ptr + group + 1)
    rows = tl.load(rows_ptr + places, valid, 0)
    lanes = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane_ok = lanes < GROUP_SIZE
    neurons = group * GROUP_SIZE + lanes

    full = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    weight_row = neurons.to(tl.int64)[None, :] * (channels * TAPS)
    steps_per_tap = tl.cdiv(channels, BLOCK_K)
    for step in range(0, steps_per_tap * TAPS):
        tap = step // steps_per_tap
        ks = step % steps_per_tap * BLOCK_K + tl.arange(0, BLOCK_K)
        offsets, inside = input_offsets(rows, valid, tap, stride_row, GEOMETRY)
        a = tl.load(x_ptr + offsets[:, None] + ks[None, :], inside[:, None] & (ks[None, :] < channels), 0.0)
        b = tl.load(
            weight_ptr + weight_row + tap * channels + ks[:, None],
            lane_ok[None, :] & (ks[:, None] < channels),
            0.0,
        )
        full = tl.dot(a, b, full, input_precision=PRECISION)

    y = full
    if not HARD:
        # l + a (f - l) as a f + (1 - a) l: one accumulator, where two would take half of the registers.
        block = block_of(rows, positions, blocks, SPAN).to(tl.int64)
        gate = tl.load(gates_ptr + block * num_groups + group, valid, 0.0)[:, None]
        y = light_tile(
            gate * full, 1.0 - gate, code_ptr, up_ptr, rows, valid, neurons, lane_ok, rank, PRECISION, BLOCK_R
        )  # fmt: skip
    if HAS_BIAS:
        y += tl.load(bias_ptr + neurons, lane_ok, 0.0).to(tl.float32)[None, :]
    out = y_ptr + rows.to(tl.int64)[:, None] * width + neurons[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), valid[:, None] & lane_ok[None, :])
