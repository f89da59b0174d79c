"""Write docs/reference/configuration.md: every key, from the dataclasses of the configuration."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import ast
import inspect
import itertools
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import omegaconf

from train.config import RunConfig

TARGET = Path(__file__).resolve().parents[1] / "docs/reference/configuration.md"
HEAD = """# Configuration reference

Made by `python scripts/config_reference.py` from the dataclasses; a test keeps it up to date.
Where no default stands, the run file must give a value.
`python train/pretrain.py conf=NAME --cfg job` prints what a run resolves to.
"""


class Key(NamedTuple):
    """A row of a table."""

    name: str
    type: str
    default: str
    meaning: str


def attribute_docs(config: type) -> dict[str, str]:
    """The string under each field."""
    body = ast.parse(inspect.getsource(config)).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            docs[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return docs


def type_text(hint: Any) -> str:
    """`int or null`, `one of a, b`, `list of {path: text}`."""
    if get_origin(hint) is types.UnionType:
        return " or ".join(type_text(part) for part in get_args(hint))
    if get_origin(hint) is list:
        return f"list of {type_text(get_args(hint)[0])}"
    if hint is types.NoneType:
        return "null"
    if is_dataclass(hint):
        return "{" + ", ".join(field.name for field in fields(hint)) + "}"
    if issubclass(hint, Enum):
        return ", ".join(f"`{member.value}`" for member in hint)
    return {str: "text", bool: "true, false"}.get(hint, hint.__name__)


def default_text(field: Field[Any]) -> str:
    """As it would stand in YAML; nothing where a value must be given."""
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if value is omegaconf.MISSING or value is MISSING:
        return ""
    plain = {None: "null", True: "true", False: "false"}
    is_plain = value is None or isinstance(value, bool)
    return f"`{plain[value] if is_plain else value}`"


def keys(config: type, prefix: str) -> Iterator[Key]:
    """The fields of a dataclass that are values, not parts."""
    hints, docs = get_type_hints(config), attribute_docs(config)
    for field in fields(config):
        if not is_dataclass(hints[field.name]):
            meaning = docs.get(field.name, "")
            yield Key(prefix + field.name, type_text(hints[field.name]), default_text(field), meaning)


def section(title: str, config: type, prefix: str) -> Iterator[str]:
    """A heading, the dataclass's own words, a table, and the same for what its lists hold."""
    yield f"\n## {title}\n\n{inspect.cleandoc(config.__doc__ or '')}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for key in keys(config, prefix):
        yield "| `{}` | {} | {} | {} |".format(*(cell.replace("|", "\\|") for cell in key))
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
    TARGET.write_text(reference(), encoding="utf-8")
