"""Tables of numbers in CSV files. Errors name the file, line and column."""

from __future__ import annotations

import csv as csv_format
import errno
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from regrow.config.rules import require
from regrow.errors import DataError, UserError, listed
from regrow.feeding.files import not_utf8
from regrow.feeding.splits import (
    Examples,
    Splits,
    check_fractions,
    check_name,
    cut_examples,
    origins_of,
    text_names,
)

log = logging.getLogger("regrow.data")

WAY_APART = (
    "If equal rows are different cases, add data.overlap=ignore, which splits them one by one."
)
TRUTHS = {"true": 1.0, "false": 0.0}  # as pandas and spreadsheets write them, in any case
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Table:
    path: Path
    features: npt.NDArray[np.float64]  # (N, F)
    texts: list[list[str]]  # N rows of the columns requested as text
    lines: list[int]  # the line where each row ends, from 1


def read_header(path: Path, delimiter: str) -> list[str]:
    rows = _rows(path, delimiter)
    _, header = next(rows, (0, []))
    if not header:
        raise DataError(f"{path}: the first line is empty. It must name the columns.")
    doubles = sorted({name for name in header if header.count(name) > 1})
    if doubles:
        raise DataError(f"{path}, line 1: column {doubles[0]!r} is there twice. Rename one.")
    return header


def read_table(
    path: Path, delimiter: str, columns: list[str], texts: list[str], *, is_fixed: bool = False
) -> Table:
    """Read `columns` as finite numbers and `texts` as text.

    Raises DataError, which names keys of the config unless a run has fixed them: `is_fixed`.
    """
    header = read_header(path, delimiter)
    missing = [name for name in [*columns, *texts] if name not in header]
    if missing:
        hint = ""
        if len(header) == 1 and (others := [sign for sign in ";\t|," if sign in header[0]]):
            sign = "$" if others[0] == "\t" else ""  # makes the shell insert a tab
            hint = f" Is {others[0]!r} its delimiter? The run's is {delimiter!r}."
            if not is_fixed:
                key = f'data.source.delimiter="{others[0] if not sign else chr(92) + "t"}"'
                hint = f" Is {others[0]!r} its delimiter? Then add {sign}'{key}'."
        raise DataError(f"{path} has no column {missing[0]!r}; it has {listed(header)}.{hint}")
    numeric = [(header.index(name), name) for name in columns]
    textual = [(header.index(name), name) for name in texts]
    read = [Column() for _ in numeric]
    features: list[list[float]] = []
    cells: list[list[str]] = []
    lines: list[int] = []
    rows = _rows(path, delimiter)
    next(rows)
    blank = 0
    otherwise = ""
    if not is_fixed:
        otherwise = (
            ", or name the columns of numbers in data.source.feature_columns. A category needs a "
            "column of 0 and 1 for each of its values"
        )
    way_out = f"Remove the {delimiter!r} at the end of each line."  # if each ends with one
    for line, row in rows:
        if not row:
            blank += 1
            continue
        where = f"{path}, line {line}"
        if len(row) != len(header):
            is_at_end = len(row) == len(header) + 1 and not row[-1]
            raise DataError(
                f"{where}: {len(row)} cells where the header names {len(header)}. "
                f"{way_out if is_at_end else 'Fix or remove the line.'}"
            )
        if not header[-1] and not row[-1] and "" in columns:
            raise DataError(
                f"{where}: the last column has no name, and its cell is empty. {way_out}"
            )
        features.append(
            [
                column.number(row[at], f"{where}, column {name!r}", otherwise)
                for column, (at, name) in zip(read, numeric, strict=True)
            ]
        )
        cells.append([row[at] for at, _ in textual])
        lines.append(line)
    if not lines:
        raise DataError(f"{path} has a header and no rows.")
    unused = [name for name in header if name not in (*columns, *texts)]
    if blank:
        log.info("%s: left out %d blank line%s", path, blank, "s"[: blank > 1])
    if unused:
        log.info("%s: columns that are not used: %s", path, listed(unused))
    if "" in columns:
        log.warning(
            "%s: column %d has no name and is used as a feature: is it the index that pandas "
            "writes? Then write the table with index=False.",
            path,
            header.index("") + 1,
        )
    values = np.array(features, np.float64).reshape(len(lines), len(columns))
    return Table(path, values, cells, lines)


class Column:
    """Reads the cells of one column: all of them numbers, or all of them true and false."""

    def __init__(self) -> None:
        self.truths: bool | None = None  # True if its cells are true and false

    def number(self, text: str, where: str, otherwise: str = "") -> float:
        """Return the cell as a finite float; true is 1, false 0. Raises DataError with `where`.

        `otherwise`: what may be done instead of writing a number.
        """
        truth = TRUTHS.get(text.lower())
        if self.truths is None:
            self.truths = truth is not None
        if self.truths != (truth is not None):
            kinds = ("true and false", "numbers") if self.truths else ("numbers", "true and false")
            if truth is not None or _is_number(text):
                raise DataError(
                    f"{where}: the cell holds {text[:40]!r}, and the cells above hold {kinds[0]}. "
                    f"Write {kinds[0]} alone, or {kinds[1]} alone."
                )
        return truth if truth is not None else number(text, where, otherwise)


