"""A resume whose data is not what the run was trained on: refused, unless it is typed now."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import as_hydra_has_it, composed

from regrow import resume
from regrow import run as runs
from regrow.launch import launch
from regrow.sweep import state

CSV = (
    *("data=csv", "task=regression", "data.source.train_file=rows.csv", "data.root=."),
    *("data.source.target_columns=[y]", "data.target_kind=regression", "data.num_classes=null"),
    *("data.num_outputs=1", "data.input_shape=[2]", "data.batch_size=10", "model.hidden=[4]"),
    *("trainer.device=cpu", "trainer.num_threads=1", "scheduler=constant"),
)
IMAGES = (
    *("data=image_folder", "data.root=images", "data.num_classes=2", "data.num_outputs=2"),
    *("data.input_shape=[3,8,8]", "data.source.resize=8", "data.num_workers=0", "model.hidden=[4]"),
    *("data.augment=false", "data.batch_size=4", "data.overlap=ignore", "scheduler=constant"),
    *("trainer.device=cpu", "trainer.num_threads=1"),
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "draw", lambda folder: None)  # the slow part, and none of this
    return tmp_path


def write_rows(count: int = 100, **changed: float) -> None:
    rows = [f"{n / 100},{n % 5},{changed.get(f'y{n}', n * 0.5)}" for n in range(count)]
    Path("rows.csv").write_text("\n".join(["a,b,y", *rows]) + "\n")


def start(*overrides: str) -> None:
    launch(as_hydra_has_it(composed(*overrides, "hydra.run.dir=run")))


def resumed(*typed: str) -> None:
    """As `resume=run …` on the command line."""
    arguments = [a for a in resume.expand(["resume=run", *typed]) if "hydra.run.dir" not in a]
    start(*arguments)


def refusal(capsys: pytest.CaptureFixture[str], *typed: str) -> str:
    with pytest.raises(SystemExit) as stop:
        resumed(*typed)
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def resumes() -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(Path("run/manifest.json").read_text())["resumes"]
    return found


MORE = "trainer.max_epochs=2"


def test_only_the_key_typed_at_the_resume_accepts_other_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_rows()
    start(*CSV, "trainer.max_epochs=1", "data.changed=accept")  # harmless, and no leave for later
    write_rows(90)
    assert "train: 70 examples then, 63 now" in (line := refusal(capsys, MORE))
    assert "resume=run data.changed=accept" in line
    for named in ("data.num_workers=2", "data.root=.", "data.batch_size=10", "data.changed=refuse"):
        assert "the data has changed" in refusal(capsys, MORE, named), named
    assert "resumes" not in json.loads(Path("run/manifest.json").read_text())
    resumed(MORE, "data.changed=accept")
    said = capsys.readouterr().err
    assert "training examples: 70 then, 63 now. Step 7 is now step 0 of 7 in epoch 1" in said
    (entry,) = resumes()
    assert entry["changed_data"]["train"]["was"]["examples"] == 70  # type: ignore[index]
    # What was accepted is what the next resume compares with, and the leave is over.
    resumed("trainer.max_epochs=3")
    write_rows(80)
    assert "train: 63 examples then, 56 now" in refusal(capsys, "trainer.max_epochs=4")
    resumed("trainer.max_epochs=4", "data.changed=accept")
    assert "is now step 3 of 6 in epoch 3" in capsys.readouterr().err


def test_the_same_command_again_accepts_where_it_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_rows()
    start(*CSV, "trainer.max_epochs=1")
    write_rows(90)
    with pytest.raises(SystemExit):
        start(*CSV, MORE)
    assert "data.changed=accept" in capsys.readouterr().err
    start(*CSV, MORE, "data.changed=accept")
    assert "changed_data" in resumes()[0]


def test_a_changed_target_is_other_data(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows()
    start(*CSV, "trainer.max_epochs=1")
    write_rows(y3=1.6)  # the inputs are the same, and in the same decile the split is, too
    assert "other content in" in refusal(capsys, MORE)
    write_rows()
    resumed(MORE)  # put back, as the message says
    assert "changed_data" not in resumes()[0]


def test_a_damaged_image_is_removed_and_the_run_resumes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        Path("images", name).mkdir(parents=True)
        for number in range(20):
            pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(f"images/{name}/{number}.jpg")
    start(*IMAGES, "trainer.max_epochs=1")
    whole = Path("images/a/3.jpg").read_bytes()
    Path("images/a/3.jpg").write_bytes(whole[: len(whole) // 2])
    assert "3.jpg" in refusal(capsys, MORE)
    Path("images/a/3.jpg").unlink()
    assert "data.changed=accept" in refusal(capsys, MORE)
    resumed(MORE, "data.changed=accept")
    assert json.loads(Path("run/summary.json").read_text())["status"] == "completed"


def test_a_key_that_the_run_was_given_already_is_named_by_typing_it_again() -> None:
    """Its value may have changed in conf/ since, behind an unchanged override."""
    overrides = ["optimizer=sgd", "resume=run", "optimizer=sgd", "optimizer.lr=1"]
    assert resume.typed(overrides) == ["optimizer=sgd", "optimizer.lr=1"]
    assert resume.typed(["optimizer=sgd", "resume=auto"]) == ["optimizer=sgd", "resume=auto"]
    forged = ["resume=mine", "data.changed=accept", "resume=run"]  # a record that holds the key
    assert resume.typed(forged) == []


def test_a_sweep_is_the_same_with_and_without_the_leave() -> None:
    identities = [
        state.identity_of(composed(*CSV, f"data.changed={it}")) for it in ("refuse", "accept")
    ]
    assert identities[0] == identities[1] != state.identity_of(composed(*CSV, "data.batch_size=4"))
