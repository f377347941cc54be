"""`train.py --check` reports what a run would be, and runs nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked import run_script as train
from PIL import Image
from running import CPU, TINY, composed, config_of, launched

from lab.tasks.losses import CrossEntropy
from regrow.config import flags
from regrow.config.job import Job, job_of
from regrow.config.targets import instantiate
from regrow.errors import UserError
from regrow.project import ROOT
from regrow.runs import launch, preview, training
from regrow.runs.banner import config_tree, unread_root

GAN = ("--config-dir", str(ROOT / "src" / "lab" / "examples" / "gan" / "conf"))


def hashes(folder: Path) -> dict[Path, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


GIVEN = (*TINY, "optimizer=sgd", "trainer.max_steps=2", "trainer.progress_bar=false")


def test_a_check_tells_sizes_and_differences_and_writes_nothing(tmp_path: Path) -> None:
    said = train(tmp_path, "--check", *GIVEN)
    assert list(tmp_path.iterdir()) == []
    facts = said.splitlines()[:4]
    assert [line.partition(":")[0] for line in facts] == ["data", "model", "batch", "run"]
    for part in (
        "data: 50 train, 20 val, 10 test\n", "run: 2 steps, 4 per epoch, on cpu in fp32",
        "folder: outputs/synthetic/<date>_<time>-<suffix>, a new one\n",
        "  optimizer=sgd ", "  trainer.max_steps=2 instead of null ",
    ):  # fmt: skip
        assert part in said
    assert "lr=" not in said  # SGD's own is a default
    assert all(line.endswith("command line") for line in said.split("defaults:\n")[1].splitlines())


@pytest.mark.slow
def test_a_check_names_the_classes_the_origin_of_the_splits_and_the_chosen_data(
    tmp_path: Path,
) -> None:
    said = train(tmp_path, "--check", "trainer.device=cpu", "seed=3").splitlines()
    assert "classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in said
    assert (
        "splits: val is data.source.val_fraction=0.1 of the examples, test is "
        "data.source.test_fraction=0.2 of the examples; data.source.seed=3 draws them"
    ) in said
    assert next(line for line in said if line.startswith("chosen: ")).startswith(
        "chosen: data=digits task=multiclass"
    )
    for number in range(8):
        for split in ("train", "val"):
            for name in ("cat", "dog"):
                path = tmp_path / "photos" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                value = number * 20 + 5 * (split == "val") + 10 * (name == "dog")
                Image.new("L", (8, 8), value).save(path)
    given = ("data=image_folder", "data.root=photos", "data.num_classes=2", "model=cnn")
    said = train(
        tmp_path, "--check", *given, "data.input_shape=[1,8,8]", "trainer.device=cpu"
    ).splitlines()  # fmt: skip
    assert "classes: cat, dog" in said and any("chosen: data=image_folder " in s for s in said)
    assert (
        "splits: val is given, test is data.source.test_fraction=0.2 of the examples; "
        "data.source.seed=0 draws them"
    ) in said


def told_of_splits(*given: str) -> list[str]:
    config = config_of(*given)
    return [*preview._splits(config, SimpleNamespace(data=instantiate(config["data"])))]


@pytest.mark.parametrize("beside", ["", "test"])
def test_a_check_says_that_the_seed_splits_a_table_whatever_folders_lie_about(
    beside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / beside).mkdir(exist_ok=True)
    rows = "".join(f"{number},{number % 2}\n" for number in range(40))
    (tmp_path / "rows.csv").write_text(f"a,b\n{rows}")
    (tmp_path / "other.csv").write_text("a,b\n50,0\n51,1\n")
    table = (
        "data=csv", "data.root=.", "data.source.train_file=rows.csv",
        "data.source.target_columns=[b]", "data.target_kind=multiclass", "data.num_classes=2",
        "data.source.val_fraction=0.2", "data.num_outputs=2", "data.input_shape=[1]",
    )  # fmt: skip
    said = "splits: val is data.source.val_fraction=0.2 of the examples, test is "
    drawn = "; data.source.seed=0 draws them"
    (line,) = told_of_splits(*table, "data.source.test_fraction=0.1")
    assert line == f"{said}data.source.test_fraction=0.1 of the examples{drawn}"
    (line,) = told_of_splits(*table, "data.folds=5", "data.fold=1")
    assert line == f"{said}fold 1 of 5{drawn}"
    (line,) = told_of_splits(*table, "data.source.test_file=other.csv")
    assert line == f"{said}given{drawn}"
    (line,) = told_of_splits("data=text", "data.root=persuasion", "data.source.test_fraction=0")
    assert line.startswith("splits: val is data.source.val_fraction=0.1 of the text; ")
    assert told_of_splits(*TINY) == []


@pytest.mark.slow
def test_a_check_tells_what_the_run_tells_and_leaves_its_folder(tmp_path: Path) -> None:
    facts = train(tmp_path, "--check", *GIVEN).splitlines()[:4]
    ran = train(tmp_path, *GIVEN, "hydra.run.dir=run")
    assert [line for line in ran.splitlines() if line in facts] == facts
    before = hashes(tmp_path)
    said = train(tmp_path, "--check", "resume=run", "trainer.max_steps=6")
    assert "run: 6 steps" in said and "folder: run, resumed from step 2\n" in said
    assert hashes(tmp_path) == before


def test_a_check_refuses_what_a_start_refuses(tmp_path: Path) -> None:
    said = train(tmp_path, "--check", *TINY, "model.norm=bach", code=2)
    assert said == "error: model.norm=bach is unknown. Did you mean batch?\n"
    said = train(tmp_path, "--check", "-m", "seed=1,2", code=2)
    assert said.startswith("error: --check looks at one config: leave out -m")
    assert list(tmp_path.iterdir()) == []


def test_a_check_knows_recipes_and_several_models(tmp_path: Path) -> None:
    said = train(tmp_path, *GAN, "experiment=gan_ring", "--check", "trainer.device=cpu")
    assert "model: Models with 34,179 parameters" in said and "compute: " in said
    assert "gan_ring.yaml:" in said.split("defaults:\n")[1]
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_missing_is_told(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    said = train(tmp_path, "--check", *TINY, "trainer=gpu", "trainer.device=cuda")
    assert "Measured on the CPU." in said and "in bf16" in said and "memory: about " in said


def cost(size: int, *overrides: str) -> tuple[preview.Cost, Any]:
    config = config_of(*TINY, "data.batch_size=32", "model.norm=none", *overrides)
    objects = training.build(preview._alone(config, CPU.device), CPU)
    return preview.measured(objects, 0, CPU, size), objects


def test_the_cost_of_a_step_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    found, objects = cost(32)
    # Per example: forward, the weights' gradients, and the hidden layer's gradient.
    assert found.flops == 32 * 2 * (2 * (6 * 12 + 12 * 3) + 12 * 3)
    weights = sum(p.numel() * 4 for p in objects.state.model.parameters())
    assert found.optimizer == 2 * weights  # AdamW's two moments
    assert cost(32, "optimizer=sgd")[0].optimizer == weights
    assert (
        cost(32, "optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=false")[0].optimizer
        == 0
    )
    # float32 inputs, the hidden layer, log-probabilities, and a few numbers per example
    least = 32 * (6 + 12 + 3) * 4
    assert least <= found.activations <= 2 * least

    monkeypatch.setattr(preview, "DIRECT", 0)
    steps: list[int] = []
    step = preview._step
    monkeypatch.setattr(
        preview, "_step", lambda *given: (steps.append(given[-1].num_local), step(*given))[1]
    )
    from_two, _ = cost(32)
    assert steps == [2, 4]
    assert from_two.flops == found.flops
    assert from_two.activations == pytest.approx(found.activations, rel=0.02)
    assert cost(16)[0].activations < 0.75 * found.activations


def test_a_check_leaves_no_folder_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    train(tmp_path, "--check", *GIVEN, "hydra.run.dir=runs/x/y")
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]
    train(tmp_path, "--check", *GIVEN, "hydra.run.dir=kept/x/y", "model.norm=bach", code=2)
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]


def test_a_check_resizes_no_images_and_refuses_what_the_cache_does(tmp_path: Path) -> None:
    for number in range(12):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 24), (20 * number, 0, 0)).save(path)
    before = sorted(tmp_path.rglob("*"))
    given = (
        "--check", "data.root=photos", "data.num_classes=2", "data.input_shape=[3,16,16]",
        "data.source.resize=18", "data.batch_size=4", "trainer.device=cpu", "model.hidden=[8]",
    )  # fmt: skip
    assert "folder: " in train(tmp_path, *given, "data=resized_folder")
    said = train(tmp_path, *given, "data=image_folder", "data.cache=resized", code=2)
    assert "takes the original image, which is not kept" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_the_update_of_the_weights_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cost(32)[0].flops
    assert cost(32, "optimizer=muon")[0].flops == found
    monkeypatch.setattr(preview, "_of_updates", lambda *_: contextlib.nullcontext([]))
    assert cost(32, "optimizer=muon")[0].flops > found
    assert cost(32)[0].flops == found  # AdamW's has no matrix products


@pytest.mark.slow
def test_one_example_is_not_measured_alone() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        config = config_of(*TINY, "model.norm=batch")
        objects = training.build(preview._alone(config, CPU.device), CPU)
        batch = next(iter(objects.train.epoch(0)))
        preview._step(objects, 0, CPU, preview._first(batch, 1))
    of_one, of_all = cost(1, "model.norm=batch")[0], cost(32, "model.norm=batch")[0]
    assert (of_one.size, of_all.size) == (1, 32)
    assert of_one.flops == of_all.flops / 32
    few = cost(1, "model.norm=batch", "data.batch_size=2", "trainer.check_first_batch=false")[0]
    assert few.size == 2


def job(*overrides: str) -> Job:
    config = composed(*TINY, *overrides)
    return job_of(config, None, [])


def reported(caplog: pytest.LogCaptureFixture, *overrides: str) -> list[str]:
    caplog.clear()
    with caplog.at_level("INFO", logger="regrow"):
        preview.report(job(*overrides))
    return caplog.messages


def line(lines: list[str], start: str) -> str:
    return next(line for line in lines if line.startswith(start))


@pytest.mark.slow
def test_a_batch_has_no_more_examples_than_the_split(caplog: pytest.LogCaptureFixture) -> None:
    one = reported(caplog, "data.batch_size=1000")
    two = reported(caplog, "data.batch_size=1000", "trainer.devices=2")
    assert line(one, "compute") == line(two, "compute")
    assert "activations of 50 examples" in line(one, "memory")
    assert "activations of 25 examples" in line(two, "memory")
    less = reported(caplog, "data.batch_size=20")
    assert line(less, "compute") != line(one, "compute")


def test_a_check_refuses_a_micro_batch_that_a_start_refuses(
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = ("model.norm=batch", "data.batch_size=2", "trainer.accumulation_steps=2")
    with pytest.raises(UserError, match="a step's smallest micro-batch is one example"):
        preview.report(job(*given))
    assert reported(caplog, *given, "data.batch_size=10")


@pytest.mark.parametrize("split", ["trainer.devices=2", "trainer.accumulation_steps=2"])
def test_a_check_refuses_to_split_a_loss_that_does_not_sum(
    split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CrossEntropy, "sums_over_examples", False, raising=False)
    preview.report(job())
    with pytest.raises(UserError, match="into 2 parts, and this loss is not a sum over examples"):
        preview.report(job(split))


@pytest.mark.parametrize(
    ("override", "needs"),
    [
        ("trainer.precision=fp16", "trainer.precision=fp16 needs CUDA"),
        ("trainer.sync_batch_norm=true", "trainer.sync_batch_norm=true needs CUDA"),
        ("trainer.compile=true", "trainer.compile=true needs a C++ compiler"),
    ],
)
@pytest.mark.slow
def test_a_setting_that_a_start_here_would_refuse_is_told(
    override: str,
    needs: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    said = reported(caplog, override)
    told = next(it for it in said if it.endswith("A start here would fail."))
    assert told.startswith(needs) and line(said, "memory: about")
    assert not [it for it in reported(caplog) if "would fail" in it]  # the control


def test_a_check_evaluates_few_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    check = preview.lab().check_first_batch

    def checked(objects: Any, world: Any) -> None:
        sizes.extend(batch.num_local for batch in next(iter(objects.sets.values())))
        check(objects, world)

    monkeypatch.setattr(preview.lab(), "check_first_batch", checked)
    preview.report(job("data.eval_batch_size=512"))
    assert sizes == [8, 8, 4]


def test_an_error_of_a_check_has_the_place_that_a_start_gives(tmp_path: Path) -> None:
    path = tmp_path / "experiment" / "late.yaml"
    path.parent.mkdir()
    path.write_text("# @package _global_\nmodel:\n  norm: bach\n", encoding="utf-8")
    bad = dataclasses.replace(
        job("model.norm=bach"),
        source={**flags.DEFAULT, "dir": str(tmp_path)}, overrides=("experiment=late",),
    )  # fmt: skip
    with pytest.raises(UserError) as raised:
        preview.report(bad)
    assert str(raised.value).startswith(f"{path}:3: model.norm=bach is unknown.")


def test_a_check_refuses_what_slurm_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(launch, "is_check", lambda: True)
    given = ("launcher=slurm", "trainer.devices=3")
    with pytest.raises(SystemExit) as ended:
        launched(*given, "launcher.tasks_per_node=2")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: launcher.tasks_per_node=2: ")
    assert launched(*given, "launcher.tasks_per_node=3") is None
    said = "".join(capsys.readouterr())
    assert "there is no sbatch on this machine" in said and "memory: about" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_values_of_this_machine_and_of_a_primary_config_differ(tmp_path: Path) -> None:
    def differences(name: str = "train", *typed: str) -> list[str]:
        source = {**flags.DEFAULT, "name": name, "dir": str(tmp_path)}
        asked = dataclasses.replace(plain, source=source, overrides=typed)
        return list(preview._differences(asked))

    plain = job()
    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults: [train, _self_]\ndata:\n  batch_size: 25\n", encoding="utf-8")
    assert differences() == ["differs from the defaults: nothing"]
    assert differences("train", "~optimizer.lr")[1].split() == ["~optimizer.lr", "command", "line"]
    _, value = differences("mine")
    assert "data.batch_size=25 instead of" in value and value.endswith(f"{mine}:3")
    local = tmp_path / "local" / "default.yaml"
    local.parent.mkdir()
    local.write_text("# @package _global_\ndata:\n  batch_size: 50\n", encoding="utf-8")
    _, value = differences()
    assert "data.batch_size=50 instead of" in value and value.endswith(f"{local}:3")


def test_a_check_finds_the_options_on_the_search_path_of_a_file(tmp_path: Path) -> None:
    files = {
        "there/model/wide.yaml": "defaults: [mlp]\nhidden: [99]\n",
        "own/mine.yaml": f"defaults: [train, _self_]\nhydra:\n  searchpath: [{tmp_path}/there]\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    given = ("--config-dir", "own", "--config-name", "mine", "model=wide", "trainer.device=cpu")
    said = train(tmp_path, "--check", *given).split("defaults:\n")[1]
    assert "  model=wide " in said and "hidden" not in said


def test_the_tree_at_a_start_shows_each_value_once() -> None:
    given = ("data.root=photos", "data.num_classes=2", "model=cnn", "name=absent")
    config = config_of("data=image_folder", *given)

    def shown(num_processes: int) -> list[str]:
        lines = config_tree(config, {"data": "image_folder"}, num_processes=num_processes)
        return " ".join(lines).split()

    alone, several = shown(1), shown(2)
    assert [word for word in alone if "photos" in word] == ["root=photos"]
    assert [word for word in alone if "[3,224,224]" in word] == ["input_shape=[3,224,224]"]
    assert {"num_classes=2", "num_outputs=2", "source.resize=auto", "name=absent"} <= {*alone}
    assert not [word for word in alone if word.startswith(("ddp.", "fsdp.", "strategy="))]
    assert {"strategy=ddp", "max_epochs=100"} <= {*several}


@pytest.mark.slow
def test_a_start_shows_typed_values_first_and_one_line_for_a_group(tmp_path: Path) -> None:
    typed = ("trainer.max_steps=1", "trainer.progress_bar=false", "seed=3")
    said = train(tmp_path, *typed, "hydra.run.dir=mine")
    tree = [line for line in said.splitlines() if line.startswith(("├", "│", "└"))]
    assert len(tree) == 10 and not [line for line in tree if line.startswith("│")]  # not wrapped
    trainer = tree[-1].split()
    assert trainer[3].startswith("max_steps=1") and trainer[-1] == "…"
    log = (tmp_path / "mine" / "train.log").read_text(encoding="utf-8")
    assert "max_skipped_steps=10" in log and "max_skipped_steps" not in said
    assert log.count("├─ data ") == 1


@pytest.mark.slow
def test_a_root_that_the_data_does_not_read_is_named(tmp_path: Path) -> None:
    said = train(tmp_path, "--check", "data.root=photos", *GIVEN)
    assert "data.root=photos has no effect: data=synthetic reads no folder" in said
    assert "has no effect" not in train(tmp_path, "--check", *GIVEN)
    for source, lines in ({"root": "${data.root}"}, 0), ({}, 1):
        data = {"root": "photos", "source": source}
        job = Job({"data": data}, None, ["data.root=photos"], {"data": "mine"}, {}, [])
        assert len(unread_root(job)) == lines


@pytest.mark.slow
def test_a_start_names_the_interrupted_run_of_the_same_command(tmp_path: Path) -> None:
    first = train(tmp_path, *GIVEN)
    assert "was interrupted" not in first
    latest = (tmp_path / "outputs" / "synthetic" / "latest").resolve()
    said = f"{latest.relative_to(tmp_path)}, started by the same command, was interrupted."
    assert said not in train(tmp_path, *GIVEN)  # it was complete
    latest = (tmp_path / "outputs" / "synthetic" / "latest").resolve()
    status = json.loads((latest / "status.json").read_text()) | {"state": "running"}
    (latest / "status.json").write_text(json.dumps(status))  # as a SIGKILL leaves it
    said = f"{latest.relative_to(tmp_path)}, started by the same command, was interrupted."
    assert said not in train(tmp_path, *GIVEN, "seed=1", "--check")
    elsewhere = tmp_path / "elsewhere"  # outputs/ may be a link to another disk
    (tmp_path / "outputs").rename(elsewhere)
    here = tmp_path / "here"
    here.mkdir()
    (here / "outputs").symlink_to(elsewhere)
    (elsewhere / "synthetic" / "latest").unlink()
    (elsewhere / "synthetic" / "latest").symlink_to(latest.name)
    absolute = f"{elsewhere / 'synthetic' / latest.name}, started by the same command, was"
    assert absolute in train(here, *GIVEN)
    elsewhere.rename(tmp_path / "outputs")
    (tmp_path / "outputs" / "synthetic" / "latest").unlink()
    (tmp_path / "outputs" / "synthetic" / "latest").symlink_to(latest.name)
    assert said in train(tmp_path, *GIVEN)
    assert said not in train(tmp_path, *GIVEN)  # the latest run is the one just made
