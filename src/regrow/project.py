"""Where this checkout is, and which package is its lab."""

import functools
import re
from pathlib import Path

from regrow.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"


@functools.cache
def lab_name() -> str:
    """Return the key `lab` of conf/train.yaml: the package of loop, models, tasks and data.

    Never read from a run's record: a foreign folder must not choose code. Raises UserError.
    """
    file = CONF / "train.yaml"
    text = file.read_text(encoding="utf-8")
    found = re.search(r"""^lab: *(["']?)([A-Za-z_]\w*)\1 *(?:#.*)?$""", text, re.MULTILINE)
    if found is None:
        raise UserError(
            f"lab: {file} has no such key. Name your package in src/ there, such as lab: lab."
        )
    return found[2]


def of_lab(name: str) -> str:
    """Return a dotted name within the lab, such as lab.loop, with the lab's own name."""
    return re.sub(r"^lab(?=\.|$)", lab_name(), name)
