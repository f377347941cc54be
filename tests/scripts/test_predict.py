from __future__ import annotations

import csv
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from finished import SCRIPTS, finished, one_line_and_exit_code_2, script

from regrow.load import load_run
from regrow.record.output import write_csv

main = script("predict").main


def predicted(run: Path, source: Path, output: Path, *arguments: str) -> list[dict[str, str]]:
    main([f"run={run}", f"input={source}", f"output={output}", *arguments])
    with output.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_classes_are_what_an_evaluation_sees(digits: Path, tmp_path: Path) -> None:
    run = load_run(digits)
    np.save(tmp_path / "images.npy", run.data.source.test.inputs.numpy())
    rows = predicted(digits, tmp_path / "images.npy", tmp_path / "out.csv", "batch_size=100")
    batch = next(iter(run.data.evaluation("test", device=run.device)))
    with torch.no_grad():
        probability = run.model(batch.inputs).softmax(1)
    names = [str(index) for index in range(10)]
    assert [row["input"] for row in rows] == [str(index) for index in range(359)]
    assert [row["prediction"] for row in rows] == [names[i] for i in probability.argmax(1)]
    found = [[float(row[f"probability/{name}"]) for name in names] for row in rows]
    assert torch.allclose(torch.tensor(found), probability, atol=1e-6)
    others = predicted(
        digits, tmp_path / "images.npy", tmp_path / "o2.csv", "checkpoint=step_00000040"
    )
    assert others != rows


