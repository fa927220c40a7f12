"""Names of samples are made unique."""

from collections import Counter

import numpy as np
import pytest

from fastjepa.data.dataset import Strings
from fastjepa.data.sources import names as names_module
from fastjepa.data.sources.names import unique_names


@pytest.mark.parametrize(
    ("names", "expected", "changed"),
    [
        ([], [], []),
        (["a", "b"], ["a", "b"], []),
        (["a", "a", "b", "a"], ["a", "a#2", "b", "a#3"], [1, 3]),
        (["a", "a", "a#2", "a"], ["a", "a#3", "a#2", "a#4"], [1, 3]),  # a#2 is taken, further down
        (["a", "a", "a#2", "a#2"], ["a", "a#3", "a#2", "a#2#2"], [1, 3]),
    ],
)
def test_a_name_that_occurs_again_gets_the_next_free_number(
    names: list[str], expected: list[str], changed: list[int]
) -> None:
    made, indices = unique_names(Strings.of(name.encode() for name in names))
    assert [name.decode() for name in made] == expected
    assert indices.tolist() == changed


def test_many_random_names_are_unique_afterwards_and_the_first_of_each_keeps_its_own() -> None:
    rng = np.random.default_rng(0)
    names = [f"{rng.choice(['a', 'b'])}{'#2' * int(rng.integers(0, 3))}".encode() for _ in range(300)]
    made, changed = unique_names(Strings.of(names))
    assert max(Counter(made).values()) == 1
    unchanged = [i for i in range(300) if i not in set(changed.tolist())]
    assert unchanged == sorted({name: i for i, name in reversed(list(enumerate(names)))}.values())
    assert [made[i] for i in unchanged] == [names[i] for i in unchanged]


def test_names_with_equal_hashes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names_module, "hash", lambda name: len(name), raising=False)
    made, changed = unique_names(Strings.of([b"a", b"b", b"cc", b"a"]))
    assert list(made)[:3] == [b"a", b"b", b"cc"]
    assert changed.tolist() == [3]
    assert made[3].startswith(b"a#")
