import pytest
import torch
from helpers.adapters import attach_adapter
from helpers.builds import MODELS, logits, some_ids
from helpers.models import train_a_little
from torch import nn

from nanogpt_surgery import (
    SurgeryError,
    blend_lora,
    disable_lora,
    enable_lora,
    inject_lora,
    lora_rows,
    merge_lora,
    merge_survival,
    remove_lora,
    swap_lora,
    tensor_hashes,
    undo_lora,
)
from nanogpt_surgery.lora.stored_adapter import StoredAdapter, extract_adapter

NEW = {"norm.weight": torch.linspace(0.5, 2, 24), "norm.bias": torch.linspace(-1, 1, 24)}


def model_with_another_norm() -> tuple[nn.Module, nn.Module]:
    """A model whose adapter "whole" replaces the last norm, and what it should compute."""
    model, wanted = MODELS["SimpleGPT"](), MODELS["SimpleGPT"]()
    inject_lora(model, "q_proj", rank=2, name="thin")
    train_a_little(model)
    attach_adapter(model, StoredAdapter({}, whole=NEW), "whole")
    wanted.norm.weight.data, wanted.norm.bias.data = (t.clone() for t in NEW.values())
    return model, wanted


def test_the_copy_takes_part_when_its_adapter_does():
    model, wanted = model_with_another_norm()
    ids, plain = some_ids(), logits(MODELS["SimpleGPT"](), some_ids())
    assert torch.equal(logits(model, ids), logits(wanted, ids))
    disable_lora(model)
    assert torch.equal(logits(model, ids), plain)
    enable_lora(model)
    swap_lora(model, "thin")
    assert not torch.equal(logits(model, ids), plain)
    swap_lora(model, "whole")
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "weight",
        "bias",
    }
    assert torch.equal(logits(model, ids), logits(wanted, ids))


def test_it_takes_part_alone_or_not_at_all():
    model, _ = model_with_another_norm()
    blend_lora(model, {"thin": 1.0, "whole": 0.5})
    with pytest.raises(SurgeryError, match="'whole'"):
        model(some_ids())
    with (
        pytest.raises(SurgeryError, match="'whole'"),
        lora_rows(model, ["thin", "whole", None]),
    ):
        model(some_ids())


def test_it_is_merged_removed_and_undone():
    model, wanted = model_with_another_norm()
    ids, hashes = some_ids(), tensor_hashes(model)
    merge_lora(model)
    assert torch.equal(logits(model, ids), logits(wanted, ids))
    assert not any("whole" in name for name in tensor_hashes(model))
    undo_lora(model)
    assert tensor_hashes(model) == hashes
    assert merge_survival(model).summary["layers"] == 2  # q_proj alone has a ΔW
    remove_lora(model)
    assert tensor_hashes(model) == tensor_hashes(MODELS["SimpleGPT"]())


def test_without_any_matrix_no_share_of_a_change_is_given():
    model = MODELS["SimpleGPT"]()
    attach_adapter(model, StoredAdapter({}, whole=NEW), "whole")
    report = merge_survival(model)
    assert report.rows == []
    assert report.summary == {"layers": 0}


def test_it_is_taken_off_as_it_was_put_on():
    model, _ = model_with_another_norm()
    stored = extract_adapter(model, "whole")
    assert not stored.updates
    assert all(torch.equal(stored.whole[name], tensor) for name, tensor in NEW.items())


def test_one_adapter_cannot_replace_what_another_updates():
    model = MODELS["SimpleGPT"]()
    inject_lora(model, "lm_head", name="thin")
    hashes = tensor_hashes(model)
    whole = StoredAdapter({}, whole={"lm_head.weight": torch.zeros(43, 24)})
    with pytest.raises(SurgeryError, match=r"lm_head.*replaced whole"):
        attach_adapter(model, whole, "whole")
    assert tensor_hashes(model) == hashes


def test_a_tensor_that_does_not_fit_is_refused():
    for name, size in (("norm.weight", 23), ("nrm.weight", 24)):
        whole = StoredAdapter({}, whole={name: torch.zeros(size)})
        with pytest.raises(SurgeryError, match=rf"{name} of shape \({size},\)"):
            attach_adapter(MODELS["SimpleGPT"](), whole)
