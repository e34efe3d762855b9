"""lib/training/optim.py: Muon, the fused AdamW, and a state that goes on."""
import copy
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import operations
from configurator import REPO, UserError
from lib.training import optim
from lib.training.optim import (
    clip_grad_norm_,
    decay_for_epochs,
    load_optimizer_state,
    make_optimizer,
    newton_schulz,
    orthogonalized,
)
from model import GPT, GPTConfig
from tests.kit import differences


def tiny(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(8, 16, 2, 2, 16, bias=True))


def train(net, opt, steps, seed=3):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        idx = torch.randint(16, (4, 8), generator=g)
        net(idx, idx.flip(1))[1].backward()
        opt.step()
        opt.zero_grad()
    return [p.detach().clone() for p in net.parameters()]


def ours(net, kind='adamw', lr=1e-2, decay=0.1):
    return make_optimizer(kind, net.param_groups(decay, muon=kind == 'muon'), lr, 2e-2, (0.9, 0.95), 'cpu')


def test_no_update_waits_for_the_import_of_torchs_compiler():
    code = """if True:
        import sys
        from tests.test_optim import ours, tiny, train
        for kind in ('adamw', 'muon'):
            net = tiny()
            opt = ours(net, kind)
            train(net, opt, 1)
            opt.load_state_dict(opt.state_dict())
        print('torch._dynamo' in sys.modules)"""
    done = subprocess.run([sys.executable, '-c', code], cwd=REPO, text=True, capture_output=True)
    assert done.stdout == 'False\n', done.stderr


