"""`python -m regrow.sweep.finish FOLDER JOB CODE`: finish a sweep's job on another machine.

Notes what the run's own folder does not record, and updates the sweep's table.
"""

from __future__ import annotations

import sys
from pathlib import Path

from regrow.processes.ranks import STOPPED
from regrow.sweep import results, state


def finish(folder: Path, number: int, code: int) -> None:
    (entry,) = [entry for entry in state.entries(folder) if entry.number == number]
    slurm = state.noted(folder, number).get("slurm")
    its, reason = state.state_of(folder, entry)
    if code == 0 or code in STOPPED:
        state.note(folder, number, "ended", slurm=slurm)
    elif code < 0:
        reason = f"its process was killed by signal {-code}"
        state.note(folder, number, "failed", reason, slurm=slurm)
    else:
        reason = (reason if its == "failed" else None) or last_error(folder, slurm)
        state.note(folder, number, "failed", reason, slurm=slurm)
    with state.alone(folder, state.RESULTS_LOCK):  # several jobs may end at once
        found = results.write_table(folder)
        if all(row.state in state.ENDED for row in found.rows):
            results.write_page(folder, found)
        total = state.read(folder).get("total", 0)
        good = all(row.state in state.GOOD for row in found.rows)
        state.write(folder, complete=good and len(found.rows) >= total)


def last_error(folder: Path, slurm: str | None) -> str:
    """Return the job's last printed error; its output may come from several processes."""
    for file in (folder / "slurm").glob(f"{slurm}_*.out") if slurm else ():
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in reversed(lines):
            if "error: " in line:
                return line.partition("error: ")[2]
    return "it ended without a word"


if __name__ == "__main__":
    finish(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
