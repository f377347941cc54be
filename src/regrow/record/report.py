"""report.html: one self-contained page of a run; and what is read of a run's folder."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from markupsafe import Markup

from regrow.dotted import Checked, walk
from regrow.errors import UserError, brief
from regrow.record import by_class, fitting, logged_images, manifest, moved, pages, pictures, plots
from regrow.record.plots import Panel
from regrow.record.records import (
    METRICS,
    STATUS,
    SUMMARY,
    by_set,
    load_status,
    load_summary,
    read_metrics,
    refuse_links,
    sets_of,
)
from regrow.record.redact import redact, redact_all

# Keys that differ between any two runs without telling anything about them.
BOOKKEEPING = ("resume", "init_from", "hydra", "logger", "notes", "tags", "name")
LEAST_FOR_IMAGES = 300_000  # bytes of a page that plots leave to images, if it has some
LONGEST_NAME = 200  # characters of a metric, or of a tag, in a page
MOST_TAGS = 100
OPEN_RESUMES, MOST_RESUMES = 3, 100  # resumes shown open; resumes shown at all
MOST_OF_RESUMES = 50_000  # bytes of their commands together
NOTES_BYTES = 2_000  # for the sentences about images that a page lacks


@dataclass(frozen=True)
class Run:
    """The content of a run's folder; missing or incomplete files are empty."""

    folder: Path
    name: str
    status: Mapping[str, Any]
    summary: Mapping[str, Any]
    manifest: Mapping[str, Any]
    config: Checked
    overrides: Sequence[str]
    lines: Sequence[Mapping[str, Any]]

    @property
    def state(self) -> str:
        return str(self.status.get("state") or self.summary.get("status") or "unknown")

    @property
    def best(self) -> Mapping[str, Any]:
        """The metric that chose the weights, its best value and that step; empty if unknown."""
        return self.summary.get("best") or {}

    @property
    def examples_per_second(self) -> float | None:
        """Training examples by the time of training, without evaluations."""
        data = self.config.get("data")
        batch = data.get("batch_size") if isinstance(data, Mapping) else None
        known = [self.summary.get("steps"), self.summary.get("seconds"), batch]
        numbers = [float(it) for it in known if isinstance(it, int | float) and 0 < it < math.inf]
        if not isinstance(data, Mapping) or len(numbers) < len(known):
            return None
        steps, seconds, each = numbers
        facts = self.manifest.get("data")
        train = facts.get("train") if isinstance(facts, Mapping) else None
        count = train.get("examples") if isinstance(train, Mapping) else None
        if isinstance(count, int) and count and not data.get("drop_last"):
            each = count / math.ceil(count / each)  # an epoch's last batch may be smaller
        return steps * each / seconds

    @property
    def steps(self) -> Any:
        """The steps that the run has taken, which may be more than those of its summary."""
        steps, now = self.summary.get("steps"), self.status.get("step")
        return now if steps is None or self.has_older_results else steps

    @property
    def has_older_results(self) -> bool:
        """True if the run was complete, was resumed to train longer, and is not complete again."""
        steps, now = self.summary.get("steps"), self.status.get("step")
        if not isinstance(steps, int) or not isinstance(now, int):
            return False
        return self.state != "completed" and now > steps

    def share(self, key: str) -> str:
        """Return the median over the log of a share, 0 … 1, in percent; "" if it was not logged."""
        _, values = plots.series(self.lines, key)
        known = [value for value in values if math.isfinite(value)]
        return f"{100 * statistics.median(known):.1f} %" if known else ""

    @cached_property
    def sets(self) -> Mapping[str, Mapping[str, Any]]:
        """The final metrics of each set, or the last ones logged, without the set in the keys."""
        logged = by_set({key: value for line in self.lines for key, value in line.items()})
        found = {**logged, **{k: v for k, v in sets_of(self.summary).items() if v}}
        ordered = [name for name in found if name not in self.final] + [*self.final]
        return {
            name: {key.removeprefix(f"{name}/"): value for key, value in found[name].items()}
            for name in ordered
            if name in found
        }

    @property
    def final(self) -> list[str]:
        """The sets that are measured once, at the end, if the data has them."""
        data = self.config.get("data")
        named = data.get("final_sets") if isinstance(data, Mapping) else None
        return [*(named if isinstance(named, list) else ()), "test"]

    def metrics(self, name: str) -> Mapping[str, Any]:
        """Return a set's final or last logged metrics, without the set in the keys."""
        return self.sets.get(name, {})


