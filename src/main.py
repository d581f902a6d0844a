"""The whole story on one page: a GPT from nothing, then LoRA on its head for another kind of text.

    cd src && uv sync && uv run main.py          or, from the root:   uv run src/main.py

Text, a tokenizer, windows, a model, a short pretraining on English; then the head alone learns
Python through a low-rank update, and no bit of the model's own weights has changed.
"""

import hashlib
from collections.abc import Iterator

import torch
from rich.progress import track

from nanogpt_surgery import (
    CharacterTokenizer,
    GPTDataset,
    SimpleGPT,
    Step,
    disable_lora,
    enable_lora,
    evaluate,
    fit,
    generate,
    inject_lora,
    python_reference,
    python_source,
    split_by_position,
)

BLOCK = 128


def main() -> None:
    """Pretrains a model, injects LoRA, trains that, and compares the losses."""
    torch.manual_seed(1337)
    english, python = python_reference(), python_source()[:500_000]
    tokenizer = CharacterTokenizer(english + python)
    english_train, english_held = windows(english, tokenizer)
    python_train, python_held = windows(python, tokenizer)

    model = SimpleGPT(tokenizer.vocab_size, block_size=BLOCK)
    print(f"{model.n_parameters:,} parameters, {tokenizer.vocab_size} characters")
    steps = fit(model, english_train, max_steps=400, muon=True, learning_rate=0.03)
    watch("pretraining on English", steps, 400)
    before = evaluate(model, english_held), evaluate(model, python_held)
    sample("before", model, tokenizer)

    print(inject_lora(model, targets="lm_head", rank=8, alpha=16))
    frozen = fingerprint(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]  # A, B
    adamw = torch.optim.AdamW(trainable, weight_decay=0.0)  # without one, fit makes its own
    steps = fit(model, python_train, optimizer=adamw, max_steps=250, learning_rate=1e-2)
    watch("LoRA on the head, on Python", steps, 250)
    after = evaluate(model, english_held), evaluate(model, python_held)
    sample("after", model, tokenizer)

    assert fingerprint(model) == frozen, "a frozen tensor has moved"
    disable_lora(model)
    without = evaluate(model, english_held), evaluate(model, python_held)
    enable_lora(model)

    print("held-out loss, nats a character    English   Python")
    for name, losses in [("before", before), ("with LoRA", after), ("LoRA disabled", without)]:
        print(f"  {name:31s}  {losses[0]:8.4f} {losses[1]:8.4f}")
    print(f"trained {sum(p.numel() for p in trainable):,} of {model.n_parameters:,} parameters")
    print(f"every frozen tensor has its bits: sha256 {frozen[:16]}… before and after")


def windows(text: str, tokenizer: CharacterTokenizer) -> tuple[GPTDataset, GPTDataset]:
    """Returns training and held-out windows of a text."""
    train, held = split_by_position(text)
    return GPTDataset(train, tokenizer, BLOCK), GPTDataset(held, tokenizer, BLOCK)


def watch(what: str, training: Iterator[Step], max_steps: int) -> None:
    """Takes every step of a training, with a progress bar."""
    *_, last = track(training, what, total=max_steps)
    print(f"{what}: loss {last.loss:.3f} after {last.step} steps")


def sample(when: str, model: SimpleGPT, tokenizer: CharacterTokenizer) -> None:
    """Prints a text of the model's, drawn with temperature and top-k."""
    prompt = "\ndef "
    ids = generate(model, tokenizer.encode(prompt), BLOCK - len(prompt), 0.8, top_k=20, seed=1)
    print(f"--- {when} ---{prompt}{tokenizer.decode(list(ids))}\n---")


def fingerprint(model: torch.nn.Module) -> str:
    """Returns the sha256 of all tensors that LoRA must not change."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
