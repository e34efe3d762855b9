"""model.py: GPT-2 by default, and what must hold for every variant."""
import math

import pytest
import torch

import model
from model import GPT, GPT2_SIZES, GPTConfig, ReLUSquared, RMSNorm, RootMeanSquare, attend, relu2

VARIANTS = [{}, {'bias': False}, {'pos': 'rope'}, {'norm': 'rmsnorm'}, {'mlp': 'relu2'}, {'mlp': 'swiglu'},
            {'qk_norm': True}, {'tie_weights': False}, {'softcap': 15.0}, {'smear': True},
            {'pos': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'qk_norm': True, 'tie_weights': False, 'bias': False}]


def make(seed=0, **options):
    torch.manual_seed(seed)
    net = GPT(GPTConfig(**{**dict(block_size=12, vocab_size=20, n_layer=2, n_head=2, n_embd=16), **options}))
    with torch.no_grad():  # RMSNorm's models start with silent projections; wake them, and biases and gains
        for p in net.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    return net.eval()


def tokens(B=3, T=12, seed=1):
    return torch.randint(20, (B, T), generator=torch.Generator().manual_seed(seed))


def test_the_quick_forms_of_norm_and_relu2_have_their_gradients():
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(RootMeanSquare.apply, (x, 1e-3)) and torch.autograd.gradcheck(ReLUSquared.apply, x)


@pytest.mark.parametrize('quick', [RMSNorm(), relu2])
@pytest.mark.parametrize('scale', [1.0, 1e-4])  # at the second, eps is most of what is under the root
def test_with_a_gradient_or_without_norm_and_relu2_say_the_same(quick, scale):
    x = (scale * torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))).requires_grad_()
    with torch.no_grad():
        plain = quick(x)
    torch.testing.assert_close(quick(x).detach(), plain)


def reference(net, idx):
    """GPT-2's logits (B, T, V) from its description, one head and one query at a time, in float64."""
    w = {name: p.detach().double() for name, p in net.named_parameters()}
    c = net.config
    hs = c.n_embd // c.n_head

    def norm(x, name):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * w[f'{name}.weight'] + w[f'{name}.bias']

    def linear(x, name):
        return x @ w[f'{name}.weight'].T + w[f'{name}.bias']
    x = w['transformer.wte.weight'][idx] + w['transformer.wpe.weight'][:idx.size(1)]
    for layer in range(c.n_layer):
        at = f'transformer.h.{layer}'
        qkv = linear(norm(x, f'{at}.ln_1'), f'{at}.attn.c_attn')
        out = torch.zeros_like(x)
        for head in range(c.n_head):
            q, k, v = (qkv[..., i * c.n_embd + head * hs:i * c.n_embd + (head + 1) * hs] for i in range(3))
            for t in range(idx.size(1)):
                weight = ((k[:, :t + 1] @ q[:, t, :, None])[..., 0] / math.sqrt(hs)).softmax(-1)
                out[:, t, head * hs:(head + 1) * hs] = (weight[..., None] * v[:, :t + 1]).sum(1)
        x = x + linear(out, f'{at}.attn.c_proj')
        h = linear(norm(x, f'{at}.ln_2'), f'{at}.mlp.c_fc')
        x = x + linear(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))), f'{at}.mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ w['transformer.wte.weight'].T


def test_the_default_model_is_gpt2_as_written_down_independently():
    net, idx = make(bias=True), tokens()
    logits = net(idx, idx)[0].view(3, 12, 20)
    torch.testing.assert_close(logits.double(), reference(net, idx), rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_mean_cross_entropy_and_skips_minus_one():
    net, idx, targets = make(), tokens(), tokens(seed=2)
    targets[0, :5] = -1
    logits, loss = net(idx, targets)
    logp = logits.view(3, 12, 20).log_softmax(-1)
    by_hand = [-logp[b, t, targets[b, t]] for b in range(3) for t in range(12) if targets[b, t] >= 0]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())


def test_a_cache_works_where_gradients_are_recorded():
    net, idx = make(), tokens()
    cache = model.KVCache(net.config, 3, 'cpu', torch.float32)
    net(idx[:, :7], cache=cache)
    torch.testing.assert_close(net(idx[:, 7:], cache=cache)[0], net(idx)[0])


