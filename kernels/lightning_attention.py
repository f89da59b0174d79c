"""Lightning attention on GPUs: one Triton scan serves the output and all three gradients.

With S_t = exp(-s) S_{t-1} + k_t^T v_t (MiniMax-01, arXiv 2501.08313 sec. 2.2) output and gradients are
out_t = sum_u exp(-s |t - u|) (x_t . y_u) z_u over the tokens u of t's document up to t, or from t to its end:

    o: x, y, z = q, k, v      dq: do, v, k      dk, from the end: v, do, q      dv, from the end: k, q, do

A program walks through the chunks of one segment of a row, for one head and a block of z's columns; the state
y^T z stays in registers. Where rows and heads are too few to fill the GPU, segments run side by side, seeded
by a pass that computes states only, which is also LASP+'s local state.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.documents import Documents
from kernels.reference import lightning_attention as lightning_attention_by_chunks
from kernels.reference import lightning_attention_with_state as lightning_attention_with_state_by_chunks
from kernels.reference import lightning_end_state as lightning_end_state_by_sum
from kernels.reference import lightning_step

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


CONFIGS = [Config(64, 64, 4, 3), Config(64, 64, 4, 2), Config(64, 32, 4, 2), Config(16, 16, 4, 1)]


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
    return _plan(*q.shape, q.element_size(), config, segments)


@cache  # the launches of a small call take longer on the host than on the GPU
def _plan(
    rows: int,
    tokens: int,
    heads: int,
    size: int,
    bytes_each: int,
    config: Config | None,
    segments: int | None,
) -> Layout:
    padded = triton.next_power_of_2(size)
    if config is None:
        config = CONFIGS[3 if bytes_each > 2 else 0 if padded <= 128 else 2]
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


def lightning_attention_with_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    documents: Documents,
    *,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`lightning_attention`, and S after the last token [rows, heads, head_dim, head_dim], at least fp32.

    A single token takes the recurrence itself: each state is read and written once, no chunk filled up.
    """
    if q.shape[1] == 1:
        return lightning_step(q, k, v, slopes, initial_state)
    if not is_supported(q):
        return lightning_attention_with_state_by_chunks(
            q, k, v, slopes, documents, initial_state=initial_state
        )
    return lightning_attention_triton(q, k, v, slopes, documents.positions, initial_state)


def is_supported(q: Tensor) -> bool:
    """Whether the kernels take q [rows, tokens, heads, head_dim] (docs/decisions.md: not yet in fp32)."""
    size = q.shape[-1]
    return q.is_cuda and q.element_size() == 2 and size % 16 == 0 and size <= MAX_SIZE and q.numel() > 0


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
        q, k, v = _readable(q), _readable(k), _readable(v)
        positions = positions.contiguous()
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        entering, _ = _entering_states(k, v, slopes, positions, initial, layout, reverse=False)
        after = _new_states(q, layout.segments)
        _launch_scan((q, k, v, o), slopes, positions, entering, after, layout)
        ctx.save_for_backward(q, k, v, slopes, positions, *(() if entering is None else (entering,)))
        ctx.layout, ctx.initial_dtype = layout, None if initial is None else initial.dtype
        return o, after[:, :, -1].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, positions, *kept = ctx.saved_tensors
        layout, grad = ctx.layout, _readable(grads[0])
        entering = kept[0] if kept else None
        returning, _ = _entering_states(q, grad, slopes, positions, grads[1], layout, reverse=True)
        before = _new_states(q, layout.segments)
        packed = torch.empty((*q.shape[:-1], 3 * layout.size), dtype=q.dtype, device=q.device)
        parts = packed.chunk(3, -1)
        grid = (3 * layout.blocks, layout.segments, q.shape[0] * q.shape[2])
        _backward_kernel[grid](
            *(_tiles(x, layout) for x in (k, q, v, grad)),
            *(_tiles(x, layout, part=True) for x in (k, q, grad, *parts)),
            positions, slopes, entering, returning, before,
            q.shape[1], q.shape[2], layout.segment_chunks, layout.blocks,
            **_constants(layout), HAS_ENTERING=entering is not None,
        )  # fmt: skip
        d_initial = None if ctx.initial_dtype is None else before[:, :, 0].to(ctx.initial_dtype)
        return *parts, None, None, d_initial, None


