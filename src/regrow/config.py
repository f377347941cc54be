"""All use of Hydra in one place: the entry point, one-line errors, and objects from a config."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import logging
import os
import re
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from regrow import flags, places, terminal
from regrow.command_line import path_of, paths_as_typed, read
from regrow.dotted import walk
from regrow.errors import UserError, did_you_mean, machine_fault, printable
from regrow.leads import RECIPES, lead
from regrow.record.redact import redact

MULTIRUN = ("-m", "--multirun")
FLAGS = (
    *(*MULTIRUN, "-h", "--help", "--hydra-help", "--version", "--resolve", "-r", "--run"),
    *("-sc", "--shell-completion"),
)
FLAGS_WITH_A_VALUE = (
    *("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name"),
    *("-cd", "--config-dir", "-i", "--info", "--experimental-rerun"),
)
HANDED_IN = frozenset({"params", "length", "optimizer", "outputs", "targets"})  # the run passes it
SET_BY_US = "REGROW_SET_HYDRA_FULL_ERROR"
log = logging.getLogger("regrow")

ROOT = Path(__file__).resolve().parents[2]
CONF = places.CONF


def entry_point(
    config_name: str, resumed: Callable[[list[str]], None] = lambda arguments: None
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], Any]]:
    """Return a decorator like `hydra.main` over `conf/`; an error prints one line and exits with 2.

    `resumed` receives the arguments that `resume=…` expands to, before anything is composed.
    """
    import hydra

    from regrow.explain import composition_error, hydras_value_error, wrong_options
    from regrow.hydras import refuse_typed
    from regrow.registered import ELSEWHERE, take_up
    from regrow.resume import expand

    arguments: dict[str, Any] = {"config_path": str(CONF), "config_name": config_name}

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], Any]:
        def main() -> None:
            let_hydra_raise()
            register_resolver("options", option_list)  # for --help
            # Hydra skips a missing search path entry and then composes a different config.
            warnings.filterwarnings("error", r"provider=hydra\.searchpath", UserWarning)
            if {"-i", "--info"} & {argument.partition("=")[0] for argument in sys.argv[1:]}:
                # With `| head`, logging would print a traceback for each remaining line.
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            try:
                find_own_modules()
                take_up()
                if (place := os.environ.pop(ELSEWHERE, None)) is not None:
                    take_up(Path(place))
                check_arguments(sys.argv[1:])
                if is_train(task):
                    refuse_typed(sys.argv[1:])
                if (wrong := wrong_options(sys.argv[1:])) is not None:
                    raise UserError(wrong)
                flags.check(sys.argv[1:])
                multirun = any(a in MULTIRUN for a in sys.argv[1:])
                given = paths_as_typed(sys.argv[1:], multirun=multirun)
                given = flags.absolute(given)
                flags.refuse_records(given)
                sys.argv[1:] = flags.absolute(expand(given))
                if is_train(task):
                    if flags.typed(given).get("name") == "find_lr":
                        raise UserError("--config-name find_lr is for scripts/find_lr.py.")
                    _started.append(task)
                if sys.argv[1:] != given:
                    resumed(sys.argv[1:])
                # Hydra 1.3 takes a version; 1.4 takes the targets that it may instantiate.
                last = version_arguments() or {"execution_whitelist": hydras_targets(sys.argv[1:])}
                hydra.main(**arguments, **last)(task)()
            except UserError as error:
                fail(str(error))
            except (hydra.errors.HydraException, OmegaConfBaseException) as error:
                fail(composition_error(error))
            except UnicodeDecodeError:
                fail(not_utf8())
            except BrokenPipeError:
                if not terminal.nobody_reads():
                    raise
                raise SystemExit(1) from None
            except OSError as error:  # Hydra creates its folder before the run does
                if (named := folder_named(sys.argv[1:], error.filename)) is None:
                    if (fault := machine_fault(error)) is None:
                        raise
                    fail(str(fault), code=1)
                fail(f"{named}: {error.filename}: {error.strerror}. Choose another folder.")
            except yaml.YAMLError as error:
                fail(not_yaml(error))
            except KeyboardInterrupt:
                raise SystemExit(130) from None
            except UserWarning as error:
                if f"provider={flags.SEARCH_PATH}" not in str(error):
                    raise
                place = str(error).partition("path=")[2].removesuffix(" is not available.")
                fail(f"{flags.SEARCH_PATH}: there is no {place}. Correct it, or leave it out.")
            except Exception as error:
                if isinstance(error, ValueError) and (said := hydras_value_error(error)):
                    fail(said)
                if (fault := machine_fault(error)) is None:
                    raise
                fail(str(fault), code=1)

        return main

    return decorate


@contextlib.contextmanager
def faults_in_a_line() -> Iterator[None]:
    """Exit with one line for a machine fault raised inside; Hydra would print more."""
    try:
        yield
    except Exception as error:
        if (fault := machine_fault(error)) is None:
            raise
        fail(str(fault), code=1)


# The task function of scripts/train.py, once this process has started it.
_started: list[Callable[..., Any]] = []


def is_train(task: Callable[..., Any]) -> bool:
    """Return True if `task` is that of scripts/train.py, the only script where -m is our sweep."""
    code = getattr(task, "__code__", None)
    return code is not None and Path(code.co_filename).resolve() == ROOT / "scripts" / "train.py"


def is_started(task: Any = None) -> bool:
    """Return True if this process runs scripts/train.py, with `task` if one is given."""
    return bool(_started) if task is None else any(task is each for each in _started)


def register_resolver(name: str, function: Callable[..., Any]) -> None:
    """Register the resolver `${name:…}`."""
    register: Any = OmegaConf.register_resolver  # older than 2.4: a legacy function of this name
    if "replace" not in inspect.signature(register).parameters:
        register = OmegaConf.register_new_resolver
    register(name, function, replace=True)


def if_chosen(group: str, option: str, then: Any, otherwise: Any) -> Any:
    """Return `then` if `group=option` was chosen; a config cannot test a choice otherwise."""
    from hydra.core.hydra_config import HydraConfig

    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return then if choices.get(group) == option else otherwise


register_resolver("if_chosen", if_chosen)


def output_dir() -> Path:
    """Return the folder that Hydra gives the job. A name with `${` in it is taken literally."""
    from hydra.core.hydra_config import HydraConfig

    runtime = OmegaConf.to_container(HydraConfig.get().runtime, resolve=False)
    assert isinstance(runtime, dict)
    return Path(str(runtime["output_dir"]))


def is_named(key: str) -> bool:
    """Return True if `key`, hydra.run.dir or hydra.sweep.dir, was set.

    The default is the current folder, so that value only counts if it was typed.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    typed = [line.lstrip("+") for line in typed_overrides(hydra.overrides.hydra)]
    place = hydra.run.dir if key == "hydra.run.dir" else hydra.sweep.dir
    return any(line.startswith(f"{key}=") for line in typed) or Path(place).resolve() != Path.cwd()


