import math

import pytest
import torch
import torch.nn.functional as F
from helpers.adapters import merged_layer
from helpers.builds import MODELS, TABLES, close, logits, some_ids
from helpers.models import train_a_little
from torch import nn

from nanogpt_surgery import (
    LoRAEmbedding,
    LoRALinear,
    LoRASettings,
    SurgeryError,
    inject_lora,
    merge_lora,
    plan_lora,
)
from nanogpt_surgery.lora.several import lora_layers
from nanogpt_surgery.lora.variants import (
    DoRAUpdate,
    PiSSAUpdate,
    new_update,
    principal_factors,
    row_norms,
)

KINDS = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"pissa": True},
    "all of them": {"rslora": True, "dora": True, "pissa": True},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
EVERY_PATIENT = pytest.mark.parametrize("patient", MODELS)


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(3)
    layer = nn.Linear(7, 5, bias=bias)
    nn.init.normal_(layer.weight)
    return layer


def wrapped(
    layer: nn.Module, settings: LoRASettings, size: float = 0.3
) -> LoRALinear | LoRAEmbedding:
    around = LoRAEmbedding.around if isinstance(layer, nn.Embedding) else LoRALinear.around
    whole = around(layer)
    update = new_update(layer, settings)
    for parameter in update.trainable():
        parameter.data += size * torch.randn(parameter.shape)
    whole.updates["default"] = update
    return whole


@EVERY_KIND
@EVERY_PATIENT
def test_every_kind_is_born_changing_no_bit(kind, patient):
    model, ids = MODELS[patient](), some_ids()
    before = logits(model, ids)
    inject_lora(model, [r".*(?<!embed_positions)"], rank=3, **kind)
    assert len(lora_layers(model)) >= 4
    assert torch.equal(logits(model, ids), before)
    train_a_little(model)
    assert not close(logits(model, ids), before, 1e-2)


@EVERY_KIND
@EVERY_PATIENT
def test_merged_is_adapted(kind, patient):
    model, ids = MODELS[patient](), some_ids()
    inject_lora(model, ["all-linear", TABLES[patient]], rank=3, **kind)
    train_a_little(model)
    adapted = logits(model, ids)
    merge_lora(model)
    assert close(logits(model, ids), adapted)


@EVERY_KIND
def test_only_what_the_kind_learns_gets_a_gradient(kind):
    layer = wrapped(linear(), LoRASettings(rank=2, **kind))
    layer(torch.randn(4, 7)).square().sum().backward()
    learns = {id(parameter) for parameter in layer.update.trainable()}
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in learns), name


def test_rslora_scales_by_the_root_of_the_rank():
    assert new_update(linear(), LoRASettings(rank=9, alpha=6, rslora=True)).scaling == 2
    assert new_update(linear(), LoRASettings(rank=9, alpha=6)).scaling == pytest.approx(6 / 9)


@pytest.mark.parametrize("bias", [True, False])
def test_dora_gives_each_row_the_length_it_learned(bias):
    layer = wrapped(linear(bias), LoRASettings(rank=2, dora=True))
    update = layer.update
    assert isinstance(update, DoRAUpdate)
    direction = layer.original_layer.weight + update.inner.product()
    weight = update.lora_magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    x = torch.randn(3, 4, 7)
    wanted = F.linear(x, weight, layer.original_layer.bias)
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(merged_layer(layer)(x), wanted)


def test_dora_of_an_embedding_has_a_length_for_each_feature():
    layer = wrapped(nn.Embedding(11, 6), LoRASettings(rank=2, dora=True))
    update = layer.update
    assert update.lora_magnitude.shape == (6,)
    direction = layer.original_layer.weight + update.inner.product().t()
    table = update.lora_magnitude * direction / direction.norm(dim=0)
    ids = torch.randint(11, (3, 5))
    torch.testing.assert_close(layer(ids), F.embedding(ids, table))


