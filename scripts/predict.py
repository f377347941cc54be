"""Predict with a trained run, from its folder alone.

python scripts/predict.py run=outputs/digits/latest input=images/ output=predictions.csv

The input is an image, a folder of images, an .npy array (N, …) in the data's own raw units, or a
.csv with the columns that the run was trained on. The output has a line per example: its name, the
predicted class and the probability of each (of the positive one alone, for a binary task), or the
value in the targets' own units; the first ones and the number of each class are printed. For a
segmentation, the output is a folder with a mask per example, as PNG. Without output=, it is written
to the current folder, as predictions.csv or, for masks, predictions/.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import _start  # noqa: F401  finds the package or explains the set-up

from regrow.cli.arguments import Arguments, Option, parse
from regrow.config.recorded import as_shown, gives_masks, refuse_other_folder
from regrow.errors import DataError, UserError, printable
from regrow.failing import in_one_line
from regrow.processes.begin import ending
from regrow.processes.terminal import may_be_unread
from regrow.record.output import (
    refuse_existing,
    refuse_existing_folder,
    write_csv,
    write_images,
)

OPTIONS = {
    "run": Option("the run's folder", required=True),
    "input": Option("an image, a folder of images, .npy or .csv", required=True),
    "output": Option(
        "the .csv file to write, or the folder of masks; by default predictions.csv, or "
        "predictions/ for masks, in the current folder"
    ),
    "overwrite": Option("replace an existing file", False, kind="boolean"),
    "checkpoint": Option("best, last or a name such as step_00000460", "best"),
    "device": Option(
        "auto, cpu, cuda or mps; by default the run's own", choices=("auto", "cpu", "cuda", "mps")
    ),
    "skip_broken": Option(
        "leave out images of the folder that cannot be read, and name them", False, kind="boolean"
    ),
    "batch_size": Option("examples per forward pass", 256, kind="integer"),
}
SHOWN = 20  # names of images that are left out


@ending()
@in_one_line()
@may_be_unread()
def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    predict(parse(given, OPTIONS, text=__doc__ or ""))


def predict(options: Arguments) -> None:
    folder, source = Path(options["run"]), Path(options["input"])
    refuse_other_folder(folder)
    if not source.exists():
        raise UserError(f"input={source} does not exist. Give an image, a folder, .npy or .csv.")
    has_masks = gives_masks(folder)
    default = Path.cwd() / ("predictions" if has_masks else "predictions.csv")
    output = Path(options["output"] or default)
    if output.exists() and output.samefile(source):
        raise UserError(f"output={output} is the input itself. Choose another name.")
    overwrite = options["overwrite"]
    (refuse_existing_folder if has_masks else refuse_existing)(output, overwrite)
    if not options["output"]:
        print(printable(f"writes to {output}; output=… names another place\n"), flush=True)
    # these import torch: only after the arguments are checked
    from tqdm import tqdm

    from regrow.runs.console import console
    from regrow.runs.inference import predict as predictions
    from regrow.runs.inference import predict_masks
    from regrow.runs.loaded import load_run, set_numerics
    from regrow.runs.predictions import Glance, kind_of

    with console(), _offering_to_skip(source):
        run = load_run(options["run"], which=options["checkpoint"], device=options["device"])
        set_numerics(run)
        with contextlib.closing(run):
            glance = Glance(kind_of(run.task), run.class_names)
            broken: list[str] | None = [] if options["skip_broken"] else None
            how = (run, source, options["batch_size"], broken)
            bar = {"unit": "example", "leave": False, "disable": None}
            if has_masks:
                masks = tqdm(predict_masks(*how), **bar)
                count = write_images(masks, output, overwrite=overwrite)
            else:
                rows = glance.passing(tqdm(predictions(*how), **bar))
                count = write_csv(rows, output, overwrite=overwrite)
    for line in glance.lines():
        print(line)
    written = f"{count:,} prediction{'s'[: count != 1]}"
    its = f"{as_shown(options['run'], run.folder)}, step {run.step} ({options['checkpoint']})"
    print(printable(f"{written} of {its}, in {output}"))
    if broken:
        more = f" and {len(broken) - SHOWN:,} more" if len(broken) > SHOWN else ""
        names = ", ".join(broken[:SHOWN])
        print(printable(f"left out, as they cannot be read: {names}{more}"))


@contextlib.contextmanager
def _offering_to_skip(source: Path) -> Iterator[None]:
    """Offer `skip_broken` in the error about a broken image of a folder."""
    from regrow.feeding.decoding import BrokenImage

    try:
        yield
    except BrokenImage as error:
        if not source.is_dir():
            raise
        raise DataError(f"{error} To predict for the others: skip_broken=true") from None


if __name__ == "__main__":
    main()
