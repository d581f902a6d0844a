"""Every kind of LoRA from the command line: planned, trained, merged in place, taken back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_model

from nanogpt_surgery import CharacterTokenizer, GPTConfig, inject_lora, save_adapter, save_model
from nanogpt_surgery.cli.framework.app import run as surgery
from nanogpt_surgery.files.atomic import file_hash
from nanogpt_surgery.formats.peft import writing
from nanogpt_surgery.formats.peft.config import config_for
from nanogpt_surgery.training.fast.frozen_prefix import FrozenPrefix

TEXT = "to be, or not to be: that is the question.\n" * 40
STEPS = "--max-steps 2 --evaluate-every 2 --batch-size 4 --warmup-steps 1 --device cpu".split()
SIZES = {"n_embd": 16, "n_head": 2, "n_layer": 2, "block_size": 12}

# Each kind: its flags, what its adapter_config.json says, and flags that only a training takes.
KINDS = {
    "plain": ("--rank 3 --alpha 5", {"r": 3, "lora_alpha": 5}, ""),
    "rslora": ("--rslora", {"use_rslora": True}, ""),
    "dora": ("--dora", {"use_dora": True}, ""),
    "pissa": ("--pissa --rank 2", {"r": 4}, ""),
    "dora-pissa-rslora": ("--dora --pissa --rslora --rank 2", {"use_dora": True}, ""),
    "lora-plus": ("", {}, "--lora-plus-ratio 16"),
    "rank-pattern": (
        "--rank 2 --rank-pattern layers.1.self_attn.v_proj=4 q_proj=3",
        {"r": 3},  # what most layers have; the others are its pattern
        "",
    ),
    "alpha-pattern": ("--alpha-pattern v_proj=2.5", {}, ""),
    "dropout": ("--dropout 0.1", {"lora_dropout": 0.1}, ""),
    "all-linear": ("--targets all-linear", {}, ""),
    "expression": (r"--targets layers\.[01]\.mlp\..*", {}, ""),
    "embedding": ("--targets embed_tokens v_proj", {}, ""),
    "head": ("--targets lm_head", {}, ""),
    "untie": ("--targets lm_head --tied untie", {}, ""),
    "both": ("--targets lm_head --tied both", {}, ""),
    "both-rslora": ("--targets embed_tokens --tied both --rslora", {"use_rslora": True}, ""),
}
TIED = {"untie", "both", "both-rslora"}


def bytes_of(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "LOCK"]
    return {str(p.relative_to(folder)): file_hash(p) for p in files if "operations" not in p.parts}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("kinds")
    (place / "text.txt").write_text(TEXT)
    tokenizer = CharacterTokenizer(TEXT)
    for name in ("llama", "tied"):
        config = GPTConfig.for_family(
            "llama", vocab_size=tokenizer.vocab_size, tie_head=name == "tied", **SIZES
        )
        save_model(tiny_model(config), place / name, tokenizer)
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_planned_trained_merged_and_undone(
    kind: str, bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, config, training = KINDS[kind]
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    shutil.copytree(bases / ("tied" if kind in TIED else "llama"), base)
    first = bytes_of(Path(base))
    capsys.readouterr()
    surgery(["plan", base, *flags.split(), "--json"])
    planned = json.loads(capsys.readouterr().out)
    words = [*flags.split(), *training.split(), *STEPS, "--learning-rate", "0.05", "--json"]
    surgery(["finetune", base, str(bases / "text.txt"), "--out", adapter, *words])
    trained = json.loads(capsys.readouterr().out)
    assert trained["trained_parameters"] == planned["trainable_parameters"]
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for key, value in config.items():
        assert written[key] == value, key
    surgery(["log", adapter, "--json"])
    [line] = json.loads(capsys.readouterr().out)["rows"]
    assert line["operation"] == f"finetune from {base}, 2 steps"

    surgery(["merge", base, adapter, "--json"])
    merged = json.loads(capsys.readouterr().out)
    assert merged["kl"] < 1e-9
    assert max(row["ΔW / W"] for row in merged["rows"]) > 1e-4, "it has learned something"
    assert merged["largest_error"] <= 1e-5 * merged["largest_logit"]
    surgery(["undo", base])
    assert bytes_of(Path(base)) == first


def test_the_ratio_of_lora_plus_reaches_the_matrices(bases: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    moved = []
    for name, ratio in (("once", "1"), ("more", "16")):
        words = [*STEPS, "--learning-rate", "0.001", "--lora-plus-ratio", ratio]
        text, out = str(bases / "text.txt"), tmp_path / name
        surgery(["finetune", str(bases / "llama"), text, "--out", str(out), *words])
        tensors = load_file(out / "adapter_model.safetensors")
        b = [t for n, t in tensors.items() if "lora_B" in n]
        moved.append(torch.stack([t.abs().max() for t in b]).mean())
    assert moved[1] > 10 * moved[0]


def test_a_pattern_in_a_config_file_is_a_table(
    bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.toml"
    file.write_text('rank = 2\n[rank_pattern]\n"layers.1.self_attn.v_proj" = 4\nq_proj = 3\n')
    capsys.readouterr()
    surgery(["plan", str(bases / "llama"), "--config", str(file), "--json"])
    ranks = {row["layer"][7:]: row["rank"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert ranks["1.self_attn.v_proj"] == 4
    assert ranks["0.self_attn.v_proj"] == 2
    assert ranks["0.self_attn.q_proj"] == ranks["1.self_attn.q_proj"] == 3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "o_proj"], ["o_proj"]])
def test_a_plan_says_the_size_of_the_file(
    family: str, targets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = GPTConfig.for_family(
        family, vocab_size=31, n_embd=12, n_head=2, n_layer=2, block_size=8
    )
    model = tiny_model(config)
    save_model(model, tmp_path / "base")
    inject_lora(model, targets, rank=3)
    save_adapter(model, tmp_path / "adapter")
    capsys.readouterr()
    flags = [word for target in targets for word in ("--targets", target)]
    surgery(["plan", str(tmp_path / "base"), *flags, "--rank", "3", "--json"])
    planned = json.loads(capsys.readouterr().out)["adapter_bytes"]
    assert planned == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("flags", "piece"),
    [
        ("--rank-pattern *.v_proj=4", "'*.v_proj' of rank_pattern or alpha_pattern is not a reg"),
        ("--rank-pattern v_proj=four", "'v_proj=four' is no layer with its number"),
        ("--rank-pattern v_proj", "'v_proj' is no layer with its number"),
        ("--rank-pattern o_proj=4", "no target matches 'o_proj'"),
        ("--targets lm_head", "share one weight"),
    ],
)
def test_what_is_wrong_is_said(
    flags: str, piece: str, bases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        surgery(["plan", str(bases / "tied"), *flags.split()])
    assert piece in capsys.readouterr().err


def test_a_run_is_resumed_with_the_adapter_that_it_has(
    bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what no shape and no report shows; of an old run it is not known."""
    run = tmp_path / "run"
    words = ["finetune", str(bases / "llama"), str(bases / "text.txt"), "--out", str(run), *STEPS]
    surgery([*words, "--rslora", "--dropout", "0.1"])
    written = json.loads((run / "run.json").read_text())
    assert written["adapter"]["rslora"]
    assert written["adapter"]["dropout"] == 0.1
    with pytest.raises(SystemExit):
        surgery([*words, "--resume"])
    said = capsys.readouterr().err
    assert "dropout was 0.1 and is 0.0" in said and "rslora was True and is False" in said
    assert "--rslora --dropout 0.1;" in said, "the command that began it"
    surgery([*words, "--rslora", "--dropout", "0.1", "--resume"])
    del written["adapter"]
    (run / "run.json").write_text(json.dumps(written))
    surgery([*words, "--rslora", "--dropout", "0.1", "--resume"])


