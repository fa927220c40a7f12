"""Bad samples are named once, whoever meets them, and a full disk does not stop a run."""

import json
import logging
import multiprocessing
from pathlib import Path

import pytest

from fastjepa.data import DataError
from fastjepa.data.bad_samples import BadSamples
from fastjepa.data.dataset import ImageDataset, Strings

DATASET = ImageDataset("images", Strings.of([f"{i}.jpg".encode() for i in range(1000)]), None, ())


def names(path: Path) -> list[str]:
    return [json.loads(line)["name"] for line in path.read_text().splitlines() if line.strip()]


def test_several_ranks_name_a_sample_once_and_count_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    first, second = (BadSamples(DATASET, 1.0, path) for _ in range(2))
    for index in (3, 5, 3):
        first.add(index, "why")
    for index in (5, 7):
        second.add(index, "why")
    assert names(path) == ["3.jpg", "5.jpg", "7.jpg"]
    assert len(first) == len(second) == 3
    assert first.reason(7) is None  # each process finds out for itself: the image may be good by now
    resumed = BadSamples(DATASET, 1.0, path)
    assert len(resumed) == 3
    resumed.add(7, "why")
    assert names(path) == ["3.jpg", "5.jpg", "7.jpg"]


def _add_all(path: Path, start: int) -> None:
    bad = BadSamples(DATASET, 1.0, path)
    for index in range(start, 200 + start):
        bad.add(index, "why")


@pytest.mark.processes
def test_processes_that_write_at_the_same_time_lose_and_repeat_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_add_all, args=(path, start)) for start in (0, 100, 50)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sorted(names(path)) == sorted(f"{i}.jpg" for i in range(300))


def test_half_a_line_of_a_killed_process_costs_no_other_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"index": 1, "name": "1.jpg", "reason": "x"}\n{"index": 2, "na')
    bad = BadSamples(DATASET, 1.0, path)
    bad.add(9, "why")
    bad.add(8, "why")
    assert len(BadSamples(DATASET, 1.0, path)) == len(bad) == 3
    assert path.read_text().endswith('"reason": "why"}\n')


def test_more_bad_samples_than_the_share_are_an_error_on_every_rank_that_meets_one(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    first, second = (BadSamples(DATASET, 0.002, path) for _ in range(2))
    first.add(1, "a")
    first.add(2, "a")
    with pytest.raises(DataError, match=r"images: 3 of 1000 images are bad, more than data.max_bad_share = 0.002"):
        second.add(3, "a")
    for index in (4, 1):  # a new one, and one that it knows
        with pytest.raises(DataError, match=r"the latest are 1\.jpg, 2\.jpg, 3\.jpg.*bad\.jsonl names them all"):
            first.add(index, "a")


def test_the_bad_samples_of_another_source_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(f'{{"index": {i}, "name": "old/{i}.jpg", "reason": "x"}}\n' for i in range(990, 1020)))
    bad = BadSamples(DATASET, 0.002, path)
    bad.add(5, "why")
    assert len(bad) == len(BadSamples(DATASET, 0.002, path)) == 1


def test_a_single_bad_sample_stops_no_run_however_small() -> None:
    few = ImageDataset("images", Strings.of([b"1.jpg", b"2.jpg", b"3.jpg"]), None, ())
    bad = BadSamples(few, 0.01, None)
    bad.add(1, "why")
    with pytest.raises(DataError, match="2 of 3"):
        bad.add(0, "why")


def test_with_a_share_of_zero_the_first_bad_sample_is_an_error() -> None:
    with pytest.raises(DataError, match="1 of 1000"):
        BadSamples(DATASET, 0.0, None).add(1, "a")


def test_a_file_that_cannot_be_written_is_logged_once_and_the_count_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "no folder").touch()
    bad = BadSamples(DATASET, 1.0, tmp_path / "no folder" / "bad.jsonl")
    with caplog.at_level(logging.WARNING):
        for index in range(3):
            bad.add(index, "why")
    assert len(bad) == 3
    assert sum("cannot be written" in message for message in caplog.messages) == 1
    assert sum("takes its place" in message for message in caplog.messages) == 3
