"""Lightning attention on GPUs: one Triton scan serves the output and all three gradients.

With S_t = exp(-s) S_{t-1} + k_t^T v_t (MiniMax-01, arXiv 2501.08313 sec. 2.2) output and gradients are
out_t = sum_u exp(-s |t - u|) (x_t . y_u) z_u over the tokens u of t's document up to t, or from t to its end:

    o: x, y, z = q, k, v      dq: do, v, k      dk, from the end: v, do, q      dv, from the end: k, q, do

A program walks through the chunks of one segment of a row, for one head and a block of z's columns; the state
y^T z stays in registers. Where rows and heads are too few to fill the GPU, segments run side by side, seeded
by a pass that computes states only, which is also LASP+'s local state.
"""

import logging
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.documents import Documents
from kernels.reference import carry_state, lightning_step
from kernels.reference import lightning_attention as lightning_attention_by_chunks
from kernels.reference import lightning_end_state as lightning_end_state_by_sum

log = logging.getLogger(__name__)

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
    rows: int, tokens: int, heads: int, size: int, bytes_each: int, config: Config | None,
    segments: int | None,
) -> Layout:  # fmt: skip
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
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, documents: Documents, *,
    initial_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
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
    return lightning_attention_triton(q, k, v, slopes, documents.positions, initial_state)


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
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, documents: Documents, *,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`lightning_attention`, and S after the last token [rows, heads, head_dim, head_dim], at least fp32.

    S is that of `lightning_end_state`, a pass of its own: the states inside the scan are less exact. A single
    token takes the recurrence itself: each state is read and written once, no chunk filled up.
    """
    if q.shape[1] == 1:
        return lightning_step(q, k, v, slopes, initial_state)
    state = lightning_end_state(k, v, slopes, documents)
    if initial_state is not None:
        state = carry_state(initial_state, state, slopes, documents)
    return lightning_attention(q, k, v, slopes, documents, initial_state=initial_state), state


def is_supported(q: Tensor) -> bool:
    """Whether the kernels take q [rows, tokens, heads, head_dim]; if not on a GPU, the log says why."""
    if not q.is_cuda or not q.numel():
        return False
    return _has_kernel(q.dtype, q.shape[-1])


@cache
def _has_kernel(dtype: torch.dtype, size: int) -> bool:
    """Whether a GPU has kernels for it; one warning where it has not."""
    if dtype not in (torch.bfloat16, torch.float16):
        reason = f"the kernels take bf16 and fp16, not {dtype}"  # docs/design/decisions.md: not yet fp32
    elif size % 16 or size > MAX_SIZE:
        reason = f"head_dim {size} is no multiple of 16 up to {MAX_SIZE}"
    else:
        return True
    log.warning("lightning attention by plain torch, which is much slower: %s", reason)
    return False


def lightning_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, positions: Tensor, initial_state: Tensor | None = None,
    layout: Layout | None = None,
) -> Tensor:  # fmt: skip
    """`lightning_attention` by the kernels.

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
    """forward: o; backward: dq, dk, dv in one launch, from recomputed or saved states."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, positions: Tensor,
        initial: Tensor | None, layout: Layout,
    ) -> Tensor:  # fmt: skip
        q, k, v = _readable(q), _readable(k), _readable(v)
        positions = positions.contiguous()
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        y, z = _tiles(k, layout), _tiles(v, layout, part=True)
        entering = _entering_states((y, z), k, slopes, positions, initial, layout, reverse=False)
        _scan_kernel[(q.shape[0] * q.shape[2] * layout.blocks, layout.segments)](
            _tiles(q, layout), y, z, _tiles(o, layout, part=True), positions, slopes, entering, None,
            q.shape[1], q.shape[2], layout.segment_chunks, layout.blocks,
            **_constants(layout), REVERSE=False, HAS_INITIAL=entering is not None, HAS_OUT=True,
            IS_EXACT=False,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, slopes, positions, *(() if entering is None else (entering,)))
        ctx.layout, ctx.initial_dtype = layout, None if initial is None else initial.dtype
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, positions, *kept = ctx.saved_tensors
        layout, grad = ctx.layout, _readable(grads[0])
        entering = kept[0] if kept else None
        wholes = [_tiles(x, layout) for x in (k, q, v, grad)]
        blocks = [_tiles(x, layout, part=True) for x in (k, q, grad)]
        returning = _entering_states((wholes[1], blocks[2]), q, slopes, positions, None, layout, reverse=True)
        # The compiler finds fewer registers and more shared memory for a kernel without these two.
        returning = _new_states(q, 1).zero_() if returning is None else returning
        before = _new_states(q, layout.segments)
        packed = torch.empty((*q.shape[:-1], 3 * layout.size), dtype=q.dtype, device=q.device)
        parts = packed.chunk(3, -1)
        _backward_kernel[(q.shape[0] * q.shape[2] * 3 * layout.blocks, layout.segments)](
            *wholes, *blocks, *(_tiles(x, layout, part=True) for x in parts),
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
        ctx.layout = layout
        tiles = _tiles(k, layout), _tiles(v, layout, part=True)
        states = _own_states(tiles, k, slopes, positions, layout, reverse=False, is_exact=True)
        if layout.segments == 1:
            return states.squeeze(2)
        final = torch.empty_like(states[:, :, 0], memory_format=torch.contiguous_format)
        _seed_segments(states, positions, slopes, None, final, layout, reverse=False)
        return final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        k, v, slopes, positions = ctx.saved_tensors
        layout, (rows, tokens, heads, size) = ctx.layout, k.shape
        grad = grads[0].contiguous()
        dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        for x, out, strides in ((v, dk, (1, size)), (k, dv, (size, 1))):
            _end_gradient_kernel[(rows * heads * layout.blocks, layout.segments)](
                _tiles(x, layout), grad, positions, slopes, _tiles(out, layout, part=True),
                tokens, heads, layout.segment_chunks, layout.blocks, *strides, **_constants(layout, 2),
            )  # fmt: skip
        return dk, dv, None, None, None


def _readable(x: Tensor) -> Tensor:
    """x as the GPU's copy engine wants it: last dim dense, the other strides and the start of 16 bytes."""
    size = x.element_size()
    is_fine = x.stride(-1) == 1 and all(n * size % 16 == 0 for n in (*x.stride()[:-1], x.storage_offset()))
    return x if is_fine else x.contiguous()


