"""Lightning attention on GPUs: one Triton scan serves the output and all three gradients.

With S_t = exp(-s) S_{t-1} + k_t^T v_t (MiniMax-01, arXiv 2501.08313 sec. 2.2) output and gradients are
out_t = sum_u exp(-s |t - u|) (x_t . y_u) z_u over the tokens u of t's document up to t, or from t to its end:

    o: x, y, z = q, k, v      dq: do, v, k      dk, from the end: v, do, q      dv, from the end: k, q, do

A program walks through the chunks of one segment of a row, for one head and a block of z's columns; the state
y^T z stays in registers. Where rows and heads are too few to fill the GPU, segments run side by side, seeded
by a pass that computes states only, which is also LASP+'s local state.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.documents import Documents
from kernels.reference import lightning_attention as lightning_attention_by_chunks
from kernels.reference import lightning_end_state as lightning_end_state_by_sum

MAX_SIZE = 256
"""Of a head; it must also be a multiple of 16."""
FULL_GPU = 128
"""Programs that keep a GPU busy."""
SEGMENT_CHUNKS = 16
"""Of a segment, at least."""


class Config(NamedTuple):
    """Constants of a scan."""

    chunk: int
    """Tokens a step."""
    columns: int
    """Of z and of the state that a program holds."""
    num_warps: int
    num_stages: int


CONFIGS = [
    Config(64, 64, 4, 2),
    Config(64, 32, 4, 2),
    Config(64, 64, 4, 3),
    Config(32, 64, 4, 2),
    Config(32, 32, 4, 1),
]


class Layout(NamedTuple):
    """How the work of one call is cut."""

    config: Config
    size: int
    """Of a head."""
    padded: int
    """The same as a power of two."""
    blocks: int
    """Programs that share a head."""
    segment_chunks: int
    segments: int


def plan_layout(q: Tensor, config: Config | None = None, segments: int | None = None) -> Layout:
    """Constants for q [rows, tokens, heads, head_dim], chosen by shape and dtype alone."""
    rows, tokens, heads, size = q.shape
    padded = triton.next_power_of_2(size)
    if config is None:
        config = CONFIGS[0] if padded * q.element_size() <= 256 else CONFIGS[3 if padded <= 128 else 4]
    config = config._replace(columns=min(config.columns, padded))
    blocks, chunks = triton.cdiv(size, config.columns), triton.cdiv(tokens, config.chunk)
    if segments is None:
        segments = triton.cdiv(FULL_GPU, rows * heads * blocks)
        segments = max(1, min(segments, chunks // SEGMENT_CHUNKS))
    segment_chunks = triton.cdiv(chunks, segments)
    return Layout(config, size, padded, blocks, segment_chunks, triton.cdiv(chunks, segment_chunks))


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    documents: Documents,
    *,
    initial_state: Tensor | None = None,
) -> Tensor:
    """Linear attention with fixed decay: S_t = exp(-s) S_{t-1} + k_t^T v_t, o_t = q_t S_t, per document.

    Args:
        q, k, v: [rows, tokens, heads, head_dim]; parts of one packed tensor are read in place.
        slopes: [heads] fp32, s > 0.
        initial_state: [rows, heads, head_dim, head_dim] S before the first token, seen by each row's first
            document; None = 0.

    Returns:
        [rows, tokens, heads, head_dim].
    """
    if not is_supported(q):
        return lightning_attention_by_chunks(q, k, v, slopes, documents, initial_state=initial_state)
    return lightning_attention_triton(q, k, v, slopes, documents.positions, initial_state)[0]


def lightning_end_state(k: Tensor, v: Tensor, slopes: Tensor, documents: Documents) -> Tensor:
    """S after the last token, from 0 before the first: what `lightning_attention` hands on to later tokens.

    Args:
        k, v: [rows, tokens, heads, head_dim].
        slopes: [heads] fp32, s > 0.

    Returns:
        [rows, heads, head_dim, head_dim], at least fp32.
    """
    if not is_supported(k):
        return lightning_end_state_by_sum(k, v, slopes, documents)
    return lightning_end_state_triton(k, v, slopes, documents.positions)


def is_supported(q: Tensor) -> bool:
    """Whether the kernels take q [rows, tokens, heads, head_dim]."""
    size = q.shape[-1]
    return q.is_cuda and q.dtype != torch.float64 and size % 16 == 0 and size <= MAX_SIZE and q.numel() > 0


def lightning_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    positions: Tensor,
    initial_state: Tensor | None = None,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor]:
    """(o, S after the last token [rows, heads, head_dim, head_dim] fp32) by the kernels.

    Args:
        positions: [rows, tokens] distance of each token to the start of its document.
    """
    return _LightningAttention.apply(q, k, v, slopes, positions, initial_state, layout or plan_layout(q))


def lightning_end_state_triton(
    k: Tensor, v: Tensor, slopes: Tensor, positions: Tensor, layout: Layout | None = None
) -> Tensor:
    """`lightning_end_state` by the kernels."""
    return _EndState.apply(k, v, slopes, positions, layout or plan_layout(k))


class _LightningAttention(torch.autograd.Function):
    """forward: o and the last state; backward: dq, dk, dv in one launch, from recomputed or saved states."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        positions: Tensor,
        initial: Tensor | None,
        layout: Layout,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = _alike(q, k, v)
        positions = positions.contiguous()
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        entering, final = _entering_states(k, v, slopes, positions, initial, layout, reverse=False)
        _launch_scan((q, k, v, o), slopes, positions, entering, final, layout)
        ctx.save_for_backward(q, k, v, slopes, positions, *(() if entering is None else (entering,)))
        ctx.layout, ctx.initial_dtype = layout, None if initial is None else initial.dtype
        return o, final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, positions, *kept = ctx.saved_tensors
        layout, grad = ctx.layout, _rows_in_order(grads[0])
        entering = kept[0] if kept else None
        returning, d_initial = _entering_states(q, grad, slopes, positions, grads[1], layout, reverse=True)
        packed = torch.empty((*q.shape[:-1], 3 * layout.size), dtype=q.dtype, device=q.device)
        parts = packed.chunk(3, -1)
        grid = (3 * layout.blocks, layout.segments, q.shape[0] * q.shape[2])
        _backward_kernel[grid](
            q, k, v, grad, *parts, positions, slopes, entering, returning, d_initial,
            q.shape[1], q.shape[2], layout.segment_chunks, layout.blocks,
            *q.stride()[:3], *grad.stride()[:3], *parts[0].stride()[:3],
            **_constants(layout), HAS_ENTERING=entering is not None, HAS_FINAL=layout.segments == 1,
        )  # fmt: skip
        return (
            *parts,
            None,
            None,
            None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype),
            None,
        )


