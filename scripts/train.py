"""Train: `python scripts/train.py optimizer=adamw scheduler=cosine`. Every option is in `conf/`."""

import _start  # noqa: F401  finds the package, or says what to set up
from omegaconf import DictConfig

from regrow.config import entry_point
from regrow.ranks import follows


@entry_point("train")
def main(config: DictConfig) -> float | None:
    from regrow.launch import launch  # torch comes with it: only once the config is right

    return launch(config)


if __name__ == "__main__":
    if follows():  # torchrun or srun started several: the first composes the config for all
        from regrow import worker

        worker.main()
    else:
        main()
