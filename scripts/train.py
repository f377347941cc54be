"""Train: `python scripts/train.py optimizer=adamw scheduler=cosine`. Every option is in `conf/`."""

import _start  # noqa: F401  finds the package, or says what to set up
from omegaconf import DictConfig

from regrow.config import entry_point, faults_in_a_line
from regrow.start import start


def resumed(arguments: list[str]) -> None:
    from regrow.sweep import frozen  # for a resume alone

    frozen.resume_in_copy(arguments)


@entry_point("train", resumed)
def main(config: DictConfig) -> float | None:
    with faults_in_a_line():
        from regrow.launch import launch  # torch comes with it: only once the config is right

    return launch(config)


if __name__ == "__main__":
    start(main)
