"""Several runs as a table: a row per run, a line per setting over its seeds, and the best."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.record import monitor, output
from regrow.record.output import harmless
from regrow.record.records import sets_of, write_text
from regrow.record.redact import redact
from regrow.record.report import BOOKKEEPING, Run, differing_keys, flatten, natural, references
from regrow.record.statistics import LEVEL, Difference, Estimate, differences, estimate

REPEATS = ("seed", "data.fold")  # runs that differ only in these are of one setting
OUT_OF_FOLD = "predictions_out_of_fold.csv"
UNKNOWN = "too few seeds to tell"


def label_of(swept: Mapping[str, str]) -> str:
    """Return the overrides that distinguish a run, as typed."""
    return " ".join(f"{key}={value}" if value else key for key, value in swept.items())


@dataclass(frozen=True)
class Row:
    """A run, or a job without a run so far."""

    job: str
    state: str
    swept: Mapping[str, str]  # the overrides that distinguish it
    seed: object
    run: Run | None
    folder: str
    reason: str | None = None
    log: str | None = None

    @property
    def label(self) -> str:
        return label_of(self.swept)

    @property
    def setting_label(self) -> str:
        return label_of({k: v for k, v in self.swept.items() if k not in REPEATS})

    @property
    def setting(self) -> tuple[tuple[str, str], ...]:
        return _setting(self.swept)

    @property
    def monitored(self) -> str:
        """The metric that selected the run's best weights; empty without one.

        For a fold without val, the same metric of test, by which folds can be compared.
        """
        if self.run is None or self.state != "completed":
            return ""
        metric = str((self.run.summary.get("best") or {}).get("metric") or "")
        if not metric and self.fold is not None:
            task = self.run.config.get("task") or {}
            metric = f"test/{str(task.get('monitor') or 'val/loss').partition('/')[2]}"
        return metric

    @property
    def fold(self) -> int | None:
        """The number of the fold that the run was tested on; None if it is not one of folds."""
        data = self.run.config.get("data") if self.run is not None else None
        if not isinstance(data, Mapping) or data.get("folds") is None:
            return None
        return int(data.get("fold") or 0)

    @property
    def repeat(self) -> tuple[object, int | None]:
        """Seed and fold, which distinguish the run from others of its setting."""
        return self.seed, self.fold

    @property
    def overlap(self) -> float:
        """Test per training examples if the run is a fold, else 0: see `statistics.estimate`."""
        if self.run is None or self.fold is None:
            return 0.0
        data = self.run.manifest.get("data") or {}
        test, train = ((data.get(name) or {}).get("examples") for name in ("test", "train"))
        return float(test / train) if test and train else 0.0

    def value(self, metric: str) -> float | None:
        """Return a completed run's value of `metric`; None if there is no finite number.

        It is the best monitored value, another metric of that step, or a fact such as `parameters`.
        """
        if self.run is None or self.state != "completed":
            return None
        summary = self.run.summary
        if metric == (summary.get("best") or {}).get("metric"):
            found = summary["best"].get("value")
        else:
            values = sets_of(summary).get(metric.partition("/")[0], summary)
            found = values.get(metric)
        is_number = isinstance(found, int | float) and math.isfinite(found)
        return float(found) if is_number else None

    def metrics(self) -> dict[str, Any]:
        """Return the final metrics, without those per class."""
        if self.run is None or self.state != "completed":
            return {}
        found = [item for its in sets_of(self.run.summary).values() for item in its.items()]
        return {k: v for k, v in found if k.count("/") == 1 and not isinstance(v, list)}


@dataclass(frozen=True)
class Setting:
    """The results of the runs that differ only in their seed or fold."""

    label: str
    rows: Sequence[Row]
    monitored: Estimate
    others: Sequence[Estimate]  # of the comparison's `others`
    from_best: Difference | None  # None for the best itself, and with too few seeds


@dataclass(frozen=True)
class Comparison:
    rows: Sequence[Row]
    metric: str  # monitored
    mode: str  # max or min
    others: Sequence[str]  # the same metric on the other sets
    settings: Sequence[Setting]  # the best first
    left_out: Sequence[Row]  # completed, but without that metric
    repeated: Sequence[Row]  # of another value than a counted run of the same setting and seed
    values: Mapping[str, float]  # of the metric, by job

    @property
    def counted(self) -> list[Row]:
        """The runs of all settings, those of the best setting first."""
        return [row for its in self.settings for row in its.rows]

    @property
    def best(self) -> Row | None:
        """The run with the best value."""
        pick = max if self.mode == "max" else min
        return pick(self.counted, key=lambda row: self.values[row.job], default=None)


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Return a row per run, distinguished by the keys in which their configs differ.

    Uses the overrides as typed, if these distinguish the same runs.
    """
    keys = differing_keys([run.config for run in runs], references([run.folder for run in runs]))
    flats = [flatten(run.config) for run in runs]
    differing = [{key: _plain(flat[key]) for key in keys if key in flat} for flat in flats]
    common = set.intersection(*(set(run.overrides) for run in runs)) if runs else set()
    typed = [
        {
            key: value
            for override in run.overrides
            for key, _, value in [override.lstrip("+").partition("=")]
            if override not in common and key.split(".")[0] not in BOOKKEEPING
        }
        for run in runs
    ]
    pairs = {(_setting(a), _setting(b)) for a, b in zip(differing, typed, strict=True)}
    same = len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    rows = []
    for run, swept in zip(runs, typed if same else differing, strict=True):
        seed = run.config.get("seed")
        state = "pruned" if run.summary.get("pruned") else run.state
        rows.append(Row(str(run.folder), state, swept, seed, run, str(run.folder)))
    return rows


