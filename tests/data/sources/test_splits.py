"""`data.source` is recognised, its files are divided into splits, and errors name the setting."""

import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastjepa.config import DataConfig
from fastjepa.data.dataset import ImageDataset
from fastjepa.data.sources import open_dataset
from fastjepa.errors import DataError


def write(root: Path, *names: str) -> Path:
    """Images, shards, tables and lists, each with one image whose bytes are its path."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tar":
            (root / "image").write_text(name)
            with tarfile.open(path, "w") as tar:
                tar.add(root / "image", "1.jpg")
            (root / "image").unlink()
        elif path.suffix == ".parquet":
            pq.write_table(pa.table({"image": [name.encode()]}), path)
        elif path.suffix == ".arrow":
            made = pa.table({"image": [name.encode()]})
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, made.schema) as writer:
                writer.write_table(made)
        else:
            path.write_text(name)
    return root


def opened(source: Path | str, val_source: Path | str | None = None) -> dict[str, list[str] | None]:
    """The images' bytes in each split."""

    def content(dataset: ImageDataset | None) -> list[str] | None:
        return None if dataset is None else [dataset.read(i, 99).decode() for i in range(len(dataset))]

    config = DataConfig(source=str(source), val_source=None if val_source is None else str(val_source))
    return {"train": content(open_dataset(config, "train")), "val": content(open_dataset(config, "val"))}


def refused(source: Path | str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        open_dataset(DataConfig(source=str(source)), "train")


def test_a_folder_without_splits_is_all_train(tmp_path: Path) -> None:
    assert opened(write(tmp_path, "a/1.png", "b/2.png", "val/3.png")) == {
        "train": ["a/1.png", "b/2.png", "val/3.png"],
        "val": None,
    }


@pytest.mark.parametrize("held_out", ["val", "validation", "valid", "test"])
def test_sub_folders_are_splits(tmp_path: Path, held_out: str) -> None:
    write(tmp_path, "train/a/1.png", "train/b/2.png", f"{held_out}/a/3.png", "other/4.png", "5.png")
    assert opened(tmp_path) == {"train": ["train/a/1.png", "train/b/2.png"], "val": [f"{held_out}/a/3.png"]}


def test_validation_comes_before_test(tmp_path: Path) -> None:
    assert opened(write(tmp_path, "train/1.png", "test/2.png", "validation/3.png"))["val"] == ["validation/3.png"]


def test_splits_have_labels_that_can_be_matched_by_name(tmp_path: Path) -> None:
    config = DataConfig(source=str(write(tmp_path, "train/a/1.png", "train/c/2.png", "val/b/3.png", "val/c/4.png")))
    train, val = open_dataset(config, "train"), open_dataset(config, "val")
    assert train is not None
    assert val is not None
    assert train.class_names == ("a", "c")
    assert val.class_names == ("b", "c")
    labels = val.labels_by(train.class_names)
    assert labels is not None
    assert labels.tolist() == [2, 1]


@pytest.mark.parametrize("suffix", ["tar", "parquet", "arrow"])
def test_shards_and_tables_are_split_by_their_names(tmp_path: Path, suffix: str) -> None:
    names = [f"data-{split}-{i}.{suffix}" for split in ("train", "val", "test") for i in range(2)]
    write(tmp_path, *names, "README.md", ".hidden.png", "info.json")
    expected = {"train": names[:2], "val": names[2:4]}
    assert opened(tmp_path) == expected
    assert opened(tmp_path / f"*.{suffix}") == expected
    assert opened(tmp_path / f"data-train-?.{suffix}") == {"train": names[:2], "val": None}


@pytest.mark.parametrize("suffix", ["tar", "parquet", "arrow"])
def test_sub_folders_of_shards_and_tables_are_splits(tmp_path: Path, suffix: str) -> None:
    """The `datasets` library writes a DatasetDict in this way (`save_to_disk`)."""
    write(
        tmp_path,
        f"train/data-0.{suffix}",
        f"train/data-1.{suffix}",
        "train/state.json",
        f"test/data-0.{suffix}",
        "d.json",
    )
    assert opened(tmp_path) == {
        "train": [f"train/data-0.{suffix}", f"train/data-1.{suffix}"],
        "val": [f"test/data-0.{suffix}"],
    }


def test_names_that_tell_no_split_are_all_train(tmp_path: Path) -> None:
    write(tmp_path, "a.tar", "trainer.tar", "valley.tar")
    assert opened(tmp_path) == {"train": ["a.tar", "trainer.tar", "valley.tar"], "val": None}
    assert opened(tmp_path / "a.tar") == {"train": ["a.tar"], "val": None}


def test_a_single_split_is_train_whatever_its_name(tmp_path: Path) -> None:
    assert opened(write(tmp_path, "test-0.tar", "test-1.tar")) == {"train": ["test-0.tar", "test-1.tar"], "val": None}


def test_held_out_splits_alone_are_refused(tmp_path: Path) -> None:
    refused(write(tmp_path, "val-0.tar", "test-0.tar"), r"data\.source = .*: nothing in it is named train")


def test_results_that_datasets_caches_beside_the_data_are_passed_over(tmp_path: Path) -> None:
    assert opened(write(tmp_path, "data-0.arrow", "cache-1a2b.arrow", "tmpx1y2.arrow"))["train"] == ["data-0.arrow"]


@pytest.mark.parametrize("missing", [(), (1,), (0, 2)])
def test_a_pattern_counts_shards_whether_they_are_there_or_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, missing: tuple[int, ...]
) -> None:
    there = [i for i in range(4) if i not in missing]
    write(tmp_path, *(f"{letter}/s-{i:03d}.tar" for letter in "12" for i in there), "1/s-004.tar")
    assert opened(tmp_path / "{1..2}" / "s-{000..003}.tar")["train"] == [
        f"{letter}/s-{i:03d}.tar" for letter in "12" for i in there
    ]
    assert (f"{2 * len(missing)} of 8 shards are missing" in caplog.text) == bool(missing)


