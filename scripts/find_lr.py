"""Look for a learning rate: `python scripts/find_lr.py model=cnn`. Options as for train.py, and
`find_lr.…` (see `conf/find_lr.yaml`)."""

import _start  # noqa: F401  finds the package or explains the set-up
from omegaconf import DictConfig

from regrow.cli.entry import entry_point
from regrow.failing import in_one_line


# As @hydra.main, which is what fish's completion looks for in this file.
@entry_point("find_lr")
def main(config: DictConfig) -> float:
    with in_one_line():
        from regrow.runs.find_lr import find_lr  # imports torch: only after the config is checked

    return find_lr(config)


if __name__ == "__main__":
    main()
