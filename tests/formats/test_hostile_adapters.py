"""Adapters that a stranger made to hang or fill the machine: our own error, soon, in little memory.

Limits on time are generous: a test that hangs fails, a slow machine does not.
"""

import json
import random
import re
import struct
import warnings
from pathlib import Path

import pytest
import torch
from helpers.adapters import adapted, change_config, unsealed
from helpers.measured import assert_cheap, costs
from helpers.models import FAMILY_CONFIGS, tiny_model
from safetensors.torch import load_file, save_file

from nanogpt_surgery import SurgeryError, load_adapter, save_adapter
from nanogpt_surgery.formats.peft.config import Patterns
from nanogpt_surgery.formats.peft.reading import CONFIG, TENSORS, read_adapter

LLAMA = FAMILY_CONFIGS["llama"]
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(adapted(LLAMA), tmp_path / "adapter")
    return unsealed(tmp_path / "adapter")


def pefts(patterns: dict[str, int], name: str) -> int:
    """What PEFT finds; -1 for the default."""
    found = (v for p, v in patterns.items() if re.match(rf"^(.*\.)?({p})$", name))
    return next(found, -1)


LAYERS = [
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.up_proj",
    "layers_1.q_proj",
    "lm_head",
    "h.0.attn.c_attn",
]
PATTERNS = [
    r"q_proj", r"^lm_head", r"layers.1.self_attn.q_proj", r"layers\.1\.mlp\.up_proj", r".*q_proj$",
    r".*layers\.(1|2)\..*_proj", r"layers.1.q_proj", r"h\.\d+\.attn\.c_attn", r"[lh].*", r"(.*)*x?",
    r"model\.layers\.1{1,2}\.self_attn\.(?:q|k)_proj", r"(a+)+", r"[^q]+_proj", r"x{,3}lm_head",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", LAYERS)
def test_patterns_mean_what_they_mean_in_peft(pattern, name):
    assert Patterns({pattern: 1}).value(name, -1) == pefts({pattern: 1}, name)


def written(draw: random.Random, depth: int) -> str:
    atoms = ["a", "b", ".", r"\.", "q_proj", r"\d", "[ab]", "[^a]", "[]a]", "^", "$", "_"]
    chance = draw.random()
    if depth == 0 or chance < 0.35:
        return draw.choice(atoms)
    inner = written(draw, depth - 1)
    if chance < 0.6:
        return inner + written(draw, depth - 1)
    if chance < 0.75:
        return f"({inner}|{written(draw, depth - 1)})"
    return f"(?:{inner})" + draw.choice(["", "*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "*?"])


def test_any_patterns_mean_what_they_mean_in_peft():
    draw = random.Random(3)
    names = ["".join(draw.choices(["a", "b", ".", "q_proj", "1"], k=k % 6 + 1)) for k in range(30)]
    for _ in range(300):
        patterns = {written(draw, 3): value for value in range(draw.randint(1, 3))}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wanted = [pefts(patterns, name) for name in names]
        except re.error:
            continue
        table = Patterns(patterns)
        assert [table.value(name, -1) for name in names] == wanted, patterns


HANGING = [
    "(a+)+$", "(a|a)*$", "(a|aa)+$", "(.*)*(.*)*(.*)*z", "(.*a){20}", "(" * 50 + "a" + ")*" * 50,
    "((((a{1,99}){1,99}){1,99}){1,99})", "a{4294967290}", "(?=(a+)+$)b", r"(a*)*\1b",
    "(?:a?){999}b", "|".join(["a*"] * 300), "a{99999999999999}", "(", "a**", "[", "(?i)q",
]  # fmt: skip


@pytest.mark.parametrize("pattern", HANGING, ids=lambda p: p[:24])
def test_a_pattern_that_would_hang_does_not(folder, pattern):
    """It is matched in bounded time or refused by name; the layers' names are long too."""
    tensors = load_file(folder / TENSORS)
    for end in ("lora_A.weight", "lora_B.weight"):
        tensors[f"{Q}.{'a' * 300}.{end}"] = tensors[f"{Q}.{end}"].clone()
    save_file(tensors, folder / TENSORS)
    for key in ("alpha_pattern", "rank_pattern"):
        change_config(folder, **{key: {pattern: 4}})
    change_config(folder, target_modules=pattern)
    with pytest.raises(SurgeryError):  # at the latest because the model has no such layers
        load_adapter(tiny_model(LLAMA), folder)


def test_patterns_of_an_adapter_are_read_wherever_it_is_opened(folder, tmp_path):
    from helpers.commands import called

    change_config(folder, alpha_pattern={"(?=(a+)+$)b": 4})
    for words in (["inspect", folder], ["merge", tmp_path, "--adapter", folder, "--out", "o"]):
        called(*words, check=1)


def test_an_alpha_for_each_of_many_layers_is_read(folder):
    escaped = {rf"model\.layers\.{i}\.self_attn\.q_proj": i + 2 for i in range(50_000)}
    change_config(folder, alpha_pattern=escaped)
    updates = read_adapter(folder).in_float32().updates
    assert updates["model.layers.1.self_attn.q_proj"].alpha == 3
    assert updates["model.layers.1.self_attn.k_proj"].alpha == 5


LOADING = """
from nanogpt_surgery import SimpleGPT, load_adapter
model = SimpleGPT(53, n_embd=16, n_head=2, n_layer=2, block_size=8)
opened = lambda path: load_adapter(model, path)
"""


def plain_config(**changes: object) -> str:
    return json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | changes)


def header(entries: dict[str, object] | bytes, data: int = 0) -> tuple[bytes, int]:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, data


def tensor(shape: list[int], start: int, dtype: str = "F32", width: int = 4) -> dict[str, object]:
    size = width
    for length in shape:
        size *= length
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
MIB64 = 1 << 26  # numbers: 256 MiB
HERE = "base_model.model.transformer.h.0"  # the model that is loaded on has it
ONE = {A: tensor([2, 16], 0), B: tensor([16, 2], 128)}
MANY = {f"{Q}.x{i}.lora_{k}.weight": tensor([1, 1], 8 * i + 4 * (k == "B"))
        for i in range(25_000) for k in "AB"}  # fmt: skip
BOMBS: dict[str, tuple[str, tuple[bytes, int], str]] = {
    "sparse": (
        plain_config(),
        header({A: tensor([2, MIB64 // 2], 0), B: tensor([16, 2], MIB64 * 4)}, MIB64 * 4 + 128),
        "another model",
    ),
    "sparse half": (
        plain_config(),
        header(
            {A: tensor([2, MIB64], 0, "F16", 2), B: tensor([16, 2], MIB64 * 4, "F16", 2)},
            MIB64 * 4 + 64,
        ),
        "another model",
    ),
    **{
        f"sparse, of {layer}": (
            plain_config(),
            header(
                {
                    f"{HERE}.{layer}.lora_A.weight": tensor([2, MIB64 // 2], 0),
                    f"{HERE}.{layer}.lora_B.weight": tensor([16, 2], MIB64 * 4),
                },
                MIB64 * 4 + 128,
            ),
            "another model",
        )
        for layer in ("attn.c_attn", "attn.c_proj")
    },
    "sparse copy": (
        plain_config(),
        header(
            {f"{HERE}.attn.c_proj.base_layer.weight": tensor([MIB64, 2], 0, "F16", 2)}
            | {
                f"{HERE}.attn.c_proj.lora_A.weight": tensor([2, 16], MIB64 * 4, "F16", 2),
                f"{HERE}.attn.c_proj.lora_B.weight": tensor([16, 2], MIB64 * 4 + 64, "F16", 2),
            },
            MIB64 * 4 + 128,
        ),
        "another model",
    ),
    "sparse, out of step": (
        plain_config(),
        header({A: tensor([1], 0, "U8", 1), B: tensor([2, MIB64 // 2], 1)}, MIB64 * 4 + 1),
        "floats",
    ),
    "sparse halves out of step": (
        plain_config(),
        header({A: tensor([1], 0, "F16", 2), B: tensor([2, MIB64 // 2], 2)}, MIB64 * 4 + 2),
        "67,108,864",
    ),
    "huge header": (plain_config(), header(b" " * (17 << 20)), "header"),
    "header of lists": (plain_config(), header(b'{"a":' + b"[],[]," * 2_500_000 + b"}"), "header"),
    "many tensors": (plain_config(), header(MANY, 200_000), "another model"),
    "too many tensors": (
        plain_config(),
        header({f"a{i}": tensor([0], 0) for i in range(100_000)}),
        "100,000",
    ),
    "100,000 names": (
        plain_config(alpha_pattern={f"layers.{i}.q_proj": 2 for i in range(100_000)}),
        header(ONE, 256),
        "another model",
    ),
    "100,000 expressions": (
        plain_config(alpha_pattern={f"(a|b{i})*.*c": 2 for i in range(100_000)}),
        header(ONE, 256),
        "alpha_pattern",
    ),
    "100,000 wrong values": (
        plain_config(alpha_pattern={f"q{i}": "x" for i in range(100_000)}),
        header(ONE, 256),
        "alpha_pattern of 'q0' is 'x'",
    ),
    "100,000 modules": (
        plain_config(modules_to_save=[f"m{i}" for i in range(100_000)]),
        header(MANY, 200_000),
        "modules_to_save",
    ),
    "large config": (plain_config(x=[[]] * 5_000_000), header(ONE, 256), "bytes"),
    "nested config": ("[" * 1_000_000, header(ONE, 256), "JSON"),
}


def write_bombs(folder: Path) -> list[Path]:
    for name, (config, (head, data), _) in BOMBS.items():
        place = folder / name
        place.mkdir()
        (place / CONFIG).write_text(config, "utf-8")
        with (place / TENSORS).open("wb") as file:
            file.write(head)
            file.truncate(len(head) + data)
    return [folder / name for name in BOMBS]


def test_bombs_end_with_our_own_error_in_little_time_and_memory(tmp_path):
    for name, cost in costs(LOADING, write_bombs(tmp_path)).items():
        assert_cheap(cost, name)
        assert BOMBS[name][2] in (cost.error or "opened"), name


INSPECTING = """
import contextlib, io
from nanogpt_surgery.cli.commands.inspect import inspect
from nanogpt_surgery.formats.peft import layout, reading, writing
def opened(path):
    with contextlib.redirect_stdout(io.StringIO()):
        inspect(path, json=True)
"""


def test_bombs_are_inspected_in_little_time_and_memory(tmp_path):
    found = costs(INSPECTING, write_bombs(tmp_path))
    for name, cost in found.items():
        assert_cheap(cost, name)
    assert found["sparse"].error is None, "its shapes are shown, without norms"


REFUSED_HEADERS = {
    "integers": {A: tensor([2, 24], 0, "I32"), B: tensor([60, 2], 192, "I32")},
    "bytes": {A: tensor([2, 24], 0, "U8", 1), B: tensor([60, 2], 48, "U8", 1)},
    "twice": json.dumps({A: tensor([2, 24], 0)})[:-1].encode()
    + b"," + json.dumps({A: tensor([2, 24], 0)})[1:].encode(),
    "a long name": {A.replace("model", "m" * 5000): tensor([2, 24], 0)},
    "with and without prefix": {
        A: tensor([2, 24], 0), A.removeprefix("base_model.model."): tensor([2, 24], 192),
    },
    "an overlap": {A: tensor([2, 24], 0), B: tensor([60, 2], 100)},
    "a hole": {A: tensor([2, 24], 0), B: tensor([60, 2], 400)},
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED_HEADERS)
def test_headers_go_through_the_checks_of_models(folder, kind):
    head, _ = header(REFUSED_HEADERS[kind])
    entries = re.findall(rb'"data_offsets": \[\d+, (\d+)\]', head)
    (folder / TENSORS).write_bytes(head + b"\0" * max(map(int, entries)))
    with pytest.raises(SurgeryError, match=re.escape(TENSORS)):
        load_adapter(tiny_model(LLAMA), folder)


VALUES = [
    None, True, 0, -1, 3, 1e400, float("nan"), 10**40, "", "x", "\x1b[31m", "\ud800", "a" * 5000,
    [], [None], [[]], ["x"], {}, {"": None}, {"x": []}, {"q_proj": {}}, {"*": 1}, [1, "x"],
]  # fmt: skip


def test_no_value_of_a_config_ends_in_a_traceback(folder):
    path = folder / CONFIG
    good = json.loads(path.read_text("utf-8"))
    model = tiny_model(LLAMA)
    keys = [*good, "alpha_pattern", "lora_bias", "layer_replication", "ensure_weight_tying", "new"]
    pairs = [(key, value) for key in keys for value in VALUES]
    for key, value in random.Random(7).sample(pairs, 150):
        path.write_text(json.dumps(good | {key: value}), "utf-8")
        loaded_or_refused(model, folder)


def loaded_or_refused(model, folder) -> None:
    from nanogpt_surgery import remove_lora

    try:
        load_adapter(model, folder)
    except SurgeryError as error:
        assert len(str(error)) < 5_000
        assert "\x1b" not in str(error)
    else:
        remove_lora(model)


def test_no_change_of_a_byte_ends_in_a_traceback(folder):
    draw, model = random.Random(5), tiny_model(LLAMA)
    for name, most in ((CONFIG, None), (TENSORS, 3000)):
        path = folder / name
        good = path.read_bytes()
        for _ in range(150):
            data = bytearray(good)
            for _ in range(draw.randint(1, 4)):
                data[draw.randrange(len(data) if most is None else most)] = draw.randrange(256)
            path.write_bytes(bytes(data))
            loaded_or_refused(model, folder)
        path.write_bytes(good[: draw.randrange(len(good))])
        with pytest.raises(SurgeryError):
            load_adapter(model, folder)
        path.write_bytes(good)


def test_an_adapter_in_half_precision_or_out_of_step_is_read_as_its_numbers_are(folder):
    whole = read_adapter(folder).in_float32().updates
    tensors = {key: t.to(torch.bfloat16) for key, t in load_file(folder / TENSORS).items()}
    save_file(tensors, folder / TENSORS, {"x": "y"})
    for name, update in read_adapter(folder).in_float32().updates.items():
        assert update.A.dtype == torch.float32
        assert torch.equal(update.A, whole[name].A.bfloat16().float())
    text = (folder / TENSORS).read_bytes()
    length = int.from_bytes(text[:8], "little")
    moved = struct.pack("<Q", length + 1) + text[8 : 8 + length] + b" " + text[8 + length :]
    (folder / TENSORS).write_bytes(moved)
    for name, update in read_adapter(folder).in_float32().updates.items():
        assert torch.equal(update.B, whole[name].B.bfloat16().float())
