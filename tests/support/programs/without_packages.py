"""A program as it runs where no package is installed: its arguments are the program and its own."""

import importlib.metadata
import runpy
import sys


def version(name: str) -> str:
    """Know no distribution."""
    raise importlib.metadata.PackageNotFoundError(name)


if __name__ == "__main__":
    importlib.metadata.version = version
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