def version_arguments() -> dict[str, Any]:
    """Return the argument `version_base` for Hydra 1.3, and nothing for 1.4."""
    import hydra

    is_new = "execution_whitelist" in inspect.signature(hydra.main).parameters
    return {} if is_new else {"version_base": None}


def hydras_targets(arguments: Sequence[str]) -> list[str]:
    """Return the targets that Hydra 1.4 may instantiate itself, such as user `hydra.callbacks`.

    These are all targets in files that this command may compose, and all that were typed.
    """
    found = {flags.CHECK}
    for place in (CONF, *flags.folders(arguments)):
        for _, content in readable("**/*.yaml", place):
            found |= {*_callables(content)}
    for argument in arguments:
        key, equals, _ = argument.lstrip("+").partition("=")
        if equals and key.startswith("hydra"):
            found |= {*_callables({key.rpartition(".")[2]: read(argument)})}
    return sorted(found)


def _callables(node: Any) -> Iterator[str]:
    """Yield the dotted names in a node: targets, and classes that `logging` instantiates."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key in ("_target_", "class", "()") and isinstance(value, str):
                if re.fullmatch(r"\w+(\.\w+)+", value.removeprefix("ext://")):
                    yield value.removeprefix("ext://")
            else:
                yield from _callables(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _callables(value)


def find_own_modules() -> None:
    """Make modules in the repository's root importable, and import its `resolvers.py`.

    The root goes last on sys.path, so that it does not shadow installed modules. Raises UserError
    if `resolvers.py` cannot be imported.
    """
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    import_resolvers(ROOT)


@functools.cache
def import_resolvers(root: Path) -> None:
    """Import the `resolvers.py` in `root` once, never an installed module of that name."""
    spec = importlib.machinery.PathFinder.find_spec("resolvers", [str(root)])
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.setdefault("resolvers", module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        if before is module:
            del sys.modules["resolvers"]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == spec.origin]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 1
        raise UserError(
            f"resolvers.py:{line}: {type(error).__name__}: {_first_lines(error)}. It is imported "
            "wherever a config is composed: correct it, or remove it."
        ) from error


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise UserError for the first argument that is neither `key=value` nor a flag of Hydra's.

    Hydra's own parser would only print its usage.
    """
    before = ""
    for argument in arguments:
        word, equals, _ = argument.partition("=")
        flag = argument.startswith("-")
        known = (
            word in (*FLAGS, *FLAGS_WITH_A_VALUE)
            if flag
            else ("=" in argument[1:] or argument.startswith("~") or before in FLAGS_WITH_A_VALUE)
        )
        if not known:
            raise UserError(f"{argument}: {_not_an_argument(word, equals, argument)}")
        before = argument


