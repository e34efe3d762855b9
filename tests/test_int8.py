"""lib/weights/int8.py: int8 weights compute nearly what the float weights do, and loading them needs no more memory."""
import sys
from pathlib import Path

import pytest
import torch

from lib.generate import generate
from lib.weights import gpt2, int8
from lib.weights.checkpoint import has_nan
from lib.weights.int8 import Int8Linear, quantize
from model import GPT, GPTConfig, KVCache, Linear


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(**options):
    torch.manual_seed(0)
    net = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=64, **options)).eval()
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    return net


def quantized(net):
    """Return a GPT with the weights of `net` in int8."""
    into = gpt2.uninitialized(net.config, torch.int8)
    int8.use_int8(into)
    into.load_state_dict(net.state_dict())
    return into.eval()


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
    layer = Int8Linear(linear)
    layer.copy_(linear.weight)
    y = layer(x)
    assert y.shape == expected.shape and (y.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize('options', [{}, dict(pos='rope', norm='rmsnorm', mlp='swiglu', tie_weights=False)], ids=str)
def test_a_quantized_model_predicts_nearly_the_same(options):
    net, idx = tiny(**options), torch.randint(40, (4, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, loss = net(idx, idx.roll(-1, 1), return_logits=True)
        net = quantized(net)
        _, after = net(idx, idx.roll(-1, 1), return_logits=True)
    assert abs(float(loss) - float(after)) < 0.03
    assert net.transformer.wte.weight.dtype == torch.bfloat16  # embeddings are not quantized


def test_a_quantized_model_generates_the_greedy_text_of_its_own_logits():
    net = quantized(tiny())
    text = [3]
    for ids in generate(net, [3], 1, 8, temperature=0.0):
        with torch.no_grad():
            logits, _ = net(torch.tensor([text]))
        best = logits[0, -1].float().topk(2)
        if best.values[0] - best.values[1] > 0.3:  # the cache's products are rounded differently
            assert int(ids) == int(best.indices[0])
        text.append(int(ids))


# Loading

def hub_tensors(config, seed=1):
    """Yield (name, tensor) of a GPT-2 in the hub's layout, as Source._tensors; layers share their random numbers."""
    C, V, T = config.n_embd, config.vocab_size, config.block_size
    shapes = {'attn.c_attn.weight': (C, 3 * C), 'attn.c_proj.weight': (C, C), 'mlp.c_fc.weight': (C, 4 * C),
              'mlp.c_proj.weight': (4 * C, C), 'attn.c_attn.bias': (3 * C,), 'attn.c_proj.bias': (C,),
              'mlp.c_fc.bias': (4 * C,), 'mlp.c_proj.bias': (C,), 'ln_1.weight': (C,), 'ln_1.bias': (C,),
              'ln_2.weight': (C,), 'ln_2.bias': (C,)}
    block = {name: random(*shape, seed=seed) * 0.05 for name, shape in shapes.items()}
    for layer in range(config.n_layer):
        yield from ((f'h.{layer}.{name}', tensor) for name, tensor in block.items())
    yield from (('wte.weight', random(V, C) * 0.05), ('wpe.weight', random(T, C) * 0.05),
                ('ln_f.weight', torch.ones(C)), ('ln_f.bias', torch.zeros(C)))


@pytest.fixture
def source(monkeypatch):
    """source(**sizes) returns a gpt2.Source whose tensors are made up, without a file."""
    def make(**sizes):
        config = GPTConfig(**{'block_size': 16, 'vocab_size': 40, 'mlp': 'gelu_tanh', **sizes})
        made = list(hub_tensors(config))
        monkeypatch.setattr(gpt2.Source, 'config', lambda self: config)
        monkeypatch.setattr(gpt2.Source, 'files', lambda self: [__file__])
        monkeypatch.setattr(gpt2.Source, '_tensors', lambda self, path: iter(made))
        return gpt2.Source('made-up', None)
    return make


@pytest.mark.parametrize('chunk', [1, 200, 10**6])  # rows at a time: 1, a few, all
def test_a_gpt2_is_quantized_while_it_is_loaded(source, monkeypatch, chunk):
    monkeypatch.setattr(int8, 'CHUNK', chunk)
    found = source(n_layer=2, n_head=2, n_embd=32)
    loaded, expected = found.load(dtype=torch.int8), quantized(found.load())
    for (name, tensor), other in zip(loaded.named_buffers(), expected.buffers()):
        if not name.startswith('lm_head'):
            assert torch.equal(tensor, other), name
    head, embedding = loaded.lm_head, loaded.transformer.wte.weight.float()
    assert (head.weight * head.scale[:, None] - embedding).abs().max() < 0.01 * embedding.abs().max()


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_found_after_quantizing(value):
    net = tiny()
    net.transformer.h[1].mlp.c_fc.weight.data[3, 5] = value
    assert has_nan(quantized(net)) and not has_nan(quantized(tiny()))


@pytest.mark.skipif(sys.platform != 'linux', reason='reads the peak memory from /proc')
def test_loading_needs_memory_for_the_int8_weights_only(source):
    """50M weights: 50 MB in int8, 100 MB in bfloat16, 200 MB in float32."""
    found = source(n_layer=4, n_head=8, n_embd=1024)

    def megabytes(key):
        status = Path('/proc/self/status').read_text(encoding='utf-8')
        return int(status.split(key)[1].split()[0]) / 1024
    Path('/proc/self/clear_refs').write_text('5', encoding='utf-8')  # the peak begins at what is in use now
    before = megabytes('VmRSS:')
    model = found.load(dtype=torch.int8)
    held = sum(t.nbytes for t in model.buffers()) / 2**20
    assert 48 < held < 52 and megabytes('VmHWM:') - before < held + 25


def test_gpt2_xl_and_the_cache_of_a_sample_fit_3_gb():
    config = GPTConfig(vocab_size=50257, mlp='gelu_tanh', **gpt2.SIZES['gpt2-xl'])
    with torch.device('meta'):
        model = gpt2.uninitialized(config, torch.int8)
        int8.use_int8(model)
        cache = KVCache(config, 1, 'meta', torch.float32)
    n_bytes = sum(t.nbytes for t in {*model.parameters(), *model.buffers(), *cache.k, *cache.v})
    assert 2.2e9 < n_bytes < 2.5e9  # Python and torch need 0.3 GB more
