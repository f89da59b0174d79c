"""An optional library that is broken costs one warning, never a run; its fakes are packages on the path."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels.expert_ffn import QUACK, _config, _swiglu_gemm, _try_quack, has_quack
from kernels.optional import compare_with_twin, is_usable
from kernels.softmax_attention import _try_flash4, has_flash4

LACKS = "raise ImportError('libnvvm.so: no such file')\n"
REFUSES = "raise TypeError('epilogue fn depends on the folder')\n"
ATTENTION = """
import torch
def _flash_attn_fwd(q, k, v, **options):
    {}
    return torch.zeros_like(q), torch.zeros(q.shape[1], len(q))
def _flash_attn_bwd(q, k, v, *others, **options):
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
"""
GEMMS = """
import torch
class gemm_tuned:
    fn = staticmethod(lambda a, b, out, **options: out.zero_())
def gemm_dgated(grad, down, both, **options):
    return torch.zeros_like(both), torch.zeros_like(both[:, ::2]), torch.zeros(len(both))
"""
EPILOGUE = """
def gemm_epilogue(**options):
    def decorate(function):
        def gemm(x, weight, out, **options):
            {}
            for each in out.values():
                each.zero_()
        return gemm
    return decorate
"""
QUACK_PARTS = {
    "quack/activation.py": "def swiglu(gate, up): pass\n",
    "quack/gemm_config.py": "def GemmConfig(**options): return options\n",
    "quack/epilogue/math.py": "pack = unpack = None\n",
    "quack/epilogue/ops.py": "def ColVecLoad(name): return name\n",
}
FAKES = {  # distribution, version, question, files, what the warning says
    "flash: does not import": ("flash-attn-4", "4.0.0", {"flash_attn/cute/interface.py": LACKS}, "ImportError: libnvvm.so"),
    "flash: refuses": ("flash-attn-4", "4.0.0", {"flash_attn/cute/interface.py": ATTENTION.format(REFUSES)}, "TypeError: epilogue fn"),
    "flash: wrong": ("flash-attn-4", "4.0.0", {"flash_attn/cute/interface.py": ATTENTION.format("pass")}, "ArithmeticError: its result differs"),
    "quack: does not import": ("quack-kernels", QUACK, {"quack/activation.py": LACKS}, "ImportError: libnvvm.so"),
    "quack: lacks a part": ("quack-kernels", QUACK, {"quack/activation.py": QUACK_PARTS["quack/activation.py"]}, "ModuleNotFoundError"),
    "quack: refuses": ("quack-kernels", QUACK, {**QUACK_PARTS, "quack/gemm_interface.py": GEMMS, "quack/epilogue/frontend.py": EPILOGUE.format(REFUSES)}, "TypeError: epilogue fn"),
    "quack: wrong": ("quack-kernels", QUACK, {**QUACK_PARTS, "quack/gemm_interface.py": GEMMS, "quack/epilogue/frontend.py": EPILOGUE.format("pass")}, "ArithmeticError: its result differs"),
    "quack: another version": ("quack-kernels", "0.7.0", {}, "only 0.6.5 is tested"),
}  # fmt: skip
# ruff: noqa: E501


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """A function that puts a folder on the path; afterwards nothing of it is remembered."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("quack", "flash_attn")]:
            del sys.modules[name]
        _config.cache_clear()
        _swiglu_gemm.cache_clear()

    forget()
    yield lambda folder: monkeypatch.syspath_prepend(str(folder))
    forget()


@pytest.mark.parametrize("case", FAKES)
def test_a_broken_library_is_passed_over_with_one_warning(
    case: str,
    fresh: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    library, version, files, reason = FAKES[case]
    facts = tmp_path / f"{library.replace('-', '_')}-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: {version}\n")
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    fresh(tmp_path)
    monkeypatch.setattr("kernels.expert_ffn._try_quack", partial(_try_quack, "cpu"))
    monkeypatch.setattr("kernels.softmax_attention._try_flash4", partial(_try_flash4, "cpu"))
    question = has_quack if library == "quack-kernels" else has_flash4
    with caplog.at_level(logging.WARNING):
        assert question.__wrapped__() is False
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{library} {version} is installed but not used: {reason}")


def test_a_missing_library_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert not is_usable("no-such-library", lambda: None)
    assert not caplog.records


def test_a_library_that_passes_is_used(caplog: pytest.LogCaptureFixture) -> None:
    assert is_usable("pytest", lambda: None)
    assert is_usable("pytest", lambda: None, tested=pytest.__version__)
    assert not caplog.records


def test_results_and_gradients_are_compared() -> None:
    inputs = [torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    compare_with_twin(torch.mul, torch.mul, inputs)
    compare_with_twin(lambda a, b: (a * b).bfloat16(), torch.mul, inputs)
    for wrong, what in (
        (lambda a, b: 1.1 * a * b, "result"),
        (lambda a, b: a * b * float("nan"), "result"),
        (lambda a, b: a.detach() * b + 0 * a, "gradient 1"),
        (lambda a, b: a * b.detach() + 0 * b, "gradient 2"),
    ):
        with pytest.raises(ArithmeticError, match=f"its {what} differs"):
            compare_with_twin(wrong, torch.mul, inputs)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_trial_needs_no_gradients_from_its_caller(
    context: Callable[[], AbstractContextManager[None]], caplog: pytest.LogCaptureFixture
) -> None:
    """As when attention is first called by an evaluation, or by ring attention's autograd function."""
    with context():
        assert is_usable("pytest", _multiply_twice)
    assert not caplog.records


def test_a_trial_is_no_part_of_a_recomputed_block(caplog: pytest.LogCaptureFixture) -> None:
    """The first forward pass tries the library, the second takes the answer: they save the same tensors."""
    usable = cache(lambda: is_usable("pytest", _multiply_twice))
    x = torch.ones(3, requires_grad=True)
    checkpoint(lambda x: (x.square() * usable()).sum(), x, use_reentrant=False).backward()
    assert torch.equal(x.grad, 2 * torch.ones(3))
    assert not caplog.records


def _multiply_twice() -> None:
    compare_with_twin(torch.mul, torch.mul, [torch.ones(3), torch.ones(3)])
