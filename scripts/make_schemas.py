"""Write the JSON Schemas of conf/, with which editors complete and underline: make schemas

Writes schemas/, and names them in .vscode/settings.json, whose other settings stay.
"""

from __future__ import annotations

import sys

import _start  # noqa: F401  finds the package or explains the set-up

from regrow.cli.arguments import parse
from regrow.config import schemas
from regrow.errors import UserError
from regrow.failing import tell
from regrow.project import ROOT


def main() -> int:
    try:
        parse(sys.argv[1:], {}, text=__doc__ or "")
        for path in schemas.write():
            print(path.relative_to(ROOT))
    except UserError as error:
        tell(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