def test_dora_takes_no_gradient_through_the_norm():
    layer = wrapped(linear(bias=False), LoRASettings(rank=2, dora=True))
    update, x = layer.update, torch.randn(4, 7)
    layer(x).sum().backward()
    gain = (update.lora_magnitude / row_norms(layer.original_layer, update.product())).detach()
    y = x @ (layer.original_layer.weight + update.scaling * update.lora_B @ update.lora_A).t()
    [wanted] = torch.autograd.grad((gain * y).sum(), [update.lora_B])
    torch.testing.assert_close(update.lora_B.grad, wanted)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_principal_factors_are_the_best_approximation(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    a, b = principal_factors(weight, 3, scaling=2.5)
    u, s, vh = torch.linalg.svd(weight)
    best = u[:, :3] @ torch.diag(s[:3]) @ vh[:3]
    torch.testing.assert_close(2.5 * b @ a, best, atol=1e-5, rtol=1e-4)
    norms = [(2.5 * b.T @ b).diag(), (2.5 * a @ a.T).diag()]
    torch.testing.assert_close(norms[0], norms[1], atol=1e-4, rtol=1e-4)  # shared out evenly


def test_pissa_is_a_plain_update_of_twice_the_rank():
    layer = wrapped(linear(), LoRASettings(rank=2, pissa=True))
    update = layer.update
    assert isinstance(update, PiSSAUpdate)
    a, b = update.factors()
    assert a.shape == (4, 7)
    assert b.shape == (5, 4)
    x = torch.randn(3, 7)
    added = layer(x) - layer.original_layer(x)
    torch.testing.assert_close(added, update.scaling * F.linear(F.linear(x, a), b))


def test_pissa_trains_as_if_the_base_were_its_residue():
    layer = wrapped(linear(bias=False), LoRASettings(rank=2, pissa=True), size=0.0)
    update, x = layer.update, torch.randn(6, 7)
    residue = layer.original_layer.weight - update.initial.product()
    layer(x).square().sum().backward()
    a, b = (update.lora_A.detach().clone(), update.lora_B.detach().clone())
    a.requires_grad_(), b.requires_grad_()
    (F.linear(x, residue + update.scaling * b @ a)).square().sum().backward()
    torch.testing.assert_close(update.lora_A.grad, a.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(update.lora_B.grad, b.grad, atol=1e-4, rtol=1e-4)


def test_pissa_refuses_more_directions_than_there_are():
    with pytest.raises(SurgeryError, match=r"rank 6 on 0, a matrix of .*only 5 directions"):
        inject_lora(nn.Sequential(linear()), "0", rank=6, pissa=True)


def test_ranks_and_alphas_follow_their_patterns():
    model = MODELS["SimpleGPT"]()
    inject_lora(
        model, ["q_proj", "up_proj"], rank=4, alpha=8,
        rank_pattern={"up_proj": 2}, alpha_pattern={r"layers\.1.*q_proj": 3},
    )  # fmt: skip
    found = {name: (layer.rank, layer.alpha) for name, layer in lora_layers(model).items()}
    assert found == {
        "layers.0.self_attn.q_proj": (4, 8),
        "layers.1.self_attn.q_proj": (4, 3),
        "layers.0.mlp.up_proj": (2, 8),
        "layers.1.mlp.up_proj": (2, 8),
    }


def test_a_pattern_of_ranks_that_meets_no_target_is_refused():
    with pytest.raises(SurgeryError, match="no target matches 'down_proj'"):
        inject_lora(MODELS["SimpleGPT"](), "q_proj", rank_pattern={"down_proj": 2})


def test_dropout_zeroes_inputs_in_training_alone():
    layer = wrapped(linear(), LoRASettings(rank=2, dropout=0.5))
    x = torch.ones(200, 7)
    torch.testing.assert_close(layer.eval()(x)[0], layer(x)[1])
    spread = layer.train()(x).std(0)
    assert bool((spread > 0).all())


def test_dropout_of_an_embedding_drops_whole_ids():
    layer = wrapped(nn.Embedding(11, 6), LoRASettings(rank=3, dropout=0.25)).train()
    ids = torch.full((4000,), 7)
    added = layer(ids) - layer.original_layer(ids)
    full = layer.eval()(ids[:1]) - layer.original_layer(ids[:1])
    kept = added.abs().sum(1) > 0
    assert kept.float().mean() == pytest.approx(0.75, abs=0.05)
    torch.testing.assert_close(added[kept][0], full[0] / 0.75)


@pytest.mark.parametrize("kind", [KINDS["dora"], KINDS["all of them"]], ids=str)
def test_dora_of_an_embedding_drops_the_gain_with_the_id(kind):
    layer = wrapped(nn.Embedding(11, 6), LoRASettings(rank=3, dropout=0.25, **kind)).train()
    ids = torch.full((400,), 7)
    added = layer(ids) - layer.original_layer(ids)
    kept = added.abs().sum(1) > 1e-6
    assert 0.5 < kept.float().mean() < 0.95


def test_the_scale_of_a_large_rank_stays_with_rslora():
    """ΔW's size for unit gradients does not shrink with R: α/√R · √R, where α/R · √R does."""
    sizes = {}
    for rslora in (False, True):
        for rank in (1, 64):
            update = new_update(nn.Linear(80, 80), LoRASettings(rank, 1, rslora=rslora))
            update.lora_A.data.normal_(), update.lora_B.data.normal_()
            sizes[rslora, rank] = float(update.product().std())
    assert sizes[True, 64] == pytest.approx(sizes[True, 1], rel=0.3)
    assert sizes[False, 64] == pytest.approx(sizes[False, 1] / math.sqrt(64), rel=0.3)


@pytest.mark.parametrize("kind", [{"rank": 2}, {"pissa": True, "rank": 2}], ids=str)
def test_dora_refuses_an_output_without_a_length(kind):
    """A head padded to a round vocabulary has rows of zeros, and 0 / 0 is no number."""
    model = nn.Sequential(nn.Linear(7, 5), nn.Embedding(11, 6))
    model[0].weight.data[3:] = 0
    model[1].weight.data[:, 2] = 0
    before = dict(model.named_modules())
    for verb in (plan_lora, inject_lora):
        with pytest.raises(SurgeryError, match=r"DoRA .* 0: 2 of its 5 outputs .* zero"):
            verb(model, "0", dora=True, **kind)
        with pytest.raises(SurgeryError, match=r"DoRA .* 1: 1 of its 6 outputs .* zero"):
            verb(model, "1", dora=True, **kind)
    assert dict(model.named_modules()) == before
    inject_lora(model, ["0", "1"], **kind)  # the others divide by nothing
