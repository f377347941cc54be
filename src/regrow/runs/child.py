"""`python -m regrow.runs.child`: one of the processes that `ranks.start` starts.

Importing torch takes seconds. A signal must end the rank during them, too.
"""

from __future__ import annotations

import os

from regrow.processes import begin
from regrow.processes.parent import die_with_parent
from regrow.processes.signals import STOPPING

if __name__ == "__main__":
    begin.child(STOPPING)
    die_with_parent(int(os.environ["REGROW_PARENT"]))

    with begin.ending():
        from regrow.runs import worker

        worker.main()
