"""Imports run one way, and slow modules are imported when they are needed."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from regrow.project import lab_name

SOURCE = Path(__file__).resolve().parents[1] / "src"
KNOW_HYDRA = {"cli", "config", "runs", "sweep"}


def files_of(source: Path) -> dict[str, Path]:
    """The modules of both packages below `source`, by dotted name."""
    found = {}
    packages = [source / lab_name(), source / "regrow"]
    for path in sorted(path for package in packages for path in package.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path) -> set[str]:
    """Return what a file imports anywhere: names of modules, and of what it takes from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def wing_of(module: str) -> str:
    """Return the folder of an engine's module, whose root's modules are wings; the lab is one."""
    package, _, rest = module.partition(".")
    return "lab" if package == lab_name() else rest.partition(".")[0]


def imports_in(source: Path) -> dict[str, set[str]]:
    """Return the modules of the package that each of its modules imports."""
    files = files_of(source)
    return {
        module: {
            name if name in files else name.rpartition(".")[0]
            for name in imports_of(path)
            if name in files or name.rpartition(".")[0] in files
        }
        for module, path in files.items()
    }


def wings_in(source: Path) -> dict[str, set[str]]:
    """Return the wings that each wing imports."""
    found: dict[str, set[str]] = {}
    for module, names in imports_in(source).items():
        wing = wing_of(module)
        found.setdefault(wing, set()).update({wing_of(name) for name in names} - {wing})
    return found


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of nodes that reach each other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [*graph.get(start, ())]
        while left:
            if (node := left.pop()) not in seen:
                seen.add(node)
                left += graph.get(node, ())
        return seen

    reach = {node: reached(node) for node in graph}
    found = {
        tuple(sorted(each for each in reach[node] if node in reach.get(each, ())))
        for node in graph
        if node in reach[node]
    }
    return [list(group) for group in sorted(found)]


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = imports_in(SOURCE)
    assert len(graph) > 100 and cycles(graph) == []


def test_no_wing_imports_itself_by_way_of_others() -> None:
    graph = wings_in(SOURCE)
    assert {"config", "runs", "sweep", "lab"} <= {*graph} and cycles(graph) == []


def write(source: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = source / "regrow" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_cycles_are_found_in_lazy_imports_too(tmp_path: Path) -> None:
    files = {
        "config/a.py": "from regrow.config import b",
        "config/b.py": "def f():\n    from regrow.record.c import x",
        "record/c.py": "import regrow.runs.d",
        "runs/d.py": "if TYPE_CHECKING:\n    from regrow.config.a import y",
    }
    write(tmp_path, files)
    ring = ["regrow.config.a", "regrow.config.b", "regrow.record.c", "regrow.runs.d"]
    assert cycles(imports_in(tmp_path)) == [ring]
    assert cycles(wings_in(tmp_path)) == [["config", "record", "runs"]]
    (tmp_path / "regrow" / "runs" / "d.py").write_text("from regrow.record import c")
    assert cycles(imports_in(tmp_path)) == [["regrow.record.c", "regrow.runs.d"]]
    (tmp_path / "regrow" / "runs" / "d.py").write_text("")
    assert cycles(imports_in(tmp_path)) == cycles(wings_in(tmp_path)) == []


def shared_names(source: Path) -> set[str]:
    """Return the names that several files of the two packages share, without the examples."""
    files = [path for path in files_of(source).values() if path.name != "__init__.py"]
    names = [path.name for path in files if "examples" not in path.parts]
    return {name for name in names if names.count(name) > 1}


def test_a_name_is_that_of_one_file(tmp_path: Path) -> None:
    assert shared_names(SOURCE) == set()
    write(tmp_path, {"config/kinds.py": "", "sweep/kinds.py": "", "config/check.py": ""})
    assert shared_names(tmp_path) == {"kinds.py"}


def shared_classes(source: Path) -> set[str]:
    """Return the names that several classes of the two packages share, Protocols included."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files_of(source).values()]
    names = [n.name for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    return {name for name in names if names.count(name) > 1}


def test_a_name_is_that_of_one_class(tmp_path: Path) -> None:
    assert shared_classes(SOURCE) == set()
    lazy = "def f():\n    class Entry: ..."
    write(tmp_path, {"config/a.py": "class Entry: ...", "sweep/b.py": lazy})
    assert shared_classes(tmp_path) == {"Entry"}


def engine_imports_of_the_lab(source: Path) -> list[str]:
    """Return the engine's modules that name the lab: they must find it by its key."""
    name = lab_name()
    return [
        module
        for module, path in files_of(source).items()
        if module.startswith("regrow")
        and any(f"{each}.".startswith(f"{name}.") for each in imports_of(path))
    ]


def test_the_engine_does_not_import_the_lab(tmp_path: Path) -> None:
    assert engine_imports_of_the_lab(SOURCE) == []
    (tmp_path / "regrow" / "runs").mkdir(parents=True)
    lazy = f"def f():\n    from {lab_name()}.loop import fit"
    (tmp_path / "regrow" / "runs" / "a.py").write_text(lazy)
    assert engine_imports_of_the_lab(tmp_path) == ["regrow.runs.a"]


LISTED = re.compile(r"^(\w+)(?:: (.+(?:\n    .+)*))?$", re.MULTILINE)


def public_names(source: Path, wing: str) -> dict[str, set[str]]:
    """Return the public names of a wing by module, from the docstring of its `__init__`."""
    text = (source / "regrow" / wing / "__init__.py").read_text(encoding="utf-8")
    said = (ast.get_docstring(ast.parse(text)) or "").partition("\n\nPublic")[2]
    found = LISTED.findall(said.partition("\n\n")[2])
    return {module: {*re.split(r",\s+", names)} - {""} for module, names in found}


def used_from_outside(source: Path) -> dict[str, dict[str, set[str]]]:
    """Return the names that other wings, the lab and the scripts use, by wing and module."""
    files, used = files_of(source), defaultdict[str, dict[str, set[str]]](dict)
    users = [(wing_of(module), path) for module, path in files.items()]
    users += [("scripts", path) for path in sorted((source.parent / "scripts").glob("*.py"))]
    for user, path in users:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
                "regrow."
            ):
                continue
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                target = whole if whole in files else str(node.module)
                wing, inner = wing_of(target), target.split(".")[2:]
                if wing == user or not inner:
                    continue
                names = used[wing].setdefault(".".join(inner), set())
                names |= uses_of(name.name, files[whole], tree) if target == whole else {name.name}
    return used


