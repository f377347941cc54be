"""The kinds of targets that the sampling and the mixing of training examples are for."""

from __future__ import annotations

from regrow.errors import UserError

BALANCED = ("multiclass", "binary")
MIXED = ("multiclass", "binary", "multilabel", "regression")
INSTEAD = {
    "multilabel": "an example has several labels. Use loss.pos_weight, or a column of draw "
    "weights: data.sampling={column: …}",
    "regression": "its targets are values, not classes. Use a column of draw weights: "
    "data.sampling={column: …}",
    "segmentation": "a mask holds several classes. Use loss.class_weights",
    "language": "an example is a window of text. Use data.sampling=null",
    None: "data.target_kind=null names no classes. Use a column of draw weights: "
    "data.sampling={column: …}",
}
UNMIXED = {
    "segmentation": "a mask of class indices cannot be blended",
    "language": "tokens cannot be blended",
    None: "data.target_kind=null says nothing about the targets",
}


def refuse_sampling(sampling: object, kind: str | None) -> None:
    """Raise UserError if `data.sampling` does not fit targets of this kind."""
    if sampling == "balanced" and kind not in BALANCED:
        raise UserError(f"data.sampling=balanced does not fit {_of(kind)}: {INSTEAD[kind]}.")
    if sampling is not None and kind == "language":
        raise UserError(f"data.sampling does not fit task=language: {INSTEAD[kind]}.")


def refuse_mixing(name: str, kind: str | None, ignore_index: int | None) -> None:
    """Raise UserError if `data.mixing`, of the class `name`, does not fit targets of this kind."""
    if kind not in MIXED:
        raise UserError(
            f"data.mixing={name} does not fit {_of(kind)}: {UNMIXED[kind]}. Set data.mixing=null."
        )
    if kind == "multiclass" and ignore_index is not None:
        raise UserError(
            f"data.mixing={name} does not fit loss.ignore_index={ignore_index}: an ignored target "
            "has no class to blend. Set data.mixing=null, or leave such examples out of the data."
        )


def _of(kind: str | None) -> str:
    return "these targets" if kind is None else f"task={kind}"
