"""Train: `python scripts/train.py optimizer=adamw scheduler=cosine`. Every option is in `conf/`."""

import _start  # noqa: F401  finds the package or explains the set-up
from omegaconf import DictConfig

from regrow.cli.entry import entry_point
from regrow.cli.start import start
from regrow.failing import in_one_line


def resumed(arguments: list[str]) -> None:
    from regrow.sweep import frozen  # only needed for a resume

    frozen.resume_in_copy(arguments)


# As @hydra.main, which is what fish's completion looks for in this file.
@entry_point("train", resumed)
def main(config: DictConfig) -> float | None:
    with in_one_line():
        from regrow.runs.launch import launch  # imports torch: only after the config is checked

    return launch(config)


if __name__ == "__main__":
    start(main)
