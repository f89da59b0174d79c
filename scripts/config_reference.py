"""Write docs/reference/configuration.md: every key, from the dataclasses of the configuration."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import ast
import inspect
import itertools
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

import omegaconf

from train.config import RunConfig

TARGET = Path(__file__).resolve().parents[1] / "docs/reference/configuration.md"
HEAD = """# Configuration

Every key of a run, with its type, its default and what it means. A run file (`conf/run/NAME.yaml`, or any
YAML file given by `conf=FILE.yaml`) holds the keys that differ from the defaults; `key=value` on the command
line overrides both. A key without a default has to be given, but for `name` and `run_dir`, which follow from
`conf=`. An unknown key, a wrong type or an impossible combination ends with one message at once.

`python train/pretrain.py conf=NAME --cfg job` prints what a run resolves to. This page is made by
`python scripts/config_reference.py` from the dataclasses that hold the keys.
"""


def attribute_docs(config: type) -> dict[str, str]:
    """The string under each field."""
    body = ast.parse(inspect.getsource(config)).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            docs[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return docs


def type_text(hint: Any) -> str:
    """`int or null`, `one of a, b`, `list of text`."""
    if get_origin(hint) is types.UnionType:
        return " or ".join(type_text(part) for part in get_args(hint))
    if get_origin(hint) is list:
        return f"list of {type_text(get_args(hint)[0])}"
    if hint is types.NoneType:
        return "null"
    if is_dataclass(hint):
        return "objects, see below"
    if issubclass(hint, Enum):
        return ", ".join(f"`{member.value}`" for member in hint)
    return {str: "text", bool: "true, false"}.get(hint, hint.__name__)


def default_text(field: Field[Any]) -> str:
    """As it would stand in YAML."""
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if value is omegaconf.MISSING or value is MISSING:
        return "none"
    plain = {None: "null", True: "true", False: "false"}
    is_plain = value is None or isinstance(value, bool)
    return f"`{plain[value] if is_plain else value}`"


def keys(config: type, prefix: str, *, nested: bool) -> Iterator[tuple[str, ...]]:
    """Name, type, default and meaning of the fields that are values; `nested`: of parts as well."""
    hints, docs = get_type_hints(config), attribute_docs(config)
    for field in fields(config):
        name, hint = prefix + field.name, hints[field.name]
        if not is_dataclass(hint):
            yield f"`{name}`", type_text(hint), default_text(field), docs.get(field.name, "")
        elif nested and isinstance(hint, type):
            yield from keys(hint, f"{name}.", nested=True)


def section(title: str, config: type, prefix: str) -> Iterator[str]:
    """A heading, the dataclass's own words, a table, and the same for what its lists hold."""
    yield f"\n## {title}\n\n{inspect.cleandoc(config.__doc__ or '')}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for cells in keys(config, prefix, nested=title.startswith("Each")):
        yield "| {} | {} | {} | {} |".format(*(cell.replace("|", "\\|") for cell in cells))
    for name, hint in get_type_hints(config).items():
        item = get_args(hint)[0] if get_origin(hint) is list else None
        if isinstance(item, type) and is_dataclass(item):
            yield from section(f"Each of `{prefix}{name}`", item, "")


def reference() -> str:
    """The whole page."""
    parts = [*section("The run", RunConfig, "")]
    for name, hint in get_type_hints(RunConfig).items():
        if isinstance(hint, type) and is_dataclass(hint):
            parts += section(f"`{name}`", hint, f"{name}.")
    return HEAD + "\n".join(parts) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    TARGET.write_text(reference(), encoding="utf-8")
