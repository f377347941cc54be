"""Several processes compute the same as one, in steps, evaluations and decisions."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import in_ranks
import pytest
import torch
from running import CPU, TINY, config_of
from test_communication import worked_out
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from regrow.checkpoint import sharded, writer
from regrow.distributed.parallel import World
from regrow.record import pictures

SIZE = 3  # 50 examples in windows of 16: shares differ, and some are empty
COUNTS = range(3 * SIZE * in_ranks.BATCH + 2)  # of examples in an evaluation
Seen = list[dict[str, Any]]

# A loss with class weights, so that a step's weights are not just a count.
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
    """Return the results of one process."""
    torch.set_num_threads(1)
    alone = World(device=torch.device("cpu"))
    folder = tmp_path_factory.mktemp("one")
    return {"trained": in_ranks.trained(alone, config, folder), "measured": measured_at_once()}


def measured_at_once() -> dict[str, dict[str, float]]:
    """Return each metric from a single update with all examples."""
    values = {}
    for kind, recipe in in_ranks.RECIPES.items():
        for count in COUNTS:
            metrics = in_ranks.Measured(recipe(), torch.device("cpu"))
            metrics.update(*in_ranks.rows(kind, count))
            values[f"{kind} {count}"] = metrics.scalars()
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def several(config: dict[str, Any], folder: Path) -> Seen:
    """The results of three processes, which are started once for all tests of this file."""
    torch.set_num_threads(1)
    in_ranks.leg(CPU, config, folder, 2)  # one of their checks resumes from it
    return in_ranks.together(SIZE, config, folder)


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(
        (one["weights"][name] - other["weights"][name]).abs().max().item()
        for name in one["weights"]
    )


@pytest.mark.parametrize(
    "way",
    [
        *("trained", "trained_in_slices", "trained_with_sums_on_device"),
        *("trained_sharded", "trained_sharded_in_slices"),
    ],
)
def test_processes_and_micro_batches_do_not_change_the_maths(
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


def test_a_sharded_model_may_be_gathered_and_computed_in_bf16(
    one: dict[str, Any], several: Seen
) -> None:
    for rank in several:
        seen = rank["trained_in_bf16"]
        assert {weight.dtype for weight in seen["weights"].values()} == {torch.float32}
        assert 1e-5 < distance(one["trained"], seen) < 2e-2
        for losses in (seen["seen"], seen["autocast"]):
            for (loss, _, count), (loss_1, _, count_1) in zip(
                losses, one["trained"]["seen"], strict=True
            ):
                assert count == count_1 and loss == pytest.approx(loss_1, abs=2e-2)


def test_every_process_ends_with_the_same_bits(several: Seen) -> None:
    for rank in several[1:]:
        assert distance(several[0]["trained"], rank["trained"]) == 0


def test_a_mean_over_processes_would_be_found(one: dict[str, Any], several: Seen) -> None:
    assert distance(one["trained"], several[0]["trained_as_if_alone"]) > 1e-3


@pytest.mark.parametrize("way", ["trained_with_a_nan", "sharded_with_a_nan"])
def test_a_nan_in_one_process_leaves_the_step_out_in_all(way: str, several: Seen) -> None:
    for rank in several:
        assert rank[way] == {"skipped": 1, "moved": False, "moments": 0}


def test_a_sharded_run_grows_back_from_its_checkpoint(several: Seen) -> None:
    for rank in several:
        assert rank["saved_sharded"]["seen"] == rank["trained_sharded"]["seen"][3:]
        assert distance(rank["saved_sharded"], rank["trained_sharded"]) == 0


def test_one_process_reads_what_several_have_sharded(several: Seen, folder: Path) -> None:
    parts, facts = writer.load(folder / "saved" / "step_00000003")
    assert facts["step"] == 3 and {*facts["files"]} > {f"shards/__{r}_0.distcp" for r in range(3)}
    expected = several[0]["saved_sharded"]["at three"]
    for name, tensor in parts["model"].items():
        assert torch.equal(tensor, expected[name])
    moments = parts["optimizer"]["state"]
    assert not any(value.is_meta for each in moments.values() for value in each.values())


def test_the_number_of_processes_may_change_between_any_two_steps(
    one: dict[str, Any], several: Seen, folder: Path, config: dict[str, Any]
) -> None:
    """Started by one process, then three with FSDP, three with DDP, and one again."""
    relayed = [*several[0]["relayed"], *in_ranks.leg(CPU, config, folder, 6)]
    assert len(relayed) == 4
    for (loss, norm, count), (loss_1, norm_1, count_1) in zip(
        relayed, one["trained"]["seen"][2:], strict=True
    ):
        assert count == count_1
        assert loss == pytest.approx(loss_1, abs=1e-5)
        assert norm == pytest.approx(norm_1, rel=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that counts them")
def test_each_process_sends_as_many_bytes_as_worked_out(several: Seen) -> None:
    expected = worked_out(SIZE)
    for rank in several:
        assert rank["sent"].keys() == expected.keys()
        for name, times in expected.items():
            # A ring's shares differ by some rows; headers, and the few numbers besides gradients.
            assert 0.97 * times < rank["sent"][name] < 1.04 * times, name


@pytest.mark.parametrize("file", ["__1_0.distcp", ".metadata"])
def test_damage_of_a_shard_is_found_and_named(
    file: str, several: Seen, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder / "saved" / "step_00000003", tmp_path / "step_00000003")
    content = bytearray((copy / "shards" / file).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "shards" / file).write_bytes(content)
    with pytest.raises(writer.DamagedCheckpoint, match=f"shards/{file} does not match"):
        writer.load(copy)


def test_an_index_of_shards_cannot_run_anything(
    several: Seen, folder: Path, tmp_path: Path
) -> None:
    """Its SHA-256 does not help if the whole folder is a stranger's."""

    class Foreign:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/ran",)

    shards = shutil.copytree(folder / "saved" / "step_00000003" / "shards", tmp_path / "shards")
    index = pickle.loads((shards / ".metadata").read_bytes())
    name, entry = next(iter(index.state_dict_metadata.items()))
    empty = {name: torch.empty(entry.size, device="meta")}
    assert name in sharded.read(shards, empty)
    # A class on the stack, and the state for pickle's BUILD.
    rebound = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}S'ran'\nK\x01stb."
    foreign = {"no place in an index": Foreign(), "has no place": BytesStorageMetadata()}
    # torch 2.11 does not pass the reason on.
    for says, entry in {**foreign, "is not a tensor": 7, "changes no class": rebound}.items():
        index.state_dict_metadata[name] = entry
        content = entry if isinstance(entry, bytes) else pickle.dumps(index)
        (shards / ".metadata").write_bytes(content)
        with pytest.raises(sharded.ERRORS, match=f"{says}|metadata is None"):
            sharded.read(shards, empty)
    assert not hasattr(type(index), "ran")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Foreign()))  # the control: it would have
    assert (tmp_path / "ran").exists()


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
        text, gathered, firsts, texts = rank["told"]
        assert text == "ä\udcff 0" and gathered == [0, 10, 20] and sum(firsts) == 1
        assert texts == ["", "ö", "öö"]