class _EndState(torch.autograd.Function):
    """forward: the state pass; backward: dk = weight * v dS^T, dv = weight * k dS on the last document."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, slopes: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        k, v = _alike(k, v)
        positions = positions.contiguous()
        ctx.save_for_backward(k, v, slopes, positions)
        if layout.segments > 1:
            return _entering_states(k, v, slopes, positions, None, layout, reverse=False)[1]
        final = _new_states(k, 1)
        _launch_scan((k, k, v, k), slopes, positions, None, final, layout, states_only=True)
        return final.squeeze(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        k, v, slopes, positions = ctx.saved_tensors
        tokens, grad = k.shape[1], grads[0].to(k.dtype)
        left = torch.arange(tokens - 1, -1, -1, device=k.device)[:, None]
        weight = torch.exp(-slopes * left) * (positions[:, -1:] >= left[:, 0])[..., None]
        weight = weight.to(k.dtype)[..., None]
        dk = torch.einsum("rthe,rhde->rthd", v * weight, grad)
        return dk, torch.einsum("rthd,rhde->rthe", k * weight, grad), None, None, None


def _rows_in_order(x: Tensor) -> Tensor:
    """x with its last dim contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with one set of strides, the last 1."""
    strides = {x.stride() for x in tensors}
    return (
        tensors
        if len(strides) == 1 and tensors[0].stride(-1) == 1
        else tuple(x.contiguous() for x in tensors)
    )


def _new_states(like: Tensor, segments: int) -> Tensor:
    rows, _, heads, size = like.shape
    return torch.empty((rows, heads, segments, size, size), dtype=torch.float32, device=like.device)


def _constants(layout: Layout) -> dict[str, Any]:
    config = layout.config
    return {
        "SIZE": layout.size, "C": config.chunk, "Y": layout.padded, "Z": config.columns,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def _entering_states(
    y: Tensor,
    z: Tensor,
    slopes: Tensor,
    positions: Tensor,
    initial: Tensor | None,
    layout: Layout,
    *,
    reverse: bool,
) -> tuple[Tensor | None, Tensor]:
    """States [rows, heads, segments, head_dim, head_dim] that enter each segment, and the last one.

    From the end if `reverse`. With one segment the last one is still to be written.
    """
    final = torch.empty(
        (y.shape[0], y.shape[2], layout.size, layout.size), dtype=torch.float32, device=y.device
    )
    if layout.segments == 1:
        return None if initial is None else initial.contiguous()[:, :, None], final
    states = _new_states(y, layout.segments)
    _launch_scan((y, y, z, y), slopes, positions, None, states, layout, states_only=True, reverse=reverse)
    block = 1024
    grid = (triton.cdiv(layout.size**2, block), y.shape[2], y.shape[0])
    _prefix_kernel[grid](
        states, positions, slopes, None if initial is None else initial.contiguous(), final,
        y.shape[1], layout.segments, layout.segment_chunks * layout.config.chunk,
        SQUARE=layout.size**2, BLOCK=block, REVERSE=reverse, HAS_INITIAL=initial is not None,
    )  # fmt: skip
    return states, final


def _launch_scan(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    slopes: Tensor,
    positions: Tensor,
    entering: Tensor | None,
    final: Tensor,
    layout: Layout,
    *,
    states_only: bool = False,
    reverse: bool = False,
) -> None:
    """x, y, z, out of one direction; `final` gets the states after each segment, or after the only one."""
    x, y, z, out = tensors
    grid = (layout.blocks, layout.segments, x.shape[0] * x.shape[2])
    _scan_kernel[grid](
        x, y, z, out, positions, slopes, entering, final,
        x.shape[1], x.shape[2], layout.segment_chunks,
        *x.stride()[:3], *y.stride()[:3], *z.stride()[:3], *out.stride()[:3],
        **_constants(layout), REVERSE=reverse, HAS_INITIAL=entering is not None,
        HAS_FINAL=states_only or layout.segments == 1, HAS_OUT=not states_only,
    )  # fmt: skip


@triton.jit
def _scan_kernel(
    x, y, z, out, positions, slopes, entering, final, tokens, heads, segment_chunks,
    x_row, x_token, x_head, y_row, y_token, y_head, z_row, z_token, z_head, out_row, out_token, out_head,
    SIZE: tl.constexpr, C: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr, REVERSE: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_OUT: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of columns, segments, rows * heads."""
    row, head = tl.program_id(2).to(tl.int64) // heads, tl.program_id(2).to(tl.int64) % heads
    _scan(
        x + row * x_row + head * x_head, y + row * y_row + head * y_head, z + row * z_row + head * z_head,
        out + row * out_row + head * out_head, positions + row * tokens, slopes + head, entering, final,
        tl.program_id(0), tokens, segment_chunks, x_token, y_token, z_token, out_token, SIZE, 1,
        SIZE, C, Y, Z, REVERSE, HAS_INITIAL, HAS_FINAL, HAS_OUT,
    )  # fmt: skip


