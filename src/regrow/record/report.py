"""report.html: one self-contained page of a run, or of several side by side."""

from __future__ import annotations

import html
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from regrow.dotted import walk
from regrow.errors import UserError
from regrow.record import logged_images, manifest, moved, plots
from regrow.record.records import (
    METRICS,
    STATUS,
    SUMMARY,
    by_set,
    load_status,
    load_summary,
    read_json,
    read_metrics,
    refuse_links,
    sets_of,
    write_text,
)
from regrow.record.redact import redact, redact_all

DRAWN_RUNS = 40  # in one plot; the table holds all runs
# Keys that differ between any two runs without telling anything about them.
BOOKKEEPING = ("resume", "init_from", "hydra", "logger", "notes", "tags", "name")


@dataclass(frozen=True)
class Run:
    """The content of a run's folder; missing or incomplete files are empty."""

    folder: Path
    name: str
    status: Mapping[str, Any]
    summary: Mapping[str, Any]
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    overrides: Sequence[str]
    lines: Sequence[Mapping[str, Any]]

    @property
    def state(self) -> str:
        return str(self.status.get("state") or self.summary.get("status") or "unknown")

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
    overrides = _read(folder / ".hydra" / "overrides.yaml")
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
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.parts]


def _mapping(path: Path) -> dict[str, Any]:
    value = _read(path)
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".yaml":
            import yaml

            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
        return read_json(path)
    except (OSError, ValueError):
        return None
    except Exception as error:  # YAML errors, without importing yaml to name them
        return {"unreadable": f"{path.name}: {' '.join(str(error).split())}"}


# -- one run ---------------------------------------------------------------------------------------


def draw(folder: Path, output: Path | None = None) -> Path:
    """Write the run's plots and its page. Returns the page's path."""
    run = load(folder)
    refuse_links(folder, str(folder), "plots")
    drawn = plots.figures(folder, run.lines, run.final)
    plots.draw(folder, drawn)
    return _write(run, drawn, output)


def write(folder: Path, output: Path | None = None) -> Path:
    """Write the run's page, by default report.html in its folder. Returns its path."""
    run = load(folder)
    return _write(run, plots.figures(folder, run.lines, run.final), output)


def _write(run: Run, drawn: Mapping[str, Any], output: Path | None) -> Path:
    pictures = "".join(
        _picture(_CAPTIONS.get(name.partition("_")[0], ""), name, figure)
        for name, figure in drawn.items()
    )
    body = (
        _head(run)
        + _results(run)
        + _section("Pictures", pictures)
        + _section("Images", _images(run.folder))
        + _section("Facts", _facts(run))
        + _section("Record", _records(run))
    )
    path = output or run.folder / "report.html"
    write_text(path, _page(f"{run.name} · {run.folder.resolve().name}", body))
    return path


_CAPTIONS = {
    "learning": "",
    "confusion": "Rows are the true classes; colour is the share of the row.",
    "predicted": "The dashed line is where predicted equals true.",
    "examples": "The first examples, as the model sees them.",
}


def _images(folder: Path) -> str:
    """Return the newest images that the run logged, a row for each name."""
    return "".join(
        f"<h3>{_text(name)}</h3><div class=scroll>"
        + "".join(
            f'<figure style="display:inline-block"><img alt="{_text(name)}, step {step}" '
            f'src="{data}" style="min-width:8em;image-rendering:pixelated">'
            f"<figcaption>step {step}</figcaption></figure>"
            for step, data in images
        )
        + "</div>"
        for name, images in logged_images.latest(folder).items()
    )


def _head(run: Run) -> str:
    error = run.status.get("error")
    tags = "".join(f"<span class=tag>{_text(tag)}</span>" for tag in run.config.get("tags") or [])
    notes = run.config.get("notes")
    return (
        f"<header><h1>{_text(run.name)}</h1><p class=where>{_text(run.folder.resolve().name)} "
        f"{_badge(run.state)} {tags}</p>"
        + (f"<p class=error>{_text(error)}</p>" if error and run.state != "completed" else "")
        + (f"<p>{_text(notes)}</p>" if notes else "")
        + "</header>"
    )


def _results(run: Run) -> str:
    best = run.summary.get("best") or {}
    rows = {
        name: [_text(name), *(_number(its.get(name)) for its in run.sets.values())]
        for name in dict.fromkeys(name for its in run.sets.values() for name in its)
        if not any(isinstance(its.get(name), list | dict) for its in run.sets.values())
    }
    if not rows:
        return _section("Result", "<p class=muted>Nothing has been evaluated yet.</p>")
    chosen = ""
    if best.get("metric"):
        chosen = (
            f"<p class=muted>Best {_text(best['metric'])} {_number(best.get('value'))} "
            f"at step {_number(best.get('step'))}.</p>"
        )
    header = ["metric", *run.sets]
    numbers = range(1, len(header))
    whole = [row for name, row in rows.items() if "/" not in name]
    per_class = [row for name, row in rows.items() if "/" in name]  # e.g. f1/zero
    more = _details("per class", _table(header, per_class, numbers)) if per_class else ""
    return _section("Result", _table(header, whole, numbers) + chosen + more)


