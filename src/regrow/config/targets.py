"""Which targets a config may name, and the objects that its nodes describe."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import re
import traceback
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from regrow.config.own_code import own_place, owner_of, places_of, shown
from regrow.config.yaml_files import broken_files, readable
from regrow.dotted import Config
from regrow.errors import UserError, brief, chain, did_you_mean, machine_fault
from regrow.project import ROOT
from regrow.record import moved
from regrow.record.redact import redact

SHOWS_ALL = "HYDRA_FULL_ERROR=1 shows the whole traceback."
HANDED_IN = frozenset({"params", "length", "optimizer", "outputs", "targets"})  # the run passes it
HANDED_TO = {"task": ("loss",), "step": ("state", "batch", "plan")}  # likewise, by node
# The keys that Hydra itself reads in a node. None of them can bypass the check of targets.
HYDRAS_OWN = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
# Targets that this process may instantiate in addition to those in conf/: see `allow`.
_allowed: set[str] = set()
_paths: dict[str, set[str]] = {}  # where the allowed configs name a target
_typed: list[str] = []  # the overrides of this process's job


def allow(*nodes: Any) -> None:
    """Allow `instantiate` to use the targets in these nodes.

    The config must be composed from the user's command line, or a recorded one that has passed
    `roles.check_roles`.
    """
    for path, target in (found for node in nodes for found in targets_in(node)):
        if isinstance(target, str):
            _allowed.add(target)
            _paths.setdefault(target, set()).add(path)


def note_typed(overrides: Iterable[str]) -> None:
    """Note the overrides of the job, for errors of what a config describes."""
    _typed[:] = overrides


def typed_below(path: str, error: BaseException) -> str:
    """Return the typed values of a node's keys, of which `error` names none; "" for none."""
    typed = (line.lstrip("+") for line in _typed)
    found = [line for line in typed if line.startswith(f"{path}.") and "._target_=" not in line]
    keys = [line.partition("=")[0].rpartition(".")[2] for line in found]
    is_said = any(re.search(rf"\b{re.escape(key)}\b", str(error)) for key in keys)
    return "" if is_said else redact(", ".join(found))


def is_allowed(target: Any) -> bool:
    return isinstance(target, str) and (target in _allowed or target in shipped_targets())


@functools.cache
def shipped_targets() -> frozenset[str]:
    """Return all targets that the files in conf/ name."""
    nodes = [node for _, node in readable("**/*.yaml")]
    return frozenset(t for node in nodes for _, t in targets_in(node) if isinstance(t, str))


def named_packages() -> frozenset[str]:
    """Return the packages that targets of the config name, beyond those in conf/."""
    shipped = {target.partition(".")[0] for target in shipped_targets()}
    return frozenset({target.partition(".")[0] for target in _allowed} - shipped - {"torch"})


