"""The report as data: duplicates within a split and across both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.check_images import encoded, pattern, write

Report = dict[str, Any]


def test_duplicates_are_found_within_a_split_and_across(
    tmp_path: Path, run: Callable[..., tuple[int, Report]], capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, three, four = (encoded(pattern(seed), "PNG") for seed in range(4))
    files = {"train/x/1.png": one, "train/x/2.png": two, "train/x/3.png": one, "train/y/4.png": one}
    files |= {"train/y/5.png": three, "train/y/6.png": three, "train/y/7.png": b"", "train/y/8.png": b""}
    files |= {"val/x/9.png": three, "val/x/10.png": four, "val/z/11.png": two, "val/z/12.png": two}
    _, report = run(write(tmp_path / "images", files))
    assert report["splits"]["train"]["duplicates"] == {
        "groups": 2,
        "surplus": 3,
        "groups_of_several_labels": 1,
        "named": [["x/1.png", "x/3.png", "y/4.png"], ["y/5.png", "y/6.png"]],
    }
    assert report["splits"]["val"]["duplicates"] == {
        "groups": 1,
        "surplus": 1,
        "groups_of_several_labels": 0,
        "named": [["z/11.png", "z/12.png"]],
    }
    assert report["in_train_and_val"] == {
        "groups": 2,
        "val_images": 3,
        "named": [
            {"train": ["x/2.png"], "val": ["z/11.png", "z/12.png"]},
            {"train": ["y/5.png", "y/6.png"], "val": ["x/9.png"]},
        ],
    }
    assert report["splits"]["val"]["classes"]["not_in_train"] == ["z"]
    text = capsys.readouterr().out
    assert "in val and in train: 3 (75%) of val's images, byte for byte" in text
    assert "      val: z/11.png = val: z/12.png = train: x/2.png" in text
    assert "duplicates    2 groups with the same bytes, 3 images too many; 1 group under different labels" in text
