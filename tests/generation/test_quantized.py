"""Weights of 8 and 4 bits: blocks as llama.cpp has them, the same in the model and the decoder."""

import copy
import dataclasses

import gguf
import numpy as np
import pytest
import torch
from helpers.models import CONFIGS, random_ids, tiny_model, train_a_little

from nanogpt_surgery import (
    GPTConfig,
    KVCache,
    SurgeryError,
    generate,
    inject_lora,
    merge_lora,
    open_model,
    save_gguf,
    save_model,
)
from nanogpt_surgery.generation.native.decoder import NativeDecoder, NativeSteps, unsupported_reason
from nanogpt_surgery.generation.native.library import decoder_library
from nanogpt_surgery.model.quantized import (
    BLOCK_BYTES,
    QuantizedEmbedding,
    QuantizedLinear,
    dequantize_blocks,
    quantize_blocks,
    quantize_layers,
)

LIBRARY, WHY_NOT = decoder_library()
needs_decoder = pytest.mark.skipif(LIBRARY is None, reason=f"no compiled decoder: {WHY_NOT}")
KINDS = list(BLOCK_BYTES)
WIDE = {"n_embd": 64, "n_inner": 96, "head_dim": 16, "n_head": 4, "n_kv_head": 2}
LLAMA = dataclasses.replace(CONFIGS["llama"], **WIDE)
TIED = dataclasses.replace(CONFIGS["llama-scaled-tied"], **WIDE)
PREVIOUS = dataclasses.replace(CONFIGS["prev-tokens-relu2"], **WIDE)
GPT2 = dataclasses.replace(CONFIGS["gpt2"], n_embd=96, n_head=3, n_kv_head=3, head_dim=32)


def quantized(config, bits, seed=0):
    model = tiny_model(config, seed)
    quantize_layers(model, bits)
    return model


def dequantized(model):
    """The same model with the numbers that the blocks stand for, as plain layers."""
    plain = tiny_model(model.config)
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            plain.get_submodule(name).weight.data = module.weight
    others = {name: t for name, t in model.state_dict().items() if not name.endswith("blocks")}
    assert not plain.load_state_dict(others, strict=False).unexpected_keys
    return plain


def stepped(model, ids, threads=2):
    with torch.inference_mode():
        cache = KVCache(model.config, len(ids), ids.size(1))
        assert unsupported_reason(model, cache) == ""
        decoder = NativeDecoder(model, cache, threads)
        return torch.stack([decoder.step(ids[:, t : t + 1]) for t in range(ids.size(1))], 1)


def a_weight():
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(37, 160, generator=draw) * torch.rand(37, 1, generator=draw)
    weight[3] = 0
    return weight


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_llama_cpps_to_the_bit(kind):
    """But for the scales of Q4_0, which have their own test."""
    theirs = gguf.quants.quantize(a_weight().numpy(), gguf.GGMLQuantizationType[kind])
    blocks = quantize_blocks(a_weight(), kind).numpy()
    assert kind == "Q4_0" or np.array_equal(blocks, theirs)
    for found in (blocks, theirs):
        numbers = gguf.quants.dequantize(found, gguf.GGMLQuantizationType[kind])
        assert np.array_equal(dequantize_blocks(torch.from_numpy(found), kind).numpy(), numbers)


def test_4_bits_have_a_smaller_error_than_llama_cpps_in_every_block():
    weight, errors = a_weight(), []
    theirs = torch.from_numpy(gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_0))
    for blocks in (quantize_blocks(weight, "Q4_0"), theirs):
        error = (dequantize_blocks(blocks, "Q4_0") - weight).square()
        errors.append(error.unflatten(-1, (-1, 32)).sum(-1))
    assert bool((errors[0] <= errors[1] * 1.001).all())
    assert float(errors[0].sum() / errors[1].sum()) < 0.92


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("config", [LLAMA, TIED, PREVIOUS, GPT2])
def test_the_readable_model_computes_with_dequantized_weights(config, bits):
    model, ids = quantized(config, bits), random_ids(config, 2, 9)
    with torch.inference_mode():
        assert torch.equal(model(ids), dequantized(model)(ids))