@pytest.mark.slow
def test_a_reader_that_has_gone_gets_the_file_and_no_traceback(
    digits: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "images.npy", load_run(digits).data.source.test.inputs.numpy()[:3])
    for given in (
        ("predict", f"run={digits}", "input=images.npy", "output=out.csv"),
        ("evaluate", f"run={digits}", "output=out.json"),
        ("report", str(digits)),
    ):
        reader, writer = os.pipe()
        os.close(reader)  # as `| head -1` does, sooner or later
        command = [sys.executable, SCRIPTS / f"{given[0]}.py", *given[1:]]
        done = subprocess.run(
            command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
        os.close(writer)
        assert "Traceback" not in done.stderr and "Broken pipe" not in done.stderr, done.stderr
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 4


def test_a_terminal_shows_the_first_rows_the_counts_and_the_file(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = load_run(digits).data.source.test.inputs.numpy()
    for count in (12, 3):
        np.save(tmp_path / "images.npy", inputs[:count])
        rows = predicted(digits, tmp_path / "images.npy", tmp_path / f"{count}.csv")
        header, *lines = capsys.readouterr().out.splitlines()
        assert header.split() == ["input", "prediction", "probability"]
        for row, line in zip(rows[:10], lines, strict=False):
            share = float(row[f"probability/{row['prediction']}"])
            assert line.split() == [row["input"], row["prediction"], f"{share:.4f}"]
        *more, empty, counts, last = lines[min(count, 10) :]
        assert more == (["… and 2 more"] if count == 12 else []) and empty == ""
        told = counts.removeprefix("counts: ").split(", ")
        names = [row["prediction"] for row in rows]
        assert sorted(told) == sorted(f"{name} {names.count(name)}" for name in {*names})
        assert last.startswith(f"{count} predictions of {digits}, step ") and f"{count}.csv" in last


def test_a_link_to_a_run_is_told_with_its_folder(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latest = tmp_path / "latest"
    latest.symlink_to(digits)
    np.save(tmp_path / "images.npy", load_run(digits).data.source.test.inputs.numpy()[:1])
    predicted(latest, tmp_path / "images.npy", tmp_path / "1.csv")
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"1 prediction of {latest} ({digits.name}), step ")


def test_a_regression_is_in_the_units_of_its_targets(diabetes: Path, tmp_path: Path) -> None:
    run = load_run(diabetes)
    test = run.data.source.test
    np.save(tmp_path / "rows.npy", test.inputs.numpy())
    rows = predicted(diabetes, tmp_path / "rows.npy", tmp_path / "out.csv")
    values = torch.tensor([float(row["prediction"]) for row in rows], dtype=torch.float64)
    assert list(rows[0]) == ["input", "prediction"]
    # The target ranges from 25 to 346; standardised it would be around 0.
    error = (values - test.targets).square().mean().sqrt()
    assert error < test.targets.std() and values.mean() > 100
    batch = next(iter(run.data.evaluation("test", device=run.device)))
    with torch.no_grad():
        standardised = run.model(batch.inputs).squeeze(1)
    assert torch.allclose(values, run.data.in_units(standardised), rtol=1e-5)


def test_binary_and_multilabel_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cancer = finished(tmp_path / "binary", "data=breast_cancer", "task=binary")
    np.save(tmp_path / "rows.npy", load_run(cancer).data.source.test.inputs.numpy()[:5])
    rows = predicted(cancer, tmp_path / "rows.npy", tmp_path / "binary.csv")
    assert list(rows[0]) == ["input", "prediction", "probability"]
    names = load_run(cancer).class_names or ["0", "1"]
    heading, *told = capsys.readouterr().out.splitlines()
    assert heading.split() == ["input", "prediction", "probability", "of", names[1]]
    for row, line in zip(rows, told, strict=False):
        share = float(row["probability"])  # of the second class, here and there
        assert row["prediction"] == names[share > 0.5]
        assert line.split() == [row["input"], row["prediction"], f"{share:.4f}"]

    attributes = finished(tmp_path / "labels", "data=digits_attributes", "task=multilabel")
    np.save(tmp_path / "images.npy", np.full((2, 8, 8), 3, np.uint8))
    rows = predicted(attributes, tmp_path / "images.npy", tmp_path / "labels.csv")
    labels = ["even", "prime", "above_four", "has_a_loop"]
    assert list(rows[0])[1:5] == [f"predicted/{label}" for label in labels]
    for label in labels:
        chosen = float(rows[0][f"probability/{label}"]) > 0.5
        assert rows[0][f"predicted/{label}"] == str(int(chosen))
    apply = [label for label in labels if rows[0][f"predicted/{label}"] == "1"]
    told = capsys.readouterr().out.splitlines()
    assert told[0].split() == ["input", "labels"]
    assert told[1].removeprefix("0").strip() == (", ".join(apply) or "–")


def test_images_in_a_folder_without_the_data(tmp_path: Path) -> None:
    from PIL import Image

    root, random = tmp_path / "pictures", np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for index in range(12):
            pixels = random.integers(0, 255, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    run = finished(
        tmp_path / "run",
        *("data=image_folder", f"data.root={root}", "data.num_classes=2", "model=cnn"),
        *("data.input_shape=[3,16,16]", "data.source.resize=18", "data.num_workers=0"),
    )
    new = tmp_path / "new"
    shutil.move(root / "cat", new)
    shutil.rmtree(root)  # the data is gone: only the run's folder is left
    moved = shutil.move(run, tmp_path / "elsewhere")
    rows = predicted(moved, new, tmp_path / "out.csv")
    assert [row["input"] for row in rows] == sorted(str(path) for path in new.iterdir())
    assert {row["prediction"] for row in rows} <= {"cat", "dog"}
    columns = ["input", "prediction", "probability/cat", "probability/dog"]
    assert list(rows[0]) == columns
    one = predicted(moved, new / "3.png", tmp_path / "one.csv")
    assert one[0]["input"] == str(new / "3.png")
    whole = next(row for row in rows if row["input"] == one[0]["input"])
    for name in columns[2:]:
        assert float(one[0][name]) == pytest.approx(float(whole[name]), abs=1e-6)


def test_rows_of_a_table_by_the_names_of_its_columns(table: Path, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("y,x\n50,0.5\n20,20.5\n")
    (tmp_path / "same.csv").write_text("x,y\n0.5,50\n20.5,20\n")
    rows = predicted(table / "run", tmp_path / "new.csv", tmp_path / "out.csv")
    assert list(rows[0])[2:] == [f"probability/{name}" for name in "abc"]
    assert rows == predicted(table / "run", tmp_path / "same.csv", tmp_path / "same_out.csv")
    total = sum(float(rows[0][f"probability/{name}"]) for name in "abc")
    assert total == pytest.approx(1, abs=1e-6)


def test_nothing_is_overwritten_unasked(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "one.npy", np.zeros((8, 8)))
    output = tmp_path / "out.csv"
    output.write_text("precious")
    arguments = [f"run={digits}", f"input={tmp_path / 'one.npy'}", f"output={output}"]
    with one_line_and_exit_code_2(capsys, "exists already"):
        main(arguments)
    assert output.read_text() == "precious"
    main([*arguments, "overwrite=true"])
    assert output.read_text().startswith("input,prediction")
    with one_line_and_exit_code_2(capsys, "is the input itself"):
        source = f"{tmp_path / 'one.npy'}"
        main([f"run={digits}", f"input={source}", f"output={source}", "overwrite=true"])


def test_run_and_input_are_checked_before_an_output_that_exists(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.csv").write_text("precious")
    np.save(tmp_path / "one.npy", np.zeros((8, 8)))
    right = {"run": digits, "input": tmp_path / "one.npy", "output": tmp_path / "out.csv"}
    for changed, message in (
        ({"run": tmp_path / "misspelt"}, "run's folder (there is no such folder)"),
        ({"run": tmp_path}, "run's folder (it holds no config.yaml)"),
        ({"input": tmp_path / "misspelt"}, "misspelt does not exist"),
        ({}, "out.csv exists already"),
    ):
        with one_line_and_exit_code_2(capsys, message):
            main([f"{key}={value}" for key, value in (right | changed).items()])


def test_without_an_output_the_first_line_has_its_full_path(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("one.npy", np.zeros((8, 8)))
    main([f"run={digits}", "input=one.npy"])
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == f"writes to {tmp_path / 'predictions.csv'}; output=… names another place"
    assert last.endswith(f" in {tmp_path / 'predictions.csv'}")
    assert (tmp_path / "predictions.csv").read_text().startswith("input,prediction")
    with one_line_and_exit_code_2(capsys, f"output={tmp_path / 'predictions.csv'} exists already"):
        main([f"run={digits}", "input=one.npy"])
    main([f"run={digits}", "input=one.npy", "output=other.csv"])
    assert "writes to" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert "predictions/ for masks, in the current folder" in told


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"

    def rows() -> object:
        target.write_text("of another process")
        yield {"input": "1"}

    with pytest.raises(ValueError, match="exists already"):
        write_csv(rows(), target, overwrite=False)  # type: ignore[arg-type]
    assert target.read_text() == "of another process"
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_a_broken_input_leaves_no_file(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    pictures, output = tmp_path / "pictures", tmp_path / "out.csv"
    pictures.mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(pictures / "a.png")
    (pictures / "b.png").write_text("no image")
    arguments = [f"run={digits}", f"input={pictures}", f"output={output}", "batch_size=1"]
    with one_line_and_exit_code_2(capsys, "b.png is not a readable image"):
        main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
    (pictures / "b.png").unlink()
    main(arguments)
    assert output.exists()


def test_broken_images_of_a_folder_are_skipped_if_that_is_asked_for_and_named(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    images, output = tmp_path / "images", tmp_path / "out.csv"
    images.mkdir()
    for name in ("b.png", "d.png"):
        Image.fromarray(np.full((8, 8), 9, np.uint8)).save(images / name)
    for name in ("a.png", "c.png", "e.png"):  # a batch of two holds one, and the last one none
        (images / name).write_text("no image")
    arguments = [f"run={digits}", f"input={images}", f"output={output}", "batch_size=2"]
    with one_line_and_exit_code_2(capsys, "To predict for the others: skip_broken=true"):
        main(arguments)
    main([*arguments, "skip_broken=true"])
    said = capsys.readouterr().out
    assert "2 predictions of" in said
    start, _, names = said.splitlines()[-1].partition(": ")
    assert start == "left out, as they cannot be read"
    assert [Path(name).name for name in names.split(", ")] == ["a.png", "c.png", "e.png"]
    rows = output.read_text().splitlines()[1:]
    assert [Path(row.split(",")[0]).name for row in rows] == ["b.png", "d.png"]
    for name in ("b.png", "d.png"):
        (images / name).unlink()
    with one_line_and_exit_code_2(capsys, "none of its 3 images can be read"):
        main([*arguments, "skip_broken=true", "overwrite=true"])


class Evil:
    def __reduce__(self) -> object:
        return os.mkdir, (os.environ["EVIL"],)


def test_a_pickle_in_an_array_is_not_opened(
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EVIL", str(tmp_path / "executed"))
    np.save(tmp_path / "evil.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    arguments = [f"run={digits}", f"input={tmp_path / 'evil.npy'}", f"output={tmp_path / 'o.csv'}"]
    with one_line_and_exit_code_2(capsys, "not a readable array"):
        main(arguments)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "o.csv").exists()
    np.load(tmp_path / "evil.npy", allow_pickle=True)  # the negative control: it does execute
    assert (tmp_path / "executed").exists()


def test_names_that_a_spreadsheet_would_run_are_marked(tmp_path: Path) -> None:
    names = ["=1+1", "@x", "-x", "+x", "\tx", "-1.5", "a,b", 'a"b', "plain", "a\nb", "\udcff"]
    write_csv(({"input": name, "n": "1"} for name in names), tmp_path / "out.csv", overwrite=False)
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        found = [row["input"] for row in csv.DictReader(file)]
    marked = ["'=1+1", "'@x", "'-x", "'+x", "'\tx", "-1.5"]
    assert found == [*marked, "a,b", 'a"b', "plain", "a\nb", "\\udcff"]


def test_a_value_that_is_nan_is_shown(diabetes: Path, tmp_path: Path) -> None:
    run = shutil.copytree(diabetes, tmp_path / "run", symlinks=True)
    np.save(tmp_path / "huge.npy", np.full((1, 10), 1e300))
    rows = predicted(run, tmp_path / "huge.npy", tmp_path / "out.csv")
    assert not math.isfinite(float(rows[0]["prediction"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=DIGITS"], "input must be given: add input=…"),
        (["run=DIGITS", "input=nowhere.png"], "input=nowhere.png does not exist."),
        (["run=nowhere", "input=DIGITS"], "run=nowhere: not a run's folder (there is no such"),
        (["run=DIGITS", "input=DIGITS", "output=."], "output=. is a folder. Name a file"),
        (["run=DIGITS", "input=DIGITS", "output=/no/such/x.csv"], "there is no folder /no/such"),
        (
            ["run=DIGITS", "input=DIGITS/config.yaml"],
            "not a known kind. Use an image, a folder of images, .npy or",
        ),
        (["run=DIGITS", "input=DIGITS", "batch_size=0"], "must be an integer of at least 1"),
        (["run=DIGITS", "input=DIGITS", "overwrite=1"], "overwrite=1 must be true or false"),
        (["run=DIGITS", "input=DIGITS", "data.root=x"], "data.root: there is no such key."),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_wrong_argument_of_predict_is_an_error_of_one_line(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with one_line_and_exit_code_2(capsys, message):
        main([argument.replace("DIGITS", str(digits)) for argument in arguments])
    assert list(tmp_path.iterdir()) == []
