"""Pictures of a few examples, wrong or with their masks, for a run's page. Values as JSON holds."""

from __future__ import annotations

import io
import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.record.records import read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

NUM_SHOWN = 4
NUM_WRONG = 16
MOST_WRONG_PIXELS = 96  # of a side, as there are more of them
MOST_PIXELS = 256  # of a side; larger pictures keep every second pixel, or fewer
IGNORED = "#ffffff"
INK = "#24292f"  # of text; a page has its own
MAX_NAMES = 24  # in a legend


def of_masks(
    inputs: Any,
    masks: Mapping[str, Tensor],
    class_names: Sequence[str],
    ignore_index: int | None,
    as_pixels: Callable[[Tensor], Tensor] | None,
) -> dict[str, Any]:
    """Return the first examples: the input and each of the `masks` (B, H, W), as PNG in base64.

    `as_pixels` converts inputs (B, C, H, W) to uint8; None: by the range of their values. Inputs
    that are not one batch of images give nothing. Ignored pixels get the index after the classes.
    """
    if getattr(inputs, "ndim", None) != 4:  # several inputs are a tuple or a mapping
        return {}
    every = -(-max(inputs.shape[2:]) // MOST_PIXELS)
    columns = {"input": _pngs(inputs[:NUM_SHOWN], every, as_pixels)}
    for name, mask in masks.items():
        classes = mask[:NUM_SHOWN, ::every, ::every].long().cpu()
        if ignore_index is not None:
            classes = classes.masked_fill(classes == ignore_index, len(class_names))
        columns[name] = [_png(one[None]) for one in classes]
    return {"examples": columns, "class_names": list(class_names)}


def of_wrong(
    batch: Any,
    outputs: Any,
    predict: Callable[[Any], Mapping[str, Tensor]],
    class_names: Sequence[str],
    as_pixels: Callable[[Tensor], Tensor] | None,
) -> dict[str, Any]:
    """Return the wrongly classified images of a batch, in its order; at most `NUM_WRONG`.

    Takes inputs (B, C, H, W), targets (B,), (B, 1) or probabilities (B, classes), and outputs, of
    which `predict` gives `prediction` (B,), and `probability` (B, classes), or (B,) that of class
    1. Targets without a name, such as ignored ones, do not count. Anything else gives nothing.
    `row` is an image's place in the batch. `images` is the number of those that count.
    """
    inputs, targets = batch.inputs, batch.targets
    has_images = getattr(inputs, "ndim", None) == 4 and inputs.is_floating_point()
    if not has_images or getattr(outputs, "ndim", 3) > 2 or not batch.num_local:
        return {}
    found = predict(outputs)
    predicted = found["prediction"]
    targets = targets.argmax(1) if targets.ndim == 2 and targets.shape[1] > 1 else targets.flatten()
    targets = targets.gt(0.5).long() if targets.is_floating_point() else targets
    counts = ((targets >= 0) & (targets < len(class_names)))[: batch.num_local]
    wrong = (predicted != targets)[: batch.num_local] & counts
    chosen, images = wrong.nonzero().flatten()[:NUM_WRONG], {"images": int(counts.sum())}
    if not len(chosen):
        return images
    of_each: list[float | None] = [None] * len(chosen)
    if "probability" in found:
        probability = found["probability"][chosen]
        if probability.ndim == 2:
            probability = probability.gather(1, predicted[chosen, None]).flatten()
        else:
            probability = probability.where(predicted[chosen] == 1, 1 - probability)
        of_each = probability.tolist()
    every = -(-max(inputs.shape[2:]) // MOST_WRONG_PIXELS)
    columns = {
        "image": _pngs(inputs[chosen], every, as_pixels),
        "true": [str(class_names[index]) for index in targets[chosen].tolist()],
        "predicted": [str(class_names[index]) for index in predicted[chosen].tolist()],
        "probability": of_each,
        "row": chosen.tolist(),
    }
    return {**images, "wrong": columns}


def has_room(examples: Mapping[str, Any]) -> bool:
    """Return True if another batch may add to the examples: only wrong ones are collected."""
    if "wrong" not in examples:
        return examples.keys() <= {"images"}
    return len(examples["wrong"]["image"]) < NUM_WRONG


def joined(
    examples: Mapping[str, Any], more: Mapping[str, Any], number: int | None = None
) -> Mapping[str, Any]:
    """Return the examples of the batches so far with those of the next one.

    `number` is the next batch's, from 0; without it, `in_the_set` finds no files.
    """
    if number is not None and "wrong" in more:
        more = {"wrong": {**more["wrong"], "batch": [number] * len(more["wrong"]["row"])}}
    if not (examples and more):
        return more or examples
    images = {"images": examples.get("images", 0) + more.get("images", 0)}
    before, after = examples.get("wrong"), more.get("wrong")
    if not (before and after):
        return {**images, "wrong": before or after} if before or after else images
    return {**images, "wrong": {key: [*before[key], *after[key]][:NUM_WRONG] for key in before}}


def in_the_set(
    details: Mapping[str, Any],
    start_of: Callable[[int], int],
    ids: Callable[[], Sequence[int | str]],
    gather: Callable[[str], Sequence[str]],
) -> dict[str, Any]:
    """Return a set's details with the wrong examples of all processes, in the order of the set.

    `start_of` gives a batch's place in the set. An example that its source names by a string, such
    as a file's path, gets this string as its `file`. `gather` gives every process's text, by rank.
    If no image is wrong, `all_right` is the number of images of all processes.
    """
    found = {key: value for key, value in details.items() if key not in ("wrong", "images")}
    own = dict(details.get("wrong") or {})
    rows, batches = own.pop("row", []), own.pop("batch", None)
    if own and batches is not None:
        pairs = zip(batches, rows, strict=True)
        own["place"] = [start_of(batch) + row for batch, row in pairs]
    images = details.get("images", 0)
    shares = [json.loads(text) for text in gather(json.dumps({"images": images, "wrong": own}))]
    wrong: dict[str, list[Any]] = {}
    for share in (share["wrong"] for share in shares):
        for key, column in share.items():
            wrong.setdefault(key, []).extend(column)
    if "place" in wrong:
        places = wrong.pop("place")
        order = sorted(range(len(places)), key=places.__getitem__)[:NUM_WRONG]
        wrong = {key: [column[index] for index in order] for key, column in wrong.items()}
        names = ids()
        files = [names[places[index]] for index in order]
        if all(isinstance(file, str) for file in files):
            wrong["file"] = files
    if wrong:
        return {**found, "wrong": wrong}
    count = sum(share["images"] for share in shares)
    return {**found, "all_right": count} if count else found


def wrong_of(folder: Path) -> list[dict[str, Any]]:
    """Return the wrong examples of each set of a run, from its folder, as its page shows them.

    `all_right` is the number of images of a set without a wrong one, else 0. `image` is a PNG.
    """
    found = []
    for path in sorted((folder / "plots").glob("*.json")):
        try:
            content = read_json(path)
            if isinstance(count := content.get("all_right"), int):
                found.append({"name": path.stem, "examples": [], "all_right": count})
                continue
            wrong = content["wrong"]
            files = wrong.get("file") or [""] * len(wrong["image"])  # older runs have none
            examples = [
                {
                    "image": b64decode(image, validate=True),
                    "true": true,
                    "predicted": predicted,
                    "probability": "" if probability is None else f"{float(probability):.2f}",
                    "file": str(file),
                }
                for image, true, predicted, probability, file in zip(
                    *(wrong[key] for key in ("image", "true", "predicted", "probability")),
                    files,
                    strict=True,
                )
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        found.append({"name": path.stem, "examples": examples, "all_right": 0})
    return found


def by_range(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) as uint8, each stretched from its least to its largest value."""
    import torch  # reading a page does not need it

    images = images.float()
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return ((images - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)


def _pngs(images: Tensor, every: int, as_pixels: Callable[[Tensor], Tensor] | None) -> list[str]:
    """Return images (B, C, H, W) as PNG, of every so many rows and columns, in colour or grey."""
    pixels = (as_pixels or by_range)(images[..., ::every, ::every]).cpu()
    return [_png(image) for image in (pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1])]


def _png(pixels: Tensor) -> str:
    """Return (1, H, W) or (3, H, W) values as PNG: 8 bits, or 16 if a class index needs them."""
    import torch  # reading a page does not need it
    from PIL import Image

    is_wide = pixels.dtype != torch.uint8 and int(pixels.max()) > 255
    array = pixels.permute(1, 2, 0).squeeze(2).numpy().astype("uint16" if is_wide else "uint8")
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return b64encode(buffer.getvalue()).decode("ascii")


def figure(
    columns: Mapping[str, Sequence[str]], class_names: Sequence[str], colours: Sequence[str]
) -> Figure:
    """Return a row per example: its input and its masks, with a colour per class."""
    import numpy as np
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from PIL import Image

    table = np.array([to_rgb(colour) for colour in (*colours, IGNORED)])
    rows = len(columns["input"])
    drawn = Figure(figsize=(2.3 * len(columns), 2.3 * rows + 0.9), layout="constrained")
    axes = drawn.subplots(rows, len(columns), squeeze=False)
    seen: set[int] = set()
    for column, (name, encoded) in enumerate(columns.items()):
        for row, text in enumerate(encoded):
            axis = axes[row][column]
            axis.set_axis_off()
            if row == 0:
                axis.set_title(name, loc="left", fontsize=11, color=INK)
            with Image.open(io.BytesIO(b64decode(text)), formats=("PNG",)) as file:
                pixels = np.array(file)
            if name == "input":
                axis.imshow(pixels, cmap="gray", vmin=0, vmax=255)
            else:
                seen.update(np.unique(pixels).tolist())
                axis.imshow(table[pixels], interpolation="nearest")
    named = dict(enumerate([*class_names, "ignored"]))
    handles = [
        Patch(facecolor=table[index], edgecolor="#888888", label=named[index].replace("$", r"\$"))
        for index in sorted(seen & named.keys())[:MAX_NAMES]
    ]
    style = {"frameon": False, "fontsize": 9, "labelcolor": INK}
    drawn.legend(handles=handles, loc="outside lower left", ncols=6, **style)
    return drawn
