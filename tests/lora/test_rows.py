"""A different adapter for each row: what is not the batch has no rows, and is refused."""

import pytest
import torch
from helpers.builds import MODELS, close, logits, some_ids
from helpers.models import train_a_little
from torch import Tensor, nn

from nanogpt_surgery import (
    SurgeryError,
    blend_lora,
    disable_lora,
    enable_lora,
    inject_lora,
    lora_log,
    lora_rows,
    merge_lora,
    redo_lora,
    remove_lora,
    swap_lora,
    undo_lora,
)

T = 6  # tokens, and rows where the two are to be mistaken for each other


class Positions(nn.Module):
    """Positions as nanoGPT has them, without a batch; and a table and a Linear over all pairs."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(31, 8), nn.Embedding(T, 8)
        self.pairs = nn.Embedding(2 * T, 5)
        self.turn, self.last = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor, pooled: bool = False) -> Tensor:
        where = torch.arange(ids.size(1))  # (T)
        x = self.wte(ids) + self.turn(self.wpe(where))  # (B, T, 8)
        bias = self.pairs(where[:, None] + where)  # (T, T, 5)
        return self.last(x.mean(1)) if pooled else self.last(x) + bias.mean(1)


def two_adapters(*targets: str) -> nn.Module:
    model = Positions().eval()
    for seed, name in enumerate("ab"):
        inject_lora(model, targets, rank=2, name=name)
        train_a_little(model, seed)
    return model


@pytest.mark.parametrize("target", ["wpe", "pairs", "turn"])
@pytest.mark.parametrize("rows", [T - 1, T])
def test_a_layer_that_is_not_called_on_the_batch_is_refused_by_name(target, rows):
    model, ids = two_adapters("wte", target), some_ids(batch=rows, tokens=T) % 31
    with (
        pytest.raises(SurgeryError, match=rf"^{target} is called on .*{rows} rows") as caught,
        lora_rows(model, ["a", "b", *["a"] * (rows - 2)]),
    ):
        model(ids)
    assert "without it" in caught.value.hint
    assert "swap_lora" in caught.value.hint
    swap_lora(model, "a")
    model(ids)


@pytest.mark.parametrize("rows", [T - 1, T])
def test_layers_that_no_row_s_adapter_touches_may_do_as_they_like(rows):
    model, ids = two_adapters("wte", "last"), some_ids(batch=rows, tokens=T) % 31
    inject_lora(model, "wpe", rank=2, name="c")
    names = ["a", None, "b", *["a"] * (rows - 3)]
    with lora_rows(model, names):
        mixed = logits(model, ids)
    for row, name in enumerate(names[:3]):
        if name is None:
            disable_lora(model)
        else:
            swap_lora(model, name)
        assert close(mixed[row], logits(model, ids)[row])
        enable_lora(model)


def test_one_vector_for_a_row_of_ids_cannot_be_told_from_one_for_a_token():
    model, ids = two_adapters("last"), some_ids(batch=T, tokens=T) % 31
    with (
        pytest.raises(SurgeryError, match=r"^last is called on .*\(6, 8\)"),
        lora_rows(model, ["a", "b"] * 3),
    ):
        model(ids, pooled=True)


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4), (3, 2, 5, 4)])
def test_a_model_of_vectors_has_rows_too(shape):
    model, x = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 2)), torch.randn(shape)
    outputs = {}
    for seed, name in enumerate("ab"):
        inject_lora(model, "all-linear", rank=2, name=name)
        train_a_little(model, seed)
        outputs[name] = logits(model, x)
    with lora_rows(model, ["a", "b", "a"]):
        mixed = model(input=x)
    for row, name in enumerate("aba"):
        assert close(mixed[row], outputs[name][row])


def test_a_batch_of_other_rows_is_refused_where_it_enters():
    model, ids = two_adapters("wte"), some_ids(tokens=T) % 31
    with (
        pytest.raises(SurgeryError, match=r"the model is called on 3 rows.*for 2"),
        lora_rows(model, ["a", "b"]),
    ):
        model(ids)
    model(ids)  # nothing is watched after the block


OPERATIONS = {
    "inject": lambda model: inject_lora(model, "last", rank=2, name="c"),
    "enable": enable_lora,
    "disable": disable_lora,
    "swap": lambda model: swap_lora(model, "a"),
    "blend": lambda model: blend_lora(model, {"a": 0.5}),
    "merge": merge_lora,
    "remove": lambda model: remove_lora(model, "a"),
    "remove all": remove_lora,
    "undo": undo_lora,
    "redo": redo_lora,
    "rows": lambda model: lora_rows(model, ["b", "a"]).__enter__(),
}


@pytest.mark.parametrize("verb", OPERATIONS)
def test_no_operation_is_done_inside_the_block(verb):
    model, ids = two_adapters("last"), some_ids(batch=2, tokens=T) % 31
    merge_lora(model)
    undo_lora(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    log = lora_log(model).rows
    with lora_rows(model, ["a", None]):
        output = logits(model, ids)
        with pytest.raises(SurgeryError, match=r"block of lora_rows|one ΔW") as caught:
            OPERATIONS[verb](model)
        assert "leave the block" in caught.value.hint
        assert torch.equal(logits(model, ids), output)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert lora_log(model).rows == log


def test_rows_go_through_the_parts_of_a_model_too():
    """As a training does that holds no more logits than it must."""
    model, ids = MODELS["SimpleGPT"](), some_ids()
    for seed, name in enumerate("ab"):
        inject_lora(model, ["q_proj", "lm_head", "embed_tokens"], rank=2, name=name)
        train_a_little(model, seed)
    with lora_rows(model, ["b", None, "a"]):
        assert torch.equal(model.lm_head(model.hidden(ids)), model(ids))