@pytest.mark.parametrize("flags", [[], ["--plan"]], ids=["trained", "planned"])
def test_what_cannot_be_saved_is_refused_before_the_training(
    flags: list[str],
    bases: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(  # a fault in the writer, such as there were
        writing, "config_for", lambda *a, **b: {**config_for(*a, **b), "lora_alpha": 999}
    )
    words = ["finetune", str(bases / "llama"), str(bases / "text.txt"), *STEPS, *flags]
    with pytest.raises(SystemExit):
        surgery([*words, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert "model.layers.0.self_attn.q_proj" in said
    assert not (tmp_path / "run").exists()


def test_a_flag_counts_over_the_file(
    bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.toml"
    file.write_text("dora = true\nrank = 2\n")
    counts = []
    for more in ([], ["--no-dora"], ["--no-dora", "--rank", "4"]):
        capsys.readouterr()
        surgery(["plan", str(bases / "llama"), "--config", str(file), *more, "--json"])
        counts.append(json.loads(capsys.readouterr().out)["trainable_parameters"])
    assert counts[2] == 2 * counts[1]
    assert counts[0] > counts[1]


def test_kept_states_in_a_folder_train_the_same(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, made = tmp_path / "short.txt", []
    text.write_text(TEXT[:180])
    room = FrozenPrefix._room
    monkeypatch.setattr(FrozenPrefix, "_room", lambda s, x: made.append(s.folder) or room(s, x))
    adapters = []
    for name, place in (("memory", []), ("disk", ["--cache-dir", str(tmp_path / "kept")])):
        words = [*"--targets lm_head --max-steps 5 --batch-size 60 --device cpu".split(), *place]
        surgery(
            ["finetune", str(bases / "llama"), str(text), "--out", str(tmp_path / name), *words]
        )
        adapters.append(file_hash(tmp_path / name / "adapter_model.safetensors"))
    assert adapters[0] == adapters[1]
    assert made == [None, tmp_path / "kept"]
    assert not list((tmp_path / "kept").iterdir())


def test_a_file_to_keep_states_in_is_refused_before_anything_is_made(
    bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", str(bases / "llama"), str(bases / "text.txt"), "--out"]
    with pytest.raises(SystemExit):
        surgery([*words, str(tmp_path / "run"), "--cache-dir", str(bases / "text.txt"), *STEPS])
    assert "text.txt is a file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