def load(folder: Path) -> Run:
    """Return the run in `folder`. Raises UserError if there is none."""
    if not is_run(folder):
        raise UserError(f"{folder} holds no run: neither {METRICS} nor {STATUS} is there.")
    facts, config = manifest.read(folder), moved.in_config(_mapping(folder / "config.yaml"))
    overrides = _yaml(folder / ".hydra" / "overrides.yaml")
    name = str(config.get("name") or folder.resolve().parent.name)
    status = load_status(folder) or {}
    return Run(
        folder=folder,
        name=name,
        status=redact_all(status),
        summary=load_summary(folder, whole=False),
        manifest=redact_all(facts),
        config=redact_all(config),
        overrides=[redact(str(it)) for it in overrides] if isinstance(overrides, list) else [],
        lines=read_metrics(folder),
    )


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (METRICS, STATUS, SUMMARY))


def find_runs(folder: Path) -> list[Path]:
    """Return the folder itself if it is a run's, else the runs below it; links are not followed."""
    if is_run(folder):
        return [folder]
    found = []
    for root, folders, files in os.walk(folder):
        if {METRICS, STATUS, SUMMARY} & set(files):
            found.append(Path(root))
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return sorted(found, key=lambda path: [*map(natural, path.parts)])


def natural(text: str) -> tuple[int, str]:
    """Return a sort key that orders numbers by their value, after other texts."""
    return (int(text), "") if text.isdecimal() else (-1, text)


def _mapping(path: Path) -> dict[str, Any]:
    value = _yaml(path)
    return value if isinstance(value, dict) else {}


def _yaml(path: Path) -> Any:
    import yaml

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (OSError, ValueError):
        return None
    except Exception as error:  # YAML's own, or of a foreign file that nests too deep
        return {"unreadable": f"{path.name}: {brief(error)}"}


# -- a run's page ----------------------------------------------------------------------------------


def draw(folder: Path) -> Path:
    """Write the run's plots and its page into its folder. Returns the page's path."""
    run = load(folder)
    refuse_links(folder, str(folder), "plots")
    panels = _panels(run)
    drawn = plots.figures(folder, panels)
    plots.draw(folder, drawn)
    return _write(run, panels, drawn, None)


def write(folder: Path, output: Path | None = None) -> Path:
    """Write the run's page, by default report.html in its folder. Returns its path."""
    run = load(folder)
    panels = _panels(run)
    return _write(run, panels, plots.figures(folder, panels), output)


def _panels(run: Run) -> dict[str, list[Panel]]:
    return plots.panels_of(run.lines, run.final, run.best)


def _write(
    run: Run, panels: Mapping[str, Sequence[Panel]], drawn: Mapping[str, Any], output: Path | None
) -> Path:
    count = sum(len(panel.lines) for its in panels.values() for panel in its)
    charts = [
        pages.chart(
            name, figure, panels.get(name, ()), count, _CAPTIONS.get(name.split("_")[0], "")
        )
        for name, figure in drawn.items()
    ]
    metrics: list[Sequence[Any]] = [
        [name, *(its.get(name) for its in run.sets.values())]
        for name in dict.fromkeys(name for its in run.sets.values() for name in its)
        if not any(isinstance(its.get(name), list | dict) for its in run.sets.values())
    ]
    path = output or run.folder / "report.html"
    whole = [row for row in metrics if "/" not in row[0]]
    per_class = [row for row in metrics if "/" in row[0]]  # e.g. f1/zero
    names = {row[0] for row in whole}
    shown, lacks_classes = by_class.of_page(per_class, [*run.sets], names)
    whole, lacks_metrics = by_class.first_rows(whole, len(run.sets) + 1)
    config_text = _as_yaml(run.config) if run.config else ""
    manifest_text = json.dumps(run.manifest, indent=2, ensure_ascii=False) if run.manifest else ""
    content: dict[str, Any] = {
        "title": f"{run.name} · {run.folder.resolve().name}",
        "run": run,
        "tags": _tags(run),
        "header": ["metric", *run.sets],
        "whole": [[plots.elided(row[0], LONGEST_NAME), *row[1:]] for row in whole],
        "lacks_metrics": lacks_metrics,
        "older": _older_results(run),
        "per_class": [[plots.elided(row[0], LONGEST_NAME), *row[1:]] for row in shown],
        "lacks_classes": lacks_classes,
        "noun": by_class.noun(names),
        "values": _file_of_values(run, path),
        "figures": _figures(run),
        "not_drawn": _not_drawn(run),
        "most_wrong": pictures.NUM_WRONG,
        "facts": _facts(run),
        "records": {
            "config.yaml": _record(run.folder / "config.yaml", config_text, path),
            "manifest.json": _record(run.folder / manifest.NAME, manifest_text, path),
        },
    }
    pages.write(path, "run", **content, **_fitted(run.folder, charts, content))
    return path


def _tags(run: Run) -> list[str]:
    tags = run.config.get("tags") or []
    found = [plots.elided(str(tag), LONGEST_NAME) for tag in tags[:MOST_TAGS]]
    more = len(tags) - MOST_TAGS
    return [*found, f"and {more:,} more, in config.yaml"] if more > 0 else found


