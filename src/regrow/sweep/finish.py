"""`python -m regrow.sweep.finish FOLDER JOB CODE`: finish a sweep's job on another machine.

Notes what the run's own folder does not record, and updates the sweep's table.
"""

from __future__ import annotations

import sys
from pathlib import Path

from regrow.processes.ranks import STOPPED
from regrow.processes.signals import name_of
from regrow.sweep import ledger, results


def finish(folder: Path, number: int, code: int) -> None:
    (entry,) = [entry for entry in ledger.entries(folder) if entry.number == number]
    slurm = ledger.noted(folder, number).get("slurm")
    its, reason = ledger.state_of(folder, entry)
    state = "failed"
    if its in ledger.GOOD or code in STOPPED:
        state, reason = "ended", None
    elif code < 0:
        reason = f"its process was killed by {name_of(-code)}"
    else:
        reason = (reason if its == "failed" else None) or last_error(folder, slurm)
    ledger.note(folder, number, state, reason, slurm=slurm)
    with ledger.alone(folder, ledger.RESULTS_LOCK):  # several jobs may end at once
        found = results.write_table(folder)
        content = ledger.read(folder)
        if all(row.state in ledger.ENDED for row in found.rows):
            results.write_page(folder, found, content.get("pictures", "none"))
        total = content.get("total", 0)
        good = all(row.state in ledger.GOOD for row in found.rows)
        ledger.write(folder, complete=good and len(found.rows) >= total)


def last_error(folder: Path, slurm: str | None) -> str:
    """Return the job's last printed error; its output may come from several processes."""
    for file in (folder / "slurm").glob(f"{slurm}_*.out") if slurm else ():
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in reversed(lines):
            if "error: " in line:
                return line.partition("error: ")[2]
    return "it ended without an error message"


if __name__ == "__main__":
    finish(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