def _facts(run: Run) -> str:
    manifest, summary = run.manifest, run.summary
    git = manifest.get("git") or {}
    hardware = manifest.get("hardware") or {}
    commit = str(git.get("commit") or "")[:10]
    changed = ", with changes" if git.get("dirty") else ""
    accelerators = ", ".join(str(it.get("name")) for it in hardware.get("accelerators") or [])
    memory = hardware.get("memory_gib")
    machine = [
        f"{hardware.get('cpus')} x {hardware.get('cpu')}" if hardware.get("cpu") else None,
        f"{memory} GiB" if memory else None,
        accelerators,
    ]
    packages = manifest.get("packages") or {}
    facts = {
        "command": _code(manifest.get("command")),
        "folder": _code(str(run.folder)),
        "commit": _text(f"{commit} ({git.get('branch') or 'no branch'}{changed})")
        if commit
        else "",
        "started": _text(manifest.get("started")),
        "resumed": _text(len(manifest.get("resumes") or []) or None, after=" times"),
        "steps": _number(summary.get("steps", run.status.get("step"))),
        "epochs": _number(summary.get("epochs")),
        "time": _duration(summary.get("seconds")),
        "machine": _text(", ".join(part for part in machine if part)),
        "versions": _text(
            ", ".join(f"{k} {v}" for k, v in packages.items() if k in ("torch", "hydra-core"))
        ),
        "weights": _code(summary.get("weights_sha256")),
    }
    rows = [[name, value] for name, value in facts.items() if value]
    return "<table class=facts>" + "".join(f"<tr><th>{n}<td>{v}" for n, v in rows) + "</table>"


def _records(run: Run) -> str:
    parts = ""
    if run.config:
        import yaml

        text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
        parts += _details("config.yaml", f"<pre>{_text(text)}</pre>")
    if run.manifest:
        import json

        text = json.dumps(run.manifest, indent=2, ensure_ascii=False)
        parts += _details("manifest.json", f"<pre>{_text(text)}</pre>")
    return parts


# -- several runs ----------------------------------------------------------------------------------


Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # header and rows, as plain text


def compare(
    runs: Sequence[Run],
    output: Path,
    title: str = "",
    tables: Mapping[str, Table] | None = None,
    groups: Mapping[Path, str] | None = None,
) -> Path:
    """Write one page with the runs side by side: their results, and where their configs differ.

    `tables` come first, by title. The curves of each of `groups` share a colour.
    """
    labels = _labels(runs)
    keys = differing_keys([run.config for run in runs], references([run.folder for run in runs]))
    columns = _metric_columns(runs)
    rows = []
    for run, label in zip(runs, labels, strict=True):
        flat = flatten(run.config)
        report = run.folder / "report.html"
        link = _link(report if report.exists() else run.folder, output.parent)
        cell = f'<a href="{_text(link)}">{_text(label)}</a>'
        rows.append(
            [
                cell,
                _badge(run.state),
                *(_number(run.metrics(split).get(name)) for split, name in columns),
                _number(run.summary.get("steps", run.status.get("step"))),
                _duration(run.summary.get("seconds")),
                *(_value(key, flat.get(key, _MISSING)) for key in keys),
            ]
        )
    results = [*(f"{split}/{name}" for split, name in columns), "steps", "time"]
    header = ["run", "status", *results, *(key.removesuffix("._target_") for key in keys)]
    drawn = {label: run.lines for label, run in zip(labels[:DRAWN_RUNS], runs, strict=False)}
    names = list(
        dict.fromkeys(name for run in runs for name in plots.panel_names(run.lines, run.final))
    )
    of_group = [(groups or {}).get(run.folder, "") for run in runs[:DRAWN_RUNS]]
    chosen = [str((run.summary.get("best") or {}).get("metric")) for run in runs]
    sets = [name for run in runs for name in run.sets if name not in run.final]
    figure = plots.overlay(
        drawn,
        names[: plots.PANELS],
        of_group if any(of_group) else None,
        [*dict.fromkeys([*(it.partition("/")[0] for it in chosen), *sets])],
    )
    more = f"The first {DRAWN_RUNS} of {len(runs)} runs." if len(runs) > DRAWN_RUNS else ""
    picture = _picture(more, "validation curves", figure) if figure else ""
    title = title or f"{len(runs)} runs"
    before = "".join(
        _section(name, _table(header, [[*map(_text, row)] for row in cells], numbers=()))
        for name, (header, cells) in (tables or {}).items()
    )
    body = (
        f"<header><h1>{_text(title)}</h1>"
        f"<p class=where>{_text(_summary_of_states(runs))}</p></header>"
        + before
        + _section("Runs", _table(header, rows, numbers=range(2, 2 + len(results))) if rows else "")
        + ("" if keys or not runs else "<p class=muted>Their configs do not differ.</p>")
        + _section("Curves", picture)
    )
    write_text(output, _page(title, body, kind="wide"))
    return output


