# The compiled kernels, native/module.cpp; absent where midl was installed without a compiler.

from collections.abc import Callable
from typing import Any

from torch import Tensor

interface: str  # SHA-256 of this file when the module was built

def linear_forward(
    bfloat16: bool, x: int, x_stride: int, rows: int, depth: int, neurons: int, rank: int, groups: int,
    selected_groups: int, threshold: float, positions: int, span: int, weight: int, bias: int, light_down: int,
    light_up: int, gate_weight: int, gate_bias: int, noise: int, packed_light: int, packed_weight: int, full: int,
    hard: bool, y: int, selected: int, threads: int,
) -> None: ...  # fmt: skip
def linear_backward(
    bfloat16: bool, grad_y: int, x: int, x_stride: int, rows: int, depth: int, neurons: int, rank: int, groups: int,
    selected_groups: int, positions: int, span: int, weight: int, code: int, light_up: int, selected: int, gate: int,
    hard: bool, grad_light: int, grad_x: int, grad_logits: int, grad_weight: int, threads: int,
) -> None: ...  # fmt: skip
def split_gradient(
    bfloat16: bool, grad_y: int, difference: int, difference_stride: int, rows: int, neurons: int, groups: int,
    selected_groups: int, positions: int, span: int, selected: int, gate: int, hard: bool, grad_full: int,
    grad_full_stride: int, grad_light: int, grad_logits: int, threads: int,
) -> None: ...  # fmt: skip
def projection(
    bfloat16: bool, x: int, x_stride: int, rows: int, depth: int, neurons: int, weight: int, y: int, threads: int
) -> None: ...  # fmt: skip
def projection_backward(
    bfloat16: bool, grad_y: int, x: int, x_stride: int, rows: int, depth: int, neurons: int, weight: int, grad_x: int,
    accumulate: bool, grad_weight: int, threads: int,
) -> None: ...  # fmt: skip
def convolution_forward(
    bfloat16: bool, x: int, images: list[int], rows: int, neurons: int, rank: int, groups: int, selected_groups: int,
    threshold: float, positions: int, span: int, weight: int, bias: int, light_up: int, projection: bool,
    gate_bias: int, noise: int, packed_light: int, packed_weight: int, full: int, hard: bool, y: int,
    selected: int, threads: int,
) -> None: ...  # fmt: skip
def convolution_code(
    bfloat16: bool, x: int, images: list[int], rows: int, rank: int, light_down: int, code: int, threads: int
) -> None: ...  # fmt: skip
def convolution_backward(
    bfloat16: bool, x: int, images: list[int], grad_y: int, rows: int, neurons: int, rank: int, groups: int,
    selected_groups: int, positions: int, span: int, weight: int, selected: int, gate: int, code: int, light_up: int,
    hard: bool, grad_light: int, grad_x: int, accumulate: bool, grad_logits: int, grad_weight: int, threads: int,
) -> None: ...  # fmt: skip
def packed_sizes(bfloat16: bool, depth: int, neurons: int, rank: int, groups: int) -> tuple[int, int]: ...
def wants_weight_panels(
    bfloat16: bool, rows: int, depth: int, groups: int, selected_groups: int, group_size: int, convolution: bool
) -> bool: ...  # fmt: skip
def backward_picks(bfloat16: bool, rows: int, groups: int, selected_groups: int, group_size: int) -> bool: ...
def pack(
    bfloat16: bool, depth: int, neurons: int, rank: int, groups: int, weight: int, light_down: int, light_up: int,
    gate_weight: int, packed_light: int, packed_weight: int, threads: int,
) -> None: ...  # fmt: skip
def topk(
    scores: int, rows: int, groups: int, k: int, threshold: float, selected: int, threads: int
) -> None: ...  # fmt: skip
def ffn_forward(
    bfloat16: bool, x: int, x_stride: int, rows: int, depth: int, hidden: int, outputs: int, rank: int, groups: int,
    selected_groups: int, threshold: float, weight: int, bias: int, value_weight: int, value_bias: int,
    down_weight: int, down_bias: int, light_down: int, light_up: int, light_hidden: int, light_bias: int,
    gate_weight: int, gate_bias: int, noise: int, panels: int, hard: bool, activation: int, y: int, selected: int,
    threads: int,
) -> None: ...  # fmt: skip
def ffn_backward(
    grad_y: int, x: int, x_stride: int, rows: int, depth: int, hidden: int, outputs: int, groups: int,
    selected_groups: int, weight: int, bias: int, value_weight: int, value_bias: int, down_weight: int,
    light_hidden: int, selected: int, gate: int, hard: bool, activation: int, grad_x: int, grad_x_of_value: int,
    grad_weight: int, grad_value_weight: int, grad_down: int, grad_bias: int, grad_value_bias: int,
    grad_light_hidden: int, grad_logits: int, threads: int,
) -> None: ...  # fmt: skip

ffn_panel_group: int

def packed_ffn_size(
    bfloat16: bool, depth: int, hidden: int, outputs: int, rank: int, groups: int, gated: bool
) -> int: ...  # fmt: skip
def pack_ffn(
    bfloat16: bool, depth: int, hidden: int, outputs: int, rank: int, groups: int, weight: int, value_weight: int,
    down_weight: int, light_down: int, light_up: int, gate_weight: int, panels: int, threads: int,
) -> None: ...  # fmt: skip
def sample(data: int, bytes: int) -> int: ...

class PreparedLinear:
    def __init__(
        self, parameters: dict[str, Any], states: dict[str, tuple[int, int, int]], bfloat16: bool,
        depth: int, neurons: int, rank: int, groups: int, selected_groups: int, threshold: float, hard: bool,
        packed_light: Tensor, packed_weight: Tensor | None, dense_product: Callable[..., Tensor] | None,
    ) -> None: ...  # fmt: skip
    def run(
        self, x: Tensor, parameters: dict[str, Any], threads: int, selection: bool = False, relu: bool = False
    ) -> Tensor | tuple[Tensor, Tensor] | None: ...
    def run_plainly(self, x: Tensor, parameters: dict[str, Any], relu: bool = False) -> Tensor | None: ...

class PreparedFfn:
    def __init__(
        self, parameters: dict[str, Any], states: dict[str, tuple[int, int, int]], bfloat16: bool,
        depth: int, hidden: int, outputs: int, rank: int, groups: int, selected_groups: int, threshold: float,
        hard: bool, activation: int, panels: Tensor,
    ) -> None: ...  # fmt: skip
    def run(
        self, x: Tensor, parameters: dict[str, Any], threads: int, selection: bool = False
    ) -> Tensor | tuple[Tensor, Tensor] | None: ...

class PreparedConvolution:
    def __init__(
        self, parameters: dict[str, Any], states: dict[str, tuple[int, int, int]], x: Tensor, bfloat16: bool,
        y_shape: tuple[int, ...], selected_shape: tuple[int, ...], images: list[int], rows: int, neurons: int,
        rank: int, groups: int, selected_groups: int, threshold: float, positions: int, span: int, hard: bool,
        packed_light: Tensor, packed_weight: Tensor | None, dense_product: Callable[..., Tensor] | None,
    ) -> None: ...  # fmt: skip
    def run(
        self, x: Tensor, parameters: dict[str, Any], threads: int, selection: bool = False, relu: bool = False
    ) -> Tensor | tuple[Tensor, Tensor] | None: ...

def infers_plainly(x: Any) -> bool: ...
def use_instruction_set(name: str) -> None: ...
def dot_pairs() -> bool: ...
def instruction_set() -> str: ...
def supported_instruction_sets() -> list[str]: ...
def built_instruction_sets() -> list[str]: ...
