"""Directions: found, followed, kept in a file, and followed by llama.cpp as we follow them."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.adapters import adapted, assert_same_bits, bits
from helpers.models import CONFIGS, FAMILY_CONFIGS, random_ids, tiny_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from nanogpt_surgery import CharacterTokenizer, SurgeryError, generate
from nanogpt_surgery.formats.direction_file import KIND, load_direction, save_direction
from nanogpt_surgery.formats.gguf.writing import save_gguf
from nanogpt_surgery.interpret import project_out, record
from nanogpt_surgery.surgery import Direction, mean_difference, plan_direction, steer

POSITIVE, NEGATIVE = [[1, 2, 3], [4, 5]], [[6, 7, 8, 9], [10], [11, 12]]


def hooks(model):
    return [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]


@pytest.fixture
def model():
    return tiny_model(CONFIGS["llama"])


@pytest.fixture
def direction(model):
    return mean_difference(model, POSITIVE, NEGATIVE, "layers.*.residual")[0]


@pytest.mark.parametrize("position", [-1, 0, None])
@torch.no_grad()
def test_a_direction_is_the_difference_of_two_means(model, position):
    before = bits(model)
    found, report = mean_difference(
        model, POSITIVE, NEGATIVE, "layers.1.mlp", position=position, probe=torch.tensor([[1, 2]])
    )
    means = []
    for prompts in (POSITIVE, NEGATIVE):
        values = []
        for ids in prompts:
            with record(model, "layers.1.mlp") as seen:
                model(torch.tensor([ids]))
            value = seen["layers.1.mlp"][0]
            values.append(value.mean(0) if position is None else value[position])
        means.append(torch.stack(values).mean(0))
    torch.testing.assert_close(found.vectors["layers.1.mlp"], means[0] - means[1])
    [row] = report.rows
    assert row["length"] == pytest.approx(float((means[0] - means[1]).norm()), rel=1e-5)
    assert report.summary["kl"] > 0 and report.summary["loss_after"] > 0
    assert 0 <= report.summary["top_token_unchanged"] <= 1
    plan = plan_direction(model, POSITIVE, NEGATIVE, "layers.1.residual")
    assert plan.summary["forward passes"] == 5 and plan.summary["tokens"] == 12
    assert plan.rows == [{"point": "layers.1.residual", "numbers": 24, "bytes": 96}]
    assert_same_bits(model, before)


@torch.no_grad()
def test_steering_adds_at_every_position_and_leaves_no_hook(model, direction):
    ids, clean = random_ids(model.config, 2, 7), hooks(model)
    plain = model(ids)
    with record(model, "layers.1.residual") as without:
        model(ids)
    one = replace(direction, vectors={"layers.1.residual": direction.vectors["layers.1.residual"]})
    with steer(model, one, -1.5), record(model, "layers.1.residual") as found:
        steered = model(ids)
    moved = found["layers.1.residual"] - without["layers.1.residual"]
    expected = (-1.5 * one.vectors["layers.1.residual"]).expand_as(moved)
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(steered, plain)
    with pytest.raises(ZeroDivisionError), steer(model, direction):
        raise ZeroDivisionError
    assert hooks(model) == clean
    assert torch.equal(model(ids), plain)


@torch.no_grad()
def test_a_share_of_a_direction_is_projected_out(model, direction):
    ids, point = random_ids(model.config, 2, 7), "layers.1.residual"
    vector = direction.vectors[point]
    with record(model, point) as before:
        model(ids)
    unit = vector / vector.norm()
    for share in (1.0, 0.25):
        out = Direction({point: vector}, "project_out", share)
        with steer(model, out), record(model, point) as after:
            model(ids)
        left = (1 - share) * (before[point] @ unit)
        torch.testing.assert_close(after[point] @ unit, left, atol=1e-5, rtol=1e-5)
    assert project_out(vector).change is not None


def test_a_steered_text_is_made_by_the_plain_code(model, direction):
    options = {"max_new_tokens": 8, "temperature": 0}
    with steer(model, direction, 3):
        text = list(generate(model, [1, 2], **options))
        assert text == list(generate(model, [1, 2], engine="plain", **options))
        with pytest.raises(SurgeryError, match="hook"):
            list(generate(model, [1, 2], engine="native", **options))
    assert text != list(generate(model, [1, 2], **options))


@torch.no_grad()
def test_a_model_of_transformers_and_an_adapted_one_are_steered():
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
            num_attention_heads=1, max_position_embeddings=16,
        )
    )  # fmt: skip
    ids = torch.tensor([[1, 2, 3]])
    found, _ = mean_difference(theirs, POSITIVE, NEGATIVE, "model.layers.0")
    before = theirs(ids).logits
    with steer(theirs, found, 2):
        assert not torch.allclose(theirs(ids).logits, before)
    assert torch.equal(theirs(ids).logits, before)
    wide = Direction({"model.layers.0": torch.ones(9)})
    with pytest.raises(SurgeryError, match=r"\b9\b.*\b8\b"), steer(theirs, wide):
        theirs(ids)
    with_adapter = adapted(CONFIGS["llama"])
    found, _ = mean_difference(with_adapter, POSITIVE, NEGATIVE, "layers.0.residual")
    plain, _ = mean_difference(
        tiny_model(CONFIGS["llama"]), POSITIVE, NEGATIVE, "layers.0.residual"
    )
    difference = found.vectors["layers.0.residual"] - plain.vectors["layers.0.residual"]
    assert difference.norm() > 1e-4, "the adapter takes part"


@pytest.mark.parametrize("operation", ["add", "project_out"])
@torch.no_grad()
def test_a_file_read_back_gives_the_same_activations(model, direction, operation, tmp_path):
    ids, path = random_ids(model.config, 2, 7), tmp_path / "d.safetensors"
    kept = replace(direction, operation=operation, scale=0.3)
    save_direction(kept, path)
    again = load_direction(path)
    assert (again.operation, again.scale, again.origin) == (operation, 0.3, direction.origin)
    with steer(model, kept), record(model, "layers.*.residual") as ours:
        model(ids)
    with steer(model, again), record(model, "layers.*.residual") as theirs:
        model(ids)
    assert len(ours) == 2
    assert all(torch.equal(ours[point], theirs[point]) for point in ours)
    save_direction(direction, path)  # a direction's file may be replaced
    (tmp_path / "text").write_text("mine")
    with pytest.raises(SurgeryError, match="text"):
        save_direction(direction, tmp_path / "text")
    assert (tmp_path / "text").read_text() == "mine"


def test_another_width_and_another_point_are_refused_by_name(model, direction):
    wide = tiny_model(replace(CONFIGS["llama"], n_embd=20, n_layer=1))
    for point, width, said in (
        ("layers.0.residual", 24, r"layers\.0\.residual.*\b24\b.*\b20\b"),
        ("layers.1.residual", 20, r"layers\.1\.residual"),
    ):
        wrong = replace(direction, vectors={point: torch.ones(width)})
        with pytest.raises(SurgeryError, match=said), steer(wide, wrong):
            pass
    ones = {"layers.0.residual": torch.ones(24)}
    for wrong, said in (
        ({"vectors": {}}, "none"),
        ({"vectors": {"norm": torch.zeros(24)}}, r"norm.*0\.0"),
        ({"vectors": {"norm": torch.full((24,), torch.nan)}}, "nan"),
        ({"vectors": {"norm": torch.ones(2, 12)}}, r"\(2, 12\)"),
        ({"vectors": ones, "scale": torch.inf}, "inf"),
        ({"vectors": ones, "operation": "multiply"}, "multiply"),
    ):
        with pytest.raises(SurgeryError, match=said):
            Direction(**wrong)
    for arguments, said in (
        (([], NEGATIVE, "norm"), "positive"),
        ((POSITIVE, [[]], "norm"), r"negative prompt 1 has 0"),
        ((POSITIVE, POSITIVE, "norm"), r"0\.0"),
        ((POSITIVE, NEGATIVE, "layers.0.heads"), r"heads.*\(1, 3, 6, 24\)"),
        ((POSITIVE, NEGATIVE, "layers.7.residual"), r"layers\.7"),
        ((POSITIVE, [[53]], "norm"), r"53.*52"),
    ):
        with pytest.raises(SurgeryError, match=said):
            mean_difference(model, *arguments)
    with pytest.raises(SurgeryError, match=r"positive prompt 2 has 2.*2"):
        mean_difference(model, POSITIVE, NEGATIVE, "norm", position=2)


def test_hostile_files_are_refused(tmp_path):
    path, ones = tmp_path / "d", {"norm": torch.ones(4)}
    said = {KIND: "1", "operation": "add", "scale": "1.0"}
    for tensors, metadata in (
        (ones, None),
        (ones, said | {KIND: "2"}),
        (ones, said | {"operation": "run"}),
        (ones, said | {"scale": "1e999"}),
        (ones, said | {"scale": "one"}),
        (ones, {KIND: "1"}),
        ({}, said),
        ({"*": torch.ones(4)}, said),
        ({"layers.[0-9].mlp": torch.ones(4)}, said),
        ({"norm": torch.ones(2, 2)}, said),
        ({"norm": torch.ones(4, dtype=torch.int64)}, said),
        ({"norm": torch.full((4,), torch.nan)}, said),
        ({"norm": torch.ones((1 << 20) + 1, dtype=torch.float16)}, said),
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(SurgeryError, match=r"/d(:|,| )"):
            load_direction(path)
    whole = path.read_bytes()
    header = json.dumps({"norm": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}})
    for data in (b"", b"GGUF", whole[:50], len(header).to_bytes(8, "little") + header.encode()):
        path.write_bytes(data)
        with pytest.raises(SurgeryError, match="/d"):
            load_direction(path)
    with pytest.raises(SurgeryError, match="missing"):
        load_direction(tmp_path / "missing")


LETTERS = CharacterTokenizer("the quick brown fox jumps over the lazy dog\n")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_llama_cpp_follows_a_control_vector_as_we_do(kind, tmp_path):
    from gguf import GGUFReader
    from helpers.llama_cpp_library import last_logits, loaded_control_vector

    sizes = {"vocab_size": LETTERS.vocab_size, "n_embd": 96, "n_inner": 160, "block_size": 64}
    heads = {"head_dim": 32 if kind == "gpt2" else 16}
    model = tiny_model(replace(FAMILY_CONFIGS[kind], **sizes, **heads, n_layer=4))
    save_gguf(model, tmp_path / "m.gguf", LETTERS, "F32")
    points = ["layers.1.residual", "layers.3.residual"]
    found, _ = mean_difference(model, POSITIVE, NEGATIVE, points, scale=0.5)
    save_direction(found, tmp_path / "d.gguf", family=kind)
    names = [tensor.name for tensor in GGUFReader(tmp_path / "d.gguf").tensors]
    assert names == ["direction.1", "direction.3"]
    again = load_direction(tmp_path / "d.gguf")
    ids = [1, 5, 3, 8, 2]
    with steer(model, found, 1.0):
        ours = model(torch.tensor([ids]))[0, -1]
    with steer(model, again, 2.0):
        torch.testing.assert_close(model(torch.tensor([ids]))[0, -1], ours)
    rows = loaded_control_vector(tmp_path / "d.gguf", strength=2.0)
    assert torch.equal(rows[[0, 2]], torch.stack([found.vectors[point] for point in points]))
    assert not rows[1].any()
    theirs = last_logits(tmp_path / "m.gguf", ids, len(ours), rows)
    plain = last_logits(tmp_path / "m.gguf", ids, len(ours))
    assert (theirs - ours).abs().max() < 0.01 * ours.std()  # their keys and values are float16
    assert (theirs - plain).abs().max() > 0.5 * ours.std()


def test_what_a_control_vector_cannot_hold_is_refused(tmp_path):
    for point, operation in (
        ("layers.0.residual", "add"),
        ("layers.1.residual_before", "add"),
        ("layers.1.residual", "project_out"),
    ):
        direction = Direction({point: torch.ones(4)}, operation)
        with pytest.raises(SurgeryError, match=rf"{operation} at {point}"):
            save_direction(direction, tmp_path / "d.gguf")
    assert not any(tmp_path.iterdir())
    config = replace(FAMILY_CONFIGS["llama"], vocab_size=LETTERS.vocab_size)
    save_gguf(tiny_model(config), tmp_path / "m.gguf", LETTERS)
    with pytest.raises(SurgeryError, match=r"llama.*controlvector"):
        load_direction(tmp_path / "m.gguf")