def test_the_fused_adamw_is_torchs_adamw():
    net, other = tiny(), tiny()
    plain = torch.optim.AdamW([{**g, 'params': g['params']} for g in other.param_groups(0.1)], lr=1e-2,
                              betas=(0.9, 0.95), foreach=False, fused=False)
    opt = ours(net)
    for _ in range(5):
        for p, q in zip(net.parameters(), other.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        opt.step()
        plain.step()
    for p, q in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('shape', [(3, 16, 16), (2, 8, 32), (2, 32, 8), (1, 48, 16)])
def test_orthogonalizing_keeps_directions_and_evens_out_their_sizes(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = newton_schulz(g).float()
    sizes = torch.linalg.svdvals(out)
    assert out.shape == shape and sizes.min() > 0.3 and sizes.max() < 1.3
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    assert (out - u @ vh).norm() / (u @ vh).norm() < 0.35


@pytest.mark.parametrize('shape', [(2, 8, 32), (2, 32, 8)])
def test_newton_schulz_applies_jordans_polynomial_to_the_singular_values(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10
    u, sizes, vh = torch.linalg.svd(g, full_matrices=False)
    sizes = sizes / sizes.norm(dim=-1, keepdim=True)
    for _ in range(5):
        sizes = 3.4445 * sizes - 4.7750 * sizes**3 + 2.0315 * sizes**5
    torch.testing.assert_close(newton_schulz(g).float(), u * sizes[:, None] @ vh, rtol=0, atol=0.03)
    assert newton_schulz(0 * g).count_nonzero() == 0


def test_stacked_wide_and_tall_matrices_of_one_size_are_orthogonalized_each_in_its_shape():
    matrices = [(torch.randn(12, 8), 3), (torch.randn(8, 4), 1), (torch.randn(4, 8), 1)]  # (tensor, how many in it)
    for (p, split), found in zip(matrices, orthogonalized(matrices), strict=True):
        expected = torch.cat([newton_schulz(part[None])[0] for part in p.chunk(split)])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize('fast, dtype', [(True, torch.bfloat16), (False, torch.float32)])
def test_muon_computes_in_bfloat16_where_that_is_fast(fast, dtype, monkeypatch):
    monkeypatch.setattr(optim, 'fast_bf16', lambda device: fast)
    assert newton_schulz(torch.randn(1, 4, 8)).dtype == optim.newton_dtype(torch.device('cpu')) == dtype


def test_without_momentum_muon_takes_the_newest_gradient_alone():
    net = tiny()
    groups = net.param_groups(0.0, muon=True)
    opt = make_optimizer('muon', groups, 2e-2, 2e-2, (0.9, 0.95), 'cpu', muon_momentum=0.0)
    train(net, opt, 3)
    matrix = net.transformer.h[0].mlp.c_proj.weight  # (16, 64)
    before, grad = matrix.detach().clone(), torch.randn(16, 64)
    matrix.grad = grad
    opt.step()
    step = 2e-2 * newton_schulz(grad[None])[0].float()
    torch.testing.assert_close(before - matrix.detach(), step, rtol=0, atol=1e-7)


def test_muon_orthogonalizes_queries_keys_and_values_of_each_layer_apart():
    net = tiny()
    opt = make_optimizer('muon', net.param_groups(0.0, muon=True), 2e-2, 2e-2, (0.9, 0.95), 'cpu', 0.0)
    before = copy.deepcopy(net)
    idx = torch.arange(16).view(2, 8)
    net(idx, idx.flip(1))[1].backward()
    opt.step()
    for old, block in zip(before.transformer.h, net.transformer.h):
        weight = block.attn.c_attn.weight  # (48, 16)
        step = 2e-2 * torch.cat([newton_schulz(part[None])[0].float() for part in weight.grad.split(16)])
        torch.testing.assert_close(old.attn.c_attn.weight - weight, step, rtol=0, atol=1e-6)


def test_muon_moves_matrices_by_an_orthogonal_step_and_the_rest_as_adamw():
    net, other = tiny(), tiny()
    before = [p.detach().clone() for p in net.parameters()]
    names = [name for name, _ in net.named_parameters()]
    muon, adamw = train(net, ours(net, 'muon', 2e-2), 1), train(other, ours(other, lr=2e-2), 1)
    for name, old, new, plain in zip(names, before, muon, adamw):
        if name.startswith('transformer.h.') and old.dim() == 2:
            rows, columns = (16, 16) if 'c_attn' in name else old.shape  # queries, keys and values, separately
            steps = (old * (1 - 2e-2 * 0.1) - new) / (2e-2 * max(1, rows / columns) ** 0.5)
            for step in steps.split(rows):
                assert 0.6 < torch.linalg.svdvals(step)[min(rows, columns) // 2] < 1.3, name
        else:
            assert torch.equal(new, plain), name

def plain_muon(p, grad, momentum, split, lr, decay, mu):
    """One update of Muon as its definition says, a matrix at a time."""
    momentum.mul_(mu).add_(grad, alpha=1 - mu)
    nesterov = grad * (1 - mu) + momentum * mu
    update = torch.cat([newton_schulz(part[None])[0].float() for part in nesterov.chunk(split)])
    p.mul_(1 - lr * decay).sub_(update, alpha=lr * max(1, p.size(0) / split / p.size(1)) ** 0.5)


def test_three_updates_of_muon_are_its_formula_on_each_matrix_and_adamw_on_the_rest():
    """Written out with momentum 0.9, weight decay 0.5 and two rates, so that no term is hidden."""
    net, other = tiny(), tiny()
    opt = make_optimizer('muon', net.param_groups(0.5, muon=True), 1e-2, 3e-2, (0.8, 0.95), 'cpu', muon_momentum=0.9)
    for group in opt.param_groups:
        group['lr'] = group['initial_lr']  # as training does
    rest = [dict(group) for group in other.param_groups(0.5, muon=True)[1:]]
    adamw = torch.optim.AdamW(rest, lr=1e-2, betas=(0.8, 0.95), fused=False, foreach=False)
    group = opt.param_groups[0]
    expected = [p.detach().clone() for p in group['params']]
    momenta = [torch.zeros_like(p) for p in expected]
    for _ in range(3):
        for p, q in zip(net.parameters(), other.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for p, grad, momentum, split in zip(expected, [p.grad for p in group['params']], momenta, group['splits']):
            plain_muon(p, grad, momentum, split, 3e-2, 0.5, 0.9)
        opt.step()
        adamw.step()
    for p, q, momentum in zip(group['params'], expected, momenta):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=1.5e-3)  # products in bfloat16 may round differently
        torch.testing.assert_close(opt.state[p]['momentum'], momentum)
    for ours, plain in zip(opt.param_groups[1:], rest):
        for p, q in zip(ours['params'], plain['params']):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


class WorkCounter(TorchDispatchMode):
    """Counts the operations that are not views; one on a list of tensors counts once."""
    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += not op.is_view
        return op(*args, **(kwargs or {}))


def test_a_deeper_model_takes_no_more_operations_per_update_of_muon():
    def count(n_layer):
        net = GPT(GPTConfig(8, 16, n_layer, 2, 16))
        opt = ours(net, 'muon')
        train(net, opt, 1)
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        with WorkCounter() as counter:
            opt.step()
        return counter.count
    assert 0 < count(4) == count(2) < 100


@pytest.mark.parametrize('max_norm', [0.5, 100.0, float('inf')])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])  # float64 is left to torch
def test_clipping_gives_the_norm_and_the_gradients_of_torchs(max_norm, dtype):
    net, other = tiny().to(dtype), tiny().to(dtype)
    for p, q in zip(net.parameters(), other.parameters()):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    norm = clip_grad_norm_(net.parameters(), max_norm)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(other.parameters(), max_norm))
    for p, q in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_clipping_tiny_gradients_is_torchs_too():
    """Their norm is as small as the number that keeps the division from 0."""
    net, other = tiny(), tiny()
    for p, q in zip(net.parameters(), other.parameters()):
        p.grad = 1e-8 * torch.randn_like(p)
        q.grad = p.grad.clone()
    assert 1e-7 < clip_grad_norm_(net.parameters(), 1e-7) < 1e-5
    torch.nn.utils.clip_grad_norm_(other.parameters(), 1e-7)
    for p, q in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=0)