def test_a_pattern_gives_a_file_once(tmp_path: Path) -> None:
    write(tmp_path, "s1.tar", "s10.tar")
    assert opened(tmp_path / "s{1..10}*.tar")["train"] == ["s1.tar", "s10.tar"]


def test_a_file_is_known_by_its_suffix_and_is_else_a_list(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", "1.png", "2.png")
    (tmp_path / "files.csv").write_text("2.png\n1.png\n")
    assert opened(tmp_path / "a.parquet")["train"] == ["a.parquet"]
    assert opened(tmp_path / "files.csv") == {"train": ["2.png", "1.png"], "val": None}


def test_val_source_is_held_out_as_a_whole_or_by_its_own_split(tmp_path: Path) -> None:
    write(tmp_path, "one/train/1.png", "one/val/2.png", "two/3.png", "three/a-train.tar", "three/a-val.tar")
    assert opened(tmp_path / "one", tmp_path / "two") == {"train": ["one/train/1.png"], "val": ["two/3.png"]}
    assert opened(tmp_path / "two", tmp_path / "one") == {"train": ["two/3.png"], "val": ["one/val/2.png"]}
    assert opened(tmp_path / "two", tmp_path / "three") == {"train": ["two/3.png"], "val": ["three/a-val.tar"]}


@pytest.mark.parametrize(
    ("names", "source", "match"),
    [
        ((), "nowhere", r"data\.source = .*nowhere: No such file or folder; expected images, shards, tables or a list"),
        ((), "no-{0..2}.tar", r"data\.source = .*: no file matches the pattern"),
        ((), "*.tar", "no file matches the pattern"),
        (("s-0.tar",), "s-{3..0}.tar", r"\{3\.\.0\} counts nothing; expected the smaller number first"),
        (("a.tar", "b.parquet"), "", r"files of the kinds \.parquet, \.tar: expected one of \.tar, \.arrow, \.parquet"),
        (("a.png", "b.png"), "*", r"files of the kinds \.png: expected one of \.tar"),
        (
            ("a.tar", "x/1.png"),
            "",
            r"holds a\.tar and x: say which are meant, with a pattern such as .*/\*\.tar, or move",
        ),
        (("a.arrow", "1.png"), "", r"holds a\.arrow and 1\.png: say which are meant"),
        (("train/a.tar", "train/1.png"), "", r"train holds a\.tar and 1\.png"),
        (
            ("a-train.tar", "b.tar"),
            "",
            r"b\.tar: its name tells no split, but other names do; expected train, or one of",
        ),
        (
            ("data/a-train.parquet",),
            "",
            r"no images in .* such as data/a-train\.parquet.*shards and tables in the folder",
        ),
        (("1.txt",), "", "no images in"),
    ],
)
def test_an_unusable_source_is_refused_by_a_message_with_the_setting(
    tmp_path: Path, names: tuple[str, ...], source: str, match: str
) -> None:
    refused(write(tmp_path, *names) / source, match)


def test_an_image_file_as_the_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"\xff\xd8\xff\0")
    refused(
        tmp_path / "1.jpg", r"data\.source = .*1\.jpg: holds NUL bytes.*expected a text file with one image path a line"
    )


def test_errors_of_val_source_name_it(tmp_path: Path) -> None:
    config = DataConfig(source=str(write(tmp_path, "1.png")), val_source=str(tmp_path / "nowhere"))
    assert open_dataset(config, "train") is not None
    with pytest.raises(DataError, match=r"data\.val_source = .*nowhere"):
        open_dataset(config, "val")


def test_a_home_folder_is_expanded_and_a_relative_path_is_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "images/1.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert opened("~/images") == opened("images") == {"train": ["images/1.png"], "val": None}


def test_names_with_pattern_characters_are_taken_literally_if_they_are_there(tmp_path: Path) -> None:
    write(tmp_path, "[1] a*b/1.png", "x[0].tar")
    assert opened(tmp_path / "[1] a*b")["train"] == ["[1] a*b/1.png"]
    assert opened(tmp_path / "x[0].tar")["train"] == ["x[0].tar"]


def test_unusable_paths_raise_an_error_with_the_setting(tmp_path: Path) -> None:
    refused(tmp_path / ("x" * 300), r"data\.source = .*cannot be read \(File name too long\)")
    refused("", r"data\.source = : expected the path of images")


def test_compressed_shards_are_refused_with_what_to_do(tmp_path: Path) -> None:
    refused(write(tmp_path, "a.tar.gz") / "a.tar.gz", "compressed shards cannot be read in place: .*unpack it")


def test_folders_beside_train_are_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The user is told, because `train` may be meant as a class among others."""
    write(tmp_path, "train/1.jpg", "val/2.jpg", "bus/3.jpg", "car/4.jpg", "README.md")
    opened(tmp_path)
    assert any(message.endswith("not used: bus, car") for message in caplog.messages)


def test_a_pipe_among_shards_does_not_hang(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "a.tar")
    os.mkfifo(tmp_path / "b.tar")
    assert opened(tmp_path)["train"] == ["a.tar"]
    assert any("b.tar: not a regular file" in message for message in caplog.messages)