@needs_decoder
@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("columns", [32, 96, 320])
@pytest.mark.parametrize("rows", [1, 4, 7, 50])
def test_a_product_differs_by_the_rounding_of_its_input_alone(rows, columns, bits):
    """Each number of a block of 32 is off by at most half a step of its largest / 127."""
    from nanogpt_surgery.generation.native import decoder as native

    config = GPTConfig(rows, columns, 1, 1, 8, 1, 32, 32, norm="layernorm")
    model = tiny_model(config)
    for layer in model.layers:  # so that the head sees the embedding alone, normalised
        for end in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.zeros_(end.weight)
            if end.bias is not None:
                torch.nn.init.zeros_(end.bias)
    quantize_layers(model, "int8")
    if bits == "int4":
        blocks = quantize_blocks(model.lm_head.weight, "Q4_0")
        model.lm_head = QuantizedLinear(blocks, "Q4_0")
    assert native.BLOCK_KINDS.keys() == BLOCK_BYTES.keys()
    ids = random_ids(config, 3, 1)
    with torch.inference_mode():
        hidden, wanted = model.hidden(ids)[:, 0], model(ids)[:, 0]
    step = hidden.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    weight = model.lm_head.weight.unflatten(-1, (-1, 32)).abs()
    bound = torch.einsum("bkn,vkn->bv", step.expand(-1, -1, 32) / 2, weight)
    error = (stepped(model, ids)[:, 0] - wanted).abs()
    assert bool((error <= 1.01 * bound + 1e-5).all())
    assert bool((error > 0).any())


@needs_decoder
@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("config", [LLAMA, TIED, PREVIOUS, GPT2])
def test_steps_are_near_the_models(config, bits):
    model, ids = quantized(config, bits), random_ids(config, 3, 13)
    with torch.inference_mode():
        wanted = model(ids)
    error = (stepped(model, ids) - wanted).norm() / wanted.norm()
    assert 1e-6 < error < 0.04


@needs_decoder
def test_a_rows_bits_depend_on_neither_companions_nor_threads():
    model, ids = quantized(LLAMA, "int4"), random_ids(LLAMA, 3, 8)
    together = stepped(model, ids, 2)
    for row in range(3):
        assert torch.equal(stepped(model, ids[row : row + 1], 3)[0], together[row])


@needs_decoder
@pytest.mark.parametrize("seed", range(8))
def test_any_shape(seed):
    """Matrices whose rows are no multiple of 32 stay as they are, beside others in blocks."""
    draw = torch.Generator().manual_seed(seed)

    def number(least, most):
        return int(torch.randint(least, most + 1, (), generator=draw))

    groups, head_dim = number(1, 3), 2 * number(1, 16)
    config = GPTConfig(
        number(1, 70), number(1, 4) * (32 if seed % 2 else 17), groups * number(1, 3), 2, 24,
        groups, head_dim, 32 * number(1, 4) + seed % 3, positions=("learned", "rotary")[seed // 4],
        n_prev_tokens=seed % 3, mlp=("swiglu", "relu2")[seed % 3 // 2],
    )  # fmt: skip
    model = tiny_model(config, seed)
    rows = quantize_layers(model, ("int8", "int4")[seed % 2])
    assert all(("why" in row) == (row["kind"] == "float32") for row in rows)
    ids = random_ids(config, number(1, 4), 9)
    with torch.inference_mode():
        wanted = model(ids)
    found = stepped(model, ids, number(1, 4))
    assert (found - wanted).norm() < 0.08 * wanted.norm() + 1e-6


@needs_decoder
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_lora_takes_part_beside_quantized_weights(bits):
    model, ids = quantized(TIED, bits), random_ids(TIED, 2, 9)
    with torch.inference_mode():
        before = model(ids)
    with pytest.raises(SurgeryError, match="embed_tokens"):  # they share blocks
        inject_lora(model, "lm_head", rank=2)
    inject_lora(model, ["all-linear", "lm_head"], rank=3, tied="untie")
    train_a_little(model)
    plain = dequantized_with_lora(model)
    with torch.inference_mode():
        wanted = model(ids)
        torch.testing.assert_close(plain(ids), wanted)
    assert (wanted - before).norm() > 0.1 * before.norm()
    assert (stepped(model, ids) - wanted).norm() < 0.04 * wanted.norm()


def dequantized_with_lora(model):
    plain = copy.deepcopy(model)
    for module in plain.modules():
        for name, child in list(module._modules.items()):
            if isinstance(child, QuantizedLinear):
                linear = torch.nn.Linear(child.in_features, child.out_features, bias=False)
                linear.weight.data = child.weight
                linear.bias = child.bias
                module._modules[name] = linear
    return plain


def test_lora_can_be_trained_on_quantized_weights_and_not_merged():
    model, ids = quantized(LLAMA, "int8"), random_ids(LLAMA, 2, 9)
    inject_lora(model, "q_proj", rank=2)
    train_a_little(model)
    model(ids).square().mean().backward()
    moved = [p for p in model.parameters() if p.requires_grad]
    assert moved and all(p.grad is not None and bool(p.grad.any()) for p in moved)
    with pytest.raises(SurgeryError, match="q_proj"):
        merge_lora(model, force=True)
    assert model.layers[0].self_attn.q_proj.updates


def test_what_cannot_be_written_says_so(tmp_path):
    model = quantized(LLAMA, "int8")
    for write in (save_model, save_gguf):
        with pytest.raises(SurgeryError, match="quantised"):
            write(model, tmp_path / "made")
    assert not list(tmp_path.iterdir())


@needs_decoder
@pytest.mark.parametrize("change", ["other blocks", "another kind", "a hook", "LoRA", "plain"])
def test_it_is_never_stale(change):
    def act(model):
        layer = model.layers[0].mlp.down_proj
        if change == "other blocks":
            layer.blocks = layer.blocks.flip(0).contiguous()
        elif change == "another kind":
            weight = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(2))
            model.layers[0].mlp.down_proj = QuantizedLinear(quantize_blocks(weight, "Q4_1"), "Q4_1")
        elif change == "a hook":
            layer.register_forward_hook(lambda module, inputs, output: output.flip(-1))
        elif change == "LoRA":
            inject_lora(model, "down_proj", rank=2)
            train_a_little(model, size=1.0)
        else:
            model.layers[0].mlp.down_proj = torch.nn.Linear(96, 64, bias=False)

    from nanogpt_surgery.generation.generate import next_logits

    found = []
    for native in (False, True):
        model, ids = quantized(LLAMA, "int8"), [3, 1, 4]
        cache = KVCache(LLAMA)
        steps = NativeSteps(model, cache) if native else None
        for new in (1, 5):
            before = next_logits(model, ids, cache, steps)
            ids.append(new)
        torch.manual_seed(0)
        act(model)
        found.append(next_logits(model, ids, cache, steps))
    assert (found[1] - found[0]).norm() < 0.04 * found[0].norm()
    assert (found[0] - before).norm() > 0.1 * before.norm()


@needs_decoder
def test_blocks_of_another_size_are_refused():
    """C would read past their end."""
    model = quantized(LLAMA, "int8")
    layer = model.layers[0].mlp.up_proj
    for damage in ({"blocks": layer.blocks[:, :-2].contiguous()}, {"kind": "Q9"}):
        broken = copy.deepcopy(model)
        vars_of = broken.layers[0].mlp.up_proj
        for name, value in damage.items():
            setattr(vars_of, name, value)
        with pytest.raises(SurgeryError, match=r"layers\.0\.mlp\.up_proj"):
            generate(broken, [1], 2, engine="native")


# ---- opening ----


def held_bytes(model):
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("config", [LLAMA, TIED, GPT2])
def test_a_folder_opens_in_blocks(config, bits, tmp_path):
    save_model(tiny_model(config).bfloat16(), tmp_path / "model")
    opened, _ = open_model(tmp_path / "model", quantize=bits)
    wanted, _ = open_model(tmp_path / "model", torch.float32)
    quantize_layers(wanted, bits)
    found, ours = opened.state_dict(), wanted.state_dict()
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[name], ours[name]) for name in found)
    assert not any(p.requires_grad for p in opened.parameters())
    most = {"int8": 0.4, "int4": 0.3}[bits]  # tiny models are full of vectors
    assert held_bytes(opened) == held_bytes(wanted) < most * 4 * config.n_parameters
    if config.tie_head:
        assert opened.lm_head.blocks is opened.embed_tokens.blocks


