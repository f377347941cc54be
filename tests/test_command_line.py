"""Text on command lines arrives unchanged through Hydra, the shell and the config."""

from __future__ import annotations

import random
import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from running import composed

from regrow.config.command_line import override, path_of, paths_as_typed, quoted, read, shell
from regrow.errors import UserError

NASTY = (
    *(
        "outputs/digits/latest",
        "Ünï code",
        "Dropbox (Uni)",
        "lr=1",
        "a,b",
        "[a]",
        "{a}",
        "(a",
        "~x",
    ),
    *("-x", "a'b", 'a"b', "a'b\"c", "\\", "a\\", "a\\'", 'a\\"', "a\\\\'\\", "$HOME", "${seed}"),
    *(
        "\\${seed}",
        "\\\\${a}",
        "a${",
        "$'x'",
        "#x",
        "x #y",
        "a;b",
        "a b",
        " a",
        "a ",
        "a  b",
        "x...",
    ),
    *(
        "null",
        "true",
        "False",
        "1",
        "1e3",
        ".5",
        "-inf",
        "nan",
        "007",
        "1_000",
        "2026-11-26",
        "a:b",
    ),
    *(
        "choice(a,b)",
        "a@b",
        "a*b?",
        "!x",
        "`id`",
        "$(id)",
        "日本",
        "e\u0301",
        "\u202f",
        "😀",
        "",
        "a\tb",
    ),
    *(
        "%",
        "&",
        "|",
        "<",
        ">",
        "a=b=c",
        "=",
        ",",
        "'",
        '"',
        "'a'",
        '"a"',
        "\udcfc",
        "x/" + "y" * 200,
    ),
)
ALPHABET = "aÜ1 .,:;=-_~+*?!@#$%&|/\\'\"`()[]{}<>\t\u202f\udcfc"


def random_texts(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(ALPHABET, k=draw.randint(0, 8))) for _ in range(count)]


@pytest.mark.parametrize("texts", [NASTY, random_texts(1500)], ids=["nasty", "random"])
def test_hydra_reads_quoted_text_back_as_it_was(texts: tuple[str, ...]) -> None:
    for text in texts:
        parsed = OverridesParser.create().parse_override(override("notes", text))
        assert not parsed.is_sweep_override(), text
        assert isinstance(parsed.value(), str), text
        assert read(override("notes", text)) == text


def test_unquoted_text_would_be_read_otherwise() -> None:
    """The negative control: Hydra's grammar refuses most of these, or reads something else."""
    wrong = [text for text in NASTY if read(f"notes={text}") != text]
    assert len(wrong) > len(NASTY) / 2


def test_the_config_gets_the_text_and_resolves_nothing_in_it() -> None:
    config = composed(f"tags=[{','.join(map(quoted, NASTY))}]", override("notes", NASTY[-1]))
    assert (list(config.tags), config.notes) == (list(NASTY), NASTY[-1])


def test_plain_paths_stay_as_they_are() -> None:
    for text in (
        "outputs/digits/2026-11-21_10-02-11-k3f9",
        "/tmp/x",
        "mine",
        "./a",
        "../b.c",
        "1/2",
    ):
        assert quoted(text) == text


def test_bash_takes_the_line_apart_as_it_was_put_together() -> None:
    words = [*NASTY, *random_texts(300)]
    line = shell(["printf", r"%s\0", *words])
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == [w.encode("utf-8", "surrogateescape") for w in words]


@pytest.mark.parametrize("key", ["hydra.run.dir", "data.root", "init_from"])
@pytest.mark.parametrize("path", [p for p in NASTY if "${" not in p and p not in ("", "null")])
def test_a_path_may_be_typed_as_it_is(key: str, path: str) -> None:
    (argument,) = paths_as_typed([f"{key}={path}"], multirun=False)
    if path.strip("'\" ") != path or "\\" in path:
        return  # Hydra has its own reading, unless the path exists
    assert read(argument) == path


def test_a_path_that_exists_is_taken_literally(
    tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    for path in ("'a'", "a\\,b", "a,b", "${x}", "choice(a,b)"):
        before = path_of("resume", path)
        (tmp_path / path).mkdir()  # type: ignore[operator]
        assert path_of("resume", path) == path
        assert before != path or path in ("a,b", "choice(a,b)", "${x}")
        assert read(paths_as_typed([f"data.root={path}"], multirun=True)[0]) == path


def test_several_paths_are_a_sweep_where_a_key_can_be_varied() -> None:
    assert paths_as_typed(["data.root=a,b"], multirun=True) == ["data.root=a,b"]
    assert paths_as_typed(["hydra.sweep.dir=a,b"], multirun=True) == ['hydra.sweep.dir="a,b"']
    assert paths_as_typed(["data.root=a,b"], multirun=False) == ['data.root="a,b"']


def test_values_meant_for_hydra_stay_as_typed() -> None:
    lines = ["data.root=${oc.env:HOME}/x", 'data.root="a b"', "init_from=null", "resume=auto",
             "hydra.run.dir=outputs/${now:%Y}", "optimizer.lr=a=b"]  # fmt: skip
    assert paths_as_typed(lines, multirun=False) == lines


def test_a_line_break_in_a_path_is_refused() -> None:
    with pytest.raises(UserError, match="must not contain a line break"):
        paths_as_typed(["hydra.run.dir=a\nb"], multirun=False)


@pytest.mark.parametrize("path", ["x" * 300, "Ü" * 128, "x/" * 2500])
def test_a_path_that_no_file_system_takes_is_refused(path: str) -> None:
    for key in ("hydra.run.dir", "resume", "data.root"):
        with pytest.raises(UserError, match="the path is too long"):
            paths_as_typed([f"{key}={path}"], multirun=False)
    with pytest.raises(UserError, match="the path is too long"):
        path_of("resume", path)
