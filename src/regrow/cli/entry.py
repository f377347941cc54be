"""Hydra's entry point over `conf/`, whose errors are one line."""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from regrow.cli import help
from regrow.config import flags, places
from regrow.config.command_line import path_of, paths_as_typed, read
from regrow.config.flags import MULTIRUN
from regrow.config.hydra_access import version_arguments
from regrow.config.keys import known_keys
from regrow.config.leads import lead
from regrow.config.own_code import shown
from regrow.config.own_modules import import_own_modules
from regrow.config.started import CHECK, check_only, is_check, is_train, note_start
from regrow.config.yaml_files import readable
from regrow.errors import UserError, did_you_mean
from regrow.failing import fail, in_one_line
from regrow.processes import begin, terminal
from regrow.project import CONF

FLAGS = (
    *(*MULTIRUN, "-h", "--help", "--hydra-help", "--version", "--resolve", "-r", "--run"),
    *("-sc", "--shell-completion"),
)
FLAGS_WITH_A_VALUE = (*filter(None, flags.WITH_A_VALUE), *flags.WITH_A_VALUE.values())


def entry_point(
    config_name: str, resumed: Callable[[list[str]], None] = lambda arguments: None
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], Any]]:
    """Return a decorator like `hydra.main` over `conf/`; an error prints one line and exits with 2.

    `resumed` receives the arguments that `resume=…` expands to, before anything is composed.
    """
    import hydra

    from regrow.config.explain import wrong_options
    from regrow.config.hydras import refuse_typed
    from regrow.config.registered import ELSEWHERE, take_up
    from regrow.config.resume import expand

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], Any]:
        @begin.ending()
        @in_one_line()
        @_explained()
        def main() -> None:
            topics: list[str] = []
            if asked := help.is_asked(sys.argv[1:]):
                topics, sys.argv[1:] = help.split(sys.argv[1:])
            if is_train(task):
                sys.argv[1:] = check_only(sys.argv[1:])
            import_own_modules()
            take_up()
            if ELSEWHERE in begin.handed:
                take_up(Path(begin.handed[ELSEWHERE]))
            check_arguments(sys.argv[1:])
            if is_train(task):
                refuse_typed(sys.argv[1:])
            if (wrong := wrong_options(sys.argv[1:])) is not None:
                raise UserError(wrong)
            flags.check(sys.argv[1:])
            if asked:
                given = flags.absolute(paths_as_typed(sys.argv[1:], multirun=False))
                if help.show(config_name, topics, given):
                    return
                sys.argv.insert(1, "--help")
            multirun = any(a in MULTIRUN for a in sys.argv[1:])
            given = flags.absolute(paths_as_typed(sys.argv[1:], multirun=multirun))
            flags.refuse_records(given)
            sys.argv[1:] = flags.absolute(expand(given))
            if is_train(task):
                if flags.typed(given).get("name") == "find_lr":
                    raise UserError("--config-name find_lr is for scripts/find_lr.py.")
                note_start(task)
            if is_check() and any(a in MULTIRUN for a in sys.argv[1:]):
                raise UserError(
                    "--check looks at one config: leave out -m, and give each key one value."
                )
            if sys.argv[1:] != given:
                resumed(sys.argv[1:])
            # Hydra 1.3 takes a version; 1.4 takes the targets that it may instantiate.
            last = version_arguments() or {"execution_whitelist": hydras_targets(sys.argv[1:])}
            hydra.main(config_path=str(CONF), config_name=config_name, **last)(task)()

        return main

    return decorate


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Exit with one line for an error of composing a config, or of creating its folder."""
    from hydra.errors import HydraException

    from regrow.config.explain import composition_error, hydras_value_error

    try:
        yield
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        fail(composition_error(error))
    except UnicodeDecodeError:
        fail(not_utf8())
    except BrokenPipeError:
        if not terminal.drop_unread():
            raise
        raise SystemExit(1) from None
    except OSError as error:  # Hydra creates its folder before the run does
        if (named := folder_named(sys.argv[1:], error.filename)) is None:
            raise
        fail(f"{named}: {error.filename}: {error.strerror}. Choose another folder.")
    except yaml.YAMLError as error:
        fail(not_yaml(error))
    except UserWarning as error:
        if f"provider={flags.SEARCH_PATH}" not in str(error):
            raise
        place = str(error).partition("path=")[2].removesuffix(" is not available.")
        fail(f"{flags.SEARCH_PATH}: there is no {place}. Correct it, or leave it out.")
    except ValueError as error:
        if (said := hydras_value_error(error)) is None:
            raise
        fail(said)


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
    if word == CHECK:
        return "it is for scripts/train.py, and takes no value."
    hyphened = plain.replace("_", "-")
    flags_there = [f.lstrip("-") for f in (*FLAGS, *FLAGS_WITH_A_VALUE) if f.startswith("--")]
    if word.startswith("-") and (near := difflib.get_close_matches(hyphened, flags_there, n=1)):
        return f"there is no such flag. Did you mean --{near[0]}?"
    return said + (lead(plain) or did_you_mean(plain, keys))


def folder_named(arguments: Sequence[str], refused: Any) -> str | None:
    """Return the argument that names `refused`, or a folder in it, for a run or a sweep."""
    named = [a for a in arguments if a.startswith(("hydra.run.dir=", "hydra.sweep.dir="))]
    for argument in named if isinstance(refused, str) else ():
        place = path_of(*argument.split("=", maxsplit=1))
        if "${" in place or Path(place).absolute().is_relative_to(Path(refused).absolute()):
            return argument
    return None


def not_utf8() -> str:
    """Return one line that names the file on the search path that is not UTF-8."""
    for path in (path for place in places.folders() for path in sorted(place.rglob("*.yaml"))):
        content = path.read_bytes()
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            return f"{shown(path)}:{line} is not UTF-8. Save the file as UTF-8."
    return "a file of the config is not UTF-8. Save it as UTF-8."


def not_yaml(error: yaml.YAMLError) -> str:
    """Return one line that names the file that is not YAML, the line in it and the problem."""
    if not isinstance(error, yaml.MarkedYAMLError) or not (error.problem_mark and error.problem):
        return f"a file of the config is not YAML: {error}"
    place = f"{shown(error.problem_mark.name)}:{error.problem_mark.line + 1}"
    return f"{place} is not YAML: {error.problem}. Correct that line, or the one before it."