def _not_an_argument(word: str, equals: str, argument: str) -> str:
    said = "arguments are key=value, without dashes or spaces, such as optimizer.lr=0.1."
    plain = word.lstrip("-").replace("-", "_")
    keys = known_keys()
    if plain in keys and not word.startswith("-"):
        return f"{said} Give {plain} a value: {plain}=…"
    if plain in keys:
        return f"{said} Write {plain}={argument.partition('=')[2] if equals else '…'}"
    hyphened = plain.replace("_", "-")
    flags_there = [f.lstrip("-") for f in (*FLAGS, *FLAGS_WITH_A_VALUE) if f.startswith("--")]
    if word.startswith("-") and (near := difflib.get_close_matches(hyphened, flags_there, n=1)):
        return f"there is no such flag. Did you mean --{near[0]}?"
    return said + (lead(plain) or did_you_mean(plain, keys))


def let_hydra_raise() -> None:
    """Make Hydra raise errors that it would otherwise print with its own hints.

    Child processes inherit both variables and can tell that the user did not ask for tracebacks.
    """
    if os.environ.get("HYDRA_FULL_ERROR") != "1":
        os.environ |= {"HYDRA_FULL_ERROR": "1", SET_BY_US: "1"}


def show_traceback(error: BaseException | None) -> None:
    """Print the traceback of `error` if the user set HYDRA_FULL_ERROR=1.

    A UserError without a cause gets none: its one line is complete.
    """
    is_asked = os.environ.get("HYDRA_FULL_ERROR") == "1" and SET_BY_US not in os.environ
    if not is_asked or error is None:
        return
    if isinstance(error, UserError) and error.__cause__ is None and error.__context__ is None:
        return
    for each in _chain(error):
        each.__suppress_context__ = False  # `from None` would hide the cause in a traceback too
    sys.stdout.flush()
    print(printable(redact("".join(traceback.format_exception(error)))), file=sys.stderr, end="")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    told: BaseException | None = error
    while told is not None and id(told) not in seen:
        seen.add(id(told))
        yield told
        told = told.__cause__ or told.__context__


def fail(message: str, code: int = 2) -> NoReturn:
    """Print `message` as one line and exit: with 2 for a user's error, 1 for a machine fault.

    The handled error's traceback comes first if the user asked for tracebacks.
    """
    show_traceback(sys.exception())
    print(f"error: {printable(one_line(message))}", file=sys.stderr)
    raise SystemExit(code)


def one_line(message: str) -> str:
    """Return the message without line breaks. Spaces stay: a path in a command may hold them."""
    return re.sub(r"\s*[\r\n]\s*", " ", message.strip())


