"""Write a sweep's results from its folder: results.csv, sweep.html and the table at the end."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import yaml

from regrow.config import flags
from regrow.config.command_line import command, key_of
from regrow.config.yaml_files import plain_value
from regrow.errors import UserError, brief
from regrow.record import comparison, manifest, pages, report, side_by_side
from regrow.record.comparison import Comparison, Row
from regrow.record.importances import Importance, of_study
from regrow.record.report import Run
from regrow.runs.trial import STORAGE, STUDY, open_storage
from regrow.sweep import ledger

log = logging.getLogger("regrow")

SHOWN = 20  # most settings shown in the terminal
CSV, PAGE = "results.csv", "sweep.html"


def rows_of(folder: Path) -> list[Row]:
    """Return a row for each job, in the order of their numbers."""
    rows = []
    for entry in ledger.entries(folder):
        its, reason = ledger.state_of(folder, entry)
        run = folder / entry.folder
        log = ledger.log_of(folder, entry.number)
        loaded = report.load(run) if report.is_run(run) else None
        if loaded is not None and its == "completed" and (more := asked_since(entry, loaded)):
            reason = f"its run was resumed outside the sweep with {' '.join(more)}"
        rows.append(
            Row(
                job=str(entry.number),
                state=its,
                swept=entry.swept,
                seed=None if loaded is None else loaded.config.get("seed"),
                run=loaded,
                folder=entry.folder,
                reason=reason,
                log=str(log.relative_to(folder)) if log.exists() else None,
            )
        )
    return rows


def asked_since(entry: ledger.JobEntry, run: Run) -> list[str]:
    """Return the overrides by which a job's run was changed outside the sweep."""
    shares = "trainer.num_threads="  # added by the sweep itself
    known = [_read(override) for override in entry.overrides]
    return [o for o in run.overrides if _read(o) not in known and not o.startswith(shares)]


def _read(override: str) -> tuple[str, Any]:
    """Return the key and the value, which is the same for 1e-2 and 0.01."""
    key, _, text = override.partition("=")
    with contextlib.suppress(yaml.YAMLError):
        return key, plain_value(text)
    return key, text


def write_table(folder: Path) -> Comparison:
    """Write results.csv of the sweep in `folder`, and return the comparison.

    Raises UserError if there is no sweep.
    """
    content = ledger.read(folder)
    if not content:
        raise UserError(f"{folder} holds no sweep: there is no {ledger.FILE}.")
    found = comparison.compare(
        rows_of(folder), content.get("metric") or "", content.get("mode") or ""
    )
    comparison.write_csv(found.rows, folder / CSV)
    if all(row.state in ledger.ENDED for row in found.rows):
        comparison.write_out_of_fold(found.rows, folder / comparison.OUT_OF_FOLD)
    return found


def write_page(
    folder: Path, found: Comparison, pictures: str = "none", output: Path | None = None
) -> Path:
    """Draw the best job's plots if pictures="best", then write sweep.html and return its path."""
    if found.best is not None and pictures == "best":
        draw(folder / found.best.folder)
    title = f"{ledger.read(folder).get('name', 'sweep')}: {len(found.rows)} jobs"
    searched = importance_of(folder, found) if (folder / STORAGE).is_file() else None
    return side_by_side.write_page(found, output or folder / PAGE, title, searched)


def importance_of(folder: Path, found: Comparison) -> Importance:
    """Return Optuna's importances of a search's parameters, by functional ANOVA."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.load_study(study_name=STUDY, storage=open_storage(folder))
        first = (lambda trial: trial.values[0]) if len(study.directions) > 1 else None
        complete = (optuna.trial.TrialState.COMPLETE,)
        count = len(study.get_trials(deepcopy=False, states=complete))
        shares = of_study(study, count, first)
    except Exception as error:  # as for a search of one trial; the sweep itself is complete
        return Importance({}, f"Not computed: {brief(error)}")
    if not shares:
        return Importance({}, "Not computed: no trial is complete, or none differs.")
    short = pages.short_names([key_of(key) for key in shares])
    note = (
        f"Share of the variance of {found.metric} that each parameter explains: Optuna's "
        f"functional ANOVA over {count} complete trials. It is rough below about a hundred."
    )
    return Importance({short[key_of(key)]: share for key, share in shares.items()}, note)


def draw(run: Path) -> None:
    """Draw a run's plots and page, unless it has them. A failure is only logged."""
    if (run / "report.html").exists():
        return
    try:
        report.draw(run)
    except Exception:
        log.warning("no plots and no report of %s", run, exc_info=True)


def summary_of(folder: Path, found: Comparison) -> list[str]:
    """Return the lines of the summary at the end of a sweep."""
    lines = []
    if found.settings:
        header, rows = comparison.table_of(found)
        lines += ["", *comparison.as_text(header, rows[:SHOWN])]
        if len(rows) > SHOWN:
            lines.append(f"… and {len(rows) - SHOWN} more")
        lines.append("")
    best = found.best
    if best is not None and best.run is not None:
        run = Path(os.path.relpath(folder / best.folder))
        places = flags.arguments_of(flags.of_sweep(folder))
        lines += [
            f"best job: {best.job}, {found.metric} "
            f"{comparison.shown(best.value(found.metric) or 0.0)}"
            + (f": {best.label}" if best.label else ""),
            f"          {command(*places, *best.run.overrides, root=manifest.own_root())}",
            f"          {run / 'checkpoints' / 'best'}",
        ]
    if found.left_out:
        jobs = ", ".join(row.job for row in found.left_out)
        lines.append(f"not compared, as they have no {found.metric}: job {jobs}")
    for row in found.rows:
        if row.state != "completed" or row.reason:
            why = f": {row.reason}" if row.reason else ""
            where = f" ({os.path.relpath(folder / row.log)})" if row.log else ""
            label = f", {row.label}" if row.label else ""
            lines.append(f"{row.state}: job {row.job}{label}{why}{where}")
    if (folder / comparison.OUT_OF_FOLD).is_file():
        lines.append(f"folds:    {os.path.relpath(folder / comparison.OUT_OF_FOLD)}")
    lines += [
        f"table:    {os.path.relpath(folder / CSV)}",
        f"page:     {os.path.relpath(folder / PAGE)}",
    ]
    return lines