def _setting(swept: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return a key that does not depend on the order and spelling of the overrides."""
    return tuple(sorted((k, _number(v)) for k, v in swept.items() if k not in REPEATS))


def _number(text: str) -> str:
    """Return one spelling for 1e-3 and 0.001; other text unchanged."""
    try:
        return repr(float(text))
    except ValueError:
        return text


def _plain(value: Any) -> str:
    """Return text in which 0 and 0.0 are equal, with all digits."""
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def compare(rows: Sequence[Row], metric: str = "", mode: str = "") -> Comparison:
    """Return settings over their seeds, the best first, by `metric` or what most runs monitored.

    `mode` is max or min, by default that of the runs.
    """
    completed = [row for row in rows if row.run is not None and row.state == "completed"]
    monitored = [row.monitored for row in completed if row.monitored]
    metric = metric or max(dict.fromkeys(monitored), key=monitored.count, default="")
    values = {row.job: value for row in completed if (value := row.value(metric)) is not None}
    done = [row for row in completed if row.job in values]
    chosen_by_it = next((row.run for row in done if row.monitored == metric), None)
    if not mode and chosen_by_it is not None:
        mode = str((chosen_by_it.config.get("trainer") or {}).get("mode") or "")
    mode = mode or monitor.by_name(metric) or "max"
    base = metric.partition("/")[2]
    names = dict.fromkeys(key for row in done for key in row.metrics())
    others = [key for key in names if base and key.partition("/")[2] == base and key != metric]
    groups: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    repeated = []
    for row in done:
        its = groups.setdefault(row.setting, [])
        same = [one for one in its if row.seed is not None and one.repeat == row.repeat]
        if not same:  # each counts once
            its.append(row)
        elif values[row.job] != values[same[0].job]:  # from other code or other first weights
            repeated.append(row)
    sign = 1 if mode == "max" else -1

    def order(item: tuple[object, Sequence[Row]]) -> float:
        return -sign * estimate([values[row.job] for row in item[1]]).mean

    ordered = sorted(groups.items(), key=order)
    by_repeat: list[Mapping[object, float]] = [
        {row.repeat: values[row.job] for row in its} for _, its in ordered
    ]
    overlap = statistics.fmean(row.overlap for row in done) if done else 0.0
    apart = [None, *differences(by_repeat[0], by_repeat[1:], overlap)] if by_repeat else []
    settings = [
        Setting(
            label=its[0].setting_label or ("all" if len(ordered) == 1 else "(nothing changed)"),
            rows=its,
            monitored=estimate([values[row.job] for row in its], overlap),
            others=[
                estimate([v for row in its if (v := row.metrics().get(other)) is not None], overlap)
                for other in others
            ],
            from_best=difference,
        )
        for (_, its), difference in zip(ordered, apart, strict=True)
    ]
    left_out = [row for row in completed if metric and row.job not in values]
    return Comparison(rows, metric, mode, others, settings, left_out, repeated, values)


def shown(value: float, sign: str = "") -> str:
    """Return four decimals, or as many digits as tell a small or a large value from others."""
    if math.isnan(value):
        return ""
    size = abs(value)
    how = ".4g" if size >= 100 else ".3g" if 0 < size < 1e-3 else ".4f"
    return f"{value:{sign}{how}}"


def spread(of: Estimate) -> str:
    if of.count and not math.isfinite(of.mean):
        return str(of.mean)
    return shown(of.mean) + (f" ± {shown(of.sd)}" if of.count > 1 else "")


def interval(of: Estimate | Difference | None) -> str:
    if of is None or math.isnan(of.low):
        return ""
    return f"[{shown(of.low)}, {shown(of.high)}]"


def verdict(setting: Setting, is_best: bool) -> str:
    """Return how the setting compares with the best one, judged over seeds.

    "worse": it differs even with several comparisons. "probably worse": it would differ as the only
    one.
    """
    if is_best:
        return "best"
    if setting.from_best is None:
        return UNKNOWN
    if setting.from_best.adjusted_p < 1 - LEVEL:
        return "worse"
    return "probably worse" if setting.from_best.p < 1 - LEVEL else "within the noise"


def table_of(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the settings, the best first."""
    per_cent = f"{LEVEL:.0%}"
    header = ["setting", "runs", comparison.metric, f"{per_cent} interval"]
    # Folds are a statement about each set; seeds alone are one about the choice of a setting.
    has_folds = any(row.fold is not None for row in comparison.counted)
    for other in comparison.others:
        header += [other, f"{per_cent} interval"] if has_folds else [other]
    header += ["from the best", f"{per_cent} interval", "verdict"]
    rows = []
    for index, its in enumerate(comparison.settings):
        row = [its.label, str(its.monitored.count), spread(its.monitored), interval(its.monitored)]
        for found in its.others:
            row += [spread(found), interval(found)] if has_folds else [spread(found)]
        difference = shown(its.from_best.mean, "+") if its.from_best else ""
        row += [difference, interval(its.from_best), verdict(its, index == 0)]
        rows.append(row)
    empty = {i for i in range(1, len(header)) if not any(row[i] for row in rows)}
    if len(rows) == 1 or {row[-1] for row in rows[1:]} == {UNKNOWN}:  # no verdict to show
        empty |= {len(header) - 1}
    kept = [i for i in range(len(header)) if i not in empty]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def as_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with aligned columns."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write a row per run: job, status, overrides, final metrics, weights, folder, reason, log."""
    swept = list(dict.fromkeys(key for row in rows for key in row.swept))
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics()))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")

    header = ["job", "status", *swept, *metrics, "weights_sha256", "folder", "reason", "log"]
    writer.writerow(map(harmless, header))
    for row in rows:
        found = row.metrics()
        weights = row.run.summary.get("weights_sha256") if row.run and found else None
        cells = [
            *(row.job, row.state),
            *(redact(str(row.swept.get(key, ""))) for key in swept),
            *(found.get(name, "") for name in metrics),
            *(weights or "", row.folder, row.reason or "", row.log or ""),
        ]
        writer.writerow(map(harmless, cells))
    write_text(path, text.getvalue())