def _link(path: Path, start: Path) -> str:
    """Return a relative link, quoted: a folder's name may look like a scheme or a query."""
    return quote(os.fsencode(os.path.relpath(path, start)))


_MISSING = object()
_NOTHING = "<span class=muted>&ndash;</span>"


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
        values = [flat.get(key, _MISSING) for flat in flats]
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
        if all(re.fullmatch(r"\$\{[\w.]+\}", str(flat.get(key, "${}"))) for flat in composed)
    }


def _same(one: Any, other: Any) -> bool:
    return bool(one == other and isinstance(one, bool) == isinstance(other, bool)) or (
        one != one and other != other  # NaN
    )


def _metric_columns(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return (set, name) of the metrics to compare, those of the final sets first.

    Of a set that chose the weights, only the monitored metric, unless there is no other set.
    Per-class metrics are only on the run's own page.
    """
    chosen = {str((run.summary.get("best") or {}).get("metric")) for run in runs}
    choosing = {metric.partition("/")[0] for metric in chosen}
    sets = [*dict.fromkeys(name for run in runs for name in reversed([*run.sets]))]
    found: dict[tuple[str, str], None] = {}
    for split in sets:
        for name in (name for run in runs for name in run.metrics(split) if "/" not in name):
            if split not in choosing or f"{split}/{name}" in chosen or {*sets} <= choosing:
                found.setdefault((split, name))
    return list(found)[:12]


def _labels(runs: Sequence[Run]) -> list[str]:
    """Return a label per run: the overrides that not all runs have.

    Where these are empty or equal, the shortest path endings that distinguish the runs are added.
    """
    endings = _endings([run.folder for run in runs])
    having = Counter(override for run in runs for override in {*run.overrides})
    labels = []
    for run in runs:
        own = [
            override
            for override in run.overrides
            if re.split(r"[.=@]", override.lstrip("+~"))[0] not in BOOKKEEPING
            and having[override] < len(runs)
        ]
        labels.append(" ".join(own))
    alike = Counter(labels)
    return [
        label if label and alike[label] == 1 else f"{label} {ending}".strip()
        for label, ending in zip(labels, endings, strict=True)
    ]


def _endings(folders: Sequence[Path]) -> list[str]:
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{path} ({index})" for index, path in enumerate(folders)]


def _summary_of_states(runs: Sequence[Run]) -> str:
    states = [run.state for run in runs]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


# -- html ------------------------------------------------------------------------------------------


def _page(title: str, body: str, kind: str = "") -> str:
    template = resources.files("regrow.record").joinpath("report.template.html")
    text = template.read_text(encoding="utf-8")
    return Template(text).substitute(title=_text(title), body=body, kind=kind)


def _text(value: Any, after: str = "") -> str:
    return "" if value is None else html.escape(redact(str(value)) + after)


def _code(value: Any) -> str:
    return f"<code>{_text(value)}</code>" if value else ""


def _number(value: Any) -> str:
    if value is None:
        return _NOTHING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _text(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    if not math.isfinite(value):
        return f"<strong>{'NaN' if math.isnan(value) else f'{value:+}'}</strong>"
    short = f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.4g}"
    return f'<span title="{value!r}">{short}</span>'


def _value(key: str, value: Any) -> str:
    if value is _MISSING:
        return _NOTHING
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()  # as typed on the command line
    text = str(value)
    short = text.rpartition(".")[2] if key.endswith("_target_") else text
    short = short if len(short) <= 40 else f"{short[:39]}…"
    return _text(text) if short == text else f'<span title="{_text(text)}">{_text(short)}</span>'


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return _NOTHING if seconds is not None else ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def _badge(state: str) -> str:
    return f'<span class="badge {_text(state)}">{_text(state)}</span>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>" if content else ""


def _details(title: str, content: str) -> str:
    """Return a collapsed section; the content is HTML already."""
    return f"<details><summary>{_text(title)}</summary>{content}</details>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int]) -> str:
    """Return a table; cells are HTML already, `numbers` are the columns of numbers."""
    kinds = [" class=number" if index in numbers else "" for index in range(len(header))]
    head = "".join(f"<th{k}>{_text(name)}" for k, name in zip(kinds, header, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{cell}" for k, cell in zip(kinds, row, strict=True))
        for row in rows
    )
    return f"<div class=scroll><table><thead><tr>{head}<tbody>{body}</table></div>"


def _picture(caption: str, name: str, figure: Any) -> str:
    note = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    label = _text(name.replace("_", " "))
    svg = plots.to_svg(figure).replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f"<figure><div class=scroll>{svg}</div>{note}</figure>"
