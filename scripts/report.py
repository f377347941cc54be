"""Write the page of a run, or one page and one table of several, with each setting over its seeds.

python scripts/report.py outputs/digits/latest               writes report.html in the run's folder
python scripts/report.py outputs/digits/a outputs/digits/b   writes comparison.html and .csv there
python scripts/report.py outputs/digits/sweeps/latest        writes sweep.html, results.csv in there
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import _start  # noqa: F401  finds the package or explains the set-up

from regrow.cli.arguments import Option, parse
from regrow.errors import UserError, machine_fault, printable
from regrow.failing import in_one_line, tell
from regrow.processes.begin import ending
from regrow.processes.terminal import may_be_unread
from regrow.record import comparison, report, side_by_side
from regrow.record.output import refuse_existing
from regrow.record.ownership import SWEEP
from regrow.sweep import results

OPTIONS = {
    "output": Option("the page to write, a .html file; by default in that folder"),
    "overwrite": Option("replace an existing page or table", False, kind="boolean"),
}


@in_one_line()
@may_be_unread()
def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    try:
        options = parse([a for a in given if not is_folder(a)], OPTIONS, text=__doc__ or "")
        output = Path(options["output"]) if options["output"] else None
        folders = [Path(a) for a in given if is_folder(a)]
        if not folders:
            raise UserError("Give a run's folder, such as outputs/digits/latest, or several.")
        if output is not None:
            if output.suffix != ".html":
                raise UserError(f"output={output} must end in .html.")
            refuse_existing(output, options["overwrite"])
        print(printable(str(make(folders, output, overwrite=options["overwrite"]))))
    except BrokenPipeError:  # `| head -1` closes the pipe early
        raise
    except (UserError, OSError) as error:
        tell(str(machine_fault(error) or error))
        return 2
    return 0


def is_folder(argument: str) -> bool:
    """Return True if an argument is a folder, even if its name looks like a key."""
    key, equals, _ = argument.partition("=")
    if argument in ("-h", "--help") or (equals and key in OPTIONS):
        return False
    return os.path.lexists(argument) or not (equals or argument.startswith("--"))


def make(folders: list[Path], output: Path | None, *, overwrite: bool) -> Path:
    """Write the page of the runs in `folders`; return its path. Raises UserError without runs."""
    if len(folders) == 1 and (folders[0] / SWEEP).is_file():
        return of_sweep(folders[0], output)
    runs: dict[Path, None] = {}  # resolved: `latest` and its run count once
    without = []
    for folder in folders:
        found = report.find_runs(folder)
        runs |= dict.fromkeys(run.resolve() for run in found)
        if not found and (folder.is_dir() or not folder.exists()):  # an old page is not a run
            without.append(str(folder))
    if not runs:
        raise UserError(
            f"{', '.join(without)}: no run is there. Give a run's folder, such as "
            "outputs/digits/latest, or a folder of runs."
        )
    if without:  # e.g. matched by outputs/digits/*
        print(f"note: no run in {', '.join(without)}", file=sys.stderr)
    if len(runs) == 1:
        run = next(iter(runs))
        return report.draw(run) if output is None else report.write(run, output)
    if output is None:
        common = Path(os.path.commonpath([folder.absolute() for folder in folders]))
        if Path.cwd().is_relative_to(common):  # they have no folder in common
            common = Path()
        output = Path(os.path.relpath(common)) / "comparison.html"
    else:
        refuse_existing(output.with_suffix(".csv"), overwrite)
    found = comparison.compare(comparison.rows_of([report.load(run) for run in runs]))
    for line in comparison.as_text(*comparison.table_of(found)) if found.settings else ():
        print(printable(line))
    if found.left_out:
        others = ", ".join(os.path.relpath(row.job) for row in found.left_out)
        print(f"note: not compared, as they have no {found.metric}: {printable(others)}")
    if found.repeated:
        others = ", ".join(os.path.relpath(row.job) for row in found.repeated)
        print(
            f"note: not counted, as another run of the same setting and seed is, with another "
            f"{found.metric}: {printable(others)}"
        )
    comparison.write_csv(found.rows, output.with_suffix(".csv"))
    return side_by_side.write_page(found, output)


def of_sweep(folder: Path, output: Path | None) -> Path:
    """Write a sweep's table and page, even while it runs, and return the page's path."""
    found = results.write_table(folder)
    for line in results.summary_of(folder, found):
        print(printable(line))
    return results.write_page(folder, found, output=output)


if __name__ == "__main__":
    with ending():
        sys.exit(main())
