"""`surgery train --init-from`: all weights of a model go on, in the loop that begins others."""

import json
import signal
from pathlib import Path

import pytest
import torch
from helpers.commands import LETTERS, called, write_model
from helpers.models import assert_equal_logits, randomise
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nanogpt_surgery import (
    CharacterTokenizer,
    FitSettings,
    GPTConfig,
    GPTDataset,
    SimpleGPT,
    evaluate,
    open_model,
    save_model,
)
from nanogpt_surgery.data.text.corpus import split_by_position
from nanogpt_surgery.files.atomic import file_hash
from nanogpt_surgery.runs.checkpoints import RunFolder
from nanogpt_surgery.training.recipes import MUON, further_values
from nanogpt_surgery.training.step import Step

TEXT = LETTERS * 20
SHORT = "--block-size 12 --batch-size 3 --device cpu --compile off --precision float32".split()
TOKENIZER = CharacterTokenizer(LETTERS)
LLAMA = {"n_embd": 24, "n_head": 6, "n_kv_head": 2, "head_dim": 10, "n_layer": 2, "n_inner": 28}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "m")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def going_on(
    *arguments: object, base: str = "m", out: str = "run", steps: int = 3, check: int = 0
) -> str:
    """What is said; the text is text.txt, the run is `run`, unless told otherwise."""
    words = ["train", "text.txt", "--init-from", base, "--out", out, *SHORT, "--max-steps", steps]
    return called(*words, *arguments, check=check)[1]


def described(run: str = "run") -> dict:
    return json.loads(Path(run, "run.json").read_text())


def write_llama(folder: Path, **axes: object) -> SimpleGPT:
    sizes = LLAMA | {"vocab_size": TOKENIZER.vocab_size, "block_size": 19}
    model = SimpleGPT.from_config(GPTConfig.for_family("llama", **sizes, **axes)).eval()
    randomise(model)
    save_model(model, folder, TOKENIZER)
    return model


def test_it_begins_with_the_model_s_weights_and_all_of_them_learn(place: Path) -> None:
    before = file_hash(place / "m" / "model.safetensors")
    base, _ = open_model("m")
    said = going_on("--learning-rate", 0, steps=1)
    assert f"from m: all of its {base.n_parameters:,} parameters" in said
    held_out = GPTDataset(split_by_position(TEXT)[1], TOKENIZER, 12)
    rows = map(json.loads, Path("run", "metrics.jsonl").read_text().splitlines())
    wanted = pytest.approx(evaluate(base, held_out), rel=1e-6)
    assert [row["validation_loss"] for row in rows] == [wanted, wanted]
    still, _ = open_model("run")
    assert all(map(torch.equal, still.state_dict().values(), base.state_dict().values()))
    going_on(out="moved", steps=3)
    moved, _ = open_model("moved")
    after = moved.state_dict()
    assert not [name for name, was in base.state_dict().items() if torch.equal(was, after[name])]
    assert file_hash(place / "m" / "model.safetensors") == before, "the base is read, not written"


def test_adamw_goes_on_at_a_low_rate_unless_muon_is_asked_for(place: Path) -> None:
    steps = {"max_steps": 1, "batch_size": 3, "device": "cpu", "compile": "off"}
    steps["precision"] = "float32"
    rate = further_values({})["learning_rate"]
    assert f"AdamW, at a learning rate of {rate:g}; --muon:" in going_on(steps=1)
    assert described()["settings"] == FitSettings(**further_values(steps)).to_dict()
    rate = further_values({"muon": True})["learning_rate"]
    assert rate < MUON["learning_rate"]
    said = going_on("--muon", "--max-grad-norm", 2, out="muon", steps=1)
    assert f"Muon, at a learning rate of {rate:g}; --no-muon:" in said
    asked = {**steps, "muon": True, "max_grad_norm": 2.0}
    assert described("muon")["settings"] == FitSettings(**further_values(asked)).to_dict()


@pytest.mark.parametrize(
    "flags",
    [
        ("--tokenizer", "characters"),
        ("--family", "llama"),
        ("--recipe", "fast"),
        ("--n-embd", 16),
        ("--dropout", 0.1),
        ("--no-qk-norm",),
        ("--tie-head",),
    ],
    ids=lambda flags: flags[0],
)
def test_what_the_model_settles_is_refused(place: Path, flags: tuple[object, ...]) -> None:
    said = going_on(*flags, base="nowhere", check=1)
    assert "--init-from nowhere" in said and f"settle {flags[0]}\n" in said
    assert "--block-size alone" in said


def test_all_that_is_settled_is_named_at_once(place: Path) -> None:
    said = going_on("--n-layer", 3, "--recipe", "fast", "--tokenizer", "m", check=1)
    assert "--tokenizer, --recipe, --n-layer\n" in said
    assert not Path("run").exists()


def test_a_block_size_cuts_windows_and_leaves_the_model(place: Path) -> None:
    going_on(steps=1)
    assert described()["block_size"] == 12
    assert open_model("run")[0].config.block_size == 200
    words = ["train", "text.txt", "--init-from", "m", "--out", "longer", "--block-size", 201]
    said = called(*words, check=1)[1]
    assert "201" in said and "200" in said
    assert not Path("longer").exists()


