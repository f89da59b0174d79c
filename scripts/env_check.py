"""Say what this machine gives a training: versions, GPUs, optional libraries and the backends they lead to.

Exit code: 0 if training can run, else 2, with one line for each thing to mend.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # import from the repository root, not from scripts/

import argparse
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

NEEDED = ("torch", "triton", "numpy", "hydra-core", "omegaconf", "safetensors", "tokenizers", "rich")
OPTIONAL = (
    "datasets", "deepspeed", "wandb", "tensorboard", "transformers", "apex", "flash-attn-4", "quack-kernels",
)  # fmt: skip
OLDEST = {"python": (3, 11), "torch": (2, 11)}


def main() -> int:
    """Print the tables; the exit code."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    problems = list(find_problems())
    show("versions", [("python", platform.python_version()), *((name, found(name)) for name in NEEDED)])
    show("optional", [(name, found(name)) for name in OPTIONAL])
    if found("torch") != "-":
        show("devices", describe_devices())
        show("backends", describe_backends())
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print("training cannot run" if problems else "training can run")
    return 2 if problems else 0


def found(name: str) -> str:
    """Return the version of a distribution, or `-`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def find_problems() -> Iterator[str]:
    """Yield what keeps a training from running, and what to do about it."""
    if sys.version_info < OLDEST["python"]:
        yield f"python {platform.python_version()} is too old: use 3.11 or newer"
    for name in NEEDED:
        if found(name) == "-":
            yield f"{name} is missing: run make .venv/runtime, or pip install {name}"
    torch = found("torch")
    if torch == "-":
        return
    from parallel.launch import refuse_foreign_kernels

    try:
        refuse_foreign_kernels()
    except RuntimeError as error:
        yield str(error)
    if tuple(map(int, torch.split(".")[:2])) < OLDEST["torch"]:
        yield f"torch {torch} is too old: use 2.11 or newer"


def describe_devices() -> Iterator[tuple[str, str]]:
    """Yield GPUs with memory and compute capability, and the ways in which processes talk."""
    import torch
    import torch.distributed as dist

    yield "CUDA of torch", torch.version.cuda or "- (CPU build)"
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        memory = f"{facts.total_memory / 2**30:.0f} GiB"
        yield f"GPU {number}", f"{facts.name}, {memory}, compute capability {facts.major}.{facts.minor}"
    if not torch.cuda.is_available():
        yield "GPU", "-"
    yield "gloo, NCCL", f"{dist.is_gloo_available()}, {dist.is_nccl_available()}"


def describe_backends() -> Iterator[tuple[str, str]]:
    """Yield what computes each operation in bf16 at MiniMax-01's sizes, and why; libraries are tried."""
    import torch

    from kernels.expert_ffn import choose_backend as choose_experts
    from kernels.expert_ffn import has_quack
    from kernels.softmax_attention import choose_backend as choose_attention
    from kernels.softmax_attention import has_flash4
    from parallel.optimizer import OptimizerConfig, choose_implementation

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    attention, why = choose_attention(
        torch.bfloat16, 128, capability=capability, has_flash4=has_flash4,
        has_cudnn=torch.backends.cudnn.is_available(), knows_lengths=True, is_deterministic=False,
    )  # fmt: skip
    yield "softmax attention", f"{attention}: {why}"
    experts, why = choose_experts(torch.bfloat16, 6144, 9216, capability=capability, has_quack=has_quack)
    yield "experts", f"{experts}: {why}"
    optimizer = choose_implementation(OptimizerConfig(), on_gpu=capability is not None)
    yield "optimizer", f"{optimizer}: optimizer.implementation=auto"
    yield "all other kernels", "plain torch: no GPU" if capability is None else "Triton"


def show(title: str, rows: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> None:
    """Print a table of names and values."""
    print(title)
    for name, value in rows:
        print(f"  {name:<18} {value}")


if __name__ == "__main__":
    sys.exit(main())