def uses_of(module: str, path: Path, tree: ast.AST) -> set[str]:
    """Return the names of the module at `path` that a file uses as `module.name`."""
    own = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            own |= {target.id for target in targets if isinstance(target, ast.Name)}
    return own & {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == module
    }


def test_each_wing_names_what_others_use_of_it() -> None:
    used = used_from_outside(SOURCE)
    assert len(used) == 10
    for wing, modules in used.items():
        public = public_names(SOURCE, wing)
        assert sum(map(len, public.values())) > 0, wing
        for module, names in modules.items():
            assert names <= public[module], f"{wing}/{module}.py"
            assert not any(name.startswith("_") for name in names)


def test_every_public_name_exists() -> None:
    for wing in used_from_outside(SOURCE):
        for module, names in public_names(SOURCE, wing).items():
            there = importlib.import_module(f"regrow.{wing}.{module}")
            assert [name for name in names if not hasattr(there, name)] == []


def test_a_use_of_a_private_name_is_found(tmp_path: Path) -> None:
    files = {
        "record/__init__.py": '"""The record.\n\nPublic.\n\na: f, g,\n    h\nb\n"""',
        "record/a.py": "def secret(): ...\nf = 1",
        "runs/c.py": "from regrow.record import a\nfrom regrow.record.a import f\na.secret()",
    }
    source = tmp_path / "src"
    write(source, files)
    assert public_names(source, "record") == {"a": {"f", "g", "h"}, "b": set()}
    assert used_from_outside(source)["record"] == {"a": {"f", "secret"}}
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "show.py").write_text("def f():\n    from regrow.record.a import own")
    assert used_from_outside(source)["record"] == {"a": {"f", "own", "secret"}}


IMPORTERS = ("src", "tests", "benchmarks", "scripts", "docs/site")


def renamed_modules(root: Path) -> list[str]:
    """Return the imports below `root` that give one of its modules another name."""
    paths = [path for folder in IMPORTERS for path in sorted((root / folder).rglob("*.py"))]
    paths = [path for path in paths if "older" not in path.relative_to(root).parts]
    own = set()
    for path in paths:
        folder, *parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if folder in {"tests", "docs"}:  # their files import each other by the last part
            own.add(path.stem)
        else:
            own.add(".".join(parts if folder == "src" else [folder, *parts]))
    found = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            within = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            found += [
                f"{path.relative_to(root)}: {within}{name.name} as {name.asname}"
                for name in node.names
                if name.asname not in (None, name.name) and f"{within}{name.name}" in own
            ]
    return found


def test_no_module_is_renamed_by_an_import() -> None:
    assert renamed_modules(SOURCE.parent) == []


def test_a_renamed_module_is_found_in_every_folder(tmp_path: Path) -> None:
    write(tmp_path / "src", {"runs/training.py": "", "a.py": "import json as j"})
    lines = {
        "src/lab/a.py": "from regrow.runs import training as runs",
        "tests/test_a.py": "def f():\n    import running as r",
        "tests/running.py": "import numpy as np\nfrom regrow.runs.training import train as run",
        "benchmarks/a.py": "import regrow.runs.training as runs",
        "scripts/a.py": "from benchmarks import a as b",
        "docs/site/a.py": "from regrow.runs import training, training as training",
    }
    for name, text in lines.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert renamed_modules(tmp_path) == [
        "src/lab/a.py: regrow.runs.training as runs",
        "tests/test_a.py: running as r",
        "benchmarks/a.py: regrow.runs.training as runs",
        "scripts/a.py: benchmarks.a as b",
    ]


