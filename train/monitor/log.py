"""Log lines: rank 0 at INFO, the others at WARNING with their rank in front."""

import logging
import warnings

from rich.console import Console
from rich.logging import RichHandler


def set_up_logging(rank: int, console: Console) -> None:
    """Configure the root logger of this process.

    Args:
        rank: of this process; ranks other than 0 are quieter and named in front.
        console: where lines go; a terminal gets colours and keeps the live progress below them.
    """
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, markup=False)
        text = "%(message)s"
    else:
        handler = logging.StreamHandler(console.file)
        text = "%(asctime)s %(levelname)s %(message)s"
    prefix = f"[rank {rank}] " if rank else ""
    handler.setFormatter(logging.Formatter(prefix + text, datefmt="%H:%M:%S"))
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # torch 2.11 has no other names
        warnings.filterwarnings("ignore", f".*{name}. is deprecated", FutureWarning)
    logging.basicConfig(level=logging.WARNING if rank else logging.INFO, handlers=[handler], force=True)