def _new_states(like: Tensor, segments: int) -> Tensor:
    rows, _, heads, size = like.shape
    return torch.empty((rows, heads, segments, size, size), dtype=torch.float32, device=like.device)


@cache
def _constants(layout: Layout, num_stages: int | None = None) -> dict[str, Any]:
    config = layout.config
    return {
        "SIZE": layout.size, "C": config.chunk, "Y": layout.padded, "Z": config.columns,
        "num_warps": config.num_warps, "num_stages": num_stages or config.num_stages,
    }  # fmt: skip


def _entering_states(
    tiles: tuple[TensorDescriptor, TensorDescriptor], y: Tensor, slopes: Tensor, positions: Tensor,
    initial: Tensor | None, layout: Layout, *, reverse: bool,
) -> Tensor | None:  # fmt: skip
    """States [rows, heads, segments, head_dim, head_dim] that enter each segment, None where all are 0.

    Args:
        tiles: of y and z.
        initial: what enters the row, from the end if `reverse`.
    """
    if layout.segments == 1:
        return None if initial is None else initial.contiguous()[:, :, None]
    states = _own_states(tiles, y, slopes, positions, layout, reverse=reverse, is_exact=False)
    _seed_segments(states, positions, slopes, initial, None, layout, reverse=reverse)
    return states


def _own_states(
    tiles: tuple[TensorDescriptor, TensorDescriptor], y: Tensor, slopes: Tensor, positions: Tensor,
    layout: Layout, *, reverse: bool, is_exact: bool,
) -> Tensor:  # fmt: skip
    """States [rows, heads, segments, head_dim, head_dim] that each segment makes of zeros."""
    states = _new_states(y, layout.segments)
    _scan_kernel[(y.shape[0] * y.shape[2] * layout.blocks, layout.segments)](
        None, *tiles, None, positions, slopes, None, states,
        y.shape[1], y.shape[2], layout.segment_chunks, layout.blocks,
        **_constants(layout, 2), REVERSE=reverse, HAS_INITIAL=False, HAS_OUT=False, IS_EXACT=is_exact,
    )  # fmt: skip
    return states