@pytest.mark.parametrize('n_out', [1024, 1029])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('n_rows', [1, 64, 65])
def test_few_rows_by_a_large_matrix_are_dealt_out_and_equal(n_rows, bias, n_out, monkeypatch):
    x, weight = torch.randn(n_rows, 1, 256), torch.randn(n_out, 256)
    bias, calls, bmm = torch.randn(n_out) if bias else None, [], torch.bmm
    monkeypatch.setattr(torch, 'bmm', lambda *args: calls.append(1) or bmm(*args))
    with torch.no_grad():
        y = model.linear(x, weight, bias)
    assert len(calls) == (n_rows <= 64)
    torch.testing.assert_close(y, x @ weight.T + (0 if bias is None else bias), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('options', [{}, {'tie_weights': False, 'softcap': 2.0}], ids=str)
def test_a_loss_in_chunks_is_the_loss_and_has_its_gradients(options, dtype, monkeypatch):
    net, idx, targets, sizes = make(**options), tokens(), tokens(seed=2), []
    net.set_compute_dtype(dtype)
    targets[0, 3:] = -1

    def found(**how):
        net.zero_grad()
        loss = net(idx, targets, **how)[1] * 7
        loss.backward()
        return {'loss': loss.detach(), **{name: p.grad for name, p in net.named_parameters() if p.grad is not None}}

    whole = found()
    monkeypatch.setattr(GPT, 'CHUNK', 5 * 20)  # five rows of V logits
    monkeypatch.setattr(model, 'cross_entropy', lambda logits, *args, of=model.cross_entropy: (
        sizes.append(len(logits)) or of(logits, *args)))
    chunked = found(loss_only=True)
    assert sizes == [5] * 7 + [1]
    close = dict(atol=1e-5, rtol=1e-4) if dtype == torch.float32 else dict(atol=0.03, rtol=0.03)
    torch.testing.assert_close(chunked, whole, **close)
    net.requires_grad_(False)
    net.lm_head.weight.requires_grad_(True)
    if not net.config.tie_weights:
        torch.testing.assert_close(found(loss_only=True), {name: chunked[name] for name in ('loss', 'lm_head.weight')})
    net.requires_grad_(True)
    net.lm_head.weight.requires_grad_(False)
    frozen = found(loss_only=True)
    assert 'lm_head.weight' not in frozen and 'transformer.h.0.mlp.c_fc.weight' in frozen
    torch.testing.assert_close(frozen, {name: chunked[name] for name in frozen})
    net.requires_grad_(True)
    monkeypatch.setattr(torch.autograd, 'grad', None)  # an evaluation computes none
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(net(idx, targets)[1] * 7, chunked['loss'])


@pytest.mark.parametrize('options', VARIANTS)
def test_no_position_sees_a_later_token(options):
    net, idx = make(**options), tokens()
    changed = idx.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 20
    a, b = (net(x, x)[0].view(3, 12, 20) for x in (idx, changed))
    assert torch.equal(a[:, :7], b[:, :7]) and not torch.equal(a[:, 7:], b[:, 7:])


@pytest.mark.parametrize('options', VARIANTS)
def test_the_last_logits_alone_are_the_last_of_all(options):
    net, idx = make(**options), tokens()
    torch.testing.assert_close(net(idx)[0][:, 0], net(idx, idx)[0].view(3, 12, 20)[:, -1])


@pytest.mark.parametrize('options', VARIANTS)
def test_optimizer_groups_partition_the_parameters(options):
    net = make(**options)
    for apart in (False, True):
        groups = net.param_groups(0.1, muon=apart)
        inside = [id(p) for g in groups for p in g['params']]
        assert len(inside) == len(set(inside)) and set(inside) == {id(p) for p in net.parameters()}
        assert all((p.dim() >= 2) == (g['weight_decay'] > 0) for g in groups for p in g['params'])


@pytest.mark.parametrize('options', VARIANTS)
def test_checkpointed_activations_change_no_gradient(options):
    net, idx = make(**options).train(), tokens()
    grads = []
    for on in (False, True):
        net.checkpoint_activations = on
        net.zero_grad()
        net(idx, idx)[1].backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


@pytest.mark.parametrize('options', VARIANTS)
def test_batches_do_not_mix(options):
    net, idx = make(**options), tokens()
    torch.testing.assert_close(net(idx, idx)[0].view(3, 12, 20)[1], net(idx[1:2], idx[1:2])[0].view(12, 20))


def test_the_124m_configuration_has_gpt2s_count():
    with torch.device('meta'):
        net = GPT(GPTConfig(block_size=1024, vocab_size=50257, bias=True, **GPT2_SIZES['gpt2']), init=False)
    assert net.get_num_params(non_embedding=False) == 124_439_808


@pytest.mark.parametrize('name, millions', [('gpt2-medium', 354.8), ('gpt2-large', 774.0), ('gpt2-xl', 1557.6)])
def test_the_larger_sizes_have_gpt2s_counts(name, millions):
    with torch.device('meta'):
        net = GPT(GPTConfig(block_size=1024, vocab_size=50257, bias=True, **GPT2_SIZES[name]), init=False)
    assert round(net.get_num_params(non_embedding=False) / 1e6, 1) == millions


def test_initial_weights_have_gpt2s_spread():
    torch.manual_seed(0)
    net = GPT(GPTConfig(block_size=64, vocab_size=200, n_layer=8, n_head=4, n_embd=64, bias=True))
    spread = {name: float(p.detach().std()) for name, p in net.named_parameters() if p.dim() == 2}
    for name, std in spread.items():
        wanted = 0.02 / math.sqrt(16) if name.endswith('c_proj.weight') else 0.02
        assert abs(std / wanted - 1) < 0.05, name
    assert all(p.count_nonzero() == 0 for name, p in net.named_parameters() if name.endswith('bias'))


def test_a_new_model_knows_nothing():
    torch.manual_seed(0)
    net = GPT(GPTConfig(12, 20, 2, 2, 16))
    assert abs(float(net(tokens(), tokens(seed=2))[1]) - math.log(20)) < 0.1


@pytest.mark.parametrize('pos', ['learned', 'rope'])
def test_cropping_keeps_what_is_left(pos):
    net, idx = make(pos=pos), tokens(T=5)
    whole = net(idx, idx)[0]
    net.crop_block_size(5)
    assert net.config.block_size == 5 and torch.equal(net(idx, idx)[0], whole)
    with pytest.raises(ValueError, match='6 tokens do not fit block_size=5'):
        net(tokens(T=6))
    with pytest.raises(ValueError, match='has 5 positions'):
        net.crop_block_size(9)


def test_softcap_bounds_the_logits():
    assert float(make(softcap=0.01)(tokens(), tokens())[0].abs().max()) < 0.01


def test_dropout_acts_in_training_only():
    net, idx = make(dropout=0.5), tokens()
    assert torch.equal(net(idx)[0], net(idx)[0])
    net.train()
    assert not torch.equal(net(idx)[0], net(idx)[0])


def test_model_args_are_nanogpts_seven_and_only_options_that_differ():
    seven = {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'}
    assert GPTConfig().model_args().keys() == seven
    assert GPTConfig(pos='rope', softcap=15.0).model_args().keys() == seven | {'pos', 'softcap'}


@pytest.mark.parametrize('wrong, told', [
    (dict(n_embd=8, n_head=3), 'n_embd=8 is not divisible by n_head=3'),
    (dict(n_layer=0), 'n_layer must be at least 1'),
    (dict(dropout=1.0), 'dropout must be'), (dict(mlp='glu'), 'mlp must be one of'), (dict(softcap=-1.0), 'softcap'),
    (dict(pos='rope', n_embd=6, n_head=2), 'must be even')])
def test_a_model_that_cannot_be_is_refused_with_the_numbers(wrong, told):
    with pytest.raises(ValueError, match=told):
        GPT(GPTConfig(**{**dict(block_size=8, vocab_size=8, n_layer=1, n_head=2, n_embd=8), **wrong}))


def test_attention_with_dropout_is_attention_on_average():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 6, 4)
    many = [t.expand(20000, -1, -1, -1) for t in (q, k, v)]
    out = attend(*many, 0.3)
    assert not torch.equal(out[0], out[1])
    torch.testing.assert_close(out.mean(0, keepdim=True), attend(q, k, v, 0.0), rtol=0, atol=0.03)


def test_flops_per_token_follow_the_formula():
    net = make(bias=False)
    n = 20 * 16 + 2 * (3 * 16 * 16 + 16 * 16 + 8 * 16 * 16 + 2 * 16) + 16
    assert net.get_num_params() == n and net.flops_per_token() == 6 * n + 12 * 2 * 16 * 12
    assert net.flops_per_token(4) == 6 * n + 12 * 2 * 16 * 4
    assert net.mfu(100.0, net.flops_per_token() * 200.0) == 0.5
