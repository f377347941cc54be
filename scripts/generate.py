"""Continue a prompt with a trained language model, from its folder alone.

python scripts/generate.py run=outputs/text/latest prompt="Sir Walter"

The same command gives the same text: `seed` decides the draws. The text goes to standard output.
"""

from __future__ import annotations

import itertools
import sys

import _start  # noqa: F401  finds the package or explains the set-up

from regrow.cli.arguments import Arguments, Option, parse
from regrow.failing import in_one_line
from regrow.processes.begin import ending
from regrow.processes.terminal import may_be_unread

OPTIONS = {
    "run": Option("the run's folder", required=True),
    "prompt": Option("the text to continue; by default a new document", ""),
    "tokens": Option(
        "the most tokens to generate; a document may end earlier", 500, kind="integer"
    ),
    "temperature": Option("below 1: likelier tokens; 0: the likeliest", 1.0, kind="number"),
    "top_k": Option(
        "draw from this many of the likeliest tokens; by default from all", kind="integer"
    ),
    "seed": Option("a different seed gives a different text", 0, kind="count"),
    "checkpoint": Option("best, last or a name such as step_00000460", "best"),
    "device": Option(
        "auto, cpu, cuda or mps; by default the run's own", choices=("auto", "cpu", "cuda", "mps")
    ),
}


@ending()
@in_one_line()
@may_be_unread()
def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    generate(parse(given, OPTIONS, text=__doc__ or ""))


def generate(options: Arguments) -> None:
    # these import torch: only after the arguments are checked
    from regrow.runs.console import console
    from regrow.runs.generation import generate as pieces
    from regrow.runs.loaded import load_run, set_numerics

    with console():
        run = load_run(options["run"], which=options["checkpoint"], device=options["device"])
        set_numerics(run)
        prompt = str(options["prompt"])
        settings = {key: options[key] for key in ("tokens", "temperature", "top_k", "seed")}
        text = pieces(run, prompt, **settings)
        first = next(text, "")  # raises for a prompt that the model does not take
        for piece in itertools.chain((prompt, first), text):
            print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
