"""Samples of several files are joined into one data set."""

import numpy as np

from fastjepa.data.dataset import Strings
from fastjepa.data.sources.file_samples import FileSamples, common_folder, join


def samples(name: str, labels: list[int], values: list[str], in_order: bool = False) -> FileSamples:
    """One sample for each label, all in one file, at bytes 0, 10, 20, ..."""
    count = len(labels)
    return FileSamples(
        names=Strings.of(f"{name}/{i}".encode() for i in range(count)),
        files=[name.encode()],
        file=np.zeros(count, np.int64),
        start=10 * np.arange(count),
        size=np.full(count, 7),
        labels=np.array(labels, np.int64),
        values=values,
        in_order=in_order,
    )


def test_samples_follow_file_by_file_and_point_to_their_own_file() -> None:
    listing = join("/images", [samples("b", [0, 0], ["x"]), samples("a", [0], ["x"])], [b"watched"], ["a warning"])
    dataset = listing.dataset
    assert dataset.root == "/images"
    assert list(dataset.names) == [b"b/0", b"b/1", b"a/0"]
    assert dataset.spans is not None
    assert [dataset.spans.files[int(file)] for file in dataset.spans.file] == [b"b", b"b", b"a"]
    assert dataset.spans.start.tolist() == [0, 10, 0]
    assert dataset.spans.size.tolist() == [7, 7, 7]
    assert (listing.watched, listing.warnings) == ([b"watched"], ["a warning"])


def test_labels_of_the_files_are_joined_by_value_and_sorted() -> None:
    dataset = join("/", [samples("a", [1, 0], ["10", "9"]), samples("b", [0, 1], ["10", "2"])], [], []).dataset
    assert dataset.class_names == ("2", "9", "10")
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [1, 2, 2, 0]


def test_class_names_in_their_final_order_are_not_sorted() -> None:
    parts = [samples("a", [0, 1], ["zebra", "ant"], in_order=True), samples("b", [0], ["ant"], in_order=True)]
    dataset = join("/", parts, [], []).dataset
    assert dataset.class_names == ("zebra", "ant")
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1, 1]


def test_labels_are_used_only_if_all_samples_have_one() -> None:
    partly = join("/images", [samples("a", [0, -1], ["x"]), samples("b", [0], ["x"])], [], [])
    assert partly.dataset.labels is None
    assert partly.dataset.class_names == ()
    assert partly.warnings == ["/images: 1 of 3 samples have no label: no labels are used"]
    none = join("/images", [samples("a", [-1, -1], [])], [], [])
    assert none.dataset.labels is None
    assert none.warnings == []


def test_the_common_folder_is_the_deepest_one() -> None:
    assert common_folder(["/a/b/1.tar", "/a/b/2.tar"]) == "/a/b"
    assert common_folder(["/a/b/1.tar", "/a/bc/2.tar"]) == "/a"
    assert common_folder(["/a/1.tar"]) == "/a"
