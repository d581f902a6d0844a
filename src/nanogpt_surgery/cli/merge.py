"""`surgery merge`: a model with its adapter added in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from nanogpt_surgery.cli.console import say, show

PROBE_TOKENS = 64


def merge(
    model: str,
    adapter: Path,
    *,
    out: Path,
    force: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Add an adapter's ΔW to a model's weights, in float32, and write a new model folder.

    Parameters
    ----------
    model
        a run, a model folder, a GGUF file or a hub name
    adapter
        an adapter folder, as finetune or peft writes it
    out
        the model folder to make
    force
        write it even if the merged model's answers are not the adapted one's
    json
        print the report as JSON
    """
    import torch

    from nanogpt_surgery.formats.adapter_layout import load_adapter
    from nanogpt_surgery.formats.model_file import open_model, save_model
    from nanogpt_surgery.lora.operations import merge_lora

    network, tokenizer = open_model(model)
    load_adapter(network, adapter)
    length = min(PROBE_TOKENS, network.config.block_size)
    draw = torch.Generator().manual_seed(0)
    probe = torch.randint(network.config.vocab_size, (4, length), generator=draw)
    with torch.inference_mode():
        adapted = network(probe)
    report = merge_lora(network, probe=probe, force=force)
    save_model(network, out, tokenizer)
    with torch.inference_mode():
        written = open_model(out)[0](probe)
    report.summary["largest_logit"] = float(adapted.abs().max())
    report.summary["largest_logit_error"] = float((written - adapted).abs().max())
    show(report, json)
    say(f"wrote {out}, read it again and compared it on {probe.numel()} random tokens")
