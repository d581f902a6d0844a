import math

import pytest
import torch
from helpers.training import DATASET, SETTINGS, model_of, train

from nanogpt_surgery import FitSettings, SurgeryError, fit
from nanogpt_surgery.training.hardware import choose_hardware


def test_settings_that_contradict_are_told_all_at_once():
    with pytest.raises(SurgeryError) as caught:
        FitSettings(
            max_steps=0,
            batch_size=-1,
            learning_rate=math.nan,
            beta2=1.0,
            device="tpu",
            precision="float16",
            compile="yes",
        )
    message = str(caught.value)
    for part in (
        "max_steps is 0",
        "batch_size is -1",
        "learning_rate is nan",
        "beta2 is 1.0",
        "device is 'tpu'; it must be one of auto, cpu, cuda, mps",
        "precision is 'float16'",
        "compile is 'yes'",
    ):
        assert part in message


def test_what_it_computes_on_is_said_in_one_line():
    threads = torch.get_num_threads()
    counted = f"{threads} thread{'s' if threads > 1 else ''}"
    assert choose_hardware(SETTINGS).describe() == f"CPU, {counted}, float32, not compiled"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a cuda device")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(SurgeryError, match="cuda"):
        fit(model_of(), DATASET, SETTINGS, device="cuda")


def test_a_seed_that_no_order_can_be_drawn_from_is_refused():
    for seed in (2**41 + 1, -(2**41) - 1, 10**30):
        with pytest.raises(SurgeryError, match=f"seed is {seed}"):
            FitSettings(seed=seed)
    for seed in (2**41, -(2**41)):
        rows, _ = DATASET.batch(3, 4, FitSettings(seed=seed).seed)
        assert rows.shape == (4, DATASET.block_size)


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "avx2"])
def test_auto_means_bfloat16_where_the_processor_multiplies_it(monkeypatch, flag):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {flag: True, "avx512_bf16_": True})
    precisions = {
        asked: choose_hardware(FitSettings(device="cpu", precision=asked)).precision
        for asked in ("auto", "float32", "bfloat16")
    }
    found = torch.float32 if flag == "avx2" else torch.bfloat16
    assert precisions == {"auto": found, "float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_auto_trains_as_what_it_means_to_the_bit(monkeypatch, has_bfloat16):
    monkeypatch.setattr("nanogpt_surgery.training.hardware.cpu_has_bfloat16", lambda: has_bfloat16)
    found, wanted = (
        [step.loss for step in train(model_of(), precision=precision)]
        for precision in ("auto", "bfloat16" if has_bfloat16 else "float32")
    )
    assert found == wanted
