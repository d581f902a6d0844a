import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_surgery.model.loss import count_trained, cross_entropy, kl_divergence


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.floats(0.1, 30))
def test_cross_entropy_is_the_mean_surprise_in_nats(batch, tokens, vocabulary, spread):
    torch.manual_seed(0)
    logits = spread * torch.randn(batch, tokens, vocabulary)
    targets = torch.randint(vocabulary, (batch, tokens))
    probabilities = torch.softmax(logits.double(), -1)
    expected = -probabilities.gather(-1, targets[..., None]).log().mean()
    loss = cross_entropy(logits, targets)
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


def test_cross_entropy_is_taken_in_float32():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 30, 11).bfloat16(), torch.randint(11, (2, 30))
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, cross_entropy(logits.float(), targets))


def test_what_is_not_trained_on_does_not_count():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 30, 11), torch.randint(11, (2, 30))
    targets[:, 7:] = -100
    assert count_trained(targets) == 14
    assert torch.equal(cross_entropy(logits, targets), cross_entropy(logits[:, :7], targets[:, :7]))
    whole = cross_entropy(logits, targets, "sum")
    torch.testing.assert_close(whole, 14 * cross_entropy(logits, targets))


def test_the_divergence_is_that_of_the_distributions():
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 3, 5, 11)
    p, q = (torch.distributions.Categorical(logits=logits.double()) for logits in (ours, theirs))
    expected = torch.distributions.kl_divergence(p, q).mean()
    torch.testing.assert_close(kl_divergence(ours, theirs), expected)
    assert kl_divergence(ours, ours + 3.0) < 1e-12
