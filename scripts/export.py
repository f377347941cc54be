"""Write a trained run's tested weights as one file for other programs, from its folder alone.

python scripts/export.py run=outputs/digits/latest format=onnx output=digits.onnx

onnx and pt2 hold all that `run.predict` does: they take raw inputs, and give the prediction and the
probabilities, or the values in the targets' own units. The batch may have any size. safetensors
holds the weights, and the preprocessing as JSON in its metadata. Each file is read again and
compared with the model over a whole split before it is put in its place.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import _start  # noqa: F401  finds the package or explains the set-up

from regrow.cli.arguments import Arguments, Option, parse
from regrow.extras import require
from regrow.failing import in_one_line
from regrow.processes.begin import ending
from regrow.processes.terminal import may_be_unread
from regrow.record.output import refuse_existing, write_bytes

NEEDS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "pt2": (),
    "safetensors": ("safetensors",),
}
OPTIONS = {
    "run": Option("the run's folder", required=True),
    "format": Option("onnx, pt2 (torch.export) or safetensors", choices=(*NEEDS,), required=True),
    "output": Option("the file to write; by default model.<format> in the current folder"),
    "overwrite": Option("replace an existing file", False, kind="boolean"),
    "checkpoint": Option("best, last or a name such as step_00000460", "best"),
    "check": Option("compare the file with the model over the test split", True, kind="boolean"),
}


@ending()
@in_one_line()
@may_be_unread()
def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    export(parse(given, OPTIONS, text=__doc__ or "", takes_data=True))


def export(options: Arguments) -> None:
    form, checkpoint = options["format"], options["checkpoint"]
    output = Path(options["output"] or f"model.{form}")
    refuse_existing(output, options["overwrite"])
    require(f"format={form}", "export", *NEEDS[form])
    # these import torch: only after the arguments are checked
    from regrow.runs.console import console
    from regrow.runs.export import exported
    from regrow.runs.loaded import load_run, set_numerics

    with console():
        run = load_run(options["run"], which=checkpoint, device="cpu", data=options.data)
        set_numerics(run)
        with contextlib.closing(run):
            content, checked = exported(run, form, check=options["check"])
    write_bytes(content, output, overwrite=options["overwrite"])
    print(f"step {run.step} ({checkpoint}) as {form} in {output}, {len(content):,} bytes")
    print(checked)


if __name__ == "__main__":
    main()
