"""Continue one or several prompts by a trained model.

Prompts form one batch: they are read in chunks, then continued token by token from the recurrent state of
lightning layers and the keys and values of softmax layers.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # import from the repository root, not from scripts/

import argparse
import json
import time
from collections.abc import Sequence

from model.sampling import Sampling, continue_prompts
from train.checkpoint.load_model import (
    DTYPES,
    choose_device,
    choose_dtype,
    end_token,
    find_tokenizer,
    load_model,
    open_checkpoint,
)
from train.checkpoint.storage import CheckpointError


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="CKPT", help="a step folder or a run directory")
    add("--prompt", action="append", required=True, metavar="TEXT", help="text to continue; can be repeated")
    add("--max-tokens", type=int, default=128, metavar="N", help="new tokens a prompt (default: %(default)s)")
    add(
        "--temperature", type=float, default=1.0, metavar="T", help="0 = most probable (default: %(default)s)"
    )
    add("--top-k", type=int, metavar="K", help="choose among the K most probable tokens")
    add("--top-p", type=float, default=1.0, metavar="P", help="... among the fewest of total probability P")
    add("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    add("--chunk", type=int, default=2048, metavar="N", help="prompt tokens per pass (default: %(default)s)")
    add("--tokenizer", type=Path, metavar="FILE_OR_FOLDER", help="default: the checkpoint's, else its data's")
    add("--eos-token", metavar="TOKEN", help="ends a document (default: the tokenizer's usual one)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto = a GPU if there is one")
    add("--dtype", choices=list(DTYPES), help="of the weights (default: bf16 on a GPU, else fp32)")
    add("--json", action="store_true", help="print one object per prompt: prompt, text, tokens, finished")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0; 2 if checkpoint, tokenizer or options cannot be used."""
    args = parse_arguments(argv)
    try:
        generate(args)
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def generate(args: argparse.Namespace) -> None:
    """Print every prompt with what follows it."""
    how = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    for key in ("max_tokens", "chunk"):
        if getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)} must be at least 1")
    device = choose_device(args.device)
    checkpoint = open_checkpoint(args.checkpoint)
    tokenizer = find_tokenizer(checkpoint, args.tokenizer)
    end = end_token(checkpoint, tokenizer, args.eos_token)
    model = load_model(checkpoint, device=device, dtype=choose_dtype(args.dtype, device))
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in args.prompt]
    began = time.perf_counter()
    written = continue_prompts(model, prompts, end=end, max_tokens=args.max_tokens, how=how, chunk=args.chunk)
    seconds = time.perf_counter() - began
    for text, prompt, tokens in zip(args.prompt, prompts, written, strict=True):
        if args.json:
            is_finished = tokens[-1] == end
            record = {"prompt": text, "text": tokenizer.decode(tokens), "tokens": tokens}
            print(json.dumps({**record, "finished": is_finished}, ensure_ascii=False))
        else:
            print(tokenizer.decode([*prompt, *tokens]))
    new, given = (sum(map(len, rows)) for rows in (written, prompts))
    what = f"{checkpoint.folder}: step {checkpoint.step}, {new} tokens after {given} of prompts"
    print(f"{what} in {seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
