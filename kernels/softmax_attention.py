"""Causal attention inside documents, by the fastest exact kernel that is there.

Every kernel gives (o, log-sum-exp) and takes both back in its backward pass, so that attention over some of
the keys can be merged with that over others. The kernels work on flat tokens: q [tokens, heads, head_dim].
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import cache, partial
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.documents import Documents, locate_documents
from kernels.optional import announce, compare_with_twin, is_usable
from kernels.reference import attention_part, attention_part_backward
from kernels.reference import softmax_attention as softmax_attention_by_mask

log = logging.getLogger(__name__)

CUDNN_TOKENS = 2048
"""Shortest document that gets a cuDNN call of its own: at half of it the host is slower than an H100."""

Gradients = tuple[Tensor, Tensor, Tensor]


class Backend(StrEnum):
    """What computes attention."""

    twin = "twin"
    """Plain torch with a mask: memory in tokens^2."""
    flash2 = "flash2"
    """FlashAttention-2, part of torch: one call for all documents."""
    cudnn = "cudnn"
    """cuDNN for each long document, flash2 for the short ones between them."""
    flash4 = "flash4"
    """FlashAttention-4, where flash-attn-4 is installed: one call for all documents."""


class Spans(NamedTuple):
    """Consecutive spans of flat queries, each of which attends to the span of keys with the same number."""

    queries: Tensor
    """[spans + 1] int32 on the device: where each span of queries starts, then where the last one ends."""
    keys: Tensor
    """The same of the keys."""
    most_queries: int
    """At least as many as the longest span of queries has."""
    most_keys: int
    is_causal: bool
    """Spans of queries and keys are the same tokens, of which each sees none after itself."""
    on_host: list[int] | None
    """`queries`, where they are known without reading the device."""


def choose_backend(
    dtype: torch.dtype, head_dim: int, *, capability: tuple[int, int] | None, has_flash4: Callable[[], bool],
    has_cudnn: bool, knows_lengths: bool, is_deterministic: bool,
) -> tuple[Backend, str]:  # fmt: skip
    """The fastest exact backend, and why no faster one.

    Args:
        capability: of the GPU; None = the tensors are elsewhere.
        has_flash4: asked only where nothing else speaks against flash-attn-4, as it compiles kernels.
        knows_lengths: of the documents, on the host.
        is_deterministic: gradients must repeat bit by bit.
    """
    if capability is None:
        return Backend.twin, "tensors are not on a GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return Backend.twin, f"flash kernels know no {dtype}"
    if head_dim % 8 or head_dim > 256:
        return Backend.twin, f"head_dim {head_dim} is no multiple of 8 up to 256"
    if capability < (9, 0):
        return Backend.flash2, f"faster kernels need compute capability 9.0, this is {capability}"
    if head_dim > 128:
        return Backend.flash2, f"faster kernels need head_dim <= 128, not {head_dim}"
    if has_flash4():
        return Backend.flash4, "flash-attn-4 is installed"
    if not has_cudnn:
        return Backend.flash2, "no flash-attn-4 that works, and torch has no cuDNN"
    if is_deterministic:
        return (
            Backend.flash2,
            "no flash-attn-4 that works, and cuDNN's gradients do not repeat bit by bit",
        )
    if not knows_lengths:
        return Backend.flash2, "no flash-attn-4 that works, and document lengths are only on the device"
    return Backend.cudnn, "no flash-attn-4 that works"


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document, scale head_dim^-0.5, grouped kv heads.

    With a flash kernel (`choose_backend`) memory is linear in the tokens; nothing is read on the host.

    Args:
        q: [rows, tokens, heads, head_dim]. k, v: [rows, tokens, kv_heads, head_dim].

    Returns:
        [rows, tokens, heads, head_dim].
    """
    backend = backend_for(q, documents)
    if backend is Backend.twin:
        return softmax_attention_by_mask(q, k, v, documents)
    return softmax_attention_flash(q, k, v, documents, backend)


def softmax_attention_flash(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, backend: Backend
) -> Tensor:
    """`softmax_attention` by a backend that is not the twin."""
    return _FlashAttention.apply(q, k, v, document_spans(documents, q.shape[1]), backend)


