"""The ring's arithmetic on one process: a rank's two chunks, causal inside, and what crosses between them.

On a GPU the pieces are those of flash kernels, in bf16; elsewhere the twin's.
"""

import pytest
import torch
from torch import Tensor

from kernels.documents import locate_documents
from kernels.reference import softmax_attention as twin
from model.router import Memo
from parallel.collectives import Axis
from parallel.ring import RingCore, _Ring, _RingAttention, documents_of_chunks
from tests.support.kernel_checks import DEVICE, errors, outputs_and_gradients, random_tensor

DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


@pytest.mark.parametrize(
    ("tokens", "starts"),
    [
        (150, [[0, 1, 60, 149], [0, 75]]),
        (150, [[0], [0, 74]]),
        (96, [[0, 48], [0, 10, 48]]),  # none crosses
        *([(4096, [[0], [0, 1000]])] if DEVICE.type == "cuda" else []),  # rectangles for cuDNN, and others
    ],
)
def test_two_chunks_are_the_row(tokens: int, starts: list[list[int]]) -> None:
    width = max(map(len, starts)) + 1
    on_host = [row + [tokens] * (width - len(row)) for row in starts]
    documents = locate_documents(torch.tensor(on_host, dtype=torch.int32, device=DEVICE), tokens)
    documents = documents._replace(on_host=on_host)
    ring = _Ring(RingCore(Axis("cp", 0, (0,))), on_host, tokens // 2)
    local = documents_of_chunks(documents, on_host, (0, 1))
    assert local.offsets.tolist() == local.on_host

    def by_pieces(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _RingAttention.apply(q, k, v, local, ring, None)

    inputs = [random_tensor(2, tokens, n, 32, seed=i) for i, n in enumerate((4, 2, 2))]
    narrow = [x.to(DTYPE) for x in inputs]
    truth = outputs_and_gradients(lambda *x: twin(*x, documents), [x.double() for x in narrow], 1)
    plain = outputs_and_gradients(lambda *x: twin(*x, documents), narrow, 1)
    found = outputs_and_gradients(by_pieces, narrow, 1)
    for mine, theirs, right in zip(found, plain, truth, strict=True):
        assert mine.dtype == DTYPE
        for error, allowed in zip(errors(mine, right), errors(theirs, right), strict=True):
            assert error <= 2 * allowed + torch.finfo(DTYPE).eps


def test_recomputation_takes_over_the_output() -> None:
    """One rank that keeps (o, log-sum-exp): the second pass gives the first one's, and its gradients."""
    documents = locate_documents(torch.tensor([[0, 20, 50, 50]], dtype=torch.int32, device=DEVICE), 50)
    core = RingCore(Axis("cp", 0, (0,)))
    core.memo = Memo()
    inputs = [random_tensor(1, 50, n, 16, seed=i, dtype=DTYPE) for i, n in enumerate((4, 2, 2))]
    results = [
        outputs_and_gradients(lambda *x: core(*x, documents, filler=lambda: None)[0], inputs, 1)
        for _ in range(2)
    ]
    core.memo = None
    plain = outputs_and_gradients(lambda *x: core(*x, documents, filler=lambda: None)[0], inputs, 1)
    for first, second, expected in zip(*results, plain, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        bound = 1e-2 if DTYPE.itemsize == 2 else 1e-5
        torch.testing.assert_close(first, expected, rtol=bound, atol=bound)