def test_a_rank_without_matrices_orthogonalizes_none():
    assert optim.orthogonalized([]) == []


def test_clipping_a_deeper_model_takes_no_more_operations():
    def count(n_layer):
        net = GPT(GPTConfig(8, 16, n_layer, 2, 16))
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            clip_grad_norm_(net.parameters(), 1.0)  # torch's own has an operation on lists, which takes one per tensor
        return sum(operations.by_kind(profile.events()).values())
    assert 0 < count(4) == count(2) < 10


def test_clipping_keeps_the_dtype_of_each_gradient():
    net = tiny()
    net.transformer.wpe.double()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    norm = clip_grad_norm_(net.parameters(), 0.5)
    assert float(norm) == pytest.approx(sum(p.numel() for p in net.parameters()) ** 0.5)
    assert all(p.grad.dtype == p.dtype for p in net.parameters())


def test_clipping_where_nothing_has_a_gradient_gives_a_norm_of_0():
    assert clip_grad_norm_(tiny().parameters(), 1.0) == 0


def test_a_bad_update_leaves_weights_and_momenta_as_they_are():
    net = tiny()
    opt = ours(net, 'muon')
    train(net, opt, 2)
    before = copy.deepcopy([net.state_dict(), opt.state_dict()['state']])
    for p in net.parameters():
        p.grad = torch.full_like(p, float('nan'))
    opt.found_inf = torch.tensor(1.0)
    opt.step()
    assert not differences(before, [net.state_dict(), opt.state_dict()['state']])


def test_momenta_of_older_checkpoints_which_are_a_tensor_each_load_and_go_on_exactly():
    straight = tiny()
    opt = ours(straight, 'muon')
    train(straight, opt, 2)
    saved = opt.state_dict()
    saved = {**saved, 'state': {i: {key: value.clone().contiguous() for key, value in state.items()}
                                for i, state in saved['state'].items()}}
    net = tiny()
    net.load_state_dict(straight.state_dict())
    fresh = ours(net, 'muon')
    load_optimizer_state(fresh, saved, 'last.pt')
    expected = train(straight, opt, 2, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(train(net, fresh, 2, seed=4), expected))


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_a_restored_optimizer_goes_on_exactly(kind):
    straight = tiny()
    opt = ours(straight, kind)
    train(straight, opt, 2)
    saved = copy.deepcopy(opt.state_dict())
    net = tiny()
    net.load_state_dict(straight.state_dict())
    fresh = ours(net, kind)
    load_optimizer_state(fresh, saved, 'last.pt')
    whole = train(straight, opt, 2, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(train(net, fresh, 2, seed=4), whole))


def test_the_momentum_of_muon_is_jordans_unless_given():
    assert ours(tiny(), 'muon').param_groups[0]['momentum'] == 0.95


def test_restoring_keeps_the_rates_set_now():
    net = tiny()
    saved = ours(net, lr=1e-2, decay=0.1).state_dict()
    opt = ours(net, lr=3e-3, decay=0.0)
    load_optimizer_state(opt, saved, 'last.pt')
    assert [(g['lr'], g['initial_lr'], g['weight_decay']) for g in opt.param_groups] == [(3e-3, 3e-3, 0.0)] * 2


def test_the_state_of_another_optimizer_is_refused():
    net = tiny()
    with pytest.raises(UserError, match='was the setting optimizer changed'):
        load_optimizer_state(ours(net, 'muon'), ours(net).state_dict(), 'last.pt')


@pytest.mark.parametrize('epochs, expected', [(0, 0.1), (0.2, 0.1), (4, 0.4), (30, 1.095)])
def test_weight_decay_follows_the_square_root_of_the_epochs(epochs, expected):
    assert decay_for_epochs(0.1, 0.2, epochs, 4096) == pytest.approx(expected, rel=1e-3)
    assert decay_for_epochs(0.1, 0.0, epochs, 4096) == 0.1 and decay_for_epochs(0.0, 0.2, epochs, 4096) == 0.0


def test_an_update_of_fewer_tokens_decays_less_because_an_epoch_has_more_of_them():
    assert decay_for_epochs(0.1, 0.2, 16, 2048) == pytest.approx(0.4)
    assert decay_for_epochs(0.1, 0.2, 16, 512) == 0.1
    assert decay_for_epochs(0.1, 0.2, 16, 16384) == pytest.approx(0.8)
