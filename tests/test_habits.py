"""Habits of the code, read from its source: who sets what a whole process shares, and errors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHANGES = ("update", "setdefault", "pop", "popitem", "clear")
LOCAL = ("set_rng_state", "set_stance")  # of a generator, and a context manager
# Who else may set it, and why `processes/begin.py` cannot.
ELSEWHERE = {
    "regrow/runs/machine.py:set_numerics": "depends on the config, and is the only such function",
    "regrow/runs/worker.py:run_part": "the rank's GPU is known once it has the job",
    "regrow/record/loggers.py:_wandb_environment": "wandb reads its mode from the environment only",
    "regrow/record/mlflow_logger.py:_limited": "MLflow reads its limits from the environment only",
    "regrow/numerics/capture.py:_recover": "restores the stream after a failed recording",
    "regrow/processes/signals.py:handled": "restores the earlier handlers",
    "regrow/processes/slurm.py:__call__": "replaces submitit's handlers, set just before",
    "regrow/checkpoint/writer.py:_one_thread": "restores the earlier number",
    "scripts/set_up.py:": "runs before anything is installed",
}


def text_of(node: ast.AST) -> str:
    return ast.unparse(node)


def sets_it(node: ast.AST) -> bool:
    """Return True if a node changes the environment, warnings, signal handlers or torch."""
    if isinstance(node, ast.Call):
        called, _, last = text_of(node.func).rpartition(".")
        return (
            (called == "os.environ" and last in CHANGES)
            or (called == "os" and last in ("putenv", "unsetenv"))
            or (called == "warnings" and last in ("filterwarnings", "simplefilter"))
            or (called == "signal" and last == "signal")
            or (called == "torch" and last == "use_deterministic_algorithms")
            or (called.startswith("torch") and last.startswith("set_") and last not in LOCAL)
        )
    if isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
        targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
        return any(text_of(t).startswith(("os.environ", "torch.backends")) for t in targets)
    return False


def restores(node: ast.AST) -> bool:
    return isinstance(node, ast.With) and "catch_warnings" in text_of(node.items[0].context_expr)


def setters(node: ast.AST, function: str = "") -> Iterator[str]:
    """Yield the name of each function that changes what its process shares."""
    for child in ast.iter_child_nodes(node):
        inner = child.name if isinstance(child, ast.FunctionDef) else function
        if sets_it(child):
            yield inner
        if not restores(child):
            yield from setters(child, inner)


def sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in (ROOT / "src", ROOT):
        for path in sorted((folder if folder.name == "src" else folder / "scripts").rglob("*.py")):
            yield str(path.relative_to(folder)), ast.parse(path.read_text(encoding="utf-8"))


def test_one_function_for_each_kind_of_process_sets_what_the_process_shares() -> None:
    found = {f"{name}:{function}" for name, tree in sources() for function in setters(tree)}
    begun = {place for place in found if place.startswith("regrow/processes/begin.py:")}
    kinds = {place.partition(":")[2] for place in begun}
    assert kinds >= {"main", "rank", "child", "data_worker", "sweep", "server", "job"}
    assert found - begun == {*ELSEWHERE}


def test_a_setter_is_found() -> None:
    """The negative control."""
    for line in (
        *(
            "os.environ['A'] = '1'",
            "os.environ |= {}",
            "del os.environ['A']",
            "os.putenv('A', '1')",
        ),
        *("os.environ.pop('A')", "warnings.simplefilter('ignore')", "torch.set_num_threads(1)"),
        *("torch.backends.cudnn.benchmark = True", "signal.signal(2, print)"),
    ):
        assert [*setters(ast.parse(f"def f():\n    if x:\n        {line}"))] == ["f"], line
    for line in ("os.environ.get('A')", "os.environ['A']", "torch.get_num_threads()"):
        assert [*setters(ast.parse(line))] == [], line
    within = "def f():\n    with warnings.catch_warnings():\n        warnings.simplefilter('x')"
    assert [*setters(ast.parse(within))] == []


def marks(tree: ast.AST) -> Iterator[str]:
    """Yield code that writes an attribute to an exception, or looks for one by its name."""
    for scope in ast.walk(tree):
        names = set()
        if isinstance(scope, ast.ExceptHandler) and scope.name:
            names = {scope.name}
        elif isinstance(scope, ast.FunctionDef):
            given = [a for a in scope.args.args if a.annotation is not None]
            kinds = ("Exception", "Error", "Fault")
            names = {a.arg for a in given if any(k in text_of(a.annotation or a) for k in kinds)}
        for node in ast.walk(scope) if names else ():
            owner = None
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                owner = node.value
            elif isinstance(node, ast.Call) and text_of(node.func) in ("hasattr", "getattr"):
                owner = node.args[0]
            if owner is not None and text_of(owner) in names:
                yield text_of(node)


def test_no_exception_carries_an_attribute_that_other_code_looks_for() -> None:
    assert [(name, code) for name, tree in sources() for code in marks(tree)] == []


def test_a_marked_exception_is_found() -> None:
    """The negative control."""
    assert [*marks(ast.parse("def f(error: ValueError):\n    error.step = 1"))] == ["error.step"]
    handler = "try:\n    f()\nexcept OSError as e:\n    g(getattr(e, 'step', 0), e.errno)"
    assert [*marks(ast.parse(handler))] == ["getattr(e, 'step', 0)"]