def write_out_of_fold(rows: Sequence[Row], path: Path) -> None:
    """Write one table of what each fold predicts for its test examples; nothing without folds.

    In each setting and seed, every example is there once, in the order of the source.
    """
    swept = list(dict.fromkeys(key for row in rows for key in row.swept if key != "data.fold"))
    found: list[tuple[Any, dict[str, str]]] = []
    for number, row in enumerate(rows):
        if row.run is None or row.fold is None or row.state != "completed":
            continue
        file = row.run.folder / "predictions_test.csv"
        if not file.is_file():  # outputs that are not a row per example
            continue
        before = {key: redact(str(row.swept.get(key, ""))) for key in swept}
        its = row.setting, row.seed
        first = next(i for i, one in enumerate(rows) if (one.setting, one.seed) == its)
        with file.open(newline="", encoding="utf-8") as lines:
            for line in csv.DictReader(lines):
                order = (first, natural(line["example"]), number)
                found.append((order, {**before, "fold": str(row.fold), **line}))
    found.sort(key=lambda pair: pair[0])
    # Settings of other data or classes have other columns.
    columns = dict.fromkeys(key for _, row in found for key in row)
    if found:
        table = ({key: row.get(key, "") for key in columns} for _, row in found)
        output.write_csv(table, path, overwrite=True)