def _seed_segments(
    states: Tensor, positions: Tensor, slopes: Tensor, initial: Tensor | None, final: Tensor | None,
    layout: Layout, *, reverse: bool,
) -> None:  # fmt: skip
    """Turn `_own_states` into those that enter the segments; `final` gets the state after the last one."""
    rows, heads, segments = states.shape[:3]
    block = 1024
    _prefix_kernel[(triton.cdiv(layout.size**2, block), heads, rows)](
        states, positions, slopes, None if initial is None else initial.contiguous(), final,
        positions.shape[1], segments, layout.segment_chunks * layout.config.chunk,
        SQUARE=layout.size**2, BLOCK=block, REVERSE=reverse, HAS_INITIAL=initial is not None,
        HAS_FINAL=final is not None,
    )  # fmt: skip


def _tiles(x: Tensor, layout: Layout, *, part: bool = False) -> TensorDescriptor:
    """x [rows, tokens, heads, head_dim] by chunks of a head, of all columns or of a program's."""
    rows, tokens, heads, size = x.shape
    by_row, by_token, by_head, _ = x.stride()
    columns = layout.config.columns if part else layout.padded
    return TensorDescriptor(
        x, [rows, heads, tokens, size], [by_row, by_head, by_token, 1], [1, 1, layout.config.chunk, columns]
    )