class _EndState(torch.autograd.Function):
    """forward: the state pass; backward: dk = weight * v dS^T, dv = weight * k dS on the last document."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, slopes: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        k, v = _readable(k), _readable(v)
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


def _readable(x: Tensor) -> Tensor:
    """x as the GPU's copy engine wants it: last dim dense, the other strides and the start of 16 bytes."""
    size = x.element_size()
    is_fine = x.stride(-1) == 1 and all(n * size % 16 == 0 for n in (*x.stride()[:-1], x.storage_offset()))
    return x if is_fine else x.contiguous()


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
    """x, y, z, out of one direction; `final` gets the state after each segment."""
    x, y, z, out = tensors
    grid = (layout.blocks, layout.segments, x.shape[0] * x.shape[2])
    _scan_kernel[grid](
        _tiles(x, layout), _tiles(y, layout), _tiles(z, layout, part=True), _tiles(out, layout, part=True),
        positions, slopes, entering, final, x.shape[1], x.shape[2], layout.segment_chunks,
        **_constants(layout) | ({"num_stages": 2} if states_only else {}), REVERSE=reverse,
        HAS_INITIAL=entering is not None, HAS_OUT=not states_only,
    )  # fmt: skip


def _tiles(x: Tensor, layout: Layout, *, part: bool = False) -> TensorDescriptor:
    """x [rows, tokens, heads, head_dim] by chunks, of all columns or of a program's."""
    x = x.transpose(1, 2)
    columns = layout.config.columns if part else layout.padded
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, layout.config.chunk, columns])


