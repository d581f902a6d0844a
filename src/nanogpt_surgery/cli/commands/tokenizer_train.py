"""`surgery tokenizer`: a vocabulary learnt from text."""

from __future__ import annotations

from pathlib import Path

from nanogpt_surgery.cli.framework.console import Json, say, show
from nanogpt_surgery.cli.framework.options import Overwrite, check_out


def train(
    *text: str,
    out: Path,
    vocab_size: int,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Learn a byte-level BPE from text, into a folder that transformers opens.

    Merges are learnt from the first nine tenths of the text, as a training on it learns from them,
    and measured on the last.

    Parameters
    ----------
    text
        files, folders, or - for standard input; without any, Python's own reference
    out
        the folder to make: tokenizer.json, tokenizer_config.json
    vocab_size
        how many tokens at most, the 256 bytes and <|endoftext|> among them
    """
    from nanogpt_surgery.data.text.corpus import python_reference, read_texts, split_by_position
    from nanogpt_surgery.data.tokenizers.bpe_tokenizer import BPETokenizer
    from nanogpt_surgery.formats.huggingface.tokenizer_files import save_tokenizer
    from nanogpt_surgery.report import Report

    check_out(out, overwrite)
    if not text:
        say("no text was named: learning from Python's language reference")
    whole = read_texts(text) if text else python_reference()
    learnt, held_out = split_by_position(whole)
    tokenizer = BPETokenizer.train(learnt, vocab_size)
    if tokenizer.vocab_size < vocab_size:
        say(f"the text repeats too little for {vocab_size:,} tokens")
    tokens = len(tokenizer.encode_to_numpy(held_out))
    save_tokenizer(tokenizer, out)
    summary = {
        "folder": str(out),
        "vocabulary": tokenizer.vocab_size,
        "characters_learnt_from": len(learnt),
        "held_out_characters": len(held_out),
        "held_out_tokens": tokens,
        "characters_per_token": len(held_out) / max(1, tokens),
        "bytes_per_token": len(held_out.encode()) / max(1, tokens),
    }
    show(Report("trained a tokenizer", [], summary), json)
    say(f"surgery train --tokenizer {out} … trains a model with it")