def targets_in(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, target) of `node` and all nodes below it."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node["_target_"]
        for key, value in node.items():
            yield from targets_in(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from targets_in(value, f"{path}.{index}" if path else str(index))


def refuse_unknown_targets(node: Any) -> None:
    """Raise UserError for a target, at any depth, that is not allowed."""
    for path, target in targets_in(node):
        _refuse_unknown(target, path)


def _refuse_unknown(target: Any, path: str) -> None:
    if not is_allowed(target):
        where = f"{path}._target_={target}" if path else f"_target_={target}"
        broken = broken_files()
        also = f" These cannot be read: {', '.join(broken)}." if broken else ""
        raise UserError(
            f"{where} is named neither in conf/ nor on this command line. It is not instantiated. "
            f"If it is yours, add such a file.{also}"
        )


def instantiate(node: Mapping[str, Config], **arguments: Any) -> Any:
    """Return the object that a node describes; `arguments` are those that only the run knows.

    Raises UserError for a target that is not allowed, cannot be imported or rejects its arguments.
    """
    refuse_unknown_targets(node)
    try:
        return _made(node, arguments)
    except _Raised as raised:
        if mistake := next((each for each in chain(raised) if isinstance(each, UserError)), None):
            raise mistake from None
        raise UserError(raised.in_words(node)) from raised.__cause__
    except TypeError as error:
        named = str(node["_target_"])
        called = rf"(__init__|\b{re.escape(named.rpartition('.')[2])})\(\)"
        if not re.search(rf"{called} (got|missing) ", str(error)):  # not from the call itself
            raise
        if refused := refused_argument(error, named):
            raise UserError(refused) from error
        said = brief(error)
        if "missing" in said and "required" in said:
            said += " " + _way_out(said, node, ())
        raise UserError(f"{_where(named)}: {said}") from error


class _Raised(Exception):
    """A target raised an error when it was called. The error is the cause."""

    def __init__(self, target: str, given: Mapping[str, Any]) -> None:
        super().__init__(target)
        self.target, self.given = target, given

    def in_words(self, node: Mapping[str, Any]) -> str:
        """Return the error in one line, with the key that names the target, and the place."""
        error = self.__cause__
        assert error is not None
        known = _paths.get(self.target, set()) - {""}
        said = f"{type(error).__name__}: {brief(error)}"
        place = place_in(error) or _place_of_ours(error)
        if not place and (refused := refused_argument(error, self.target)):
            return refused
        if isinstance(error, SyntaxError) and error.filename:
            said, place = f"SyntaxError: {error.msg}", f"{shown(error.filename)}:{error.lineno}"
        if "missing" in said and "required" in said:
            said += ". " + _way_out(said, node, known)
        if place:
            used = self._used_in(error)
            if not used and len(known) == 1 and (typed := typed_below(next(iter(known)), error)):
                used = f" ({typed})"
            said = f"{said.rstrip('.')}{used}. {SHOWS_ALL}"
        if len(known) == 1:
            return f"{next(iter(known))} ({self.target}{', ' * bool(place)}{place}): {said}"
        return f"_target_={self.target}{f' ({place})' * bool(place)}: {said}"

    def _used_in(self, error: BaseException) -> str:
        """Return the argument that the failed line of the user's code uses, if it is one alone."""
        place = own_place(error, named_packages())
        words = {*re.findall(r"\w+", place.text if place is not None else "")}
        used = [key for key in self.given if key in words]
        if len(used) != 1 or re.search(rf"\b{used[0]}\b", str(error)):
            return ""
        value = self.given[used[0]]
        is_plain = value is None or isinstance(value, str | int | float | list)
        return f" ({used[0]}={value})" if is_plain and str(value) not in str(error) else ""


def refused_argument(error: BaseException, target: str) -> str | None:
    """Return in one line which argument a target does not take; None for any other error.

    `error` was raised by the call of the target, not inside it.
    """
    foreign = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if not isinstance(error, TypeError) or foreign is None:
        return None
    known, hint = _paths.get(target, set()) - {""}, ""
    if (parameters := parameters_of(target, "")) is not None:
        names = [name for name in parameters if name != "self" and name not in HANDED_IN]
        hint = did_you_mean(foreign[1], names) or f" It takes {', '.join(names)}."
    key = f"{next(iter(known))}.{foreign[1]}" if len(known) == 1 else foreign[1]
    return f"{key}: {target} takes no such argument.{hint}"


def call_failed(node: str, made: Any, error: BaseException) -> str:
    """Return in one line an error of the call of what `instantiate` made of a partial node.

    `node` is the node's key, or that of the mapping that holds it by name.
    """
    name = getattr(getattr(made, "func", made), "__name__", "")
    found = [
        (path, target)
        for target, paths in _paths.items()
        for path in paths
        if f"{path}.".startswith(f"{node}.") and target.rpartition(".")[2] == name
    ]
    path, target = found[0] if len(found) == 1 else (node, "")
    place = place_in(error)
    if target and not place and (refused := refused_argument(error, target)):
        return refused
    named = ", ".join(filter(None, (target, place)))
    return f"{path}{f' ({named})' * bool(named)}: {brief(error).rstrip('.')}."


def _where(target: str, path: str = "") -> str:
    """Return `path._target_=target`, with the path in the whole config if it is the only one."""
    known = [
        each
        for each in _paths.get(target, ())
        if each and (not path or each == path or each.endswith(f".{path}"))
    ]
    path = known[0] if len(known) == 1 else path
    return f"{path}._target_={target}" if path else f"_target_={target}"


def place_in(error: BaseException) -> str:
    """Return the innermost line of the user's code in an error's traceback, as file:line, or ""."""
    own = own_place(error, named_packages())
    return "" if own is None else str(own)


def _place_of_ours(error: BaseException) -> str:
    """Return the engine's line that raised an error of a target's, or "" if a library did."""
    place = next(places_of(error), None)
    if place is None or place.file == __file__ or owner_of(place.file) != "engine":
        return ""
    return str(place)


def _made(node: Mapping[str, Any], arguments: Mapping[str, Any], path: str = "") -> Any:
    """Return the object that a node describes, its inner nodes first, as `hydra.utils` makes it.

    `hydra.utils.instantiate` itself would convert dataclass arguments to configs, and check the
    target of its own partial at each call, which costs 0.2 ms of each step. Hydra 1.4 also checks
    what a target returns: it would reject a function or an object of another class, such as a
    schedule or the metric that `torchmetrics.CohenKappa(...)` chooses.
    """

    def inner(value: Any, key: object) -> Any:
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            if "_target_" in value:
                return _made(value, {}, where)
            return {name: inner(each, f"{key}.{name}") for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [inner(each, f"{key}.{i}") for i, each in enumerate(value)]
        return value

    if "_target_" not in node:  # a custom task may bring its own loss
        return {key: inner(value, key) for key, value in node.items()}
    _refuse_unknown(node["_target_"], path)  # again, at the place where it would be called
    target = locate(str(node["_target_"]), path)
    where = f"{path}." if path else ""
    if not callable(target):
        kind = type(target).__name__
        raise UserError(f"{where}_target_={node['_target_']}: a {kind} cannot be called.")
    given = {key: value for key, value in node.items() if key not in HYDRAS_OWN}
    positional = node.get("_args_") or []
    if not isinstance(positional, list | tuple):
        raise UserError(f"{where}_args_={positional} must be a list.")
    if node.get("_recursive_", True) is False:
        positional, given = copy.deepcopy((positional, given))  # the target may change them
    else:
        given = {key: inner(value, key) for key, value in given.items()}
        positional = inner(positional, "_args_")
    if node.get("_partial_") and not arguments:
        return functools.partial(target, *positional, **given)
    try:
        with _without_note(target):
            return target(*positional, **{**given, **arguments})
    except Exception as error:
        if isinstance(error, UserError) or machine_fault(error) is not None:
            raise
        # The caller explains an error of torch's that depends on what it handed in.
        if arguments and own_place(error, named_packages()) is None:
            raise
        raise _Raised(str(node["_target_"]), given) from error


@contextlib.contextmanager
def _without_note(target: Any) -> Iterator[None]:
    """Drop torchmetrics' note that a metric, such as a rank correlation, keeps all rows.

    Each command that builds the run's task would print it again, with a line of torchmetrics.
    """
    if not str(getattr(target, "__module__", "")).startswith("torchmetrics."):
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric .* will save all .* in the buffer", UserWarning)
        yield


def _way_out(said: str, node: Mapping[str, Any], paths: Collection[str]) -> str:
    """Return the advice for a target that lacks arguments; `paths` are the keys that name it."""
    by_position = re.search(r"missing \d+ required positional", said) is not None
    if (
        {*paths} != {"model"}
        and not node.get("_partial_")
        and (by_position or HANDED_IN & {*re.findall(r"'(\w+)'", said)})
    ):
        return (
            "If the run hands that in, as it does for an optimizer, a scheduler and a loss "
            "function, add _partial_: true to the node; else give what is missing."
        )
    where = " in the model's file in conf/model" if {*paths} == {"model"} else ""
    return (
        f"Give what is missing{where}. If this is a recorded run's config, it was made by other "
        "code: the commit is in its manifest.json."
    )


def locate(target: str, path: str) -> Any:
    """Return the object that the dotted name `target` at `path` refers to. Raises UserError."""
    where = _where(target, path)
    if target in moved.GONE:
        raise UserError(f"{where}: version 0.1.0 had it, and nothing replaces it. Use another.")
    if (new := moved.in_text(target)) != target:
        raise UserError(f"{where}: it has moved. Write _target_: {new}")
    module, _, name = target.rpartition(".")
    while module:
        try:
            found: Any = importlib.import_module(module)
        except (Exception, SystemExit) as error:
            if not _is_missing(module, error):
                raise UserError(f"{where}: {_failed_import(module, error)}") from error
            module, _, first = module.rpartition(".")
            name = f"{first}.{name}"
            continue
        for part in name.split("."):
            if not hasattr(found, part):
                hint = did_you_mean(part, dir(found))
                raise UserError(f"{where}: there is no {part}.{hint}")
            found = getattr(found, part)
        return found
    raise UserError(
        f"{where}: there is no such module. Is it installed? A module of your own belongs in "
        f"{ROOT}."
    )


def parameters_of(target: str, path: str) -> Mapping[str, inspect.Parameter] | None:
    """Return a target's parameters by name; None for a builtin without a signature.

    Imports the target's module. Raises UserError if there is no such target.
    """
    function = locate(target, path)
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def _is_missing(module: str, error: BaseException) -> bool:
    """Return True if the module itself, or a package that it belongs to, is what is missing."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    return missing is not None and f"{module}.".startswith(f"{missing}.")


def _failed_import(module: str, error: BaseException) -> str:
    """Return in one line why a module cannot be imported, at which line, and what to do."""
    said = f"{type(error).__name__}: {brief(error)}"
    own = place_in(error)
    place, fix = own or _place_of_a_library(error), "Correct that line."
    if isinstance(error, SyntaxError) and error.filename:
        said = f"{type(error).__name__}: {error.msg}"
        place = f"{shown(error.filename)}:{error.lineno}"
    elif isinstance(error, ModuleNotFoundError) and error.name:
        fix = f"Install {error.name.partition('.')[0]}, or correct that line."
    elif isinstance(error, SystemExit):
        fix = 'Put what only a script does under if __name__ == "__main__".'
    elif not own:
        fix = f"Reinstall {module.partition('.')[0]}, or use another _target_."
    where = f" at {place}" if place else ""
    return f"importing {module} failed{where}: {said.rstrip('.')}. {fix} {SHOWS_ALL}"


def _place_of_a_library(error: BaseException) -> str:
    """Return the innermost line that Python's import system called, as file:line, or ""."""
    imports = Path(importlib.__file__).parent
    for place in places_of(error):
        if not (place.file.startswith("<") or Path(place.file).is_relative_to(imports)):
            return "" if place.file == __file__ else str(place)
    return ""


def said_by(error: BaseException) -> str:
    """Return an error of Hydra's about a target in one line, with the cause and its line."""
    said = brief(error)
    said = said.replace(", set env var HYDRA_FULL_ERROR=1 to see chained exception.", "")
    for cause in [*chain(error)][1:]:
        frames = traceback.extract_tb(cause.__traceback__)
        if isinstance(cause, SyntaxError) and cause.filename:
            return f"{said} ({cause.msg}, {cause.filename}:{cause.lineno})"
        if frames and not _is_of_hydra(frames[-1].filename):
            what = f"{type(cause).__name__}: {brief(cause)}"
            return f"{said} ({what}, {frames[-1].filename}:{frames[-1].lineno})"
    return said


def _is_of_hydra(file: str) -> bool:
    """Return True if a frame's file is part of Hydra or of Python's import system.

    Compares folders, not names: user code may lie in a folder named hydra.
    """
    import hydra

    places = (Path(hydra.__file__).parent, Path(importlib.__file__).parent)
    return file.startswith("<frozen importlib") or any(map(Path(file).is_relative_to, places))
