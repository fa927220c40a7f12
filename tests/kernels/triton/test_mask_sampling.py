"""The Triton mask sampler gives the host's masks in every bit, without a read-back and without a compilation per step."""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastjepa_kernels import MaskRules, PackedMasks, mask_sampling
from fastjepa_kernels.reference import mask_sampling_reference
from tests.kernels.triton.conftest import Engine, IdleKernel, compiled_only, not_in_the_simulator, simulator_runs
from tests.support.mask_rules import MODES, STRATEGIES, TIED_SAMPLE, assert_same_masks, hard_rules, mask_rules

SEED, STEP = 2**63 + 12345, 2**32 - 2
SAMPLES = [3, 2**33 + 1, 2**40 - 1, 0, 2**32 - 1]

pytestmark = pytest.mark.usefixtures("unwritten_memory_shows")


def check(engine: Engine, rules: MaskRules, samples: list[int], seed: int = SEED, step: int = STEP) -> PackedMasks:
    indices = torch.tensor(samples)
    masks = mask_sampling(rules, seed=seed, step=step, sample_indices=indices.to(engine.device))
    num_images, num_blocks = len(samples), rules.num_target_blocks
    target = num_images * rules.max_target
    lengths = {
        "context_indices": num_images * rules.max_context,
        "target_indices": target,
        "union_indices": num_images * rules.max_union,
        "union_rows": target,
        "predictor_rows": num_images * rules.max_predictor,
        "predictor_target_rows": target,
        "predictor_cu_seqlens": num_images * num_blocks + 1,
    }
    assert {name: len(getattr(masks, name)) for name in lengths} == lengths, "not the host's upper bounds"
    assert_same_masks(masks, mask_sampling_reference(rules, seed=seed, step=step, sample_indices=indices))
    return masks


@simulator_runs(lambda strategy, mode: (strategy, mode) in zip(STRATEGIES, [*MODES, "official"], strict=True))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_equal_those_of_the_plain_loop(engine: Engine, strategy: str, mode: str) -> None:
    check(engine, mask_rules(strategy, mode, 5, 7), SAMPLES[:3])