@triton.jit
def _scan_kernel(
    x, y, z, out, positions, slopes, entering, final, tokens, heads, segment_chunks, blocks,
    SIZE: tl.constexpr, C: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr, REVERSE: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_OUT: tl.constexpr, IS_EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: rows * heads * blocks of columns, those of a head side by side as they share y; segments."""
    owner = tl.program_id(0) // blocks
    _scan(
        x, y, z, out, positions, slopes, entering, final, owner, heads, tl.program_id(0) % blocks,
        tokens, segment_chunks, SIZE, 1, SIZE, C, Y, Z, REVERSE, HAS_INITIAL, not HAS_OUT, HAS_OUT, IS_EXACT,
    )  # fmt: skip


@triton.jit
def _backward_kernel(
    k, q, v, do, k_block, q_block, do_block, dq, dk, dv, positions, slopes, entering, returning, before,
    tokens, heads, segment_chunks, blocks,
    SIZE: tl.constexpr, C: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr,
    HAS_ENTERING: tl.constexpr,
):  # fmt: skip
    """Grid: rows * heads * (blocks of columns of dq, dk and dv), segments."""
    owner = tl.program_id(0) // (3 * blocks)
    which = tl.program_id(0) // blocks % 3
    block = tl.program_id(0) % blocks
    if which == 0:
        _scan(
            do, v, k_block, dq, positions, slopes, entering, None, owner, heads, block,
            tokens, segment_chunks, 1, SIZE, SIZE, C, Y, Z, False, HAS_ENTERING, False, True, False,
        )  # fmt: skip
    elif which == 1:
        _scan(
            v, do, q_block, dk, positions, slopes, returning, None, owner, heads, block,
            tokens, segment_chunks, 1, SIZE, SIZE, C, Y, Z, True, True, False, True, False,
        )  # fmt: skip
    else:
        _scan(
            k, q, do_block, dv, positions, slopes, returning, before, owner, heads, block,
            tokens, segment_chunks, SIZE, 1, SIZE, C, Y, Z, True, True, True, True, False,
        )  # fmt: skip


@triton.jit
def _scan(
    x, y, z, out, positions, slopes, entering, final, owner, heads, block,
    tokens, segment_chunks, state_y, state_z,
    SIZE: tl.constexpr, C: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr, REVERSE: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_OUT: tl.constexpr, IS_EXACT: tl.constexpr,
):  # fmt: skip
    """Columns `block` of one segment of row owner // heads and head owner % heads.

    x, y, z, out: descriptors of [rows, heads, tokens, SIZE], which read 0 behind a row's end.
    entering: states before each segment (after it if REVERSE) by the strides of y and z; final: after it.
    IS_EXACT: the state is that of fp32 products, else of products that are rounded like z.
    """
    row, head = owner // heads, owner % heads
    slope = tl.load(slopes + head) * 1.4426950408889634  # log2(e)
    i = tl.arange(0, C)
    d = tl.arange(0, Y)
    e = block * Z + tl.arange(0, Z)
    # Of a whole chunk: an error here would grow with every chunk that a state passes through.
    whole = tl.exp2(tl.load(slopes + head).to(tl.float64) * (-1.4426950408889634 * C)).to(tl.float32)
    # exp(-s |i - j|) as a product of two vectors, which over 64 tokens are far from overflow.
    falling, rising = tl.exp2(-slope * (i - C // 2)), tl.exp2(slope * (i - C // 2))
    segment = tl.program_id(1)
    state_place = owner.to(tl.int64) * tl.num_programs(1) + segment
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

        scaled = z_tile * (to_head if REVERSE else to_end)[:, None]
        narrow = scaled.to(z_tile.dtype)  # here: later it costs registers, and the backward pass spills
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
        if IS_EXACT or z_tile.dtype == tl.float32:
            # The chunk's own sum starts from 0: its roundings are then small beside the state's last bit. A
            # plain + would move the state into the product's accumulator.
            own = tl.zeros((Y, Z), dtype=tl.float32)
            if z_tile.dtype != tl.float32:  # 8 bits of bf16 three times are fp32's 24
                rest = scaled - narrow.to(tl.float32)
                middle = rest.to(z_tile.dtype)
                last = (rest - middle.to(tl.float32)).to(z_tile.dtype)
                own = tl.dot(tl.trans(y_tile), middle, tl.dot(tl.trans(y_tile), last, own))
            own = tl.dot(tl.trans(y_tile), narrow, own, input_precision="ieee")
            state = tl.fma(state, through, own)
        else:
            state = tl.dot(tl.trans(y_tile), narrow, state * through)

        # The next chunk's documents arrive meanwhile.
        t0 += step
        following = tl.maximum(tl.minimum(t0, tokens - 1), 0)
        place = tl.load(positions + tl.minimum(following + i, tokens - 1))
        last_place = tl.load(positions + tl.minimum(following + C, tokens) - 1)
    if HAS_FINAL:
        final += state_place * SIZE * SIZE
        tl.store(final + d[:, None] * state_y + e[None, :] * state_z, state, mask=in_state)


@triton.jit
def _end_gradient_kernel(
    x, grad, positions, slopes, out, tokens, heads, segment_chunks, blocks, grad_y, grad_z,
    SIZE: tl.constexpr, C: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    """out_t = exp(-s (tokens - 1 - t)) x_t grad for the last document, 0 before; grid of `_scan_kernel`."""
    owner, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row, head = owner // heads, owner % heads
    slope = tl.load(slopes + head) * 1.4426950408889634  # log2(e)
    i, d, e = tl.arange(0, C), tl.arange(0, Y), block * Z + tl.arange(0, Z)
    grad += owner.to(tl.int64) * SIZE * SIZE
    in_state = (d < SIZE)[:, None] & (e < SIZE)[None, :]
    wide = tl.load(grad + d[:, None] * grad_y + e[None, :] * grad_z, mask=in_state, other=0.0)
    narrow = wide.to(x.dtype)
    rest = (wide - narrow.to(tl.float32)).to(x.dtype)
    since = tl.load(positions + row.to(tl.int64) * tokens + tokens - 1)
    first = tl.program_id(1) * segment_chunks
    for chunk in range(first, tl.minimum(first + segment_chunks, tl.cdiv(tokens, C))):
        x_tile = x.load([row, head, chunk * C, 0]).reshape(C, Y)
        left = tokens - 1 - chunk * C - i
        result = tl.dot(x_tile, narrow, input_precision="ieee")
        if x.dtype != tl.float32:
            result = tl.dot(x_tile, rest, result)
        result *= tl.where((left >= 0) & (left <= since), tl.exp2(-slope * tl.maximum(left, 0)), 0.0)[:, None]
        out.store([row, head, chunk * C, block * Z], result.to(x.dtype).reshape(1, 1, C, Z))


@triton.jit
def _prefix_kernel(
    states, positions, slopes, initial, final, tokens, segments, segment_tokens,
    SQUARE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
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
    if HAS_FINAL:
        tl.store(final + owner * SQUARE + place, state, mask=here)