def folder_named(arguments: Sequence[str], refused: Any) -> str | None:
    """Return the argument that names `refused`, or a folder in it, for a run or a sweep."""
    for argument in arguments if isinstance(refused, str) else ():
        key, _, value = argument.partition("=")
        names_one = key in ("hydra.run.dir", "hydra.sweep.dir")
        value = path_of(key, value) if names_one else value
        if names_one and Path(value).absolute().is_relative_to(Path(refused).absolute()):
            return argument
    return None


def not_utf8() -> str:
    """Return one line that names the file on the search path that is not UTF-8."""
    for path in (path for place in places.folders() for path in sorted(place.rglob("*.yaml"))):
        try:
            path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            line = path.read_bytes()[: error.start].count(b"\n") + 1
            shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
            return f"{shown}:{line} is not UTF-8. Save the file as UTF-8."
    return "a file of the config is not UTF-8. Save it as UTF-8."


def not_yaml(error: yaml.YAMLError) -> str:
    """Return one line that names the file that is not YAML, the line in it and the problem."""
    mark, said = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or said is None:
        return f"a file of the config is not YAML: {error}"
    path = Path(mark.name)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return f"{shown}:{mark.line + 1} is not YAML: {said}. Correct that line, or the one before it."


def option_list() -> str:
    """Return a line of options for each config group, without files that begin with `_`."""
    return "\n".join(
        f"{group}: {', '.join(options)}"
        for group in sorted(places.groups())
        if (options := places.options(group))
    )


def known_keys() -> dict[str, list[str]]:
    """Return all dotted keys on the search path, each with the options that have it.

    A top-level key has no options.
    """
    keys: dict[str, list[str]] = {group: [] for group in places.groups()}
    for _, node in readable("*.yaml"):
        content = {key: value for key, value in node.items() if key != "hydra"}
        keys |= {key: [] for key in _keys(content)}
    primary = flags.typed(sys.argv[1:]).get("name", "train")
    keys |= {key: [] for key in places.own_keys(primary, {}) if key not in keys}
    for path in (path for folder in places.folders() for path in sorted(folder.glob("*/*.yaml"))):
        group = path.parent.name
        if group not in RECIPES:  # a recipe holds keys of other groups
            content = places.read(path)
            for key in _keys(content, f"{group}."):
                keys[key] = [*keys.get(key, []), path.stem]
    return keys


def readable(pattern: str, place: Path = CONF) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the files in `place` that match, each with its mapping.

    Skips unreadable files: a command that does not compose them must not fail, and Hydra names
    those that it does compose.
    """
    for path in sorted(place.glob(pattern)):
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
            content = read_yaml(path)
            if isinstance(content, dict):
                yield path, content


def broken_files() -> list[str]:
    """Return the files in conf/ that are not valid YAML, each with the line."""
    found = []
    for path in sorted(CONF.rglob("*.yaml")):
        try:
            read_yaml(path)
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark is not None else ""
            found.append(f"{path.relative_to(ROOT)}{line}")
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as file:
        return yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}


def typed_overrides(node: Any) -> list[str]:
    """Return a node of Hydra's overrides as typed, with interpolations unresolved."""
    overrides = OmegaConf.to_container(node, resolve=False)
    assert isinstance(overrides, list)
    return [str(override) for override in overrides]


def recorded_config(folder: Path, where: str) -> dict[str, Any]:
    """Return the config of the run in `folder`, which `where` names as the user did.

    If config.yaml is damaged, uses Hydra's own copy and logs a warning. Raises UserError if that is
    damaged as well.
    """
    try:
        return _whole(read_yaml(folder / "config.yaml"))
    except Exception as error:  # the YAML reader raises a dozen different kinds
        reason = " ".join(str(error).split())[:200]
    copy = folder / ".hydra" / "config.yaml"
    try:
        text = copy.read_text(encoding="utf-8")
        its = read_yaml(copy.with_name("hydra.yaml"))
        choices = its.get("hydra", its)["runtime"]["choices"]
        choice = r"\$\{hydra:runtime\.choices\.(\w+)\}"
        text = re.sub(choice, lambda found: json.dumps(str(choices[found[1]])), text)
        # The folder may be untrusted: resolve only references to the config's own keys.
        if "${" in re.sub(r"\$\{(if_chosen:|oc\.select:)?[\w.,]*\}", "", text):
            raise ValueError("it refers to more than its own keys")
        config = _whole(OmegaConf.to_container(OmegaConf.create(text), resolve=True))
    except Exception:
        raise UserError(
            f"{where}: its config.yaml cannot be read: {reason}, and neither can its copy in "
            f".hydra. Its weights can start a new run: {shlex.quote(f'init_from={folder}')}"
        ) from None
    log.warning("%s: its config.yaml is damaged (%s). Its copy in .hydra is used.", where, reason)
    return config