@pytest.mark.filterwarnings("ignore:no tokenizer was written")
@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", "int8"), ("Q8_0", "int4"), ("F16", "int8")])
@pytest.mark.parametrize("config", [LLAMA, TIED, GPT2])
def test_a_gguf_file_opens_in_its_blocks(config, kind, bits, tmp_path):
    save_gguf(tiny_model(config), tmp_path / "model.gguf", kind=kind)
    opened, _ = open_model(tmp_path / "model.gguf", quantize=bits)
    plain, _ = open_model(tmp_path / "model.gguf", torch.float32)
    ids = random_ids(config, 1, 8)
    if (kind, bits) == ("Q8_0", "int8"):
        with torch.inference_mode():
            assert torch.equal(opened(ids), plain(ids))
        # What lies in the file as it is needed is a part of the map of the file.
        maps = opened.layers[0].mlp.up_proj.blocks.untyped_storage()
        assert maps.size() == (tmp_path / "model.gguf").stat().st_size
    quantize_layers(plain, bits)
    found, ours = opened.state_dict(), plain.state_dict()
    if (kind, bits) != ("Q8_0", "int8"):  # rounded from the numbers that the file stands for
        assert all(torch.equal(found[name], ours[name]) for name in found)


def test_another_dtype_beside_quantize_is_refused(tmp_path):
    save_model(tiny_model(LLAMA), tmp_path / "model")
    with pytest.raises(SurgeryError, match="bfloat16"):
        open_model(tmp_path / "model", torch.bfloat16, quantize="int8")


def test_numbers_that_no_scale_can_hold_are_refused():
    for wrong in (torch.inf, torch.nan, 1e9):
        weight = torch.ones(4, 64)
        weight[2, 40] = wrong
        with pytest.raises(SurgeryError, match="lm_head"):
            quantize_blocks(weight, "Q8_0", "lm_head")
