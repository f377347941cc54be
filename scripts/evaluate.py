"""Measure a trained run on a split of the data that its folder names, or that data.<key>=… gives.

python scripts/evaluate.py run=outputs/digits/latest split=test
python scripts/evaluate.py run=outputs/digits/latest split=val checkpoint=last data.root=/new/data
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import _start  # noqa: F401  finds the package or explains the set-up

from regrow.cli.arguments import Arguments, Option, parse
from regrow.config.recorded import as_shown
from regrow.errors import UserError, printable
from regrow.failing import in_one_line
from regrow.processes.begin import ending
from regrow.processes.terminal import may_be_unread
from regrow.record import by_class
from regrow.record.earlier import differences, write_over
from regrow.record.output import refuse_existing, write_text

OPTIONS = {
    "run": Option("the run's folder", required=True),
    "split": Option("train, val, test or any other set of the data", "test"),
    "checkpoint": Option("best, last or a name such as step_00000460", "best"),
    "device": Option(
        "auto, cpu, cuda or mps; by default the run's own", choices=("auto", "cpu", "cuda", "mps")
    ),
    "output": Option(
        "a .json file; by default evaluation_<split>.json in the run's folder (an earlier one with "
        "other numbers is kept as ….1.json)"
    ),
    "overwrite": Option("replace an existing file", False, kind="boolean"),
}


@ending()
@in_one_line()
@may_be_unread()
def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    evaluate(parse(given, OPTIONS, text=__doc__ or "", takes_data=True))


def evaluate(options: Arguments) -> None:
    output = Path(options["output"]) if options["output"] else None
    if output is not None:
        refuse_existing(output, options["overwrite"])
    # these import torch: only after the arguments are checked
    from regrow.record.records import as_json, load_summary
    from regrow.runs.console import console
    from regrow.runs.inference import changed_split, draws_of, other_draws
    from regrow.runs.inference import evaluate as measured
    from regrow.runs.loaded import load_run, set_numerics

    with console():
        split, checkpoint = options["split"], options["checkpoint"]
        run = load_run(
            options["run"], which=checkpoint, device=options["device"], data=options.data
        )
        name = f"evaluation_{split}{'' if checkpoint == 'best' else f'_{checkpoint}'}.json"
        set_numerics(run)
        draws = draws_of(run, split)
        with contextlib.closing(run):
            values = measured(run, split, draws)
            changed = "" if options.data else changed_split(run, split)

    shown = {key: value for key, value in values.items() if key.count("/") == 1}
    width = max(len(key) for key in shown)
    its = f"{as_shown(options['run'], run.folder)}, step {run.step} ({checkpoint}), {split}"
    print(printable(its), end=": ")
    print(f"{run.data.num_examples[split]:,} examples, on {run.device} in {run.precision}\n")
    for key, value in shown.items():
        print(printable(f"  {key.ljust(width)}  {value:.5g}"))
    where = str(output or run.folder / name)
    if lines := by_class.table(values, split, where):
        print("", *(printable(line) for line in lines), sep="\n")
    content = {
        "run": str(run.folder),
        "checkpoint": run.checkpoint,
        "step": run.step,
        "split": split,
        "examples": run.data.num_examples[split],
        "swapped": options.data,
        "changed": changed or None,
        "device": str(run.device),
        "precision": run.precision,
        "values": values,
        "draws": draws.drawn,
    }
    before = ""
    if output is not None:
        write_text(as_json(content), output, overwrite=options["overwrite"])
    else:
        output = run.folder / name
        try:
            before = write_over(output, content)
        except OSError as error:
            raise UserError(
                f"{output} cannot be written: {error.strerror}. Name a file: output=….json"
            ) from None
    summary = load_summary(run.folder, whole=False)
    told = (summary or {}).get(split)  # a pruned trial has no test
    if split in run.data.num_examples and checkpoint == "best" and not options.data and told:
        print(f"\nThe run itself measured {compared(told, values)}.")
    if changed:
        print(
            printable(
                f"\nThe data has changed since the run ({changed}). If its splits are drawn by "
                f"fractions, they are drawn again, and {split} may hold examples that the run "
                "trained on."
            )
        )
    if draws.drawn and (reasons := other_draws(run, options.data)):
        print(
            "\nThe model or its loss draws random numbers in evaluation, so these numbers may "
            f"differ from the run's own: {'; '.join(reasons)}."
        )
    if before:
        print(printable(f"\n{before}."))
    print(f"\nwritten: {output}")


def compared(told: Mapping[str, float], values: Mapping[str, float]) -> str:
    """Return how the common metrics compare, and which metrics only one side has."""
    both = sorted(told.keys() & values.keys())
    if all(repr(told[key]) == repr(values[key]) for key in both):  # NaN equals NaN
        result = "the same"
    else:
        is_close = all(
            isinstance(told[key], int | float)
            and (
                math.isclose(told[key], values[key], rel_tol=1e-4, abs_tol=1e-6)
                or (values[key] != values[key] and told[key] != told[key])
            )
            for key in both
        )
        # Another number of processes or threads changes the order of summation.
        result = "the same but for rounding"
        if not is_close:
            result = f"other numbers: {differences(told, values)}"
    for which, keys in (
        ("it did not measure", values.keys() - told.keys()),
        ("this evaluation does not measure", told.keys() - values.keys()),
    ):
        if keys:
            result += f"; {which} {', '.join(sorted(keys))}"
    return result


if __name__ == "__main__":
    main()