@triton.jit
def _scan_kernel(
    x, y, z, out, positions, slopes, entering, final, tokens, heads, segment_chunks,
    SIZE: tl.constexpr, C: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr, REVERSE: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_OUT: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of columns, segments, rows * heads."""
    row, head = tl.program_id(2) // heads, tl.program_id(2) % heads
    _scan(
        x, y, z, out, positions, slopes, entering, final, row, head, tl.program_id(0), tokens, segment_chunks,
        SIZE, 1, SIZE, C, Y, Z, REVERSE, HAS_INITIAL, True, HAS_OUT,
    )  # fmt: skip


@triton.jit
def _backward_kernel(
    k, q, v, do, k_block, q_block, do_block, dq, dk, dv, positions, slopes, entering, returning, before,
    tokens, heads, segment_chunks, blocks,
    SIZE: tl.constexpr, C: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr,
    HAS_ENTERING: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of columns of dq, dk and dv, segments, rows * heads."""
    row, head = tl.program_id(2) // heads, tl.program_id(2) % heads
    block = tl.program_id(0) % blocks
    which = tl.program_id(0) // blocks
    if which == 0:
        _scan(
            do, v, k_block, dq, positions, slopes, entering, before, row, head, block,
            tokens, segment_chunks, 1, SIZE, SIZE, C, Y, Z, False, HAS_ENTERING, False, True,
        )  # fmt: skip
    elif which == 1:
        _scan(
            v, do, q_block, dk, positions, slopes, returning, before, row, head, block,
            tokens, segment_chunks, 1, SIZE, SIZE, C, Y, Z, True, True, False, True,
        )  # fmt: skip
    else:
        _scan(
            k, q, do_block, dv, positions, slopes, returning, before, row, head, block,
            tokens, segment_chunks, SIZE, 1, SIZE, C, Y, Z, True, True, True, True,
        )  # fmt: skip


@triton.jit
def _scan(
    x, y, z, out, positions, slopes, entering, final, row, head, block,
    tokens, segment_chunks, state_y, state_z,
    SIZE: tl.constexpr, C: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr, REVERSE: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_OUT: tl.constexpr,
):  # fmt: skip
    """Columns `block` of one segment of one head.

    x, y, z, out: descriptors of [rows, heads, tokens, SIZE], which read 0 behind a row's end.
    entering: states before each segment (after it if REVERSE) by the strides of y and z; final: after it.
    """
    slope = tl.load(slopes + head) * 1.4426950408889634  # log2(e)
    i = tl.arange(0, C)
    d = tl.arange(0, Y)
    e = block * Z + tl.arange(0, Z)
    # Of a whole chunk: an error here would grow with every chunk that a state passes through.
    whole = tl.exp2(tl.load(slopes + head).to(tl.float64) * (-1.4426950408889634 * C)).to(tl.float32)
    # exp(-s |i - j|) as a product of two vectors, which over 64 tokens are far from overflow.
    falling, rising = tl.exp2(-slope * (i - C // 2)), tl.exp2(slope * (i - C // 2))
    segment = tl.program_id(1)
    state_place = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + segment
    in_state = (d < SIZE)[:, None] & (e < SIZE)[None, :]
    state = tl.zeros((Y, Z), dtype=tl.float32)
    if HAS_INITIAL:
        entering += state_place * SIZE * SIZE
        state += tl.load(entering + d[:, None] * state_y + e[None, :] * state_z, mask=in_state, other=0.0)

    first = segment * segment_chunks
    count = tl.minimum(segment_chunks, tl.cdiv(tokens, C) - first)
    if not HAS_OUT:  # a state forgets: what has decayed by 2^-32 is far below its last bit
        reach = tl.minimum(count, tl.minimum(32 / slope, 1e9).to(tl.int32) // C + 2)
        first += 0 if REVERSE else count - reach
        count = reach
    t0 = (first + count - 1 if REVERSE else first) * C
    step = -C if REVERSE else C
    positions += row.to(tl.int64) * tokens
    place = tl.load(positions + tl.minimum(t0 + i, tokens - 1))
    last_place = tl.load(positions + tl.minimum(t0 + C, tokens) - 1)
    for _ in range(count):
        y_tile = y.load([row, head, t0, 0]).reshape(C, Y)
        z_tile = z.load([row, head, t0, block * Z]).reshape(C, Z)

        # What the documents allow: from before the chunk to its head, from its tail on, through all of it.
        length = tl.minimum(C, tokens - t0)
        start = i - place  # of the token's document, counted from the chunk
        last_start = length - 1 - last_place
        before = 1 if t0 == 0 else 0  # what enters a row belongs to its first document, wherever that began
        is_head = start < before
        is_tail = (i >= last_start) & (i < length)
        through = tl.where(length == C, whole, tl.exp2(-slope * length))
        through = tl.where(last_start < before, through, 0.0)
        to_head = tl.where(is_head, tl.exp2(-slope * (i + 1)), 0.0)
        to_end = tl.where(is_tail, tl.exp2(-slope * tl.maximum(length - 1 - i, 0)), 0.0)

        scaled = (z_tile * (to_head if REVERSE else to_end)[:, None]).to(z_tile.dtype)
        if HAS_OUT:
            x_tile = x.load([row, head, t0, 0]).reshape(C, Y)
            products = tl.dot(x_tile, tl.trans(y_tile), input_precision="ieee")
            result = tl.dot(x_tile, state.to(x_tile.dtype), input_precision="ieee")
            if REVERSE:
                seen = (i[None, :] >= i[:, None]) & (start[None, :] <= i[:, None])
                products = products * rising[:, None] * falling[None, :]
                result *= to_end[:, None]
            else:
                seen = (i[None, :] <= i[:, None]) & (start[:, None] <= i[None, :])
                products = products * falling[:, None] * rising[None, :]
                result *= to_head[:, None]
            products = tl.where(seen, products, 0.0).to(z_tile.dtype)
            result = tl.dot(products, z_tile, result, input_precision="ieee")
            out.store([row, head, t0, block * Z], result.to(z_tile.dtype).reshape(1, 1, C, Z))
        state = tl.dot(tl.trans(y_tile), scaled, state * through, input_precision="ieee")

        # The next chunk's documents arrive meanwhile.
        t0 += step
        following = tl.maximum(tl.minimum(t0, tokens - 1), 0)
        place = tl.load(positions + tl.minimum(following + i, tokens - 1))
        last_place = tl.load(positions + tl.minimum(following + C, tokens) - 1)
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
    slope = tl.load(slopes + head).to(tl.float64) * 1.4426950408889634  # log2(e)
    owner = row * tl.num_programs(1) + head
    states += owner * segments * SQUARE
    state = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial + owner * SQUARE + place, mask=here, other=0.0)
    segment = segments - 1 if REVERSE else 0
    own = tl.load(states + segment * SQUARE + place, mask=here, other=0.0)
    for n in range(segments):
        segment = segments - 1 - n if REVERSE else n
        t0 = segment * segment_tokens
        end = tl.minimum(t0 + segment_tokens, tokens) - 1
        last_start = end - tl.load(positions + row * tokens + end)
        through = tl.exp2(-slope * (end + 1 - t0)).to(tl.float32)
        through = tl.where(last_start < tl.maximum(t0, 1), through, 0.0)
        coming = tl.maximum(segment - 1, 0) if REVERSE else tl.minimum(segment + 1, segments - 1)
        following = tl.load(states + coming * SQUARE + place, mask=here, other=0.0)
        tl.store(states + segment * SQUARE + place, state, mask=here)
        state = own + through * state
        own = following
    tl.store(final + owner * SQUARE + place, state, mask=here)
