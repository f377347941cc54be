"""Several processes compute what one does: in steps, in evaluations, in decisions."""

from __future__ import annotations

from typing import Any

import in_ranks
import pytest
import torch
from running import TINY, config_of

from regrow.training.parallel import World

SIZE = 3  # 50 examples in windows of 16: no share is like another, and some are empty
COUNTS = range(3 * SIZE * in_ranks.BATCH + 2)  # of examples in an evaluation
Seen = list[dict[str, Any]]

# A loss with class weights, so that the weights of a step are no mere count.
CONFIG = (
    *TINY,
    "optimizer=sgd",
    "optimizer.lr=0.3",
    "loss.class_weights=[1.0,2.0,0.5]",
    "trainer.clip_norm=0.5",
    "model.dropout=0",
)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return config_of(*CONFIG)


@pytest.fixture(scope="module")
def one(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process sees."""
    torch.set_num_threads(1)
    alone = World(device=torch.device("cpu"))
    folder = tmp_path_factory.mktemp("one")
    return {"trained": in_ranks.trained(alone, config, folder), "measured": measured_at_once()}


def measured_at_once() -> dict[str, dict[str, float]]:
    """Each metric from a single update with all examples."""
    values = {}
    for kind, recipe in in_ranks.RECIPES.items():
        for count in COUNTS:
            metrics = in_ranks.Measured(recipe(), torch.device("cpu"))
            metrics.update(*in_ranks.rows(kind, count))
            values[f"{kind} {count}"] = metrics.scalars()
    return values


@pytest.fixture(scope="module")
def several(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What each of three processes sees. They are started once, for all tests of this file."""
    return in_ranks.together(SIZE, config, tmp_path_factory.mktemp("several"))


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(
        (one["weights"][name] - other["weights"][name]).abs().max().item()
        for name in one["weights"]
    )


@pytest.mark.parametrize("way", ["trained", "trained_in_slices"])
def test_processes_and_slices_do_not_move_the_maths(
    way: str, one: dict[str, Any], several: Seen
) -> None:
    for rank in several:
        assert distance(one["trained"], rank[way]) < 1e-5
        for (loss, norm, count), (loss_1, norm_1, count_1) in zip(
            rank[way]["seen"], one["trained"]["seen"], strict=True
        ):
            assert count == count_1
            assert loss == pytest.approx(loss_1, abs=1e-5)
            assert norm == pytest.approx(norm_1, rel=1e-4)


def test_every_process_ends_with_the_same_bits(several: Seen) -> None:
    for rank in several[1:]:
        assert distance(several[0]["trained"], rank["trained"]) == 0


def test_a_mean_over_processes_would_be_found(one: dict[str, Any], several: Seen) -> None:
    assert distance(one["trained"], several[0]["trained_as_if_alone"]) > 1e-3


def test_a_nan_in_one_process_leaves_the_step_out_in_all(several: Seen) -> None:
    for rank in several:
        assert rank["trained_with_a_nan"] == {"skipped": 1, "moved": False, "moments": 0}


@pytest.mark.parametrize("kind", in_ranks.RECIPES)
def test_a_metric_over_processes_is_the_metric_over_all(
    kind: str, one: dict[str, Any], several: Seen
) -> None:
    for count in COUNTS:
        expected = one["measured"][f"{kind} {count}"]
        for rank in several:
            found = rank["measured"][f"{kind} {count}"]
            assert found == pytest.approx(expected, abs=1e-9, nan_ok=True), count


def test_an_evaluation_ends_in_all_processes_at_the_same_batch(several: Seen) -> None:
    assert [rank["stopped"] for rank in several] == [[16]] * SIZE


def test_all_are_told_what_the_main_process_knows(several: Seen) -> None:
    for rank in several:
        text, gathered, firsts = rank["told"]
        assert text == "ä 0" and gathered == [0, 10, 20] and sum(firsts) == 1
