"""kernels.py: each function equals the plain torch.nn.functional formula that its docstring names."""
import math

import pytest
import torch
import torch.nn.functional as F

import kernels
from benchmarks import operations
from lib.training import optim
from model import GPT, GPTConfig


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def onednn_calls(monkeypatch):
    """The numbers of rows that kernels.linear gives to oneDNN."""
    if not kernels.ONEDNN:
        pytest.skip('this torch has no oneDNN')
    calls, product = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, '_linear_pointwise',
                        lambda x, *args: calls.append(x.numel() // x.size(-1)) or product(x, *args))
    return calls


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('n_rows, used', [(1, True), (64, True), (65, False)])
@pytest.mark.parametrize('n_out', [512, 517])
def test_a_few_rows_times_a_large_matrix_use_every_thread(n_rows, used, bias, n_out, onednn_calls):
    x, weight = random(n_rows, 1, 256), random(n_out, 256, seed=2)
    bias = random(n_out, seed=3) if bias else None
    with torch.no_grad():
        y = kernels.linear(x, weight, bias)
    assert onednn_calls == [n_rows] * used
    assert y.shape == (n_rows, 1, n_out)
    torch.testing.assert_close(y, x @ weight.T + (0 if bias is None else bias), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize('n_out, used', [(511, False), (512, True)])
def test_a_small_matrix_is_left_to_torch(n_out, used, onednn_calls):
    with torch.no_grad():
        kernels.linear(random(1, 256), random(n_out, 256))
    assert onednn_calls == [1] * used


def test_a_product_that_needs_a_gradient_is_left_to_torch(onednn_calls):
    kernels.linear(random(1, 256), random(512, 256).requires_grad_()).sum().backward()
    assert not onednn_calls


def test_a_product_in_bfloat16_is_left_to_torch(onednn_calls):
    with torch.no_grad():
        kernels.linear(random(1, 256, dtype=torch.bfloat16), random(512, 256, dtype=torch.bfloat16))
    assert not onednn_calls


@pytest.mark.parametrize('name', ['ONEDNN', 'ENABLED'])
def test_without_onednn_or_fast_forms_a_few_rows_are_left_to_torch(name, monkeypatch):
    calls = []
    monkeypatch.setattr(kernels, name, False)
    monkeypatch.setattr(torch.ops.mkldnn, '_linear_pointwise', lambda *args: calls.append(args), raising=False)
    x, weight = random(1, 256), random(512, 256)
    with torch.no_grad():
        torch.testing.assert_close(kernels.linear(x, weight), x @ weight.T, atol=1e-4, rtol=1e-5)
    assert not calls


def test_no_rows_times_a_large_matrix_are_no_rows():
    with torch.no_grad():
        assert kernels.linear(random(0, 256), random(1024, 256)).shape == (0, 1024)


@pytest.mark.parametrize('function, plain', [
    (kernels.rms_norm, lambda x: x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()),
    (kernels.relu_squared, lambda x: x.clamp(min=0) ** 2)])
@pytest.mark.parametrize('scale', [1.0, 1e-4])  # with the second, eps is most of what is under the root
def test_norm_and_activation_have_the_formulas_values_and_gradients(function, plain, scale):
    found = []
    for f in (function, plain):
        x = (scale * random(3, 5, 8)).requires_grad_()
        y = f(x)
        y.backward(random(3, 5, 8, seed=2))
        found.append((y.detach(), x.grad))
        with torch.no_grad():
            torch.testing.assert_close(f(x), y.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize('T, S', [(6, 6), (2, 2), (1, 6), (2, 6), (3, 6)])
def test_attention_is_the_softmax_formula(T, S, dtype, tolerance):
    q, k, v = random(2, 3, T, 8), random(2, 3, S, 8, seed=2), random(2, 3, S, 8, seed=3)
    scores = q @ k.mT / math.sqrt(8)
    scores = scores.masked_fill(torch.arange(S) > torch.arange(S - T, S)[:, None], -math.inf)
    out = kernels.causal_attention(q.to(dtype), k.to(dtype), v.to(dtype))
    torch.testing.assert_close(out.float(), scores.softmax(-1) @ v, rtol=tolerance, atol=tolerance)


def double(*shape, seed):
    return random(*shape, seed=seed, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize('enabled', [True, False], ids=['kernels on', 'kernels off'])
@pytest.mark.parametrize('T, S', [(12, 12), (11, 11), (4, 4), (3, 3), (2, 2), (1, 9), (3, 9)])
@pytest.mark.parametrize('window', [1, 4])
def test_a_window_hides_what_is_further_back(T, S, window, enabled, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(kernels, 'ENABLED', enabled)
    q, k, v = random(2, 3, T, 8), random(2, 3, S, 8, seed=2), random(2, 3, S, 8, seed=3)
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill((distance < 0) | (distance >= window), -math.inf)
    out = kernels.causal_attention(q.to(dtype), k.to(dtype), v.to(dtype), window=window)
    torch.testing.assert_close(out.float(), scores.softmax(-1) @ v, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('window', [0, 2])
@pytest.mark.parametrize('dropout_p', [0.0, 0.3])
def test_attention_has_the_gradients_of_its_formula(dropout_p, window):
    def attention(q, k, v):
        torch.manual_seed(0)  # the same dropout each time
        return kernels.causal_attention(q, k, v, dropout_p, window)
    q, k, v = (double(1, 5, 2, 4, seed=seed).transpose(1, 2) for seed in (1, 2, 3))  # laid out as in the model
    torch.autograd.gradcheck(attention, (q, k, v))


def test_rotation_has_the_values_and_gradients_of_its_formula():
    angle = random(5, 1, 1, 3, seed=2, dtype=torch.float64)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)
    x = double(3, 5, 2, 4, 6, seed=1)
    first, second = x.chunk(2, -1)
    expected = torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)
    turned = kernels.rotate(x, cos, sin)
    torch.testing.assert_close(turned, expected)
    assert turned[:, :, 0].transpose(1, 2).is_contiguous()  # (B, nh, T, hs): attention need not copy it
    torch.autograd.gradcheck(lambda x: kernels.rotate(x, cos, sin), (x,))


def test_a_mask_replaces_causality_and_window():
    q, k, v = random(2, 3, 2, 8), random(2, 3, 6, 8, seed=2), random(2, 3, 6, 8, seed=3)
    mask = random(2, 6, seed=4)
    expected = (q @ k.mT / math.sqrt(8) + mask).softmax(-1) @ v
    torch.testing.assert_close(kernels.causal_attention(q, k, v, window=2, mask=mask), expected)


def test_attention_with_dropout_is_attention_on_average():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 6, 4)
    many = [t.expand(20000, -1, -1, -1) for t in (q, k, v)]
    out = kernels.causal_attention(*many, 0.3)
    assert not torch.equal(out[0], out[1])
    torch.testing.assert_close(out.mean(0, keepdim=True), kernels.causal_attention(q, k, v), rtol=0, atol=0.03)


@pytest.mark.parametrize('p', [0.1, 0.5])
def test_dropout_zeroes_the_fraction_p_and_keeps_the_mean(p):
    torch.manual_seed(0)
    y = kernels.dropout(torch.ones(1_000_001), p, True)
    assert abs(float((y == 0).float().mean()) - p) < 0.003 and abs(float(y.mean()) - 1) < 0.005
    assert torch.equal(kernels.dropout(torch.ones(9), p, False), torch.ones(9))
    zero = (y == 0).float()
    assert abs(float((zero[:-1] * zero[1:]).mean()) - p * p) < 0.003  # neighbours are independent


@pytest.mark.parametrize('p', [0.1, 0.5, 0.9])
def test_dropout_is_exact_over_all_random_numbers(p, monkeypatch):
    numbers = torch.arange(-2**15, 2**15, dtype=torch.int16).view(torch.int64)  # each 16-bit number once
    monkeypatch.setattr(torch.Tensor, 'random_', lambda bits, *limits: bits.copy_(numbers))
    y, zeros = kernels.dropout(torch.ones(2**16), p, True), round(p * 2**16)
    assert (y == 0).sum() == zeros
    torch.testing.assert_close(y.max(), torch.tensor(2**16 / (2**16 - zeros)), rtol=1e-7, atol=0)


@pytest.mark.parametrize('cap', [0.0, 2.0])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
class TestLossInChunks:
    def case(self, dtype, cap, chunk, monkeypatch, grads=(True, True)):
        """The loss of 23 rows and its gradients, `chunk` rows at a time (None: all at once)."""
        if chunk:
            monkeypatch.setattr(kernels, 'CHUNK', chunk * 20)
        x, w = random(23, 16).to(dtype).requires_grad_(grads[0]), random(20, 16, seed=2).requires_grad_(grads[1])
        targets = torch.arange(23) % 20
        targets[3:7] = -1
        loss = kernels.linear_cross_entropy(x, w, targets, cap)
        (loss * 7).backward()
        return loss.detach(), x.grad, w.grad

    def test_it_equals_the_loss_at_once(self, dtype, cap, monkeypatch):
        whole = self.case(dtype, cap, None, monkeypatch)
        close = dict(atol=1e-5, rtol=1e-4) if dtype == torch.float32 else dict(atol=0.03, rtol=0.03)
        torch.testing.assert_close(self.case(dtype, cap, 5, monkeypatch), whole, **close)

    def test_without_a_cap_it_is_plain_cross_entropy(self, dtype, cap, monkeypatch):
        x, weight, targets = random(23, 16).to(dtype), random(20, 16, seed=2), torch.arange(23) % 20
        found = kernels.linear_cross_entropy(x, weight, targets)
        torch.testing.assert_close(found, F.cross_entropy((x @ weight.to(dtype).T).float(), targets))

    def test_it_never_holds_more_logits_than_a_chunk(self, dtype, cap, monkeypatch):
        sizes, real = [], kernels.cross_entropy
        monkeypatch.setattr(kernels, 'cross_entropy', lambda logits, *a: sizes.append(len(logits)) or real(logits, *a))
        self.case(dtype, cap, 5, monkeypatch)
        assert sizes == [5, 5, 5, 5, 3]
        sizes.clear()
        self.case(dtype, cap, 0.5, monkeypatch)  # less than a row
        assert sizes == [1] * 23

    @pytest.mark.parametrize('grads', [(True, False), (False, True)])
    def test_frozen_parts_get_no_gradient_and_the_others_the_same(self, dtype, cap, grads, monkeypatch):
        whole, some = self.case(dtype, cap, 5, monkeypatch), self.case(dtype, cap, 5, monkeypatch, grads)
        for wanted, a, b in zip(grads, whole[1:], some[1:]):
            torch.testing.assert_close(b, a) if wanted else self.is_none(b)

    @staticmethod
    def is_none(grad):
        assert grad is None

    def test_an_evaluation_computes_no_gradient(self, dtype, cap, monkeypatch):
        expected, *_ = self.case(dtype, cap, 5, monkeypatch)
        monkeypatch.setattr(torch.autograd, 'grad', None)
        x, w, targets = random(23, 16).to(dtype), random(20, 16, seed=2), torch.arange(23) % 20
        targets[3:7] = -1
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(kernels.linear_cross_entropy(x, w, targets, cap), expected)


def test_softcap_bounds_the_logits_and_zero_switches_it_off():
    x = random(4, 5) * 100
    assert float(kernels.softcap(x, 2.0).abs().max()) <= 2.0 and kernels.softcap(x, 0.0) is x
    torch.testing.assert_close(kernels.softcap(x, 30.0), 30 * torch.tanh(x / 30))


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str)
@pytest.mark.parametrize('options', [{}, dict(pos='rope', norm='rmsnorm', mlp='relu2', qk_norm=True, smear=True)],
                         ids=['gpt2', 'CPU recipe'])
def test_a_model_has_the_same_loss_and_gradients_without_the_kernels(options, dtype, tolerance, monkeypatch):
    torch.manual_seed(0)
    net = GPT(GPTConfig(block_size=32, vocab_size=20, n_layer=2, n_head=2, n_embd=64, **options))
    for p in net.parameters():
        p.data += torch.randn(p.shape) * 0.1
    net.set_compute_dtype(dtype)
    idx, found = torch.randint(20, (4, 32)), []
    for enabled in (True, False):
        monkeypatch.setattr(kernels, 'ENABLED', enabled)
        net.zero_grad()
        _, loss = net(idx, idx.roll(1, 1))
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])))
    (loss, grads), (plain_loss, plain_grads) = found
    assert abs(loss - plain_loss) < tolerance and (grads - plain_grads).norm() < tolerance * plain_grads.norm()
    assert not torch.equal(grads, plain_grads)  # the kernels did run