def attend(q: Tensor, k: Tensor, v: Tensor, *, documents: Documents | None = None) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys of each query, to be merged with that over the others; no autograd.

    Args:
        q: [rows, queries, heads, head_dim]. k, v: [rows, keys, kv_heads, head_dim].
        documents: of queries and keys, which are the same tokens, each seeing none after itself; None: every
            query sees all keys of its row.

    Returns:
        o [rows, queries, heads, head_dim] in q's dtype or wider, log-sum-exp [rows, queries, heads] at least
        fp32.
    """
    backend = backend_for(q, documents)
    if backend is Backend.twin:
        return attention_part(q, k, v, _seen(documents))
    o, lse = _flash(backend, _spans(q, k, documents), *(x.flatten(0, 1) for x in (q, k, v)))
    return o.view_as(q), lse.unflatten(1, q.shape[:2]).permute(1, 2, 0)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *,
    documents: Documents | None = None,
) -> Gradients:  # fmt: skip
    """What the keys of `attend` contribute to dq, and their dk and dv; in the dtypes of q, k, v or wider.

    Args:
        grad: gradient of o.
        o, lse: as `attend` returns them, over all keys that the queries see in any part.
    """
    backend = backend_for(q, documents)
    if backend is Backend.twin:
        grad = grad.to(lse.dtype)
        return attention_part_backward(q, k, v, lse, (o * grad).sum(-1), grad, _seen(documents))
    flat = [x.flatten(0, 1) for x in (grad.to(q.dtype), q, k, v, o.to(q.dtype), lse)]
    flat[5] = flat[5].T.contiguous()
    dq, dk, dv = _flash_backward(backend, _spans(q, k, documents), *flat)
    return dq.view_as(q), dk.view_as(k), dv.view_as(v)


class _FlashAttention(torch.autograd.Function):
    """forward: saves (o, log-sum-exp); backward: is seeded with them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: Spans, backend: Backend) -> Tensor:
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        o, lse = _flash(backend, spans, *flat)
        ctx.save_for_backward(*flat, o, lse)
        ctx.shapes = q.shape, k.shape
        ctx.spans, ctx.backend = spans, backend
        return o.view_as(q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = _flash_backward(ctx.backend, ctx.spans, grads[0].flatten(0, 1), *ctx.saved_tensors)
        of_q, of_k = ctx.shapes
        return dq.view(of_q), dk.view(of_k), dv.view(of_k), None, None


def document_spans(documents: Documents, tokens: int) -> Spans:
    """The documents of all rows of `tokens` tokens; what pads the offsets is an empty document."""
    rows = documents.offsets.shape[0]
    first = torch.arange(rows, device=documents.offsets.device, dtype=torch.int32)[:, None] * tokens
    starts = (documents.offsets[:, :-1] + first).flatten()
    starts = torch.cat([starts, starts.new_full((1,), rows * tokens)])
    bounds, most = None, tokens
    if documents.on_host is not None:
        bounds = [start + row * tokens for row, line in enumerate(documents.on_host) for start in line[:-1]]
        bounds.append(rows * tokens)
        most = max(b - a for a, b in pairwise(bounds))
    return Spans(starts, starts, most, most, True, bounds)


def _spans(q: Tensor, k: Tensor, documents: Documents | None) -> Spans:
    """Of the arguments of `attend`."""
    if documents is not None:
        return document_spans(documents, q.shape[1])
    edges = [torch.arange(x.shape[0] + 1, device=q.device, dtype=torch.int32) * x.shape[1] for x in (q, k)]
    on_host = [row * q.shape[1] for row in range(q.shape[0] + 1)]
    return Spans(edges[0], edges[1], q.shape[1], k.shape[1], False, on_host)


def _seen(documents: Documents | None) -> Tensor | None:
    """[rows, tokens, tokens] causal mask inside documents."""
    if documents is None:
        return None
    return (documents.ids[:, :, None] == documents.ids[:, None]).tril()


def backend_for(q: Tensor, documents: Documents | None) -> Backend:
    """What `softmax_attention` and, with None too, `attend` take for q [rows, tokens, heads, head_dim]."""
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    backend, reason = choose_backend(
        q.dtype, q.shape[-1], capability=capability,
        has_flash4=has_flash4, has_cudnn=torch.backends.cudnn.is_available(),
        knows_lengths=documents is None or documents.on_host is not None, is_deterministic=_must_repeat(),
    )  # fmt: skip
    is_dear = q.is_cuda and backend is Backend.twin
    cost = ", which takes memory in tokens^2" if is_dear else ""
    level = logging.WARNING if is_dear else logging.INFO
    announce(log, level, f"softmax attention by {backend}{cost}: {reason}")
    return backend


def _must_repeat() -> bool:
    """Whether gradients must repeat bit by bit."""
    is_asked = torch.are_deterministic_algorithms_enabled()
    return is_asked and not torch.is_deterministic_algorithms_warn_only_enabled()


@cache
def has_flash4() -> bool:
    """Whether flash-attn-4 is installed and computes what the twin does; this compiles its kernels."""
    return is_usable("flash-attn-4", _try_flash4)


def _try_flash4(device: str = "cuda") -> None:
    """Compare two documents of a small row with the twin."""
    draw = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(1, 64, heads, 64, device=device, generator=draw).bfloat16() for heads in (2, 1, 1)]
    documents = locate_documents(torch.tensor([[0, 24, 64]], dtype=torch.int32, device=device), 64)
    named: dict[str, Any] = {"documents": documents}
    fast = partial(softmax_attention_flash, backend=Backend.flash4, **named)
    compare_with_twin(fast, partial(softmax_attention_by_mask, **named), inputs)


