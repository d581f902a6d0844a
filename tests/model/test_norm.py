import torch
import torch.nn.functional as F

from nanogpt_surgery import GPTConfig
from nanogpt_surgery.model.transformer_encoder_layer import RMSNorm, make_norm


def test_rmsnorm_equals_pytorchs():
    torch.manual_seed(0)
    norm = RMSNorm(24, eps=3e-3)
    torch.nn.init.normal_(norm.weight)
    x = 0.2 * torch.randn(2, 5, 24)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (24,), norm.weight, eps=3e-3))


def test_rmsnorm_works_in_float32_and_multiplies_in_the_dtype_of_its_input():
    torch.manual_seed(0)
    norm = RMSNorm(24, eps=1e-5).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 24, dtype=torch.bfloat16)
    exact = F.rms_norm(x.float(), (24,), eps=1e-5).bfloat16() * norm.weight
    assert torch.equal(norm(x), exact)


def test_a_model_without_biases_has_none_in_its_norms():
    assert make_norm(GPTConfig(31)).bias is not None
    assert make_norm(GPTConfig(31, bias="none")).bias is None
    assert make_norm(GPTConfig(31, norm_eps=2e-3)).eps == 2e-3