def number(text: str, where: str, otherwise: str = "") -> float:
    """Return the cell as a finite float. Raises DataError with `where`."""
    if _is_number(text):
        return float(text)
    if not text:
        raise DataError(f"{where}: the cell is empty. Fill it in or remove the line.")
    marks = re.fullmatch(r"[-+]?[\d.,'_\s]+", text)
    way_out = "Write numbers as 1234.5." if marks else f"Write a number{otherwise}."
    raise DataError(
        f"{where}: the cell holds {text[:40]!r}, which is not a finite number. {way_out}"
    )


def _is_number(text: str) -> bool:
    # float() also accepts 1_000 and the digits of any script.
    return NUMBER.fullmatch(text) is not None and math.isfinite(float(text))


def _rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) of each row of the file."""
    require("data.source.delimiter", delimiter)  # a table may be read without a config
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv_format.reader(file, delimiter=delimiter, strict=True)
            try:
                for row in reader:
                    yield reader.line_num, [cell.strip() for cell in row]
            except csv_format.Error as error:
                raise DataError(f"{path}, line {reader.line_num}: {error}.") from None
            except UnicodeDecodeError as error:
                where = f"after line {reader.line_num}"
                raise not_utf8(path, where, error.reason, "Save the file as UTF-8.") from None
    except OSError as error:
        way_out = "Make it readable."
        if error.errno == errno.ENOENT:
            way_out = "Names of tables are relative to data.root: set that, or give a full path."
        elif error.errno == errno.EISDIR:
            way_out = "Name a table in it."
        raise DataError(f"{path} cannot be read: {error.strerror}. {way_out}") from None


def csv(
    *,
    root: str,
    train_file: str,
    val_file: str | None,
    test_file: str | None,
    sets: Mapping[str, str] | None,
    delimiter: str,
    feature_columns: list[str] | None,
    target_columns: list[str],
    target_dtype: str,
    weight_column: str | None,
    sampling: str | Mapping[str, str] | None,
    target_kind: str,
    num_classes: int | None,
    ignore_index: int | None,
    class_names: list[str] | None,
    val_fraction: float,
    test_fraction: float,
    folds: int | None,
    fold: int,
    group: str | None,
    overlap: str,
    seed: int,
) -> Splits:
    """Return the splits of a table of numbers with a header line. Files are relative to `root`.

    Val and test without their own files are cut from `train_file` by their fractions; `sets` names
    further files to evaluate. Rows with the same cell in the column `group` are on one side of
    every cut, and so are rows with equal features, unless `overlap` is "ignore". By default the
    features are all columns that are neither target, weight, group nor the draw weights that
    `sampling` = {column: name} names, which only `train_file` needs.
    Targets by `target_kind`: multiclass and binary: one column of class names or of indices from 0;
    multilabel: columns of 0 and 1; regression: columns of numbers.
    """
    check_fractions(val_fraction, test_fraction, folds, fold)
    if folds is not None and test_file is not None:
        raise UserError(
            f"data.folds={folds}: data.source.test_file={test_file} is a test split of its own. "
            "Use data.folds=null, or data.source.test_file=null."
        )
    if not isinstance(sets, Mapping | None):
        raise UserError(f"data.source.sets={sets} must name each file, such as {{night: n.csv}}.")
    for name in sets or {}:
        check_name(name)
    if not target_columns:
        raise UserError("data.source.target_columns=[] names no column. Name the target's column.")
    if target_kind in ("multiclass", "binary") and len(target_columns) != 1:
        raise UserError(
            f"data.source.target_columns has {len(target_columns)} columns; "
            f"data.target_kind={target_kind} takes one. For several labels use multilabel."
        )
    folder = Path(root)
    extra = [name for name in (weight_column, group) if name is not None]
    columns = feature_columns
    drawn_by = [sampling["column"]] if isinstance(sampling, Mapping) else []
    others = [*target_columns, *extra, *drawn_by]
    if columns is None:
        header = read_header(folder / train_file, delimiter)
        columns = [name for name in header if name not in others]
    if not columns or set(columns) & {*others}:
        raise UserError(
            f"data.source.feature_columns: {listed(columns) or 'no column'} cannot be the features "
            f"beside target, weight and group {listed(others)}. Choose others."
        )

    files = {"train": train_file, "val": val_file, "test": test_file, **(sets or {})}
    textual = {name: others if name == "train" else [*target_columns, *extra] for name in files}
    tables = {
        name: read_table(folder / file, delimiter, columns, textual[name])
        for name, file in files.items()
        if file is not None
    }
    for name, table in tables.items():
        _refuse_empty(table, textual[name])
    names = text_names(class_names)
    if names is None and target_kind in ("multiclass", "binary"):
        names = _found_names(tables["train"], ignore_index)
    if names is None and target_kind == "multilabel":
        names = list(target_columns)

    def examples(name: str, table: Table) -> Examples:
        targets = _targets(table, target_kind, num_classes, ignore_index, names, target_columns)
        if target_dtype == "float32" or target_kind != "regression":
            targets = targets if targets.dtype == torch.int64 else targets.float()
        weights = groups = draw_weights = None
        if weight_column is not None:
            weights = torch.tensor(_weights(table, len(target_columns), weight_column))
        if group is not None:
            at = len(target_columns) + len(extra) - 1
            groups = [cells[at] for cells in table.texts]
        if drawn_by and name == "train":
            found = _weights(table, len(others) - 1, drawn_by[0])
            draw_weights = torch.tensor(found, dtype=torch.float64)
        features = torch.from_numpy(table.features)
        return Examples(features, targets, weights, table.lines, groups, draw_weights)

    own = {name: examples(name, table) for name, table in tables.items()}
    train, val, test = cut_examples(
        own["train"],
        val_fraction=0.0 if "val" in own else val_fraction,
        test_fraction=0.0 if "test" in own else test_fraction,
        seed=seed,
        folds=folds,
        fold=fold,
        keeps_equal_together=overlap != "ignore",
        way_apart=WAY_APART,
    )
    return Splits(
        train,
        own.get("val", val),
        own.get("test", test),
        {name: own[name] for name in sets or {}},
        class_names=names,
        target_names=list(target_columns) if target_kind == "regression" else None,
        columns=columns,
        delimiter=delimiter,
        origins=origins_of(val_fraction, test_fraction, folds, fold, given=own),
    )


def _refuse_empty(table: Table, columns: list[str]) -> None:
    """Raise DataError for an empty target, which would become a nameless class."""
    for line, cells in zip(table.lines, table.texts, strict=True):
        if "" in cells:
            number("", f"{table.path}, line {line}, column {columns[cells.index('')]!r}")


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _naming(table: Table, count: int | None) -> str:
    """Return how to name the numbers of a target column as its classes; "" if they do not fit."""
    found = {cells[0] for cells in table.texts}
    if len(found) != count or not all(_is_index(word) and word == str(int(word)) for word in found):
        return ""
    named = ",".join(sorted(found, key=int))
    return f" If {listed(sorted(found, key=int))} are the classes: 'data.class_names=[{named}]'"


def _found_names(table: Table, ignore_index: int | None) -> list[str] | None:
    """Return the target column's distinct words, sorted, or None if they are class indices."""
    ignored = set() if ignore_index is None else {str(ignore_index)}
    words = sorted({row[0] for row in table.texts} - ignored)
    return None if all(_is_index(word) for word in words) else words


