"""The pages of the site: links, menu, references, diagrams, and nothing from elsewhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from regrow.config.yaml_keys import keys_of
from regrow.project import CONF, ROOT

SITE = ROOT / "docs" / "site"
NAMESPACE = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module", autouse=True)
def on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(SITE))
    yield
    sys.path.remove(str(SITE))


@pytest.fixture
def pages() -> ModuleType:
    import pages

    return pages


def test_every_link_of_the_documentation_leads_to_a_file_and_every_page_is_in_the_menu(
    pages: ModuleType, tmp_path: Path
) -> None:
    assert pages.write(tmp_path / "pages") == []
    present = {path.relative_to(tmp_path / "pages").as_posix() for path in tmp_path.rglob("*.md")}
    assert {"start.md", "repository/README.md", "reference/checkpoint.md"} <= present
    assert "repository/src/lab/loop.py.md" in present  # a source that a page links to


def test_a_link_to_nothing_and_a_page_outside_the_menu_are_named(
    pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "lost.md").write_text("[a](../gone.md) ![b](b.svg) [c](https://d)\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages.api, "pages", dict)
    monkeypatch.setattr(pages, "named_in", lambda nav: iter(["start.md"]))
    assert pages.write(tmp_path / "pages") == [
        "docs/lost.md: ../gone.md leads to no file of the repository",
        "docs/lost.md: b.svg leads to no file of the repository",
        "zensical.toml: nav names start.md",
        "zensical.toml: nav lacks lost.md",
    ]


def test_links_lead_within_the_site_and_code_stays_as_it_is(pages: ModuleType) -> None:
    places = {"src/regrow": "reference/regrow.md"}
    text = (
        "See [a](../../README.md#x), [b](../../src/regrow), `c[d](e)`.\n"
        "- one\n```\n[c](../../d)\n- e\n```\n"
    )
    assert pages.rewritten(text, "docs/recipes/page.md", places) == (
        "See [a](../repository/README.md#x), [b](../reference/regrow.md), `c[d](e)`.\n\n- one\n"
        "```\n[c](../../d)\n- e\n```\n"
    )


def test_the_api_reference_has_each_name_that_a_wing_lists() -> None:
    import api

    text = api.pages()["reference/checkpoint.md"][1]
    names = ("CheckpointOptions", "load_newest", "weights_sha256", "CheckpointFacts")
    for name in names:
        assert re.search(rf"^### {name}$", text, re.M)
    assert "def weights_sha256(model: nn.Module) -> str:" in text
    assert "    keep_last: int\n" in text  # a field
    protocols = api.pages()["reference/protocols.md"][1]
    assert "### Task\n" in protocols and "\nInputs: TypeAlias = Tensor | Sequence" in protocols
    of_users = api.pages()["reference/regrow.md"][1]
    for name in ("compose", "build", "load_run", "LoadedRun", "Predictions", "UserError"):
        assert re.search(rf"^### {name}$", of_users, re.M)
    with pytest.raises(api.NotFound, match=r"regrow\.checkpoint\.digest has no nothing"):
        api.section("regrow.checkpoint.digest", ["nothing"])


def test_the_headings_of_a_page_of_the_reference_differ() -> None:
    import api

    def repeats(text: str) -> set[str]:
        found = [line.lower() for line in re.findall(r"^##+ .*$", text, re.M)]
        return {line for line in found if found.count(line) > 1}

    assert not any(repeats(text) for _, text in api.pages().values())
    page = "## a.one\n### write\n## a.two\n### write\n### WRITE\n### read"
    assert repeats(page)  # the control
    made = api.with_unique_headings(page)
    assert [line for line in made.split("\n") if line.startswith("### ")] == [
        *("### one.write", "### two.write", "### two.WRITE (constant)", "### read")
    ]


def test_the_api_reference_in_docs_is_that_of_the_docstrings() -> None:
    import api

    written = {
        path.relative_to(api.DOCS).as_posix(): path.read_text(encoding="utf-8")
        for path in (api.DOCS / api.FOLDER).iterdir()
    }
    made = {place: text for place, (_, text) in api.pages().items()}
    assert written == made, "run make reference"
    index = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert {*re.findall(r"\]\((reference/\w+\.md)\)", index)} == {*made}


def test_a_changed_docstring_changes_the_api_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    import api

    before = api.section("regrow.project", None)
    source = (api.SOURCE / "regrow" / "project.py").read_text(encoding="utf-8")
    (tmp_path / "regrow").mkdir()
    monkeypatch.setattr(api, "SOURCE", tmp_path)
    for text, is_same in ((source, True), (source.replace("def lab_name", "def its_name"), False)):
        (tmp_path / "regrow" / "project.py").write_text(text, encoding="utf-8")
        assert (api.section("regrow.project", None) == before) is is_same


def test_words_in_angle_brackets_are_not_tags() -> None:
    import api

    assert api.prose("a <name> and `<code>`") == "a &lt;name&gt; and `<code>`\n"


def test_the_page_of_keys_is_that_of_the_schemas() -> None:
    import keys

    assert keys.PAGE.read_text(encoding="utf-8") == keys.page(), "run make reference"
    assert "| `trainer.max_steps` | an integer of at least 1, or null | `null` |" in keys.page()


def missing(listed: set[str]) -> list[str]:
    """Return the keys of conf/ that are not listed, and have none below them that is."""
    found = []
    for path in (path for group in schemas_groups() for path in (CONF / group).glob("[!_]*.yaml")):
        for key in keys_of(path):
            name = f"{path.parent.name}.{key}"
            known = name in listed or any(other.startswith(f"{name}.") for other in listed)
            if not known and key != "defaults" and not re.search(r"(^|\.)_", key):
                found.append(name)
    return found


def schemas_groups() -> list[str]:
    names = [path.stem for path in (ROOT / "schemas").glob("*.json")]
    return [name for name in names if name not in ("train", "experiment")]


def test_every_key_of_conf_is_on_the_page() -> None:
    import keys

    listed = set(re.findall(r"^\| `([\w.]+)`", keys.page(), re.M))
    assert missing(listed) == []
    assert set(missing(listed - {"trainer.max_steps"})) == {"trainer.max_steps"}  # the control


def test_every_key_on_the_page_has_its_values_and_a_comment() -> None:
    import keys

    rows = re.findall(r"^\| (`[\w.]+`[^|]*) \| (.*?) \|.*\| (.*?) \|$", keys.page(), re.M)
    assert len(rows) > 300
    assert [name for name, accepts, comment in rows if not (accepts.strip() and comment)] == []
    says = {name: accepts for name, accepts, _ in rows}
    assert says["`model.activation` (mlp)"] == "one of relu, gelu, silu, tanh, elu, leaky_relu"
    of_fold = {says[name] for name in says if name.startswith("`data.source.fold`")}
    assert of_fold == {"an integer of at least 0"}  # its value is ${..fold}
    assert keys.accepted("data.own", {"default": None}) == ""  # the control


def test_options_are_named_by_the_shorter_list() -> None:
    import keys

    options = ["a", "b", "c", "d"]
    assert keys.among(options, options) == ""
    assert keys.among(["a", "b", "c"], options) == " (not d)"
    assert keys.among(["a", "b"], options) == " (a, b)"


def test_the_images_are_those_that_the_scripts_make() -> None:
    import images
    import screenshot

    assert {*images.FOLDER.iterdir()} == {
        screenshot.IMAGE,
        *map(images.FOLDER.joinpath, images.IMAGES),
    }
    for name, draw in images.IMAGES.items():
        assert (images.FOLDER / name).read_text(encoding="utf-8") == draw()


def test_words_that_do_not_fit_their_box_are_refused() -> None:
    import images

    with pytest.raises(ValueError, match="needs"):
        images.Drawing("a", 100).card(0, 0, 60, images.LAB, "longer than the box")


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def contrasts(svg: str) -> Iterator[float]:
    """Yield the contrast of each text with the last shape that was drawn below it."""
    shapes: list[tuple[float, float, float, float, str]] = []
    for node in ElementTree.fromstring(svg):
        place = {
            key: float(value) for key, value in node.items() if re.fullmatch(r"-?[\d.]+", value)
        }
        if node.tag == f"{NAMESPACE}rect":
            corner = place["x"], place["y"]
            far = corner[0] + place["width"], corner[1] + place["height"]
            shapes.append((*corner, *far, node.attrib["fill"]))
        elif node.tag == f"{NAMESPACE}circle":
            x, y, r = place["cx"], place["cy"], place["r"]
            shapes.append((x - r, y - r, x + r, y + r, node.attrib["fill"]))
        elif node.tag == f"{NAMESPACE}text":
            x, y = place["x"], place["y"]
            under = [
                each[4] for each in shapes if each[0] <= x <= each[2] and each[1] <= y <= each[3]
            ]
            yield contrast(node.attrib["fill"], under[-1]) if under else 1.0


@pytest.mark.parametrize("name", ["two_storeys", "one_step", "kill_and_resume"])
def test_all_text_of_a_diagram_is_legible_on_a_light_and_a_dark_page(name: str) -> None:
    """It stands on a box of its own, with at least the 4.5 that WCAG 2.2 asks for."""
    import images

    found = list(contrasts(images.IMAGES[f"{name}.svg"]()))
    assert len(found) > 15 and min(found) > 4.5
    naked = (
        '<svg xmlns="http://www.w3.org/2000/svg"><text x="1" y="1" fill="#000000">a</text></svg>'
    )
    assert list(contrasts(naked)) == [1.0]


def test_a_page_that_loads_something_from_elsewhere_is_found() -> None:
    import build

    for bad in (
        '<script async src="https://a/b.js">',
        "<img src=https://a/b.png>",
        '<link rel="stylesheet" href="https://a/b.css">',
    ):
        assert build.LOADS.search(bad)
    for good in (
        '<a href="https://a">',
        '<link rel="canonical" href="https://a/">',
        '<script src="../a.js"></script><a href="https://b">',
    ):
        assert not build.LOADS.search(good)


def test_code_in_a_table_wraps_after_its_separators_alone() -> None:
    import build

    page = "<td><code>data.val_step=<a href='x.html'>a_b</a></code></td><code>a.b</code>"
    assert build.wrappable(page) == (
        "<td><code>data.<wbr>val_<wbr>step=<a href='x.html'>a_<wbr>b</a></code></td>"
        "<code>a.b</code>"
    )
    same = "<td><code>0.5 a&lt;b -m</code></td>"
    assert build.wrappable(same) == same
