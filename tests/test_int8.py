"""lib/weights/int8.py: int8 weights compute nearly what the float weights do."""
import pytest
import torch

from lib.generate import generate
from lib.weights.int8 import Int8Linear, quantize, quantize_model
from model import GPT, GPTConfig, Linear


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(**options):
    torch.manual_seed(0)
    net = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=64, **options)).eval()
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    return net


def test_a_row_is_off_by_half_a_scale_at_most_also_if_it_is_zero():
    weight = random(5, 32)
    weight[2] = 0
    ints, scale = quantize(weight)
    assert ints.dtype == torch.int8 and ints.abs().max() == 127
    assert ((ints * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()


@pytest.mark.parametrize('n_rows', [1, 4, 5, 40])  # the two ways to multiply
@pytest.mark.parametrize('bias', [True, False])
def test_the_product_is_within_two_percent_of_that_in_float32(n_rows, bias):
    linear = Linear(64, 48, bias=bias)
    linear.weight.data = random(48, 64, seed=2)
    if bias:
        linear.bias.data = random(48, seed=3)
    x = random(2, n_rows, 64)[:1]
    expected = linear(x).detach()
    y = Int8Linear(linear)(x)
    assert y.shape == expected.shape and (y.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize('options', [{}, dict(pos='rope', norm='rmsnorm', mlp='swiglu', tie_weights=False)], ids=str)
def test_a_quantized_model_predicts_nearly_the_same(options):
    net, idx = tiny(**options), torch.randint(40, (4, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, loss = net(idx, idx.roll(-1, 1), return_logits=True)
        quantize_model(net)
        _, after = net(idx, idx.roll(-1, 1), return_logits=True)
    assert abs(float(loss) - float(after)) < 0.03
    assert net.transformer.wte.weight.dtype == torch.float32  # embeddings stay


def test_a_quantized_model_generates_the_greedy_text_of_its_own_logits():
    net = tiny()
    quantize_model(net)
    text = [3]
    for ids in generate(net, [3], 1, 8, temperature=0.0):
        with torch.no_grad():
            logits, _ = net(torch.tensor([text]))
        best = logits[0, -1].float().topk(2)
        if best.values[0] - best.values[1] > 0.3:  # the cache's products are rounded differently
            assert int(ids) == int(best.indices[0])
        text.append(int(ids))