def _weights(table: Table, at: int, column: str) -> list[float]:
    found = []
    for line, cells in zip(table.lines, table.texts, strict=True):
        where = f"{table.path}, line {line}, column {column!r}"
        found.append(number(cells[at], where))
        if found[-1] < 0:
            raise DataError(f"{where}: the weight {found[-1]} is negative.")
    return found


def _targets(
    table: Table,
    kind: str,
    num_classes: int | None,
    ignore_index: int | None,
    names: list[str] | None,
    columns: list[str],
) -> Tensor:
    def where(row: int, column: int = 0) -> str:
        return f"{table.path}, line {table.lines[row]}, column {columns[column]!r}"

    if kind in ("multiclass", "binary"):
        count = 2 if kind == "binary" else num_classes
        if names is not None and len(names) == 1:
            raise UserError(
                f"data.num_classes={count}, but column {columns[0]!r} of {table.path} holds one "
                f"class alone: {names[0]}. A classifier needs at least two: add rows of another "
                "class, or name another column in data.source.target_columns."
            )
        if names is not None and len(names) != count:
            shown = listed(names)
            set_kind = "task=multiclass data.target_kind=multiclass " * (kind == "binary")
            raise UserError(
                f"data.num_classes={count}, but {len(names)} classes were found in column "
                f"{columns[0]!r} of {table.path}: {shown}. Set {set_kind}"
                f"data.num_classes={len(names)} and data.num_outputs={len(names)}."
            )
        index_of = {name: index for index, name in enumerate(names or [])}
        # Accept indices only if no class name is a number.
        if not any(_is_number(name) for name in index_of):
            index_of |= {str(index): index for index in range(count or 0)}
        if ignore_index is not None and kind == "multiclass":
            index_of.setdefault(str(ignore_index), ignore_index)
        for row, cells in enumerate(table.texts):
            if cells[0] not in index_of:
                raise DataError(
                    f"{where(row)}: class {cells[0][:40]!r} is none of the {count} classes "
                    f"{listed(names) if names else f'0 … {(count or 0) - 1}'}."
                    f"{_naming(table, count) if not names else ''}"
                )
        classes = torch.tensor([index_of[cells[0]] for cells in table.texts])
        return classes if kind == "multiclass" else classes.float()
    read = [Column() for _ in columns]
    values = torch.tensor(
        [
            [read[at].number(cells[at], where(row, at)) for at in range(len(columns))]
            for row, cells in enumerate(table.texts)
        ],
        dtype=torch.float64,
    )
    if kind == "multilabel":
        wrong = ((values != 0) & (values != 1)).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            raise DataError(
                f"{where(row, column)}: a label is 0 or 1, not {table.texts[row][column]!r}."
            )
        return values
    return values.squeeze(1)