def _whole(config: Any) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise ValueError(f"it holds a {type(config).__name__}")
    for group in ("data", "model", "task", "loss", "trainer"):
        if not isinstance(config.get(group), dict):
            raise ValueError(f"it has no node {group}. Is it a run's?")
    return config


def plain(config: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    """Return the config as plain dicts, lists and values."""
    container = OmegaConf.to_container(config, resolve=resolve, throw_on_missing=resolve)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


# The keys that Hydra itself reads in a node. None of them can bypass the check of targets.
HYDRAS_OWN = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
# Targets that this process may instantiate in addition to those in conf/: see `allow`.
_allowed: set[str] = set()


def allow(*nodes: Any) -> None:
    """Allow `instantiate` to use the targets in these nodes.

    The config must be composed from the user's command line, or a recorded one that has passed
    `roles.check_roles`.
    """
    _allowed.update(
        target for node in nodes for _, target in targets_in(node) if isinstance(target, str)
    )


def is_allowed(target: Any) -> bool:
    return isinstance(target, str) and (target in _allowed or target in shipped_targets())


@functools.cache
def shipped_targets() -> frozenset[str]:
    """Return all targets that the files in conf/ name."""
    nodes = [node for _, node in readable("**/*.yaml")]
    return frozenset(t for node in nodes for _, t in targets_in(node) if isinstance(t, str))


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
        if not is_allowed(target):
            where = f"{path}._target_={target}" if path else f"_target_={target}"
            broken = broken_files()
            also = f" These cannot be read: {', '.join(broken)}." if broken else ""
            raise UserError(
                f"{where} is named neither in conf/ nor on this command line. It is not made. If "
                f"it is yours, add such a file.{also}"
            )


def instantiate(node: Mapping[str, Any], **arguments: Any) -> Any:
    """Return the object that a node describes; `arguments` are those that only the run knows.

    Raises UserError for a target that is not allowed, cannot be imported or rejects its arguments.
    """
    from hydra import utils
    from hydra.errors import InstantiationException

    refuse_unknown_targets(node)
    try:
        if hasattr(utils, "UNSAFE_DISABLE_EXECUTION_CHECKS"):  # Hydra 1.4 checks targets too
            return _made(node, arguments)
        if not arguments:
            return utils.instantiate(dict(node), _convert_="all")
        # Call it here: Hydra would convert dataclass arguments to configs.
        return utils.instantiate({**node, "_partial_": True}, _convert_="all")(**arguments)
    except (InstantiationException, TypeError) as error:
        # Hydra 1.4 does not wrap a TypeError. Handle only one from the call itself.
        called = rf"(__init__|\b{re.escape(str(node['_target_']).rpartition('.')[2])})\(\)"
        if isinstance(error, TypeError) and not re.search(rf"{called} (got|missing) ", str(error)):
            raise
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from None
        said = said_by(error)
        if unknown := re.search(r"Error locating target '([^']+)'[^(]*$", said):
            # Raises an error that says whether the module or the name in it is missing.
            locate(unknown[1], "")
        if "missing" in said and "required" in said:
            said += " " + _way_out(said, node)
        raise UserError(f"_target_={node['_target_']}: {said}") from error


def _made(node: Mapping[str, Any], arguments: Mapping[str, Any]) -> Any:
    """Return the object that a node describes; Hydra 1.4 instantiates inner nodes by a whitelist.

    The outermost target is called here. Hydra would reject a function or a module that it returns,
    such as a schedule, unless the whitelist named the module that defines it.
    """
    from hydra import utils
    from hydra.errors import InstantiationException

    allowed = {target for _, target in targets_in(node) if is_allowed(target)}
    whitelist = sorted(allowed | {*map(_canonical, allowed)})

    def inner(value: Any) -> Any:
        if node.get("_recursive_", True) is False:
            return value
        return utils.instantiate(value, _convert_="all", _execution_whitelist_=whitelist)

    if "_target_" not in node:  # a custom task may bring its own loss
        return inner(dict(node))
    target = locate(str(node["_target_"]), "")
    given = inner({key: value for key, value in node.items() if key not in HYDRAS_OWN})
    positional = inner(list(node.get("_args_", ())))
    if node.get("_partial_") and not arguments:
        return functools.partial(target, *positional, **given)
    if arguments:
        return target(*positional, **given, **arguments)
    try:
        return target(*positional, **given)
    except Exception as error:  # as Hydra 1.3 raises it
        if isinstance(error, UserError) or machine_fault(error) is not None:
            raise
        raise InstantiationException(
            f"Error in call to target '{node['_target_']}': {error!r}"
        ) from error


def _canonical(target: str) -> str:
    """Return the name under which a target was defined, which Hydra compares after importing it."""
    try:
        found = locate(target, "")
        return f"{found.__module__}.{found.__qualname__}"
    except (UserError, AttributeError):
        return target  # instantiating it reports the error


def _way_out(said: str, node: Mapping[str, Any]) -> str:
    """Return the advice for a target that lacks arguments."""
    by_position = re.search(r"missing \d+ required positional", said) is not None
    if not node.get("_partial_") and (by_position or HANDED_IN & {*re.findall(r"'(\w+)'", said)}):
        return (
            "If the run hands that in, as it does for an optimizer, a scheduler and a loss "
            "function, add _partial_: true to the node; else give what is missing."
        )
    return (
        "Give what is missing. A recorded run that lacks it was made by other code: the commit is "
        "in its manifest.json."
    )


def locate(target: str, path: str) -> Any:
    """Return the object that the dotted name `target` at `path` refers to. Raises UserError."""
    where = f"{path}._target_={target}" if path else f"_target_={target}"
    module, _, name = target.rpartition(".")
    while module:
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module == error.name or module.startswith(error.name)):
                raise UserError(f"{where}: {error}.") from error
            module, _, first = module.rpartition(".")
            name = f"{first}.{name}"
            continue
        except Exception as error:
            said = str(error)
            if isinstance(error, SyntaxError):
                said = f"{type(error).__name__} ({error.msg}, {error.filename}:{error.lineno})"
            raise UserError(f"{where}: importing {module}: {said}.") from error
        for part in name.split("."):
            if not hasattr(found, part):
                hint = did_you_mean(part, dir(found))
                raise UserError(f"{where}: there is no {part}.{hint}")
            found = getattr(found, part)
        return found
    raise UserError(f"{where}: there is no such module. Is it installed?")