def test_disabled_kernels_are_torchs_own(monkeypatch):
    monkeypatch.setattr(kernels, 'ENABLED', False)
    x = random(3, 8).requires_grad_()
    assert torch.equal(kernels.rms_norm(x), F.rms_norm(x, (8,), eps=torch.finfo(torch.float32).eps))
    assert torch.equal(kernels.relu_squared(x), F.relu(x).square())


@pytest.mark.parametrize('window', [0, 3])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_disabled_kernels_run_no_function_of_their_own(dtype, window, monkeypatch):
    monkeypatch.setattr(kernels, 'ENABLED', False)
    for value in list(vars(kernels).values()):
        if isinstance(value, type) and issubclass(value, torch.autograd.Function):
            monkeypatch.setattr(value, 'apply', None)
    monkeypatch.setattr(kernels, '_dropout_mask', None)
    net = GPT(GPTConfig(8, 20, 1, 2, 16, dropout=0.1, pos='rope', norm='rmsnorm', mlp='relu2', window=window))
    net.set_compute_dtype(dtype)
    net(torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.long))[1].backward()


def test_the_weights_of_all_layers_are_cast_into_one_tensor_and_used_once():
    net = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=16))
    net.set_compute_dtype(torch.bfloat16)
    kernels.prepare_casts(net.linears, torch.bfloat16)
    casts = [kernels.cast(layer.weight, torch.bfloat16) for layer in net.linears]
    for layer, cast in zip(net.linears, casts):
        assert torch.equal(cast, layer.weight.bfloat16())
        cast.sum().backward(retain_graph=True)
        assert torch.equal(layer.weight.grad, torch.ones_like(layer.weight))
    assert len({cast.untyped_storage().data_ptr() for cast in casts}) == 1
    net(torch.zeros(1, 4, dtype=torch.long))
    for layer in net.linears:  # else they would get stale
        assert kernels.cast(layer.weight, torch.bfloat16).untyped_storage().nbytes() == 2 * layer.weight.numel()
    assert len(net.linears) == 8


@pytest.mark.parametrize('window', [0, 4])  # the recipe for Shakespeare has one, and contexts of several windows
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_an_update_of_the_cpu_recipe_takes_at_most_450_operations(dtype, window):  # 989 in bfloat16 at first
    net = GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=4, n_head=2, n_embd=128, bias=False, pos='rope',
                        norm='rmsnorm', mlp='relu2', qk_norm=True, tie_weights=False, smear=True, window=window))
    net.set_compute_dtype(dtype)
    opt = optim.make_optimizer('muon', net.param_groups(0.1, muon=True), 0.015, 0.015, (0.9, 0.99), 'cpu')
    idx = torch.randint(65, (2, 16))

    def update():
        net(idx, idx)[1].backward()
        optim.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
    update()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        update()
    counts = operations.by_kind(profile.events())
    counts.pop('AccumulateGrad', None)  # only hands the gradient over
    print('operations per update:', sum(counts.values()))
    assert sum(counts.values()) <= 450, counts


@pytest.mark.parametrize('p', [0.99999, 0.999999, 1 - 1e-12])
def test_dropout_of_nearly_everything_is_finite(p):
    assert kernels.dropout(torch.ones(64), p, True).isfinite().all()
