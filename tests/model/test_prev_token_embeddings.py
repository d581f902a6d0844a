"""Embeddings of previous tokens beside the convolution over one-hot ids that they are."""

import torch
import torch.nn.functional as F
from helpers.models import CONFIGS, randomise

from nanogpt_surgery import GPTConfig, SimpleGPT
from nanogpt_surgery.model.embeddings import PrevTokenEmbeddings
from nanogpt_surgery.model.layout import Layout

CONFIG = GPTConfig(11, n_embd=6, n_head=2, n_prev_tokens=3)


def embeddings():
    return randomise(PrevTokenEmbeddings(CONFIG)).double()


def random_ids(batch, tokens):
    return torch.randint(11, (batch, tokens), generator=torch.Generator().manual_seed(0))


def test_it_is_a_causal_convolution_over_one_hot_ids():
    part, ids = embeddings(), random_ids(2, 9)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    tables = [table.weight for table in part]  # of distances 1, 2, 3
    kernel = torch.stack([*reversed(tables), torch.zeros_like(tables[0])], dim=-1)  # (V, C, 4)
    one_hot = F.one_hot(ids, 11).double().mT  # (B, V, T)
    expected = x + F.conv1d(F.pad(one_hot, (3, 0)), kernel.transpose(0, 1)).mT
    torch.testing.assert_close(part(x, ids, torch.arange(9)), expected)


def test_new_tokens_see_those_before_them():
    part, ids = embeddings(), random_ids(2, 9)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    whole = part(x, ids, torch.arange(9))
    for start in (1, 2, 5, 8):
        torch.testing.assert_close(
            part(x[:, start:], ids, torch.arange(start, 9)), whole[:, start:]
        )


def test_a_text_sees_nothing_of_the_one_before_it():
    part, first, second = embeddings(), random_ids(1, 4), random_ids(1, 5)
    both = torch.cat((first, second), 1)
    layout = Layout.of_documents(torch.tensor([[1] * 4 + [2] * 5]))
    x = torch.zeros(1, 9, 6, dtype=torch.float64)
    alone = [part(x[:, : t.size(1)], t, torch.arange(t.size(1))) for t in (first, second)]
    torch.testing.assert_close(part(x, both, layout.positions), torch.cat(alone, 1))


def test_a_row_shorter_than_the_distance():
    part, ids = embeddings(), random_ids(3, 2)
    x = torch.zeros(3, 2, 6, dtype=torch.float64)
    first, second = part(x, ids, torch.arange(2)).unbind(1)
    assert not first.any()
    torch.testing.assert_close(second, part[0].weight[ids[:, 0]])


def test_without_previous_tokens_nothing_is_added():
    model, x = SimpleGPT.from_config(CONFIGS["llama"]), torch.randn(2, 3, 6)
    assert model.embed_prev_tokens(x, random_ids(2, 3), torch.arange(3)) is x
    assert "embed_prev_tokens" not in dict(model.named_children())