def test_instruction_data_is_left_to_finetune(place: Path) -> None:
    Path("answers.jsonl").write_text('{"prompt": "a?", "completion": "b"}\n' * 12)
    words = ["--init-from", "m", "--out", "run", *SHORT, "--max-steps", 1]
    said = called("train", "text.txt", "answers.jsonl", *words, check=1)[1]
    assert "surgery finetune m answers.jsonl --out" in said
    assert not Path("run").exists()
    Path("numbers.json").write_text(json.dumps({"numbers": [*range(400)]}))
    said = called("train", "numbers.json", *words, check=1)[1]
    assert "numbers.json" in said and "has the fields numbers" in said, "no JSON is read as text"
    assert not Path("run").exists()


@pytest.mark.parametrize("way", ["--no-muon", "--muon"])
def test_an_interrupted_run_ends_with_the_same_bits(
    place: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    write_llama(place / "tied", tie_head=True)
    going_on(way, out="whole", base="tied", steps=6)
    record = RunFolder.record

    def asked(run: RunFolder, step: Step) -> None:
        record(run, step)
        if step.step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "record", asked)
        assert "saved after step 3" in going_on(way, base="tied", steps=6, check=130)
    assert "going on from step 3 of 6" in going_on(way, "--resume", base="tied", steps=6)
    for name in ("model.safetensors", "training.safetensors"):
        file = f"checkpoints/step-00000006/{name}"
        assert file_hash(Path("run", file)) == file_hash(Path("whole", file))


def test_a_resume_is_told_which_model_it_began_with(place: Path) -> None:
    write_model(place / "other", seed=1)
    write_llama(place / "llama")
    going_on(steps=1)
    assert described()["named"]["model"] == "m"
    for base in ("other", "llama"):
        said = going_on("--resume", base=base, steps=1, check=1)
        assert f"model was m and is {base}" in said
    words = ["train", "text.txt", "--out", "run", *SHORT, "--max-steps", 1, "--resume"]
    said = called(*words, check=1)[1]
    assert "model was m and is not given" in said
    assert "--init-from m" in said
    going_on("--resume", base="./m", steps=1)
    write_model(place / "m", seed=2)
    assert "holds: the model m has changed since\n" in going_on("--resume", steps=1, check=1)


def test_a_run_from_nothing_goes_on_without_a_model(place: Path) -> None:
    words = ["train", "text.txt", "--out", "run", *SHORT, "--max-steps", 1, "--n-embd", 8]
    called(*words)
    assert "base" not in described()
    called(*words, "--resume")
    said = going_on("--resume", base="run", steps=1, check=1)
    assert "model was not given and is run" in said


def test_a_finished_run_goes_on_as_it_is_told(place: Path) -> None:
    going_on(steps=2)
    assert "max_steps was 2 and is 5" in going_on("--resume", steps=5, check=1)
    going_on(out="new", base="run", steps=2)
    assert described("new")["named"]["model"] == "run"
    assert "train from run, 2 steps" in called("log", "new")[0]


def test_a_tied_head_stays_tied(place: Path) -> None:
    write_llama(place / "tied", tie_head=True)
    going_on(base="tied")
    model, _ = open_model("run")
    assert model.config.tie_head
    assert model.lm_head.weight is model.embed_tokens.weight
    written = load_file(Path("run", "checkpoints", "step-00000003", "model.safetensors"))
    assert "lm_head.weight" not in written


def test_transformers_opens_what_was_trained(place: Path) -> None:
    base = write_llama(place / "llama")
    going_on(base="llama", steps=3)
    folder = Path("run", "checkpoints", "step-00000003")
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ours, _ = open_model("run")
    ids = torch.tensor([TOKENIZER.encode("the quick brown fox")])
    with torch.no_grad():
        assert_equal_logits(ours(ids), theirs(ids).logits)
        assert not torch.allclose(ours(ids), base(ids), atol=1e-3)


def test_a_gguf_file_goes_on_too(place: Path) -> None:
    write_llama(place / "llama")
    called("export", "llama", "--out", "llama.gguf")
    going_on(base="llama.gguf", steps=1)
    assert open_model("run")[0].config.n_kv_head == 2


def test_a_plan_touches_nothing(place: Path) -> None:
    out = called(
        "train", "text.txt", "--init-from", "m", "--out", "run", *SHORT, "--plan", "--json"
    )[0]
    assert json.loads(out)["trained_parameters"] == open_model("m")[0].n_parameters
    assert sorted(path.name for path in place.iterdir()) == ["m", "text.txt"]


def test_a_config_file_may_name_the_model(place: Path) -> None:
    Path("on.toml").write_text('init_from = "m"\nout = "run"\nmax_steps = 1\nblock_size = 12\n')
    assert "going on from m" in called("train", "text.txt", "--config", "on.toml")[1]


def test_an_adapter_is_no_model_to_go_on_from(place: Path) -> None:
    tune = ["--out", "adapter", *SHORT, "--max-steps", 1, "--targets", "q_proj"]
    called("finetune", "m", "text.txt", *tune)
    assert "adapter is an adapter, not a model" in going_on(base="adapter", check=1)
