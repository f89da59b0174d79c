"""The rules of the code base that a machine can check; each rule names the offending file and line.

A rule takes the root of a tree, so the second half of this file proves on small trees that it can fail.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ("train", "parallel", "model", "kernels", "data")
FOLDERS = (*LIBRARY, "scripts", "tests", "conf")
ALLOWED = {  # folder -> folders of ours that it may import
    "kernels": {"kernels"},
    "data": {"data"},
    "model": {"model", "kernels"},
    "parallel": {"parallel", "model", "kernels"},
    "train": set(LIBRARY),
    "scripts": {*LIBRARY, "scripts"},
    "tests": {*LIBRARY, "scripts", "tests"},
}
FILE_LINES, KERNEL_FILE_LINES = 400, 600
FUNCTION_LINES, KERNEL_FUNCTION_LINES, TRAIN_STEP_LINES = 60, 200, 40
FOLDER_FILES = 15
WIDE_FOLDERS = ("kernels", "parallel", "model", "scripts")  # and their mirrors in tests/
TOTAL_LINES, KERNEL_TOTAL_LINES = 14950, 4200
PICKLES = (
    "pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "torch.serialization",
    "allow_pickle", "weights_only",
)  # fmt: skip
PROCESS_FILES = {
    "train/pretrain.py",
    "parallel/launch.py",
}  # the only ones that may print and read the environment


@dataclass(frozen=True)
class Source:
    """One Python file; `path` is relative to the root, `folder` its top-level folder."""

    path: str
    text: str

    @property
    def folder(self) -> str:
        return self.path.split("/")[0]

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.text, self.path)))

    def imports(self) -> Iterator[tuple[int, str]]:
        """Line and dotted name of each import; `from a.b import c` is `a.b.c`."""
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)

    def uses(self) -> Iterator[tuple[int, str]]:
        """Imports, and dotted names in expressions."""
        yield from self.imports()
        yield from ((n.lineno, dotted(n)) for n in self.nodes if isinstance(n, ast.Attribute))

    def keywords(self) -> Iterator[tuple[int, str]]:
        """Line and name of each argument that is passed by name."""
        calls = (node for node in self.nodes if isinstance(node, ast.Call))
        yield from ((call.lineno, each.arg) for call in calls for each in call.keywords if each.arg)


Rule = Callable[[Path], list[str]]


@cache
def source(path: str, text: str) -> Source:
    """One object for each text, because a dozen rules parse it."""
    return Source(path, text)


def sources(root: Path, *folders: str) -> list[Source]:
    files = sorted(path for folder in folders or FOLDERS for path in (root / folder).rglob("*.py"))
    return [
        source(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
        for path in files
        if "__pycache__" not in path.parts
    ]


def dotted(node: ast.AST) -> str:
    """`a.b[0].c` -> `a.b.c`; a part that is no name becomes `?`."""
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return f"{dotted(node.value)}.{node.attr}"
        case ast.Subscript():
            return dotted(node.value)
    return "?"


def within(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def import_direction(root: Path) -> list[str]:
    return [
        f"{source.path}:{line}: imports {name}; {source.folder}/ may import {sorted(ALLOWED[source.folder])}"
        for source in sources(root, *ALLOWED)
        for line, name in source.imports()
        if within(name, *FOLDERS) and name.split(".")[0] not in ALLOWED[source.folder]
    ]


ROOMS = ("checkpoint", "guard", "monitor", "schedule")
BUILDERS = ("pretrain", "loop", "step", "build")


def rooms_stand_below(root: Path) -> list[str]:
    return [
        f"{source.path}:{line}: imports {name}; the rooms of train/ know nothing of {', '.join(BUILDERS)}"
        for source in sources(root, *(f"train/{room}" for room in ROOMS))
        for line, name in source.imports()
        if within(name, *(f"train.{module}" for module in BUILDERS))
    ]


def no_import_cycle(root: Path) -> list[str]:
    files = {source.path[:-3].replace("/", "."): source for source in sources(root, *LIBRARY, "scripts")}
    graph = {
        name: {(known, line) for line, used in source.imports() for known in files if within(used, known)}
        for name, source in files.items()
    }
    found, over = [], set[str]()

    def visit(name: str, way: list[str]) -> None:
        for used, line in sorted(graph[name]):
            if used in way:
                circle = " -> ".join([*way[way.index(used) :], used])
                found.append(f"{files[name].path}:{line}: closes the circle {circle}")
            elif used not in over:
                visit(used, [*way, used])
        over.add(name)

    for name in graph:
        if name not in over:
            visit(name, [name])
    return found


def no_import_from_a_test(root: Path) -> list[str]:
    return [
        f"{source.path}:{line}: imports {name}; what tests share lives in tests/support/"
        for source in sources(root, "tests")
        for line, name in source.imports()
        if any(part.startswith("test_") for part in name.split(".")[:-1])
    ]


def folder_size(root: Path) -> list[str]:
    found = []
    for folder in {Path(source.path).parent for source in sources(root)}:
        files = [file for file in sources(root, folder.as_posix()) if Path(file.path).parent == folder]
        modules = [file.path for file in files if not file.path.endswith("/__init__.py")]
        if len(modules) > FOLDER_FILES and folder.name not in WIDE_FOLDERS:
            found.append(f"{folder}/: {len(modules)} files, at most {FOLDER_FILES}; make rooms")
    return found


def explicit_imports(root: Path) -> list[str]:
    found = []
    for source in sources(root):
        for node in source.nodes:
            if isinstance(node, ast.ImportFrom) and (node.level or node.module in FOLDERS):
                what = "." * node.level + (node.module or "")
            elif isinstance(node, ast.Import) and any(within(alias.name, *FOLDERS) for alias in node.names):
                what = ast.unparse(node)
            else:
                continue
            found.append(f"{source.path}:{node.lineno}: {what}: write `from folder.file import Name`")
    return found


def no_distributed_in_the_math(root: Path) -> list[str]:
    offences = {
        f"{source.path}:{line}: uses torch.distributed; only parallel/ and train/ communicate"
        for source in sources(root, "model", "kernels", "data")
        for line, name in source.uses()
        if within(name, "torch.distributed")
    }
    return sorted(offences)


def deepspeed_in_one_file(root: Path) -> list[str]:
    return [
        f"{source.path}:{line}: imports {name}; only parallel/zero.py may"
        for source in sources(root)
        for line, name in source.imports()
        if within(name, "deepspeed") and source.path != "parallel/zero.py"
    ]


def hydra_at_the_entry(root: Path) -> list[str]:
    return [
        f"{source.path}:{line}: imports {name}; only train/pretrain.py and train/config.py may"
        for source in sources(root, *LIBRARY)
        for line, name in source.imports()
        if within(name, "hydra", "omegaconf") and source.path not in ("train/pretrain.py", "train/config.py")
    ]


def no_print(root: Path) -> list[str]:
    return [
        f"{source.path}:{node.lineno}: calls print; use logging.getLogger(__name__)"
        for source in sources(root, *LIBRARY)
        for node in source.nodes
        if isinstance(node, ast.Call) and dotted(node.func) == "print" and source.path not in PROCESS_FILES
    ]


def no_environment(root: Path) -> list[str]:
    return [
        f"{source.path}:{line}: uses {name}; a setting is a config field, passed as an argument"
        for source in sources(root, *LIBRARY)
        for line, name in source.uses()
        if name in ("os.environ", "os.getenv", "os.putenv") and source.path not in PROCESS_FILES
    ]


def no_pickle(root: Path) -> list[str]:
    return [
        f"{source.path}:{line}: uses {name}; write safetensors or JSON"
        for source in sources(root)
        for line, name in (*source.uses(), *source.keywords())
        if within(name, *PICKLES) or (name in ("torch.load", "torch.save") and source.folder != "tests")
    ]


def file_size(root: Path) -> list[str]:
    found = []
    for source in sources(root, *LIBRARY, "scripts"):
        limit = KERNEL_FILE_LINES if source.folder == "kernels" else FILE_LINES
        if source.lines > limit:
            found.append(f"{source.path}:{limit + 1}: {source.lines} lines, at most {limit}; split the file")
    return found


def function_size(root: Path) -> list[str]:
    found = []
    for source in sources(root, *LIBRARY, "scripts"):
        for node in source.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                limit = KERNEL_FUNCTION_LINES if source.folder == "kernels" else FUNCTION_LINES
                limit = TRAIN_STEP_LINES if node.name == "train_step" else limit
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > limit:
                    found.append(
                        f"{source.path}:{node.lineno}: {node.name} has {size} lines, at most {limit}; split"
                    )
    return found


def total_size(root: Path) -> list[str]:
    found = []
    others = [folder for folder in (*LIBRARY, "scripts") if folder != "kernels"]
    for folders, limit in ((others, TOTAL_LINES), (["kernels"], KERNEL_TOTAL_LINES)):
        files = sources(root, *folders)
        if (total := sum(source.lines for source in files)) > limit:
            largest = max(files, key=lambda source: source.lines).path
            found.append(f"{largest}:1: {total} lines in all, at most {limit}; this is the largest file")
    return found


def unshadowed_names(root: Path) -> list[str]:
    taken = {*sys.stdlib_module_names, *FOLDERS}
    return [
        f"{source.path}:1: {stem!r} hides a module when a script of {source.folder}/ runs; rename it"
        for source in sources(root, "train", "scripts")
        if (stem := Path(source.path).stem) in taken and source.path.count("/") == 1
    ]


def telling_names(root: Path) -> list[str]:
    vague = {"utils", "common", "base", "registry", "factory"}
    return [
        f"{source.path}:1: a name that says nothing; name the file after what it does"
        for source in sources(root)
        if vague & set(Path(source.path).with_suffix("").parts)
    ]


def packages_are_empty(root: Path) -> list[str]:
    files = sources(root)
    folders = {parent.as_posix() for source in files for parent in Path(source.path).parents} - {"."}
    texts = {source.path: source.text for source in files}
    missing = [
        f"{folder}/__init__.py:1: missing; add an empty file"
        for folder in folders
        if f"{folder}/__init__.py" not in texts
    ]
    filled = [
        f"{path}:1: must be empty" for path, text in texts.items() if path.endswith("/__init__.py") and text
    ]
    return sorted(missing + filled)


def conf_is_yaml(root: Path) -> list[str]:
    return [f"{source.path}:1: conf/ holds YAML only; move it" for source in sources(root, "conf")]


def config_is_read_only(root: Path) -> list[str]:
    found = []
    for source in sources(root):
        for node in source.nodes:
            if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
                target = dotted(node)
            elif isinstance(node, ast.Call) and dotted(node.func).endswith(("setattr", "__setattr__")):
                target = ".".join(dotted(arg) for arg in node.args[:2])
            else:
                continue
            if target.startswith("cfg.") or ".cfg." in target:
                found.append(
                    f"{source.path}:{node.lineno}: changes {target}; use a property or dataclasses.replace"
                )
    return found


RULES: list[Rule] = [
    import_direction, rooms_stand_below, no_import_cycle, no_import_from_a_test, folder_size,
    explicit_imports,
    no_distributed_in_the_math, deepspeed_in_one_file, hydra_at_the_entry,
    no_print, no_environment, no_pickle, file_size, function_size, total_size, unshadowed_names,
    telling_names, packages_are_empty, conf_is_yaml, config_is_read_only,
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_repository_follows(rule: Rule) -> None:
    offences = rule(ROOT)
    assert not offences, "\n" + "\n".join(offences)


def function(name: str, lines: int) -> str:
    return f"def {name}():\n" + "    pass\n" * (lines - 1)


OFFENCES: list[tuple[Rule, str, str, int]] = [  # rule, file, text, offending line
    (import_direction, "kernels/a.py", "import torch\nfrom model.b import C\n", 2),
    (import_direction, "data/a.py", "from kernels.b import C\n", 1),
    (import_direction, "model/a.py", "def f():\n    from parallel.b import C\n", 2),
    (import_direction, "model/a.py", "from data.b import C\n", 1),
    (import_direction, "parallel/a.py", "from train.b import C\n", 1),
    (import_direction, "parallel/a.py", "from data.b import C\n", 1),
    (import_direction, "train/a.py", "from scripts.b import C\n", 1),
    (import_direction, "train/a.py", "import tests.dist\n", 1),
    (import_direction, "scripts/a.py", "from tests.b import C\n", 1),
    (rooms_stand_below, "train/guard/a.py", "x = 1\nfrom train.loop import C\n", 2),
    (rooms_stand_below, "train/monitor/a.py", "def f():\n    from train.build import C\n", 2),
    (no_import_cycle, "data/b.py", "import os\nfrom data.a import C\n", 2),
    (no_import_cycle, "train/b.py", "def f():\n    from train.b import C\n", 2),
    (no_import_from_a_test, "tests/data/test_b.py", "from tests.data.test_a import f\n", 1),
    (no_import_from_a_test, "tests/support/a.py", "import torch\nfrom tests.test_a import f\n", 2),
    (explicit_imports, "train/a.py", "import model\n", 1),
    (explicit_imports, "train/a.py", "import torch, model.b as b\n", 1),
    (explicit_imports, "tests/a.py", "from model import b\n", 1),
    (explicit_imports, "model/a.py", "from .b import C\n", 1),
    (explicit_imports, "model/a.py", "from . import b\n", 1),
    (no_distributed_in_the_math, "model/a.py", "import torch.distributed as dist\n", 1),
    (no_distributed_in_the_math, "kernels/a.py", "from torch import distributed\n", 1),
    (no_distributed_in_the_math, "data/a.py", "from torch.distributed.tensor import DTensor\n", 1),
    (no_distributed_in_the_math, "data/a.py", "import torch\nrank = torch.distributed.get_rank()\n", 2),
    (deepspeed_in_one_file, "parallel/apply.py", "import deepspeed\n", 1),
    (deepspeed_in_one_file, "scripts/a.py", "from deepspeed.ops.adam import DeepSpeedCPUAdam\n", 1),
    (hydra_at_the_entry, "train/build.py", "from omegaconf import OmegaConf\n", 1),
    (hydra_at_the_entry, "parallel/config.py", "import hydra\n", 1),
    (no_print, "model/a.py", "x = 1\nprint(x)\n", 2),
    (no_environment, "train/step.py", "import os\nx = os.environ['X']\n", 2),
    (no_environment, "train/step.py", "import os\n\nx = os.getenv('X')\n", 3),
    (no_environment, "train/step.py", "from os import environ\n", 1),
    (no_pickle, "tests/a.py", "import pickle\n", 1),
    (no_pickle, "train/a.py", "import torch\ntorch.save({}, 'x')\n", 2),
    (no_pickle, "scripts/a.py", "from torch import load\n", 1),
    (no_pickle, "data/a.py", "import numpy as np\nnp.load('x', allow_pickle=True)\n", 2),
    (no_pickle, "train/a.py", "from torch.serialization import load as f\n", 1),
    (no_pickle, "tests/a.py", "import torch\n\ntorch.hub.load('x', weights_only=False)\n", 3),
    (no_pickle, "train/a.py", "import shelve\n", 1),
    (file_size, "train/a.py", "x = 1\n" * 401, 401),
    (file_size, "kernels/a.py", "x = 1\n" * 601, 601),
    (function_size, "scripts/a.py", "x = 1\n" + function("f", 61), 2),
    (function_size, "kernels/a.py", function("f", 201), 1),
    (function_size, "train/step.py", function("train_step", 41), 1),
    (total_size, "data/a.py", "x = 1\n" * (TOTAL_LINES + 1), 1),
    (total_size, "kernels/a.py", "x = 1\n" * (KERNEL_TOTAL_LINES + 1), 1),
    (unshadowed_names, "train/logging.py", "", 1),
    (unshadowed_names, "scripts/model.py", "", 1),
    (telling_names, "tests/utils.py", "", 1),
    (telling_names, "model/common/__init__.py", "", 1),
    (packages_are_empty, "model/__init__.py", "\n", 1),
    (conf_is_yaml, "conf/__init__.py", "", 1),
    (config_is_read_only, "train/a.py", "x = 1\ncfg.model.layers = 3\n", 2),
    (config_is_read_only, "train/a.py", "run.cfg.train.steps += 1\n", 1),
    (config_is_read_only, "train/a.py", "a, self.cfg.lr = 1, 2\n", 1),
    (config_is_read_only, "train/a.py", "cfg.data.sources[0] = 1\n", 1),
    (config_is_read_only, "train/a.py", "setattr(cfg, 'lr', 1)\n", 1),
    (config_is_read_only, "train/a.py", "object.__setattr__(run.cfg, name, 1)\n", 1),
]  # fmt: skip

LEGAL = {
    "kernels/a.py": "import torch\nfrom kernels.b import C\n" + function("f", 200) + "x = 1\n" * 398,
    "model/a.py": "from kernels.a import f\nimport models\nfrom modelling import x\nmodel.data = 1\n",
    "parallel/apply.py": "import torch.distributed\nfrom model.a import f\nfrom kernels.a import f\n"
    + function("f", 60),
    "parallel/zero.py": "def offload():\n    import deepspeed\n",
    "parallel/launch.py": "import os\nprint(os.environ)\n",
    "data/a.py": "from data.b import C\nblueprint(os.path)\nx.load(torch.loader)\n",
    "train/config.py": "import omegaconf\nself.cfg = cfg\nmy_cfg.x = 1\nsetattr(module, 'cfg', cfg.x)\n",
    "train/step.py": "from data.a import C\nfrom parallel.mesh import Mesh\n" + function("train_step", 40),
    "scripts/charts.py": "from scripts.b import C\nfrom train.config import D\nprint(os.environ)\n",
    "scripts/benchmarks/kernels.py": "",
    "scripts/__pycache__/utils.py": "import pickle\n",
    "tests/dist.py": "from scripts.a import C\nfrom tests.b import D\ntorch.save(1, 'x')\n"
    + "x = 1\n" * 10_000,
    "conf/run/demo.yaml": "",
}


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if path.suffix == ".py" and path.parent.name != "__pycache__":
            (path.parent / "__init__.py").touch()


@pytest.mark.parametrize(("rule", "file", "text", "line"), OFFENCES)
def test_rule_reports(rule: Rule, file: str, text: str, line: int, tmp_path: Path) -> None:
    write_tree(tmp_path, LEGAL | {file: text})
    offences = rule(tmp_path)
    assert [offence.startswith(f"{file}:{line}: ") for offence in offences] == [True], offences


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts(rule: Rule, tmp_path: Path) -> None:
    assert rule(tmp_path) == []  # nothing there yet
    write_tree(tmp_path, LEGAL)
    assert rule(tmp_path) == []
    assert rule in {offence[0] for offence in OFFENCES} or rule is folder_size  # its test is below


def test_a_crowded_folder_is_reported(tmp_path: Path) -> None:
    write_tree(tmp_path, {f"train/guard/a{i}.py": "" for i in range(16)})
    assert folder_size(tmp_path) == ["train/guard/: 16 files, at most 15; make rooms"]
    write_tree(tmp_path / "wide", {f"tests/kernels/a{i}.py": "" for i in range(30)})
    assert folder_size(tmp_path / "wide") == []


def test_missing_package_file(tmp_path: Path) -> None:
    write_tree(tmp_path, {"tests/model/test_a.py": ""})
    assert packages_are_empty(tmp_path) == ["tests/__init__.py:1: missing; add an empty file"]
