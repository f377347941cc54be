"""`make bench-gpu`: run parts on a GPU, store their results, and write docs/gpu.md from them."""

from __future__ import annotations

import logging
import sys
import time

import torch

from benchmarks.gpu import page
from benchmarks.gpu.parts import PARTS, ROOT, Setting
from regrow.processes import terminal

HELP = f"""python -m benchmarks.gpu [PART …] [KEY=VALUE …]
Parts, in order of value, each at most four minutes on one H100: {", ".join(PARTS)}. Default: all.
results=build/bench-gpu  folder of the stored results; what is there is not measured again
data=FOLDER              CIFAR-10 in pictures (benchmarks/gpu/sprites.py); without, random images
page=docs/gpu.md         the page to write; page= for none
commit=…                 of the code, where git cannot say it
device=cuda              or cpu, to try the code
size=full                or tiny, to try the code"""


def main(*arguments: str) -> int:
    if "--help" in arguments:
        print(HELP)
        return 0
    given = dict(a.split("=", 1) for a in arguments if "=" in a)
    names = [a for a in arguments if "=" not in a] or list(PARTS)
    known = {"results": "build/bench-gpu", "data": "", "page": "docs/gpu.md"}
    known |= {"device": "cuda", "size": "full", "commit": ""}
    if unknown := [*(given.keys() - known.keys()), *(n for n in names if n not in PARTS)]:
        sys.exit(f"benchmarks: there is no {unknown[0]}\n{HELP}")
    known |= given
    for key, values in {"device": ("cuda", "cpu"), "size": ("full", "tiny")}.items():
        if known[key] not in values:
            sys.exit(f"benchmarks: {key}={known[key]} must be {' or '.join(values)}")
    if known["device"] == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks: there is no GPU here. device=cpu size=tiny tries the code.")
    setting = Setting(torch.device(known["device"]), known["size"] == "tiny", known["data"] or None)
    folder = ROOT / known["results"]
    tell_of_capture()
    torch.set_num_threads(1)  # of the host, as in train.py here
    failed = False

    def write() -> None:
        if known["page"]:
            page.write(ROOT / known["page"], folder, list(PARTS))

    for part in names:
        for name, run in PARTS[part](setting):
            stored = page.load(folder, part)
            if name in stored and not stored[name].get("failed"):
                print(f"{part}: {name} is there", flush=True)
                write()
                continue
            started = time.perf_counter()
            print(f"{part}: {name} …", flush=True)
            try:
                result = run()
            except Exception as error:  # the other results do not depend on it
                print(f"{part}: {name} failed: {type(error).__name__}: {error}", flush=True)
                failed = True
                continue
            seconds = time.perf_counter() - started
            page.store(
                folder, part, name, {**result, **page.machine(setting.device, known["commit"])}
            )
            write()
            failed |= bool(result.get("failed"))
            print(f"{part}: {name} took {seconds:.0f} s\n{page.text(name, result)}", flush=True)
    return int(failed)


def tell_of_capture() -> None:
    """Print what train.py logs of capture: whether a row measured captured steps."""
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(lambda record: record.msg.startswith("trainer.capture"))
    logger = logging.getLogger("regrow")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


if __name__ == "__main__":
    terminal.show()
    with terminal.may_be_unread():
        sys.exit(main(*sys.argv[1:]))