def said_by(error: BaseException) -> str:
    """Return an error of `instantiate` in one line, with the user code's exception and its line."""
    said = _first_lines(error)
    said = said.replace(", set env var HYDRA_FULL_ERROR=1 to see chained exception.", "")
    cause = error.__cause__ or error.__context__
    while cause is not None:
        frames = traceback.extract_tb(cause.__traceback__)
        if isinstance(cause, SyntaxError) and cause.filename:
            return f"{said} ({cause.msg}, {cause.filename}:{cause.lineno})"
        if frames and not _is_of_hydra(frames[-1].filename):
            what = f"{type(cause).__name__}: {_first_lines(cause)}"
            return f"{said} ({what}, {frames[-1].filename}:{frames[-1].lineno})"
        cause = cause.__cause__ or cause.__context__
    return said


def _is_of_hydra(file: str) -> bool:
    """Return True if a frame's file is part of Hydra or of Python's import system.

    Compares folders, not names: user code may lie in a folder named hydra.
    """
    import hydra

    places = (Path(hydra.__file__).parent, Path(importlib.__file__).parent)
    return file.startswith("<frozen importlib") or any(map(Path(file).is_relative_to, places))


def _first_lines(error: BaseException) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _keys(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    left_out = {"defaults", "_target_", "_partial_"}
    return [key for key, _ in walk(node, prefix) if left_out.isdisjoint(key.split("."))]
