"""Times of kernels beside their floors, at ceilings measured in the same run, and beside other packages'."""

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from triton import TritonError
from triton.testing import do_bench

OURS = "ours"
PEERS = {"fla-core": "0.6.0", "liger-kernel": "0.8.5"}
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ImportError, TritonError)
"""What a case may raise without an end of the others."""

Clock = Callable[[Callable[[], object]], float]
"""Milliseconds of a call."""


class Work(NamedTuple):
    """What a pass must do at least."""

    flops: float
    bytes: float


class Ceilings(NamedTuple):
    """What this GPU does at most."""

    tflops: float
    """An 8192^3 product in bf16."""
    tb_per_s: float
    """A large copy, bytes read and written."""

    def floor_ms(self, work: Work) -> float:
        """No pass can be faster."""
        return max(work.flops / self.tflops, work.bytes / self.tb_per_s) / 1e9


class Op(NamedTuple):
    """One way to compute a case."""

    forward: Callable[[], Any]
    """Returns a tensor or several."""
    wanted: Sequence[Tensor] | Sequence[GradientEdge] = ()
    """Whose gradients backward computes."""


class Case(NamedTuple):
    """An operation at one size."""

    group: str
    """Chosen by --only."""
    name: str
    forward: Work
    """Or of both passes where there is no backward that can be timed alone."""
    backward: Work | None
    build: Callable[[bool], dict[str, Op]]
    """Makes the inputs: OURS, and with True every peer by name."""
    is_joint: bool = False
    """Both passes as one, with the memory that they take."""


class Line(NamedTuple):
    """A line of the table: one pass of a case."""

    case: str
    passes: str
    floor_ms: float
    ms: float | None
    """None: it failed."""
    peers: dict[str, float]
    """ms of each."""
    peak_bytes: int | None
    """Most memory in use beyond inputs and gradients, where it was measured."""
    errors: list[str]

    def cells(self) -> list[str]:
        """As printed."""
        best = min(self.peers, key=self.peers.__getitem__, default=None)
        return [
            self.case,
            self.passes,
            f"{self.floor_ms:.3f}",
            "failed" if self.ms is None else f"{self.ms:.3f}",
            "-" if self.ms is None else f"{self.ms / self.floor_ms:.2f}",
            "-" if best is None else best,
            "-" if best is None else f"{self.peers[best]:.3f}",
            "-" if best is None or self.ms is None else f"{self.ms / self.peers[best]:.2f}",
            "-" if self.peak_bytes is None else f"{self.peak_bytes / 2**30:.2f}",
        ]


COLUMNS = {
    "operation": 38, "pass": 8, "floor ms": 8, "ms": 8, "x floor": 7, "best peer": 12, "peer ms": 8,
    "ratio": 6, "peak GiB": 8,
}  # fmt: skip
"""Names and widths."""


def format_cells(cells: Sequence[str]) -> str:
    """Lay out one line of the table; the first column is aligned to the left."""
    first, *others = (f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True))
    return "  ".join([cells[0].ljust(len(first)), *others])


def median_ms(call: Callable[[], object]) -> float:
    """Median of runs that find nothing of theirs in the L2 cache."""
    return do_bench(call, warmup=25, rep=100, return_mode="median")


def measure_ceilings(device: torch.device) -> Ceilings:
    """On random data."""
    x, y = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    product = median_ms(lambda: x @ y)
    source = torch.randn(2**30, device=device)
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source))
    return Ceilings(2 * 8192**3 / product / 1e9, 2 * source.nbytes / copy / 1e9)


def check_peers() -> None:
    """Raise unless all peers are installed in the versions that the tables were made with."""
    for name, wanted in PEERS.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = None
        if found != wanted:
            has = "it is not installed" if found is None else f"{found} is"
            raise ValueError(f"--peers needs {name}=={wanted}, but {has}; pip install {name}=={wanted}")


def choose_cases(cases: Sequence[Case], only: Sequence[str] | None) -> list[Case]:
    """Those of the groups in `only`, None = all."""
    groups = list(dict.fromkeys(case.group for case in cases))
    if only is None:
        return list(cases)
    if unknown := [name for name in only if name not in groups]:
        raise ValueError(f"--only={','.join(only)}: {unknown[0]!r} must be one of {groups}")
    return [case for case in cases if case.group in only]


def measure_case(case: Case, ceilings: Ceilings, clock: Clock, *, with_peers: bool) -> Iterator[Line]:
    """Time every pass of a case; what fails is said in its line."""
    passes = {"both": case.forward} if case.is_joint else {"forward": case.forward}
    if case.backward is not None:
        passes["backward"] = case.backward
    times: dict[str, dict[str, float]] = {name: {} for name in passes}
    errors: dict[str, list[str]] = {name: [] for name in passes}
    peak = None
    try:
        ops = case.build(with_peers)
    except FAILURES as error:
        ops, errors[next(iter(passes))] = {}, [_said(OURS, error)]
    for name, op in ops.items():
        for kind in passes:
            try:
                times[kind][name] = clock(_PASSES[kind](op))
                if kind == "both" and name == OURS:
                    peak = peak_bytes(op)
            except FAILURES as error:
                errors[kind].append(_said(name, error))
                break
    for kind, work in passes.items():
        peers = {name: ms for name, ms in times[kind].items() if name != OURS}
        ms = times[kind].get(OURS)
        yield Line(case.name, kind, ceilings.floor_ms(work), ms, peers, peak, errors[kind])


def _said(name: str, error: BaseException) -> str:
    return f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The same kernels from a CUDA graph: one launch for all."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad(), torch.cuda.graph(graph):
        call()
    return graph.replay


def _forward(op: Op) -> Callable[[], object]:
    def call() -> None:
        with torch.no_grad():
            op.forward()

    return call


def _backward(op: Op) -> Callable[[], object]:
    found = op.forward()
    found = [found] if isinstance(found, Tensor) else [each for each in found if each.requires_grad]
    upstream = [torch.randn_like(each) for each in found]
    return lambda: torch.autograd.grad(found, op.wanted, upstream, retain_graph=True)


def _both(op: Op) -> Callable[[], object]:
    return lambda: torch.autograd.grad(op.forward(), op.wanted)


_PASSES = {"forward": _forward, "backward": _backward, "both": _both}


def peak_bytes(op: Op) -> int:
    """Most memory in use during both passes, beyond what was there before and the gradients."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(op.forward(), op.wanted)
    return torch.cuda.max_memory_allocated() - before - sum(grad.nbytes for grad in grads)
