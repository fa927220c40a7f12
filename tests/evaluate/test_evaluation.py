"""What a run leaves for those who use its encoder: a complete file that says what it holds, and a module that is ready."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.config.file import dump_config
from fastjepa.data.dataset import ImageDataset, Strings
from fastjepa.engine.build import build_engine
from fastjepa.errors import CheckpointError
from fastjepa.evaluate import load_encoder
from fastjepa.models.vision_transformer import VisionTransformer
from fastjepa.objectives.registry import build_objective, method_of
from fastjepa.run.folder import RunFolder
from fastjepa.trainer import Trainer
from tests.support.small import small_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a model that was not trained: of a named size, with another patch size."""
    path = tmp_path_factory.mktemp("run")
    config = small_config(image_size=(24, 32), precision="bf16")
    folder, method = RunFolder(path), method_of(config)
    folder.create()
    folder.write_config(dump_config(config))
    sizes = BatchSizes.share(config, 1)
    dataset = ImageDataset("", Strings.of([b"a", b"b", b"c", b"d"]), None, ())
    engine = build_engine(build_objective(method), method, config, sizes, torch.device("cpu"), None)
    Trainer(method, dataset, engine, sizes, folder)._save(1, last=True)
    return path


def contents(run: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(run / "checkpoints" / "step_00000001" / "model.safetensors", "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_a_part_of_the_file_is_the_whole_state_of_the_encoder(run: Path) -> None:
    """So that a strict load into any ViT with these names works: position tables included."""
    config = small_config()
    _, tensors = contents(run)
    for part in ("context_encoder", "target_encoder"):
        encoder = VisionTransformer(config.model, config.data)
        state = {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")}
        encoder.load_state_dict(state, strict=True)
        assert torch.equal(state["pos_embed"], encoder.pos_embed)
    table = build_objective(method_of(config)).get_buffer("predictor.predictor_pos_embed")
    assert torch.equal(tensors["predictor.predictor_pos_embed"], table)


def test_the_file_says_what_it_holds(run: Path) -> None:
    metadata, _ = contents(run)
    found = {key: json.loads(value) for key, value in metadata.items() if key not in ("format", "config")}
    assert found == {
        "step": 1,
        "model": "vit_base",
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 3,
        "mlp_ratio": 4.0,
        "patch_size": 4,
        "image_size": [24, 32],
        "in_channels": 2,
        "mean": [0.5, 0.5],
        "std": [0.25, 0.25],
        "parts": {
            "context_encoder": "trained",
            "predictor": "trained",
            "target_encoder": "EMA of context_encoder, evaluated",
        },
    }


def test_recorded_settings_have_the_sizes_of_the_named_model(run: Path) -> None:
    metadata, _ = contents(run)
    for model in (json.loads(metadata["config"])["model"],):
        assert (model["embed_dim"], model["depth"], model["num_heads"], model["mlp_ratio"]) == (24, 3, 3, 4.0)
    assert "null" not in (run / "config.yaml").read_text().partition("model:")[2].partition("optim:")[0]


def test_a_loaded_encoder_is_in_evaluation_mode(run: Path) -> None:
    for part in (None, "context_encoder"):
        encoder = load_encoder(run, part)
        assert not any(module.training for module in encoder.modules())


def test_an_encoder_of_another_size_than_the_settings_say_is_refused(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    config = RunFolder(other).config
    config.write_text(config.read_text().replace("embed_dim: 24", "embed_dim: 48"))
    with pytest.raises(CheckpointError, match=r"step_00000001 is of another model than .*config\.yaml"):
        load_encoder(other)


@pytest.mark.parametrize("part", ["nonsense", "target_encoder.blocks"])
def test_a_part_that_does_not_exist_is_refused_with_those_that_do(run: Path, part: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"part {part}: expected one of context_encoder, predictor, target_encoder"
    ):
        load_encoder(run, part)


def test_a_run_without_the_file_that_names_the_newest_checkpoint_is_read(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    (other / "checkpoints" / "latest").unlink()
    assert load_encoder(other)(torch.zeros(1, 2, 24, 32)).shape == (1, 48, 24)