@simulator_runs(lambda grid, strategy: (grid, strategy) == ((14, 14), "multiblock"))
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("grid", [(2, 2), (2, 9), (14, 14), (16, 16), (11, 33)])
def test_masks_on_any_grid(engine: Engine, grid: tuple[int, int], strategy: str) -> None:
    check(engine, mask_rules(strategy, "budget", *grid, min_context=max(grid[0] * grid[1] // 8, 1)), SAMPLES[:2])


@pytest.mark.parametrize("grid", [(32, 32), (64, 64)])
def test_masks_on_large_grids(engine: Engine, grid: tuple[int, int]) -> None:
    check(engine, mask_rules("multiblock", "budget", *grid), SAMPLES[:1])


@simulator_runs(lambda num_target_blocks: num_target_blocks == 7)
@pytest.mark.parametrize("num_target_blocks", [1, 2, 7, 30])
def test_any_number_of_target_blocks(engine: Engine, num_target_blocks: int) -> None:
    check(engine, mask_rules("multiblock", "official", 5, 5, num_target_blocks=num_target_blocks), SAMPLES[:2])


@pytest.mark.parametrize("mode", MODES)
def test_target_blocks_are_given_up_after_the_same_attempts(engine: Engine, mode: str) -> None:
    masks = check(engine, hard_rules(mode), [*range(8)], seed=1, step=1)
    shared = torch.isin(masks.context_indices[: int(masks.sizes[0, 0])], masks.target_indices)
    assert shared.any(), "no image gave up a target block: choose other samples"


@pytest.mark.parametrize(
    ("seed", "step"), [(0, 0), (1, 1), (2**32 - 1, 2**31), (2**63 - 1, 16), (2**64 - 1, 2**32 - 1)]
)
def test_any_seed_and_step(engine: Engine, seed: int, step: int) -> None:
    check(engine, mask_rules("block", "ragged", 4, 4), SAMPLES[:1], seed, step)


@pytest.mark.parametrize("mode", ["ragged", "official"])
def test_batches_longer_than_a_block_of_the_prefix_sum(
    engine: Engine, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an odd grid the rasterized targets of an image differ in length, so that the cut shortens them."""
    from fastjepa_kernels.triton_kernels import mask_sampling as triton_mask_sampling

    monkeypatch.setattr(triton_mask_sampling, "_SCAN_BLOCK", 16)
    check(engine, mask_rules("rasterized", mode, 3, 5, min_context=1), [*range(35 if engine.thorough else 18)])


def test_the_earlier_patch_wins_where_two_words_are_equal(engine: Engine) -> None:
    check(engine, mask_rules("random", "ragged", 14, 14, target_count=49), [TIED_SAMPLE], seed=0, step=0)


@not_in_the_simulator
def test_masks_of_130_images(engine: Engine) -> None:
    check(engine, mask_rules("block", "official", 4, 5), [*range(130)])


def test_sample_indices_may_be_strided(engine: Engine) -> None:
    rules, indices = mask_rules("block", "ragged", 4, 4), torch.tensor(SAMPLES)
    masks = mask_sampling(rules, seed=1, step=2, sample_indices=indices.to(engine.device)[::2])
    assert_same_masks(masks, mask_sampling_reference(rules, seed=1, step=2, sample_indices=indices[::2]))


def leave_out(monkeypatch: pytest.MonkeyPatch, *kernels: str) -> None:
    from fastjepa_kernels.triton_kernels import mask_sampling as triton_mask_sampling

    for kernel in kernels:
        monkeypatch.setattr(triton_mask_sampling, kernel, IdleKernel())


@pytest.mark.parametrize(
    ("kernels", "unwritten"),
    [(["_pack"], ["predictor_rows"]), (["_accumulate", "_pack"], ["predictor_rows", "context_cu_seqlens", "sizes"])],
)
def test_entries_that_no_kernel_wrote_would_be_seen(
    engine: Engine, kernels: list[str], unwritten: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A negative control of all tests above."""
    leave_out(monkeypatch, *kernels)
    with pytest.raises(AssertionError) as caught:
        check(engine, mask_rules("block", "ragged", 4, 4), SAMPLES[:2])
    assert all(name in str(caught.value) for name in unwritten)


class _NoReadBack(TorchDispatchMode):
    """Refuse operators that make the host wait for the device, or whose shapes depend on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "_to_copy", "equal", "unique", "repeat_interleave")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.FORBIDDEN), f"{func} waits for the device"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_read_back_to_the_host(engine: Engine, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, synchronisation is forbidden. Without one, the launches are left out, since they read CPU tensors here."""
    rules, indices = mask_rules("multiblock", mode, 4, 4), torch.arange(2, device=engine.device)
    if engine.device.type == "cuda":
        mask_sampling(rules, seed=1, step=2, sample_indices=indices)  # compiles, and loads the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            mask_sampling(rules, seed=1, step=2, sample_indices=indices)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    leave_out(monkeypatch, "_sample", "_accumulate", "_pack")
    with _NoReadBack():  # type: ignore[no-untyped-call]
        masks = mask_sampling(rules, seed=1, step=2, sample_indices=indices)
    with pytest.raises(AssertionError, match="waits for the device"), _NoReadBack():  # type: ignore[no-untyped-call]
        int(masks.sizes[0, 0])


@compiled_only
def test_steps_share_the_compiled_kernels() -> None:
    """No number that differs between the steps of a run leads to a compilation of its own."""
    from benchmarks.proofs.aot.launches import recorded

    rules = mask_rules("multiblock", "ragged", 20, 20)
    with recorded("sm_80") as launches:
        for size, seed, step in [(1, 0, 0), (2, 1, 1), (16, 16, 16), (3, 2**31, 2**31), (5, 2**63, 2**32 - 1)]:
            step_rules = replace(rules, target_h=size, target_w=size, context_h=16 + size % 2, context_w=17 - size % 2)
            step_rules = replace(step_rules, target_count=16 * size, min_context=rules.min_context)
            mask_sampling(step_rules, seed=seed, step=step, sample_indices=torch.arange(4))
    assert {launch.name for launch in launches} == {"_sample", "_accumulate", "_pack"}
    assert len({id(launch.kernel) for launch in launches}) == 3


@not_in_the_simulator
def test_the_operator_keeps_pytorchs_contract(engine: Engine) -> None:
    from fastjepa_kernels.triton_kernels.mask_sampling import _mask_sampling

    strategy, mode, *numbers = astuple(mask_rules("multiblock", "official", 3, 4, num_target_blocks=2))
    arguments = (torch.arange(2, device=engine.device), strategy, mode, numbers, 5, 6)
    torch.library.opcheck(_mask_sampling, arguments)


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        (mask_rules("block", "ragged", 64, 65), "got 4160 patches, expected up to 4096"),
        (mask_rules("multiblock", "ragged", 5, 5, num_target_blocks=31), "got 31 target blocks, expected up to 30"),
    ],
)
def test_more_patches_or_blocks_than_a_program_holds_are_refused(engine: Engine, rules: MaskRules, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        mask_sampling(rules, seed=0, step=0, sample_indices=torch.arange(1, device=engine.device))
