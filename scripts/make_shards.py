"""Write a data set as tar shards with an index, for `data=shards`.

python scripts/make_shards.py folder=photos output=photos_shards
python scripts/make_shards.py data=digits output=digits_shards
python scripts/make_shards.py data._target_=datasets.load_dataset data.path=mnist \\
    inputs=image targets=label output=mnist_shards

Give one source: a folder of images as for data=image_folder, a data set of conf/data, or map-style
data sets by their `_target_`. An interrupted command continues when it is repeated. The index is
written last.
"""

from __future__ import annotations

import sys
from pathlib import Path

import _start  # noqa: F401  finds the package or explains the set-up

from regrow.cli.arguments import Arguments, Option, parse
from regrow.errors import UserError
from regrow.failing import in_one_line
from regrow.processes.terminal import drop_unread

OPTIONS = {
    "output": Option("the folder to write", required=True),
    "folder": Option("a folder of images: <class>/…, or train/<class>/…, val/<class>/…"),
    "data": Option("a data set of conf/data; data.<key>=… sets its keys, as for train.py"),
    "inputs": Option("the field of an item that is the input, such as image"),
    "targets": Option("the field of an item that is the target, such as label"),
    "shard_mb": Option("size of a shard in 10⁶ bytes", 256.0, kind="number"),
    "block_mb": Option("size of what one read fetches, in 10⁶ bytes", 1.0, kind="number"),
    "shuffle": Option("permute train, so that each block holds a mixture", True, kind="boolean"),
    "seed": Option(
        "a different seed gives a different order and different splits", 0, kind="count"
    ),
    "overwrite": Option("replace existing shards", False, kind="boolean"),
}


@in_one_line()
def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    own = [each for each in given if not each.startswith("data.")]
    options = parse(own, OPTIONS, text=__doc__ or "", takes_data=True)
    try:
        make(options, [each for each in given if each.startswith("data.")])
    except BrokenPipeError:  # `| head -1` closes the pipe early
        if not drop_unread():
            raise
        raise SystemExit(1) from None


def make(options: Arguments, overrides: list[str]) -> None:
    output, folder, data = Path(options["output"]), options["folder"], options["data"]
    if folder and data:
        raise UserError(f"folder={folder} and data={data}: give one of them.")
    if not folder and not data and not overrides:
        raise UserError("there is nothing to write: add folder=…, data=… or data._target_=…")
    for key in ("shard_mb", "block_mb"):
        if not options[key] > 0:
            raise UserError(f"{key}={options[key]:g} must be more than 0.")
    fields = {key: options[key] for key in ("inputs", "targets") if options[key]}
    if len(fields) == 1 or (fields and (folder or data)):
        raise UserError("inputs=… and targets=… are given together, for data._target_=… alone.")
    # these import torch: only after the arguments are checked
    from regrow.cli.data_alone import data_of, datasets_of
    from regrow.config.command_line import override, shell
    from regrow.feeding.images import class_folders
    from regrow.feeding.writing_shards import (
        Layout,
        of_data,
        of_datasets,
        refuse_other,
        write_shards,
    )
    from regrow.runs.console import console

    refuse_other(output, options["overwrite"])
    with console():
        if folder:
            count = len(class_folders(folder))
            numbers = [f"data.num_classes={count}", f"data.num_outputs={count}"]
            overrides = [
                "data=image_folder",
                override("data.root", folder),
                *numbers,
                *overrides,
            ]
        elif data:
            overrides = [f"data={data}", *overrides]
        if folder or data:
            sets, facts = of_data(data_of([*overrides, f"seed={options['seed']}"]))
        else:
            sets, facts = of_datasets(datasets_of(overrides, options["seed"]), fields)
        layout = Layout(
            int(options["shard_mb"] * 1e6),
            int(options["block_mb"] * 1e6),
            options["shuffle"],
            options["seed"],
        )
        index = write_shards(
            output, sets, facts, layout, overwrite=options["overwrite"], told=print
        )
    counts = {name: sum(s.num_examples for s in shards) for name, shards in index.sets.items()}
    print(f"{', '.join(f'{name} {count:,}' for name, count in counts.items())} in {output}")
    if facts.class_names:
        place, number = override("data.source.root", output), len(facts.class_names)
        print(shell(["data=shards", place, f"data.num_classes={number}"]))


if __name__ == "__main__":
    main()
