"""Causal attention inside documents: torch's variable-length flash attention on GPUs, the twin elsewhere."""

import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.reference import softmax_attention as softmax_attention_by_mask


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document, scale head_dim^-0.5, grouped kv heads.

    On CUDA in bf16 or fp16, with head_dim a multiple of 8, its memory is linear in the tokens, and nothing
    is read on the host.

    Args:
        q: [rows, tokens, heads, head_dim]. k, v: [rows, tokens, kv_heads, head_dim].

    Returns:
        [rows, tokens, heads, head_dim].
    """
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] % 8:
        return softmax_attention_by_mask(q, k, v, documents)
    from torch.nn.attention.varlen import varlen_attn  # not in every CPU build

    rows, tokens = q.shape[:2]
    first = torch.arange(rows, device=q.device, dtype=torch.int32)[:, None] * tokens
    starts = (documents.offsets[:, :-1] + first).flatten()  # what pads the offsets is an empty document
    starts = torch.cat([starts, starts.new_full((1,), rows * tokens)])
    if (group := q.shape[2] // k.shape[2]) > 1:  # torch 2.11 has no switch for grouped heads, 2.13 wants one
        k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    o = varlen_attn(flat[0], flat[1], flat[2], starts, starts, tokens, tokens, window_size=(-1, 0))
    assert isinstance(o, Tensor)  # a tuple only where more was asked for
    return o.view_as(q)