@triton.jit
def _backward_kernel(
    q, k, v, do, dq, dk, dv, positions, slopes, entering, returning, d_initial,
    tokens, heads, segment_chunks, blocks,
    row_stride, token_stride, head_stride, do_row, do_token, do_head, grad_row, grad_token, grad_head,
    SIZE: tl.constexpr, C: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr,
    HAS_ENTERING: tl.constexpr, HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of columns of dq, dk and dv, segments, rows * heads."""
    row, head = tl.program_id(2).to(tl.int64) // heads, tl.program_id(2).to(tl.int64) % heads
    place = row * row_stride + head * head_stride
    q, k, v, do = q + place, k + place, v + place, do + row * do_row + head * do_head
    place = row * grad_row + head * grad_head
    positions += row * tokens
    slopes += head
    block = tl.program_id(0) % blocks
    which = tl.program_id(0) // blocks
    if which == 0:
        _scan(
            do, v, k, dq + place, positions, slopes, entering, d_initial, block, tokens, segment_chunks,
            do_token, token_stride, token_stride, grad_token, 1, SIZE,
            SIZE, C, Y, Z, False, HAS_ENTERING, False, True,
        )  # fmt: skip
    elif which == 1:
        _scan(
            v, do, q, dk + place, positions, slopes, returning, d_initial, block, tokens, segment_chunks,
            token_stride, do_token, token_stride, grad_token, 1, SIZE,
            SIZE, C, Y, Z, True, True, False, True,
        )  # fmt: skip
    else:
        _scan(
            k, q, do, dv + place, positions, slopes, returning, d_initial, block, tokens, segment_chunks,
            token_stride, token_stride, do_token, grad_token, SIZE, 1,
            SIZE, C, Y, Z, True, True, HAS_FINAL, True,
        )  # fmt: skip


@triton.jit
def _scan(
    x, y, z, out, positions, slopes, entering, final, block, tokens, segment_chunks,
    x_token, y_token, z_token, out_token, state_y, state_z,
    SIZE: tl.constexpr, C: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr, REVERSE: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_OUT: tl.constexpr,
):  # fmt: skip
    """Columns `block` of one segment of one head; the pointers are those of its row and head.

    entering: states before each segment (after it if REVERSE) by the strides of y and z; final: after it.
    """
    slope = tl.load(slopes) * 1.4426950408889634  # log2(e)
    i = tl.arange(0, C)
    d = tl.arange(0, Y)
    e = block * Z + tl.arange(0, Z)
    distance = i[None, :] - i[:, None] if REVERSE else i[:, None] - i[None, :]
    decay = tl.where(distance >= 0, tl.exp2(-slope * tl.maximum(distance, 0)), 0.0)
    segment = tl.program_id(1)
    state_place = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + segment
    in_state = (d < SIZE)[:, None] & (e < SIZE)[None, :]
    state = tl.zeros((Y, Z), dtype=tl.float32)
    if HAS_INITIAL:
        entering += state_place * SIZE * SIZE
        state += tl.load(entering + d[:, None] * state_y + e[None, :] * state_z, mask=in_state, other=0.0)

    first = segment * segment_chunks
    count = tl.minimum(segment_chunks, tl.cdiv(tokens, C) - first)
    for n in range(count):
        t0 = (first + (count - 1 - n if REVERSE else n)) * C
        t = t0 + i
        here = t < tokens
        wide, narrow = here[:, None] & (d < SIZE)[None, :], here[:, None] & (e < SIZE)[None, :]
        base = t0.to(tl.int64)
        y_tile = tl.load(y + base * y_token + i[:, None] * y_token + d[None, :], mask=wide, other=0.0)
        z_tile = tl.load(z + base * z_token + i[:, None] * z_token + e[None, :], mask=narrow, other=0.0)

        # What the documents allow: from before the chunk to its head, from its tail on, through all of it.
        length = tl.minimum(C, tokens - t0)
        start = t - tl.load(positions + t, mask=here, other=0)
        last_start = t0 + length - 1 - tl.load(positions + t0 + length - 1)
        before = tl.maximum(t0, 1)  # what enters a row belongs to its first document, wherever that began
        head = tl.where(here & (start < before), tl.exp2(-slope * (i + 1)), 0.0)
        tail = tl.where(here & (t >= last_start), tl.exp2(-slope * (length - 1 - i)), 0.0)
        through = tl.where(last_start < before, tl.exp2(-slope * length), 0.0)

        if HAS_OUT:
            x_tile = tl.load(x + base * x_token + i[:, None] * x_token + d[None, :], mask=wide, other=0.0)
            seen = start[None, :] <= t[:, None] if REVERSE else start[:, None] <= t[None, :]
            result = tl.dot(x_tile, state.to(x_tile.dtype), input_precision="ieee")
            result *= (tail if REVERSE else head)[:, None]
            products = tl.dot(x_tile, tl.trans(y_tile), input_precision="ieee")
            products = tl.where(seen, products * decay, 0.0).to(z_tile.dtype)
            result = tl.dot(products, z_tile, result, input_precision="ieee")
            place = out + base * out_token + i[:, None] * out_token + e[None, :]
            tl.store(place, result.to(out.dtype.element_ty), mask=narrow)
        scaled = (z_tile * (head if REVERSE else tail)[:, None]).to(z_tile.dtype)
        state = tl.dot(tl.trans(y_tile), scaled, state * through, input_precision="ieee")
    if HAS_FINAL:
        final += state_place * SIZE * SIZE
        tl.store(final + d[:, None] * state_y + e[None, :] * state_z, state, mask=in_state)


@triton.jit
def _prefix_kernel(
    states, positions, slopes, initial, final, tokens, segments, segment_tokens,
    SQUARE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Turn states that segments make from 0 into those that enter them. Grid: places, heads, rows."""
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = place < SQUARE
    slope = tl.load(slopes + head) * 1.4426950408889634  # log2(e)
    owner = row * tl.num_programs(1) + head
    states += owner * segments * SQUARE
    state = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial + owner * SQUARE + place, mask=here, other=0.0)
    for n in range(segments):
        segment = segments - 1 - n if REVERSE else n
        t0 = segment * segment_tokens
        end = tl.minimum(t0 + segment_tokens, tokens) - 1
        last_start = end - tl.load(positions + row * tokens + end)
        through = tl.where(last_start < tl.maximum(t0, 1), tl.exp2(-slope * (end + 1 - t0)), 0.0)
        own = tl.load(states + segment * SQUARE + place, mask=here, other=0.0)
        tl.store(states + segment * SQUARE + place, state, mask=here)
        state = own + through * state
    tl.store(final + owner * SQUARE + place, state, mask=here)
