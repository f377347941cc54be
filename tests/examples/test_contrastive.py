"""Contrastive learning: the loss is the paper's, over all processes, and resumes exactly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
import torch.nn.functional as F
from growing import assert_grows_back, distance
from sklearn.linear_model import RidgeClassifier
from test_gan import finished

from lab.examples.contrastive import probe, step
from regrow.load import load_run
from regrow.project import CONF

EXAMPLE = Path(step.__file__).parent / "conf"
SMALL = (
    *("experiment=contrastive_digits", "data.batch_size=500", "model.channels=[4]"),
    *("model.num_outputs=8", "trainer.max_epochs=2", "trainer.eval_every_epochs=1"),
    *("trainer.device=cpu", "trainer.num_threads=1", "trainer.log_every_steps=1"),
)
RUN = (f"hydra.searchpath=[file://{EXAMPLE}]", *SMALL)


def start(folder: Path, *arguments: str) -> None:
    """Train in a process of its own, with a whole record in `folder`."""
    script = CONF.parent / "scripts" / "train.py"
    call = [sys.executable, str(script), "--config-dir", str(EXAMPLE), *arguments]
    call.append(f"hydra.run.dir={folder}")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    finished(forked.popen(call, cwd=folder.parent, **pipes, text=True))


def by_definition(one: torch.Tensor, other: torch.Tensor, temperature: float) -> float:
    """Return the mean of equation 1 of Chen et al. (2020) over all 2N views, term by term."""
    views = [*one, *other]
    count, losses = len(one), []
    for index, row in enumerate(views):
        pair = (index + count) % (2 * count)
        similar = {k: torch.exp(row @ v / temperature) for k, v in enumerate(views) if k != index}
        losses.append(-torch.log(similar[pair] / sum(similar.values())))
    return torch.stack(losses).mean().item()


def test_the_loss_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    one, other = F.normalize(torch.randn(2, 7, 5), dim=2)
    halves = step.nt_xent(one, one, other, 0, 0.3), step.nt_xent(other, other, one, 0, 0.3)
    loss = (sum(halves) / 2).mean().item()  # type: ignore[union-attr]
    assert loss == pytest.approx(by_definition(one, other, 0.3), abs=1e-5)
    assert loss != pytest.approx(by_definition(one, other, 0.4), abs=1e-2)  # the control


def test_a_share_of_the_batch_has_its_part_of_the_loss() -> None:
    torch.manual_seed(0)
    one, other = F.normalize(torch.randn(2, 7, 5), dim=2)
    whole = step.nt_xent(one, one, other, 0, 0.3)
    parts = [step.nt_xent(one[a:b], one, other, a, 0.3) for a, b in ((0, 3), (3, 7))]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
    wrong = step.nt_xent(one[3:], one, other, 0, 0.3)  # the control
    assert not torch.allclose(wrong, whole[3:], atol=1e-3)


def test_the_probe_of_an_example_is_fitted_to_all_others() -> None:
    torch.manual_seed(0)
    rows, labels = torch.randn(40, 6).double(), torch.randint(3, (40,))
    scores = probe.left_out(rows, labels, 3)
    design = torch.cat([rows, torch.ones(40, 1)], 1).numpy()
    for index in (0, 17, 39):
        kept = [i for i in range(40) if i != index]
        wanted = F.one_hot(labels[kept], 3).double()
        of_others = torch.tensor(design[kept])
        gram = of_others.T @ of_others + probe.RIDGE * 40 * torch.eye(7)
        expected = torch.tensor(design[index]) @ torch.linalg.solve(gram, of_others.T @ wanted)
        assert torch.allclose(scores[index], expected, atol=1e-9)
    with_itself = RidgeClassifier(alpha=0.4).fit(rows, labels).score(rows, labels)
    assert (scores.argmax(1) == labels).double().mean() < with_itself


def test_an_example_of_weight_zero_is_not_probed() -> None:
    torch.manual_seed(0)
    rows, labels = torch.randn(10, 3), torch.arange(10) % 2
    metrics = probe.Probe(2, torch.device("cpu"))
    metrics.update(rows, labels)
    before = metrics.scalars()
    metrics.update(rows[:1], 1 - labels[:1], torch.zeros(1))
    assert metrics.scalars() == before


@pytest.mark.slow
def test_stops_at_each_step_in_turn_change_no_bit(tmp_path: Path) -> None:
    assert_grows_back(tmp_path, RUN, 5, "step.strength=0.21")


@pytest.mark.slow
@pytest.mark.nightly
def test_two_processes_compare_all_examples_of_the_batch(tmp_path: Path) -> None:
    start(tmp_path / "one", *SMALL)
    start(tmp_path / "two", *SMALL, "trainer=ddp", "trainer.devices=2")
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-5
    start(
        tmp_path / "half", *SMALL, "data.batch_size=250"
    )  # the control: what each would see alone
    assert distance(tmp_path / "one", tmp_path / "half") > 1e-3


def scores(folder: Path) -> tuple[float, float]:
    """Return the test accuracy of logistic regression on pixels and on a run's embeddings."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    run, cpu = load_run(folder), torch.device("cpu")
    rows: list[tuple[torch.Tensor, ...]] = []
    for batches in (run.data.train(device=cpu).epoch(0), run.data.evaluation("test", device=cpu)):
        parts = []
        for batch in batches:
            images, labels = (each[: batch.num_local] for each in (batch.inputs, batch.targets))
            with torch.no_grad():
                parts.append((images.flatten(1), F.normalize(run.model(images), dim=1), labels))
        rows.append(tuple(torch.cat(each) for each in zip(*parts, strict=True)))
    (pixels, embeddings, labels), (its_pixels, its_embeddings, its_labels) = rows
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    of_pixels = classifier.fit(pixels, labels).score(its_pixels, its_labels)
    return of_pixels, classifier.fit(embeddings, labels).score(its_embeddings, its_labels)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_linear_probe_beats_logistic_regression_on_pixels(tmp_path: Path) -> None:
    """scikit-learn's logistic regression fits both, to the same training examples and labels."""
    example = ("experiment=contrastive_digits", "trainer.device=cpu")
    start(tmp_path / "trained", *example)
    start(tmp_path / "untrained", *example, "trainer.max_epochs=null", "trainer.max_steps=1")
    of_pixels, of_embeddings = scores(tmp_path / "trained")
    assert of_embeddings >= of_pixels > 0.94
    assert scores(tmp_path / "untrained")[1] < of_embeddings  # the control