def _file_of_values(run: Run, page: Path) -> dict[str, str]:
    """Return the file that has all metrics of the page, and a link to it."""
    name = SUMMARY if any(sets_of(run.summary).values()) else METRICS
    return {"name": name, "href": pages.link(run.folder / name, page.parent)}


def _record(file: Path, text: str, page: Path) -> dict[str, str]:
    """Return what the page shows of a file, and a link to it."""
    shown, lacks = pages.clipped(text, pages.MOST_OF_TEXT)
    return {"text": shown, "lacks": lacks, "href": pages.link(file, page.parent)}


def _fitted(folder: Path, charts: list[Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the charts and images for which the page of `content` has room."""
    wrong, logged = pictures.wrong_of(folder), logged_images.latest(folder)
    for its in wrong:
        its["more"] = ""
    images = _by_rank([its["examples"] for its in wrong])
    images += _by_rank([its[::-1] for its in logged.values()])
    least = (
        min(sum(fitting.in_base64(it["image"]) for it in images), LEAST_FOR_IMAGES) + NOTES_BYTES
    )
    found: dict[str, Any] = {
        "charts": [*charts],
        "full": "",
        "wrong": wrong,
        "logged": logged,
        "more": "",
    }
    while True:
        for it in images:
            it["source"] = ""
        page = pages.render("run", **content, **found)
        room = pages.MOST_BYTES - len(page.encode("utf-8", "backslashreplace"))
        if room >= least or not found["charts"]:
            break
        found["charts"] = found["charts"][:-1]
        names = ", ".join(f"plots/{it['name']}.png" for it in charts[len(found["charts"]) :])
        found["full"] = f"Left out, as the page has at most 1 MB: {names}."
    sources = fitting.fit([it["image"] for it in images], room - NOTES_BYTES)
    for it, source in zip(images, sources, strict=True):
        it["source"] = Markup(source)  # base64, which needs no escape
    for its in wrong:
        its["more"] = _more(its["examples"], len(its["examples"]), f"plots/{its['name']}.json")
        its["examples"] = [it for it in its["examples"] if it["source"]]
    count = len(logged_images.logged(folder))
    found["more"] = _more([it for its in logged.values() for it in its], count, "images/")
    shown = {name: [it for it in its if it["source"]] for name, its in logged.items()}
    return {**found, "logged": {name: its for name, its in shown.items() if its}}


def _by_rank(groups: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the first of each group, then the second ones, and so on."""
    ranks = itertools.zip_longest(*groups)
    return [it for rank in ranks for it in rank if it is not None]


def _more(images: Sequence[Mapping[str, Any]], count: int, place: str) -> str:
    """Return a sentence if the page lacks or scales down some of `count` images; else nothing."""
    shown = [it for it in images if it["source"]]
    scaled = sum(len(it["source"]) < fitting.in_base64(it["image"]) for it in shown)
    if len(shown) == count and not scaled:
        return ""
    smaller = f", {scaled} with fewer pixels, as the page has at most 1 MB" if scaled else ""
    return (
        f"Shown: {len(shown)} of {count} images{smaller}. All are in {place} of the run's folder."
    )


_CAPTIONS = {
    "confusion": "Rows are the true classes; colour is the share of the row.",
    "predicted": "The dashed line is where predicted equals true.",
    "examples": "The first examples, as the model sees them.",
}


def _older_results(run: Run) -> str:
    """Return a sentence if the results are those of an earlier end; empty if they are not."""
    if not run.has_older_results:
        return ""
    return (
        f"These are the results of step {run.summary['steps']:,}, where the run was complete. It "
        f"was resumed to train longer, and is at step {run.steps:,}."
    )


def _not_drawn(run: Run) -> str:
    """Return a sentence about the plots that a short run lacks; empty if it has all."""
    titles = plots.too_short(run.lines)
    if not titles:
        return ""
    text = " and ".join(title.partition(",")[0] for title in titles)
    every = (run.config.get("trainer") or {}).get("log_every_steps")
    why = f" (trainer.log_every_steps={every})" if every else ""
    return (
        f"{text[0].upper()}{text[1:]}: not drawn, as fewer than {plots.FEWEST_POINTS} steps were "
        f"logged{why}."
    )


def _as_yaml(config: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def _figures(run: Run) -> dict[str, Any]:
    """Return the few numbers that a reader looks for first."""
    metric = str(run.best.get("metric") or "")
    found = {f"best {metric}": run.best.get("value")} if metric else {}
    name = metric.partition("/")[2]
    found |= {
        f"{its}/{name}": run.metrics(its).get(name) for its in run.final if name in run.metrics(its)
    }
    found["parameters"] = run.summary.get("parameters")
    rate = run.examples_per_second
    found["examples per second"] = round(rate) if rate and rate >= 10 else rate
    found["waiting for data"] = run.share("time/waiting_for_data")
    found["MFU"] = run.share("time/mfu")
    found["time"] = pages.duration(run.summary.get("seconds"))
    return {name: value for name, value in found.items() if value not in (None, "")}


def _facts(run: Run) -> dict[str, Any]:
    facts, summary = run.manifest, run.summary
    git, hardware = facts.get("git") or {}, facts.get("hardware") or {}
    packages = facts.get("packages") or {}
    commit = str(git.get("commit") or "")[:10]
    changed = ", with changes" if git.get("dirty") else ""
    machine = [
        f"{hardware.get('cpus')} x {hardware.get('cpu')}" if hardware.get("cpu") else None,
        f"{hardware['memory_gib']} GiB" if hardware.get("memory_gib") else None,
        ", ".join(str(it.get("name")) for it in hardware.get("accelerators") or []),
    ]
    versions = [f"{k} {v}" for k, v in packages.items() if k in ("torch", "hydra-core")]
    found = {
        "command": pages.code(facts.get("command")),
        "folder": pages.code(run.folder),
        "commit": f"{commit} ({git.get('branch') or 'no branch'}{changed})" if commit else "",
        "started": facts.get("started"),
        "resumed": _resumes(facts),
        "steps": pages.number(run.steps),
        "epochs": pages.number(summary.get("epochs")),
        "machine": ", ".join(part for part in machine if part),
        "versions": ", ".join(versions),
        "weights": pages.code(summary.get("weights_sha256")),
    }
    return {name: pages.brief_words(it) for name, it in found.items() if it not in (None, "")}


def _resumes(facts: Mapping[str, Any]) -> Markup | str:
    """Return when, from which step and with which command a run was resumed; "" if it was not."""
    starts = facts.get("resumes") or []
    said: list[Markup] = []
    size = 0
    for start in starts[:MOST_RESUMES]:
        step = f" from step {pages.number(start['step'])}" if start.get("step") is not None else ""
        # A resume records what differs from the first start.
        command = pages.code(start.get("command") or facts.get("command"))
        when = pages.brief_words(start.get("started") or facts.get("started") or "")
        line = Markup("<div>{}{}: {}</div>").format(when, step, command)
        size += len(line.encode("utf-8", "backslashreplace"))
        if size > MOST_OF_RESUMES and said:
            break
        said.append(line)
    if not said:
        return ""
    more = len(starts) - len(said)
    if more:
        said.append(Markup("<div>{}</div>").format(f"and {more} more, in {manifest.NAME}"))
    shown, folded = said[:OPEN_RESUMES], said[OPEN_RESUMES:]
    times = "once" if len(starts) == 1 else f"{len(starts)} times"
    text = Markup("<div>{}</div>").format(times) + Markup("").join(shown)
    if folded:
        later = f"the {len(starts) - len(shown)} later ones"
        text += Markup("<details><summary>{}</summary>{}</details>").format(
            later, Markup("").join(folded)
        )
    return text


# -- where configs differ --------------------------------------------------------------------------


MISSING = object()


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with dotted keys; lists and empty mappings are values."""
    return {key: value for key, value in walk(config) if not (isinstance(value, Mapping) and value)}


def differing_keys(
    configs: Sequence[Mapping[str, Any]], references: Collection[str] = ()
) -> list[str]:
    """Return the keys whose values differ between the configs, in the order of the configs.

    Omits redundant keys: `references`, whose value comes from another key, and keys that are the
    same in all runs with the same `_target_`.
    """
    flats = [flatten(config) for config in configs]

    def differs(key: str, flats: Sequence[Mapping[str, Any]]) -> bool:
        values = [flat.get(key, MISSING) for flat in flats]
        return any(not _same(value, values[0]) for value in values)

    def follows(key: str) -> bool:
        target = f"{key.rpartition('.')[0]}._target_"
        having = [flat for flat in flats if key in flat]
        return key != target and differs(target, flats) and not differs(key, having)

    return [
        key
        for key in dict.fromkeys(key for flat in flats for key in flat)
        if key.split(".")[0] not in BOOKKEEPING
        and key not in references
        and differs(key, flats)
        and not follows(key)
    ]


def references(folders: Sequence[Path]) -> set[str]:
    """Return the keys that take another key's value in every run that has them."""
    composed = [flatten(_mapping(folder / ".hydra" / "config.yaml")) for folder in folders]
    keys = {key for flat in composed for key in flat}
    return {
        key
        for key in keys
        if all(re.fullmatch(r"\$\{[\w.]+\}", str(flat[key])) for flat in composed if key in flat)
    }


def _same(one: Any, other: Any) -> bool:
    return bool(one == other and isinstance(one, bool) == isinstance(other, bool)) or (
        one != one and other != other  # NaN
    )
