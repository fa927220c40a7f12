"""The report for people tells what training would do, and names only a few images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.check_images import PHOTO, encoded, pattern, write

Report = dict[str, Any]


@pytest.mark.parametrize(
    ("num_good", "verdict"),
    [
        (1, "bad           1 (50%): TRAINING WOULD STOP, as they are more than data.max_bad_share = 0.01"),
        (
            99,
            "bad           1 (1%): training would put others in their places (up to data.max_bad_share = 0.01)",
        ),
    ],
)
def test_the_report_tells_what_training_would_do_with_bad_images(
    tmp_path: Path,
    run: Callable[..., tuple[int, Report]],
    capsys: pytest.CaptureFixture[str],
    num_good: int,
    verdict: str,
) -> None:
    small = encoded(pattern(1, (4, 4)), "PNG")
    run(write(tmp_path / "images", {f"{i:02}.png": small for i in range(num_good)} | {"bad.png": b""}))
    assert verdict in capsys.readouterr().out


def test_the_text_names_few_images_and_the_json_all(
    tmp_path: Path, run: Callable[..., tuple[int, Report]], capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"bad{i:02}.png": b"text" for i in range(25)} | {"good.jpg": PHOTO}
    _, report = run(write(tmp_path / "images", files))
    assert len(report["splits"]["train"]["bad"]) == 25
    output = capsys.readouterr()
    assert output.out.count(".png: not an image") == 10
    assert "... and 15 more (--json FILE names them)" in output.out
    assert "%|" not in output.err  # no bar where there is no terminal
