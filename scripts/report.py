"""Write the page of a run, or one page and one table of several, with each setting over its seeds.

python scripts/report.py outputs/digits/latest               writes report.html in the run's folder
python scripts/report.py outputs/digits/a outputs/digits/b   writes comparison.html and .csv there
python scripts/report.py outputs/digits/sweeps/latest        writes sweep.html, results.csv in there
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import _start  # noqa: F401  finds the package, or says what to set up

from regrow.errors import UserError, printable
from regrow.record import comparison, report
from regrow.resume import SWEEP
from regrow.sweep import results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,  # an error is one line
    )
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders of runs")
    parser.add_argument("--output", type=Path, help="the page; in the folder unless given")
    options = parser.parse_args(arguments)
    try:
        print(printable(str(make(options.folders, options.output))))
    except (UserError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


def make(folders: list[Path], output: Path | None) -> Path:
    """The page of the runs in `folders`; raises UserError where there is none."""
    if len(folders) == 1 and (folders[0] / SWEEP).is_file():
        return of_sweep(folders[0], output)
    runs: dict[Path, None] = {}  # resolved: `latest` and the run it names are one
    without = []
    for folder in folders:
        found = report.find_runs(folder)
        runs |= dict.fromkeys(run.resolve() for run in found)
        if not found and (folder.is_dir() or not folder.exists()):  # the page of before is no run
            without.append(str(folder))
    if not runs:
        raise UserError(
            f"{', '.join(without)}: no run is there. Give a run's folder, such as "
            "outputs/digits/latest, or a folder of runs."
        )
    if without:  # as outputs/digits/* matches
        print(f"note: no run in {', '.join(without)}", file=sys.stderr)
    if len(runs) == 1:
        run = next(iter(runs))
        return report.draw(run, output)
    if output is None:
        common = Path(os.path.commonpath([folder.absolute() for folder in folders]))
        if Path.cwd().is_relative_to(common):  # they have nothing in common
            common = Path()
        output = Path(os.path.relpath(common)) / "comparison.html"
    found = comparison.compare(comparison.rows_of([report.load(run) for run in runs]))
    for line in comparison.as_text(*comparison.table_of(found)) if found.settings else ():
        print(printable(line))
    comparison.write_csv(found.rows, output.with_suffix(".csv"))
    return comparison.write_page(found, output)


def of_sweep(folder: Path, output: Path | None) -> Path:
    """How a sweep stands, also while it runs."""
    found = results.write_table(folder)
    for line in results.summary_of(folder, found):
        print(printable(line))
    return results.write_page(folder, found, output=output)


if __name__ == "__main__":
    sys.exit(main())