def test_the_wrong_images_of_all_processes_are_shown_in_the_order_of_the_set(
    config: dict[str, Any], folder: Path, several: Seen
) -> None:
    alone, main = in_ranks.wrong_images(CPU, config, folder), several[0]["wrong_images"]
    assert main.keys() == alone.keys() and len(main["file"]) == pictures.NUM_WRONG
    for key in ("file", "image", "true", "predicted"):
        assert main[key] == alone[key]
    assert main["probability"] == pytest.approx(alone["probability"])
    places = [int(file.removeprefix("test/").removesuffix(".png")) for file in main["file"]]
    assert places == sorted(places)
    # the control: the main process's share would reach further, and leave out others
    window = SIZE * in_ranks.BATCH
    assert {place % window // in_ranks.BATCH for place in places} == {0, 1, 2}


def test_an_evaluation_uses_the_buffers_of_the_main_process(several: Seen) -> None:
    """BatchNorm's statistics differ between processes; the results of one model must not."""
    seen = [rank["evaluated_with_own_buffers"] for rank in several]
    assert seen == [[5.0, 5.0, number + 1] for number in range(SIZE)]  # a cache may have any size


def test_a_signal_to_one_process_stops_all_after_the_same_step(several: Seen) -> None:
    assert [rank["exchanged"]["stops"] for rank in several] == [[False, True]] * SIZE


def test_each_backward_pass_of_a_step_is_counted_once_under_its_name(several: Seen) -> None:
    for rank in several:
        seen = rank["sent_in_one_step"]
        assert seen["counted"] == {"first": seen["global"], "second": seen["global"]}
        assert seen["again"] == seen["global"] > 0
        twice, unnamed = seen["errors"]
        assert twice.startswith("this step has sent its sums of second already.")
        assert "a synchronised backward pass without sums of its own." in unnamed


def test_the_seconds_of_a_step_are_those_of_the_main_process(several: Seen) -> None:
    seconds = [rank["exchanged"]["seconds"] for rank in several]
    assert len(set(seconds)) == 1 and 0 < seconds[0] < 100


@pytest.mark.parametrize("way", ["trained_with_empty_steps", "trained_with_empty_steps_on_device"])
def test_a_step_is_empty_only_if_it_is_so_in_every_process(way: str, several: Seen) -> None:
    for rank in several:
        full, partly, empty = rank[way]
        assert full["moved"] and full["empty"] == 0
        assert partly["moved"] and partly["empty"] == 0 and partly["norm"] > 0
        assert not empty["moved"] and empty["empty"] == 1 and empty["norm"] == 0
        assert empty["skipped"] == 0
        assert [step["weights"] for step in rank[way]] == [s["weights"] for s in several[0][way]]