def test_few_wings_know_hydra() -> None:
    hydra = {"hydra", "omegaconf"}
    know = {
        wing_of(module)
        for module, path in files_of(SOURCE).items()
        if hydra & {name.split(".")[0] for name in imports_of(path)}
    }
    assert know <= {*KNOW_HYDRA, ""}  # "" is the package itself, which names a type


def modules_after(code: str) -> set[str]:
    script = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); {code}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_a_config_is_checked_without_torch() -> None:
    loaded = modules_after("import regrow.config, regrow.config.check, regrow.config.resume")
    assert not loaded & {"torch", "torchvision", "sklearn", "matplotlib", "wandb", "numpy"}


def test_a_run_starts_without_what_only_its_end_needs() -> None:
    loaded = modules_after(
        "import regrow.runs.launch, lab.data.datasets, lab.tasks.tasks, lab.tasks.losses, "
        "lab.models.mlp, lab.schedules"
    )
    slow = {"torchvision", "torchmetrics", "sklearn", "matplotlib", "wandb", "tensorboard", "PIL"}
    assert not loaded & slow
    assert "torch" in loaded


CONFIGS = {"asked", "cfg", "config", "node", "nodes", "trainer"}
# Dicts that the function changes, or its caller may: see docs/decisions.md.
CHANGED = {
    "config.older.adopt",
    "config.older.complete",
    "config.older.earlier",
    "config.older.earlier_defaults",
    "runs.loaded.LoadedRun",
}


def plain_mappings(source: Path) -> set[str]:
    """Return the public functions and classes where a config is a mapping to Any."""
    found = set()
    for init in sorted((source / "regrow").glob("*/__init__.py")):
        wing = init.parent.name
        for module, names in public_names(source, wing).items():
            for node in ast.parse(init.with_name(f"{module}.py").read_text("utf-8")).body:
                if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name not in names:
                    continue
                for each in ast.walk(node):
                    if isinstance(each, ast.arg):
                        name = each.arg
                    elif isinstance(each, ast.AnnAssign) and each in node.body:
                        name = ast.unparse(each.target)
                    else:
                        continue
                    said = ast.unparse(each.annotation) if each.annotation else ""
                    if isinstance(node, ast.FunctionDef) and isinstance(each, ast.AnnAssign):
                        continue  # a local name
                    if name in CONFIGS and "[str, Any]" in said:
                        found.add(f"{wing}.{module}.{node.name}")
    return found


def test_a_public_function_says_which_of_its_arguments_is_a_config(tmp_path: Path) -> None:
    assert plain_mappings(SOURCE) == CHANGED
    code = "def f(config: Mapping[str, Any]): ...\ndef g(config: Mapping[str, Config]): ..."
    public = '"""A.\n\nPublic, by module; all else is private to this folder.\n\na: f, g\n"""'
    write(tmp_path, {"wing/a.py": code, "wing/__init__.py": public})
    assert plain_mappings(tmp_path) == {"wing.a.f"}


def protocols_in(source: Path) -> set[str]:
    trees = [ast.parse(path.read_text("utf-8")) for path in files_of(source).values()]
    classes = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    return {each.name for each in classes if "Protocol" in map(ast.unparse, each.bases)}


def casts_to_a_protocol(source: Path) -> set[str]:
    """Return the modules that cast to a Protocol, or annotate what `instantiate` returns so."""
    protocols, found = protocols_in(source), set()
    for module, path in files_of(source).items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            said: ast.AST | None = None
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "cast":
                said = node.args[0] if node.args else None
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                made = ast.unparse(node.value)
                said = node.annotation if re.search(r"\binstantiate\(", made) else None
            names = set(re.findall(r"\w+", ast.unparse(said))) if said is not None else set()
            if names & protocols:
                found.add(module)
    return found


def test_only_the_build_casts_what_a_config_makes_to_a_protocol(tmp_path: Path) -> None:
    assert casts_to_a_protocol(SOURCE) == {f"{lab_name()}.build"}
    files = {
        "a.py": "class Task(Protocol): ...\ntask = cast(Task, instantiate(node))",
        "b.py": "task: list[Task] = [targets.instantiate(node)]",
        "c.py": "task: dict[str, int] = instantiate(node)\nother = memoryview(b'').cast('B')",
    }
    write(tmp_path, {f"wing/{name}": code for name, code in files.items()})
    assert casts_to_a_protocol(tmp_path) == {"regrow.wing.a", "regrow.wing.b"}


def test_a_run_is_built_without_torchmetrics() -> None:
    """Importing it takes a second or two and 120 MiB, which the first step need not wait for."""
    loaded = modules_after(
        f"sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        "from running import CPU, TINY, allow, config_of, training; "
        "config = config_of(*TINY); allow(config); training.build(config, CPU)"
    )
    assert "torchmetrics" not in loaded and "torch" in loaded
