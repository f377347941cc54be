"""A resume whose data differs from the run's is refused unless data.changed=accept is typed now."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from finished import script
from omegaconf import OmegaConf
from PIL import Image
from running import as_hydra_has_it, composed

from regrow.config import command_line, resume
from regrow.config.yaml_files import read_yaml
from regrow.feeding import identity
from regrow.feeding.splits import Splits
from regrow.runs import training
from regrow.runs.launch import launch
from regrow.sweep import ledger

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


OWN = (
    *("data=synthetic", "data.source._target_=test_changed_data.own", "data.input_shape=[2]"),
    *("data.num_classes=2", "data.num_outputs=2", "data.batch_size=10", "data.normalize=none"),
    *("model.hidden=[4]", "trainer.device=cpu", "trainer.num_threads=1", "scheduler=constant"),
)


class Own:
    """A custom data set: labels from a file, inputs through a transform that draws."""

    own_draws: np.random.Generator | None = None
    opened = 0

    def __init__(self, labels: list[int]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.opened += 1
        noise = torch.rand(2) if self.own_draws is None else self.own_draws.random(2)
        return torch.as_tensor(noise + index, dtype=torch.float32), self.labels[index]


def own(**options: object) -> Splits:
    labels = json.loads(Path("labels.json").read_text())
    return Splits(Own(labels), Own(labels[:10]), None)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "draw", lambda folder: None)  # the slow part, not tested here
    return tmp_path


def write_rows(count: int = 100, **changed: float) -> None:
    rows = [f"{n / 100},{n % 5},{changed.get(f'y{n}', n * 0.5)}" for n in range(count)]
    Path("rows.csv").write_text("\n".join(["a,b,y", *rows]) + "\n")


def start(*overrides: str) -> None:
    launch(as_hydra_has_it(composed(*overrides, "hydra.run.dir=run")))


def resumed(*typed: str) -> None:
    """Resume as `resume=run …` on the command line does."""
    arguments = [a for a in resume.expand(["resume=run", *typed]) if "hydra.run.dir" not in a]
    start(*arguments)


def refusal(capsys: pytest.CaptureFixture[str], *typed: str) -> str:
    capsys.readouterr()  # from the runs before
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


@pytest.mark.slow
def test_only_the_key_typed_at_the_resume_accepts_other_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_rows()
    start(*CSV, "trainer.max_epochs=1", "data.changed=accept")  # no effect, now or later
    write_rows(90)
    assert "train: 70 examples then, 63 now" in (line := refusal(capsys, MORE))
    assert f"resume=run {MORE} data.changed=accept" in line
    for named in ("data.num_workers=2", "data.root=.", "data.batch_size=10", "data.changed=refuse"):
        assert "the data has changed" in refusal(capsys, MORE, named), named
    assert "resumes" not in json.loads(Path("run/manifest.json").read_text())
    resumed(MORE, "data.changed=accept")
    said = capsys.readouterr().err
    assert "training examples: 70 then, 63 now. Step 7 is now step 0 of 7 in epoch 1" in said
    (entry,) = resumes()
    assert entry["changed_data"]["train"]["was"]["examples"] == 70  # type: ignore[index]
    # The next resume compares with the accepted data, and needs the key again.
    resumed("trainer.max_epochs=3")
    write_rows(80)
    assert "train: 63 examples then, 56 now" in refusal(capsys, "trainer.max_epochs=4")
    resumed("trainer.max_epochs=4", "data.changed=accept")
    assert "is now step 3 of 6 in epoch 3" in capsys.readouterr().err


@pytest.mark.slow
def test_each_refusal_of_another_seed_names_all_that_it_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_rows()
    start(*CSV, "trainer.max_epochs=1")
    with pytest.raises(SystemExit):
        resumed(MORE, "seed=1")
    (named,) = re.findall("to change it anyway: (.*)", capsys.readouterr().err)
    assert named == "data.seed=1 data.source.seed=1"
    with pytest.raises(SystemExit):
        resumed(MORE, "seed=1", *named.split())
    (again,) = re.findall("as it is now: resume=run (.*)", capsys.readouterr().err)
    resumed(*again.split())
    assert OmegaConf.load("run/config.yaml").data.source.seed == 1


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_changed_target_is_other_data(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows()
    start(*CSV, "trainer.max_epochs=1")
    write_rows(y3=1.6)  # equal inputs in the same decile, so the split is equal too
    assert "other content in" in refusal(capsys, MORE)
    write_rows()
    resumed(MORE)  # restored, as the message says
    assert "changed_data" not in resumes()[0]


def write_labels(**changed: int) -> None:
    labels = [changed.get(f"y{n}", n % 2) for n in range(60)]
    Path("labels.json").write_text(json.dumps(labels))


@pytest.mark.slow
def test_a_changed_label_in_a_data_set_of_the_users_own_is_other_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_labels()
    start(*OWN, "trainer.max_epochs=1")
    assert "fingerprint()" not in capsys.readouterr().err
    write_labels(y27=0)
    with pytest.raises(SystemExit):
        start(*OWN, MORE)
    assert "train: other content in 60 examples" in capsys.readouterr().err
    write_labels()
    start(*OWN, MORE)
    assert "changed_data" not in resumes()[0]


def test_a_record_from_before_compares_type_and_length_as_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_labels()
    start(*OWN, "trainer.max_epochs=1", "data.identity=length")
    recorded = read_yaml(Path("run/config.yaml"))
    del recorded["data"]["identity"]  # as recorded by the earlier code
    Path("run/config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(recorded)))
    write_labels(y27=0)
    start(*OWN, MORE)
    assert "data.identity=length" in capsys.readouterr().out
    assert "changed_data" not in resumes()[0]


def test_items_that_differ_from_read_to_read_are_said_to_be_compared_by_length(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Own, "own_draws", np.random.default_rng(0))
    write_labels()
    start(*OWN, "trainer.max_epochs=1")
    said = [line for line in capsys.readouterr().err.splitlines() if "fingerprint()" in line]
    assert len(said) == 1 and "type and length of train and val" in said[0]
    start(*OWN, MORE)
    assert "changed_data" not in resumes()[0]


def test_the_first_the_last_and_the_items_between_are_compared() -> None:
    labels = [n % 2 for n in range(60)]
    found = {identity.of_items(Own(labels))}
    for place in (0, 27, 59):
        found.add(identity.of_items(Own([*labels[:place], 5, *labels[place + 1 :]])))
    found |= {identity.of_items(Own(labels[:count])) for count in (59, 2, 1)}
    assert len(found) == 7


@pytest.mark.parametrize(
    ("item", "other"),
    [
        (torch.tensor([1.0, -0.0]), torch.tensor([1.0, 0.0])),
        (torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float16)),
        ({"ids": [1, 2], "text": "ab"}, {"ids": [1, 2], "text": "ba"}),
        (([1], [2, 3]), ([1, 2], [3])),
        (np.array(["a", None], object), np.array(["a", "None"], object)),
        (Image.new("L", (2, 2), 0), Image.new("L", (2, 2), 1)),
        ((np.float32(1), b"\0"), (np.float64(1), b"\0")),
    ],
)
def test_items_of_any_usual_type_are_compared_by_content(item: object, other: object) -> None:
    whole, same, changed = ([it, item] for it in (item, copy.deepcopy(item), other))
    assert identity.of_items(whole) == identity.of_items(same) != identity.of_items(changed)


def test_reading_items_for_the_comparison_leaves_the_data_set_as_it_was() -> None:
    """Workers that inherit an open file would share its position."""
    data = Own([0, 1, 0])
    part = torch.utils.data.Subset(data, [0, 2])  # type: ignore[arg-type,var-annotated]
    state = torch.get_rng_state()
    assert identity.of_items(data) != identity.of_items(part)
    assert data.opened == 0 and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(identity.Unknown, match="instance of object"):
        identity.of_items([object()])


def write_images() -> None:
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        Path("images", name).mkdir(parents=True)
        for number in range(20):
            pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(f"images/{name}/{number}.jpg")


def test_a_damaged_image_is_removed_and_the_run_resumes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_images()
    start(*IMAGES, "trainer.max_epochs=1")
    whole = Path("images/a/3.jpg").read_bytes()
    Path("images/a/3.jpg").write_bytes(whole[: len(whole) // 2])
    assert "3.jpg" in refusal(capsys, MORE)
    Path("images/a/3.jpg").unlink()
    assert "data.changed=accept" in refusal(capsys, MORE)
    resumed(MORE, "data.changed=accept")
    assert json.loads(Path("run/summary.json").read_text())["status"] == "completed"


@pytest.mark.slow
def test_a_recorded_path_to_leave_out_may_be_gone_and_a_typed_one_may_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images()
    without = "data.source.leave_out=[hidden,a/3.jpg,b/4.jpg]"
    start(*IMAGES, without, "trainer.max_epochs=1")
    shutil.copytree("run", "first")
    fingerprint = json.loads(Path("run/manifest.json").read_text())["data"]
    shutil.copytree("images", "elsewhere")
    Path("elsewhere/a/3.jpg").unlink()  # b/4.jpg stays, and is left out there too
    evaluate, reproduce = script("evaluate").main, script("reproduce")
    told = "ignored what is recorded but not below data.root="
    moved, name = "data.root=elsewhere", "elsewhere: a/3.jpg\n"

    def said() -> str:
        return "".join(capsys.readouterr())

    evaluate(["run=run", "split=val"])
    resumed(MORE)
    assert told not in said()  # both are there
    evaluate(["run=run", "split=val", moved])
    assert told + name in (text := said()) and "The run itself measured" not in text
    resumed("trainer.max_epochs=3", moved)
    assert told + name in said()
    start(*IMAGES, without, moved, "trainer.max_epochs=4")  # the same list, typed again
    assert told + name in said()
    content = json.loads(Path("run/manifest.json").read_text())
    assert content["data"] == fingerprint and not any("data" in it for it in content["resumes"])
    listed = read_yaml(Path("run/config.yaml"))["data"]["source"]["leave_out"]
    assert listed == ["hidden", "a/3.jpg", "b/4.jpg"]
    for folder in ("images", "elsewhere"):
        Path(folder, "b/4.jpg").unlink()
    evaluate(["run=run", "split=val", without])
    assert told + "elsewhere: a/3.jpg and 1 more\n" in said()
    more = without.replace("]", ",a/none.jpg]")
    for refused in (
        lambda: resumed("trainer.max_epochs=5", more),
        lambda: resumed("trainer.max_epochs=5", "data.source.leave_out=[a/none.jpg]"),
        lambda: evaluate(["run=run", "split=val", more]),
    ):
        with pytest.raises(SystemExit):
            refused()
        assert "leave_out: a/none.jpg is not among" in said()
    with pytest.raises(SystemExit):
        launch(as_hydra_has_it(composed(*IMAGES, without, moved, "hydra.run.dir=another")))
    assert "leave_out: a/3.jpg is not among" in said()

    def again(arguments: list[str], **_: str) -> int:
        launch(as_hydra_has_it(composed(*arguments)))
        return 0

    monkeypatch.setattr(reproduce, "train", again)
    Path("images/a/3.jpg").unlink()
    with pytest.raises(SystemExit) as ended:
        reproduce.main(["run=first"])
    assert ended.value.code == 0 and "\nidentical: " in said()


def test_a_key_that_the_run_was_given_already_is_named_by_typing_it_again() -> None:
    """Its value may have changed in conf/ since, behind an unchanged override."""
    overrides = ["optimizer=sgd", "resume=run", "optimizer=sgd", "optimizer.lr=1"]
    assert command_line.typed(overrides) == ["optimizer=sgd", "optimizer.lr=1"]
    assert command_line.typed(["optimizer=sgd", "resume=auto"]) == ["optimizer=sgd", "resume=auto"]
    forged = ["resume=mine", "data.changed=accept", "resume=run"]  # a record that holds the key
    assert command_line.typed(forged) == []


def test_a_sweep_is_the_same_with_and_without_the_leave() -> None:
    identities = [
        ledger.identity_of(composed(*CSV, f"data.changed={it}")) for it in ("refuse", "accept")
    ]
    assert identities[0] == identities[1] != ledger.identity_of(composed(*CSV, "data.batch_size=4"))
