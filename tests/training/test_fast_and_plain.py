"""What training/fast does equals what the code as it is read does: losses, gradients, weights."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.models import FAMILY_CONFIGS, OWN_CONFIGS, random_ids, tiny_model, train_a_little
from torch import nn

from nanogpt_surgery import (
    FitSettings,
    GPTDataset,
    InstructionDataset,
    SimpleGPT,
    SurgeryError,
    blend_lora,
    evaluate,
    fit,
    inject_lora,
    swap_lora,
)
from nanogpt_surgery.data.conversations.instructions import Example
from nanogpt_surgery.training.fast import (
    block_attention,
    chunked_logits,
    cpu_kernels,
    frozen_head,
)
from nanogpt_surgery.training.recipes import MUON

SETTINGS = FitSettings(
    max_steps=3, batch_size=4, warmup_steps=0, learning_rate=1e-2, device="cpu",
    precision="float32", compile="off", seed=3,
)  # fmt: skip
PLAIN = {"fast": False, "compile": "off"}
LLAMA = FAMILY_CONFIGS["llama"]
IDS = random_ids(LLAMA, 1, 60)[0]


def windows() -> GPTDataset:
    return GPTDataset.from_ids(IDS, 9, stride=9)


def answers() -> InstructionDataset:
    """Rows of several documents, in which some tokens are trained on."""
    rows = random_ids(LLAMA, 12, 6).tolist()
    trained = [[False] * (5 - n % 3) + [True] * (1 + n % 3) for n in range(12)]
    examples = [Example(tuple(row), tuple(t)) for row, t in zip(rows, trained, strict=True)]
    return InstructionDataset(examples, 12, pack=True)


def two(model: nn.Module) -> None:
    inject_lora(model, ["q_proj", "lm_head"], rank=2, name="one")
    inject_lora(model, ["q_proj", "down_proj"], rank=3, name="other")


def blended(model: nn.Module) -> None:
    two(model)
    blend_lora(model, {"one": 0.7, "other": 0.4})


def swapped(model: nn.Module) -> None:
    two(model)
    swap_lora(model, "other")


def lora(targets: object, **settings: object) -> object:
    return lambda model: inject_lora(model, targets, rank=2, tied="untie", **settings)


ADAPTERS = {
    "none": lambda model: None,
    "q and v": lora(("q_proj", "v_proj")),
    "all linear": lora("all-linear"),
    "head": lora("lm_head"),
    "last block": lora(r"layers\.1\..*"),
    "embedding": lora("embed_tokens"),
    "rslora": lora("all-linear", rslora=True),
    "dora": lora("all-linear", dora=True),
    "dora on the head": lora("lm_head", dora=True),
    "pissa": lora("all-linear", pissa=True),
    "a blend of two": blended,
    "one of two": swapped,
}
NAMES = [*FAMILY_CONFIGS, *OWN_CONFIGS]
CASES = [("llama", adapter, {}, windows) for adapter in ADAPTERS]
CASES += [(name, kind, {}, windows) for name in NAMES for kind in ("none", "q and v", "head")]
CASES += [
    ("llama", kind, changes, data)
    for kind in ("none", "all linear", "head", "dora")
    for data in (windows, answers)
    for changes in ({"grad_accum_steps": 2}, {"gradient_checkpointing": True}, {"max_steps": 9})
]
CASES += [("llama", "none", {**MUON, "max_steps": 3}, windows)]
CASES += [("transformers", kind, {}, windows) for kind in ("none", "q and v", "head", "dora")]
CASES += [
    pytest.param("llama", kind, {"compile": "on"}, data, marks=pytest.mark.slow)
    for kind in ("none", "q and v", "dora")
    for data in (windows, answers)
]


def of_transformers() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=LLAMA.vocab_size, hidden_size=12, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=16,
        bos_token_id=1, eos_token_id=2, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def prepared(name: str, adapter: str) -> nn.Module:
    """A model in which every update already does something."""
    torch.manual_seed(0)
    configs = FAMILY_CONFIGS | OWN_CONFIGS
    model = tiny_model(configs[name]) if name in configs else of_transformers()
    ADAPTERS[adapter](model)
    if adapter != "none":
        train_a_little(model)
    return model


def trained(model: nn.Module, data: object, **changes: object) -> tuple[list[float], list[float]]:
    steps = list(fit(model, data, SETTINGS, validation=data, evaluate_every=1, **changes))
    losses = [loss for step in steps for loss in (step.loss, step.validation_loss)]
    return losses, [step.gradient_norm for step in steps]


@pytest.fixture(params=[False, True], ids=["", "in parts"])
def in_parts(request, monkeypatch) -> None:
    """Logits, the vocabulary and attention in parts that are small enough to be several.

    Attention is computed so in float32 too, and in bfloat16 as if the processor had arithmetic.
    """
    if request.param:
        monkeypatch.setattr(chunked_logits, "MOST_LOGITS", 300)
        monkeypatch.setattr(frozen_head, "IN_CACHE", 50)
        monkeypatch.setattr(block_attention, "QUERIES", 4)
        monkeypatch.setattr(block_attention, "IN_CACHE", 100)
        monkeypatch.setattr(cpu_kernels, "float32_blocks_pay", lambda k: True)
        monkeypatch.setattr(cpu_kernels, "cpu_has_bfloat16", lambda: True)


@contextmanager
def nothing_compiled(changes: dict) -> Iterator[None]:
    """What was compiled holds the sizes of the parts, but is found again by its graph alone."""
    if changes.get("compile") != "on":
        yield
        return
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    with fresh_cache():
        yield


@pytest.mark.filterwarnings("default:::torch")  # of PyTorch's compiler
@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize(("name", "adapter", "changes", "data"), CASES)
def test_fast_is_plain(name, adapter, changes, data):
    fast = prepared(name, adapter)
    plain = copy.deepcopy(fast)
    with nothing_compiled(changes):
        losses, norms = trained(fast, data(), **changes)
    wanted, wanted_norms = trained(plain, data(), **(changes | PLAIN))
    assert losses == pytest.approx(wanted, rel=2e-5)
    assert norms == pytest.approx(wanted_norms, rel=1e-3)
    assert evaluate(fast, data()) == pytest.approx(evaluate(plain, data(), fast=False), rel=2e-5)


def gradients(model: SimpleGPT, data: object, **changes: object) -> dict[str, torch.Tensor]:
    """Those of the first step, as the optimizer is given them."""
    found: dict[str, torch.Tensor] = {}

    class Noting(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    found[name] = parameter.grad.clone()

    optimizer = Noting([p for p in model.parameters() if p.requires_grad], lr=0.0)
    changes = {"max_steps": 1, "max_grad_norm": 0.0} | changes
    list(fit(model, data, SETTINGS, optimizer=optimizer, examine=False, **changes))
    return found


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("data", [windows, answers])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_gradients_are_those_of_the_plain_way(adapter, data, precision):
    model = prepared("llama", adapter)
    wanted = gradients(model, data(), fast=False, precision=precision)
    found = gradients(model, data(), precision=precision)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        error = (gradient - wanted[name]).norm() / wanted[name].norm()
        assert error <= (1e-4 if precision == "float32" else 0.2), name


PROGRAM = """
import sys
from helpers.training import DATASET, SETTINGS, VALIDATION, model_of
from nanogpt_surgery import fit, inject_lora
model = model_of()
list(fit(model, DATASET, SETTINGS, validation=VALIDATION, fast=False, max_steps=2))
list(fit(model, DATASET, SETTINGS, fast=False, max_steps=2, muon=True))
inject_lora(model, "lm_head")
list(fit(model, DATASET, SETTINGS, validation=VALIDATION, fast=False, max_steps=2))
found = [name for name in sys.modules if name.startswith("nanogpt_surgery.training.fast")]
assert "nanogpt_surgery.training.fit" in sys.modules
sys.exit(", ".join(found) or 0)
"""


def test_the_plain_way_never_loads_the_fast_one() -> None:
    tests = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, cwd=tests, timeout=600)


def test_compiled_is_not_plain() -> None:
    with pytest.raises(SurgeryError, match="compile is on"):
        FitSettings(compile="on", fast=False)