def _flash4_module() -> ModuleType:
    return importlib.import_module("flash_attn.cute.interface")


def _flash(backend: Backend, spans: Spans, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(o [queries, heads, head_dim], log-sum-exp [heads, queries] fp32)."""
    forward = {Backend.flash2: _flash2, Backend.cudnn: _cudnn, Backend.flash4: _flash4}[backend]
    return forward(spans, q, k, v)


def _flash_backward(
    backend: Backend, spans: Spans, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> Gradients:
    """dq, dk, dv in the dtypes of q, k, v; o and lse over all keys that the queries see."""
    backwards = {
        Backend.flash2: _flash2_backward,
        Backend.cudnn: _cudnn_backward,
        Backend.flash4: _flash4_backward,
    }
    return backwards[backend](spans, grad.contiguous(), q, k, v, o, lse)


def _flash2(spans: Spans, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = spans
    o, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, s.queries, s.keys, s.most_queries, s.most_keys, 0.0, s.is_causal, False
    )
    return o, lse


def _flash2_backward(
    spans: Spans, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> Gradients:
    s, seed = spans, torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout of 0
    sizes = (s.queries, s.keys, s.most_queries, s.most_keys)
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, o, lse, *sizes, 0.0, s.is_causal, seed, torch.empty(0, device=q.device)
    )


def _flash4(spans: Spans, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    o, lse, *_ = _flash4_module()._flash_attn_fwd(q, k, v, **_flash4_sizes(spans), return_lse=True)
    return o, lse


def _flash4_backward(
    spans: Spans, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> Gradients:
    sizes = _flash4_sizes(spans)
    return _flash4_module()._flash_attn_bwd(q, k, v, o, grad, lse, **sizes, deterministic=_must_repeat())


def _flash4_sizes(spans: Spans) -> dict[str, Any]:
    return {
        "cu_seqlens_q": spans.queries,
        "cu_seqlens_k": spans.keys,
        "max_seqlen_q": spans.most_queries,
        "max_seqlen_k": spans.most_keys,
        "causal": spans.is_causal,
    }


def planned_length(length: int) -> int:
    """The next of eight lengths an octave, as cuDNN takes tens of ms to plan one that it has not seen."""
    step = 1 << max(length.bit_length() - 4, 0)
    return -(-length // step) * step


def cut_documents(bounds: Sequence[int], shortest: int) -> list[tuple[int, int]]:
    """Spans of at least `shortest` tokens alone, and what lies between two of them together.

    Args:
        bounds: where each span starts, then where the last one ends.

    Returns:
        (first, last) of places in bounds: tokens from bounds[first] to bounds[last], at least one.
    """
    edges = {0, len(bounds) - 1}
    for number, (start, stop) in enumerate(pairwise(bounds)):
        if stop - start >= shortest:
            edges |= {number, number + 1}
    return [(a, b) for a, b in pairwise(sorted(edges)) if bounds[b] > bounds[a]]


class _Piece(NamedTuple):
    """Consecutive flat tokens that see no others."""

    tokens: slice
    spans: Spans | None
    """Of the short documents in it; None: one long document, for cuDNN."""


def _pieces(spans: Spans) -> list[_Piece]:
    found, bounds = [], spans.on_host
    assert bounds is not None
    for first, last in cut_documents(bounds, CUDNN_TOKENS):
        inner = None
        if (most := max(b - a for a, b in pairwise(bounds[first : last + 1]))) < CUDNN_TOKENS:
            starts = spans.queries[first : last + 1] - bounds[first]
            inner = Spans(starts, starts, most, most, True, None)
        found.append(_Piece(slice(bounds[first], bounds[last]), inner))
    return found


def _cudnn(spans: Spans, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if not spans.is_causal:
        return _cudnn_call(spans, q, k, v) if _is_planned(spans) else _flash2(spans, q, k, v)
    parts = []
    for piece in _pieces(spans):
        length, at = piece.tokens.stop - piece.tokens.start, piece.tokens
        if piece.spans is not None:
            parts.append(_flash2(piece.spans, q[at], k[at], v[at]))
        else:
            o, lse = _cudnn_call(spans, *(_extend(x, at) for x in (q, k, v)))
            parts.append((o[:length], lse[:, :length]))
    outs, sums = zip(*parts, strict=True)
    return (outs[0], sums[0].contiguous()) if len(parts) == 1 else (torch.cat(outs), torch.cat(sums, 1))


def _cudnn_backward(
    spans: Spans, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> Gradients:
    if not spans.is_causal:
        backward = _cudnn_call_backward if _is_planned(spans) else _flash2_backward
        return backward(spans, grad, q, k, v, o, lse)
    parts = []
    for piece in _pieces(spans):
        length, at = piece.tokens.stop - piece.tokens.start, piece.tokens
        if piece.spans is not None:
            inputs = [*(x[at] for x in (grad, q, k, v, o)), lse[:, at].contiguous()]
            part = _flash2_backward(piece.spans, *inputs)
        else:
            wide = planned_length(length) - length
            kept = F.pad(grad[at], (0, 0, 0, 0, 0, wide)) if wide else grad[at]
            # What follows the document must not see its keys: exp(score - 1e30) is 0.
            sums = F.pad(lse[:, at], (0, wide), value=1e30)
            inputs = [kept, *(_extend(x, at) for x in (q, k, v, o)), sums]
            part = _cudnn_call_backward(spans, *inputs)
        parts.append(tuple(x[:length] for x in part))
    dq, dk, dv = (each[0] if len(each) == 1 else torch.cat(each) for each in zip(*parts, strict=True))
    return dq, dk, dv


def _is_planned(spans: Spans) -> bool:
    """One rectangle of sizes that cuDNN will often see."""
    sizes = (spans.most_queries, spans.most_keys)
    is_one = len(spans.queries) == 2
    return is_one and min(sizes) >= CUDNN_TOKENS and all(planned_length(size) == size for size in sizes)


def _extend(x: Tensor, at: slice) -> Tensor:
    """x[at] and what follows it, up to a planned length; zeros beyond x's end."""
    stop = at.start + planned_length(at.stop - at.start)
    part = x[at.start : stop]
    missing = stop - at.start - len(part)
    return F.pad(part, (0, 0, 0, 0, 0, missing)) if missing else part


def _cudnn_call(spans: Spans, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """All queries and keys in one call."""
    heads_first = (x[None].transpose(1, 2) for x in (q, k, v))
    o, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first, None, True, 0.0, spans.is_causal, False
    )
    return o[0].transpose(0, 1), lse.view(q.shape[1], q.shape[0])


def _cudnn_call_backward(
    spans: Spans, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> Gradients:
    heads_first = (x[None].transpose(1, 2) for x in (grad, q, k, v, o))
    seed = torch.zeros(2, 1, dtype=torch.int64, device=q.device)  # of a dropout of 0
    sizes = (None, None, len(q), len(k))
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *heads_first, lse[None, ..., None], seed[0], seed[1], None, *sizes, 0.0, spans.is_causal
    )
    dq, dk, dv = (x[0].transpose(0, 1) for x in grads)
    return dq, dk, dv
