"""model.py: every option equals the GPT of tests/reference.py, alone and in pairs, and what else must hold."""
import math

import pytest
import reference
import torch
from reference import pairwise

import kernels
import model
from lib.weights import gpt2
from model import GPT, GPTConfig, KVCache

VARIANTS = [{}, *({name: values[-1]} for name, values in reference.OPTIONS.items()), *pairwise()]
OFF = {name: values[0] for name, values in reference.OPTIONS.items()}


def name_of(options):
    return ' '.join(f'{k}={v}' for k, v in options.items() if v != OFF[k]) or 'gpt2'


def make(seed=0, **options):
    """A tiny GPT in which every parameter is awake: zeros would hide a term."""
    torch.manual_seed(seed)
    net = GPT(GPTConfig(**{**dict(block_size=12, vocab_size=20, n_layer=2, n_head=2, n_embd=16), **options}))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    return net.eval()


def tokens(B=3, T=12, seed=1):
    return torch.randint(20, (B, T), generator=torch.Generator().manual_seed(seed))


def logits_of(net, idx):
    return net(idx, idx, return_logits=True)[0]


def gradients(net):
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


# ---- the formula -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('options', VARIANTS, ids=name_of)
def test_logits_equal_the_reference(options):
    net, idx = make(**options), tokens()
    w = {name: p.detach().double() for name, p in net.named_parameters()}
    torch.testing.assert_close(logits_of(net, idx).double(), reference.logits(w, net.config, idx), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('enabled', [True, False], ids=['kernels on', 'kernels off'])
@pytest.mark.parametrize('options', VARIANTS, ids=name_of)
def test_loss_and_gradients_equal_the_reference(options, enabled, monkeypatch):
    monkeypatch.setattr(kernels, 'ENABLED', enabled)
    net, idx, targets = make(**options), tokens(B=2, T=6), tokens(B=2, T=6, seed=2)
    targets[0, :2] = -1
    _, loss = net(idx, targets)
    loss.backward()
    w = {name: p.detach().double().requires_grad_() for name, p in net.named_parameters()}
    expected = reference.loss(w, net.config, idx, targets)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for name, grad in gradients(net).items():
        torch.testing.assert_close(grad.double(), w[name].grad, rtol=2e-4, atol=1e-5, msg=lambda m, n=name: f'{n}: {m}')


@pytest.mark.parametrize('options', VARIANTS, ids=name_of)
def test_a_cache_gives_the_logits_of_the_whole_prefix(options):
    net, idx = make(**options), tokens()
    cache = KVCache(net.config, 3, 'cpu', torch.float32)
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 7), (7, 11)):
            part = net(idx[:, start:end], cache=cache)[0]
            torch.testing.assert_close(part, net(idx[:, :end])[0], rtol=1e-4, atol=1e-5)
    assert cache.pos == 11


def test_a_cache_works_where_gradients_are_recorded():
    net, idx = make(), tokens()
    cache = KVCache(net.config, 3, 'cpu', torch.float32)
    net(idx[:, :7], cache=cache)
    torch.testing.assert_close(net(idx[:, 7:], cache=cache)[0], net(idx)[0])


def test_a_cache_that_starts_over_forgets_everything():
    net, idx = make(smear=True, pos='rope'), tokens()
    cache = KVCache(net.config, 3, 'cpu', torch.float32)
    net(idx, cache=cache)
    cache.pos = 0
    torch.testing.assert_close(net(idx[:, 3:8], cache=cache)[0], net(idx[:, 3:8])[0])


def test_generation_passes_contiguous_queries_to_attention(monkeypatch):
    """Metal's kernel in torch < 2.12 reads the queries of a decoding step as if they were contiguous."""
    seen = []
    real = kernels.causal_attention
    monkeypatch.setattr(kernels, 'causal_attention', lambda q, *a: seen.append(q.is_contiguous()) or real(q, *a))
    net = make(n_embd=32)
    cache = KVCache(net.config, 3, 'cpu', torch.float32)
    with torch.no_grad():
        net(tokens(T=4), cache=cache)
        net(tokens(T=1), cache=cache)
    assert seen == [True] * 4


def test_layer_norm_adds_1e_5_to_the_variance():
    norm, x = model.make_norm(GPTConfig(n_embd=4, n_head=1)), torch.tensor([[0.001, -0.002, 0.003, 0.004]])
    centred = x - x.mean()
    torch.testing.assert_close(norm(x).detach(), centred / (centred.square().mean() + 1e-5).sqrt())


@pytest.mark.parametrize('n_embd, hidden', [(16, 48), (48, 128), (768, 2048)])
def test_the_hidden_size_of_swiglu_is_eight_thirds_rounded_up_to_a_multiple_of_8(n_embd, hidden):
    with torch.device('meta'):
        mlp = model.SwiGLU(GPTConfig(n_embd=n_embd, n_head=1))
    assert mlp.c_fc.weight.shape == (2 * hidden, n_embd) and mlp.c_proj.weight.shape == (n_embd, hidden)


def test_rotation_keeps_norms_and_depends_on_the_distance_only():
    rope, x = model.precompute_rope(12, 8), torch.randn(2, 8)
    turned = model.apply_rotary_emb(x[:, None, None, None].expand(2, 12, 1, 1, 8), rope)[:, :, 0, 0]  # (2, 12, 8)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1)[:, None].expand(2, 12))
    dot = [float(turned[0, t] @ turned[1, t + 3]) for t in range(9)]
    assert max(dot) - min(dot) < 1e-5
    assert abs(float(turned[0, 0] @ turned[1, 3]) - float(turned[0, 3] @ turned[1, 0])) > 1e-3  # the sign counts


def test_qk_norm_makes_the_scale_of_queries_and_of_keys_irrelevant():
    net, idx = make(qk_norm=True, bias=False), tokens()
    before = logits_of(net, idx)
    with torch.no_grad():
        for block in net.transformer.h:
            block.attn.c_attn.weight[:16].mul_(3)
            block.attn.c_attn.weight[16:32].mul_(10)
    torch.testing.assert_close(logits_of(net, idx), before, rtol=1e-4, atol=1e-5)


# ---- loss --------------------------------------------------------------------------------------------------------

def test_the_loss_is_the_mean_cross_entropy_and_skips_minus_one():
    net, idx, targets = make(), tokens(), tokens(seed=2)
    targets[0, :5] = -1
    logits, loss = net(idx, targets, return_logits=True)
    logp = logits.log_softmax(-1)
    by_hand = [-logp[b, t, targets[b, t]] for b in range(3) for t in range(12) if targets[b, t] >= 0]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())


def test_logits_come_with_the_loss_only_on_request():
    net, idx = make(), tokens()
    assert net(idx, idx)[0] is None
    assert logits_of(net, idx).shape == (3, 12, 20)
    torch.testing.assert_close(net(idx, idx)[1], net(idx, idx, return_logits=True)[1])


@pytest.mark.parametrize('options', VARIANTS, ids=name_of)
def test_the_last_logits_alone_are_the_last_of_all(options):
    net, idx = make(**options), tokens()
    torch.testing.assert_close(net(idx)[0][:, 0], logits_of(net, idx)[:, -1])


def test_a_model_of_zeros_loses_log_of_the_vocabulary():
    net = make()
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert abs(float(net(tokens(), tokens(seed=2))[1].detach()) - math.log(20)) < 1e-6


# ---- structure ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('options', VARIANTS, ids=name_of)
def test_no_position_sees_a_later_token(options):
    net, idx = make(**options), tokens()
    changed = idx.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 20
    a, b = logits_of(net, idx), logits_of(net, changed)
    assert torch.equal(a[:, :7], b[:, :7])
    assert not torch.equal(a[:, 7:], b[:, 7:])


def test_batches_do_not_mix():
    net, idx = make(), tokens()
    torch.testing.assert_close(logits_of(net, idx)[1], logits_of(net, idx[1:2])[0])


@pytest.mark.parametrize('options', VARIANTS, ids=name_of)
def test_checkpointed_activations_change_no_gradient(options):
    net, idx = make(**options).train(), tokens()
    found = []
    for on in (False, True):
        net.checkpoint_activations = on
        net.zero_grad()
        net(idx, idx)[1].backward()
        found.append({name: grad.clone() for name, grad in gradients(net).items()})
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_checkpointed_activations_reach_weights_below_frozen_embeddings():
    net = make().train().requires_grad_(False)
    net.checkpoint_activations = True
    weight = net.transformer.h[0].mlp.c_fc.weight.requires_grad_()
    net(tokens(), tokens())[1].backward()
    assert weight.grad.norm() > 0


@pytest.mark.parametrize('flags, expected', [((), torch.float32), ((True,), torch.bfloat16)])
def test_the_residual_stream_is_float32_unless_asked(flags, expected):
    net, found = make(), []
    net.set_compute_dtype(torch.bfloat16, *flags)
    net.transformer.h[1].register_forward_pre_hook(lambda block, args: found.append(args[0].dtype))
    net(tokens())
    net.set_compute_dtype(torch.float32, *flags)
    net(tokens())
    assert found == [expected, torch.float32]


def test_the_angles_of_rotary_embeddings_are_not_saved():
    assert 'rope' not in make(pos='rope').state_dict()


def test_without_muon_no_group_is_muons():
    assert [group['use_muon'] for group in make().param_groups(0.1)] == [False, False]


def test_activations_are_recomputed_only_in_training_and_on_request(monkeypatch):
    calls, real = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, 'checkpoint', lambda *a, **k: calls.append(1) or real(*a, **k))
    net, counts = make(), []
    for on, training in ((False, True), (True, False), (True, True)):
        net.checkpoint_activations = on
        net.train(training)(tokens(), tokens())
        counts.append(len(calls))
    assert counts == [0, 0, 2]


def test_dropout_acts_in_training_only():
    net, idx = make(dropout=0.5), tokens()
    assert torch.equal(net(idx)[0], net(idx)[0])
    net.train()
    assert not torch.equal(net(idx)[0], net(idx)[0])


def test_bfloat16_products_are_near_float32():
    net, idx = make(pos='rope', norm='rmsnorm', mlp='relu2', qk_norm=True, smear=True), tokens()
    exact = float(net(idx, idx)[1].detach())
    net.set_compute_dtype(torch.bfloat16)
    assert net.dtype == torch.bfloat16 and net.transformer.wte.weight.dtype == torch.float32
    loss = float(net(idx, idx)[1].detach())
    assert loss != exact and abs(loss - exact) < 0.03


@pytest.mark.parametrize('options', [dict(bias=True), dict(pos='rope', norm='rmsnorm', qk_norm=True, smear=True)])
def test_a_bfloat16_residual_stream_changes_loss_and_gradients_by_rounding(options):
    net, idx, found = make(**options), tokens(), []
    for bf16_residual in (False, True):
        net.set_compute_dtype(torch.bfloat16, bf16_residual)
        net.zero_grad()
        loss = net(idx, idx)[1]
        loss.backward()
        found.append((float(loss.detach()), {name: g.clone() for name, g in gradients(net).items()}))
    (loss, grads), (loss16, grads16) = found
    assert 0 < abs(loss16 - loss) < 0.03 and grads16.keys() == grads.keys()
    for name, g in grads.items():
        assert grads16[name].dtype == torch.float32 and float((grads16[name] - g).norm()) < 0.06 * float(g.norm()), name


@pytest.mark.parametrize('dtype, result', [(None, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str)
def test_a_layer_multiplies_in_its_compute_dtype_or_that_of_its_weights(dtype, result):
    layer = model.Linear(4, 3)
    torch.nn.init.normal_(layer.weight)
    layer.compute_dtype = dtype
    assert layer(torch.ones(2, 4)).dtype == result


# ---- initialisation ----------------------------------------------------------------------------------------------

def test_initial_weights_have_gpt2s_spread():
    torch.manual_seed(0)
    net = GPT(GPTConfig(block_size=64, vocab_size=200, n_layer=8, n_head=4, n_embd=64, bias=True))
    for name, p in net.named_parameters():
        if p.dim() == 2:
            wanted = 0.02 / math.sqrt(16) if name.endswith('c_proj.weight') else 0.02
            assert abs(float(p.detach().std()) / wanted - 1) < 0.05, name
        else:
            assert torch.equal(p, torch.zeros_like(p) if name.endswith('bias') else torch.ones_like(p)), name


def test_rmsnorm_starts_output_projections_and_an_untied_head_at_zero():
    net = GPT(GPTConfig(12, 20, 2, 2, 16, bias=False, norm='rmsnorm', tie_weights=False, smear=True))
    zero = {name for name, p in net.named_parameters() if not p.any()}
    assert zero == {'lm_head.weight', 'smear', *(f'transformer.h.{i}.{part}.c_proj.weight'
                                                 for i in range(2) for part in ('attn', 'mlp'))}


def test_a_new_model_knows_nothing():
    torch.manual_seed(0)
    net = GPT(GPTConfig(12, 20, 2, 2, 16))
    assert abs(float(net(tokens(), tokens(seed=2))[1]) - math.log(20)) < 0.1


# ---- counts, groups, config --------------------------------------------------------------------------------------

@pytest.mark.parametrize('muon', [False, True])
@pytest.mark.parametrize('options', VARIANTS, ids=name_of)
def test_optimizer_groups_partition_the_parameters(options, muon):
    net = make(**options)
    groups = net.param_groups(0.1, muon=muon)
    inside = [id(p) for g in groups for p in g['params']]
    assert len(inside) == len(set(inside)) and set(inside) == {id(p) for p in net.parameters()}
    assert all(g['weight_decay'] == (0.1 if p.dim() >= 2 else 0.0) for g in groups for p in g['params'])


def test_muon_gets_the_matrices_of_the_blocks_and_how_many_are_stacked():
    net = make(tie_weights=False)
    names = {id(p): name for name, p in net.named_parameters()}
    first, *others = net.param_groups(0.1, muon=True)
    assert first['use_muon'] and not any(g['use_muon'] for g in others)
    splits = {names[id(p)].removeprefix('transformer.h.0.'): s for p, s in zip(first['params'], first['splits'])}
    assert splits.items() >= {'attn.c_attn.weight': 3, 'attn.c_proj.weight': 1, 'mlp.c_fc.weight': 1,
                              'mlp.c_proj.weight': 1}.items()
    assert len(first['params']) == 8


@pytest.mark.parametrize('name, count', [('gpt2', 124_439_808), ('gpt2-medium', 354_823_168),
                                         ('gpt2-large', 774_030_080), ('gpt2-xl', 1_557_611_200)])
def test_the_sizes_have_gpt2s_counts(name, count):
    with torch.device('meta'):
        net = GPT(GPTConfig(block_size=1024, vocab_size=50257, bias=True, **gpt2.SIZES[name]), init=False)
    assert net.get_num_params(non_embedding=False) == count


def test_flops_per_token_follow_the_formula():
    net = make(bias=False)
    n = 20 * 16 + 2 * (3 * 16 * 16 + 16 * 16 + 8 * 16 * 16 + 2 * 16) + 16
    assert net.get_num_params() == n and net.flops_per_token() == 6 * n + 12 * 2 * 16 * 12
    assert net.flops_per_token(4) == 6 * n + 12 * 2 * 16 * 4
    for window, context in ((2, 4), (5, 10), (7, 12)):  # two windows are computed, or the whole context
        assert make(bias=False, window=window).flops_per_token() == 6 * n + 12 * 2 * 16 * context


def test_a_model_without_position_embeddings_counts_all_parameters():
    net = make(pos='rope')
    assert net.get_num_params() == net.get_num_params(non_embedding=False) == sum(p.numel() for p in net.parameters())


def test_an_untied_embedding_multiplies_nothing():
    tied, untied = make(bias=False), make(bias=False, tie_weights=False)
    assert untied.get_num_params() == tied.get_num_params() + 20 * 16
    assert untied.flops_per_token() == tied.flops_per_token()


@pytest.mark.parametrize('pos', ['learned', 'rope'])
def test_cropping_keeps_what_is_left(pos):
    net, idx = make(pos=pos), tokens(T=5)
    whole = logits_of(net, idx)
    gpt2.crop_block_size(net, 5)
    assert net.config.block_size == 5 and torch.equal(logits_of(net, idx), whole)
    with pytest.raises(ValueError, match='6 tokens are more than block_size=5'):
        net(tokens(T=6))
    with pytest.raises(ValueError, match='has 5 positions'):
        gpt2.crop_block_size(net, 9)


def test_model_args_are_nanogpts_seven_and_only_options_that_differ():
    seven = {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'}
    assert GPTConfig().model_args().keys() == seven
    assert GPTConfig(pos='rope', softcap=15.0).model_args().keys() == seven | {'pos', 'softcap'}


@pytest.mark.parametrize('wrong, message', [
    (dict(n_embd=8, n_head=3), "n_embd=8 is not divisible by n_head=3"),
    (dict(n_layer=0), "n_layer must be at least 1"), (dict(n_head=0), '^n_head must be at least 1, got 0$'),
    (dict(n_head=0, pos='rope'), '^n_head must be at least 1, got 0$'),
    (dict(dropout=1.0), 'dropout must be'), (dict(dropout=-0.1), 'dropout must be'),
    (dict(mlp='glu'), 'mlp must be one of'), (dict(softcap=-1.0), 'softcap'),
    (dict(pos='rope', n_embd=6, n_head=2), 'must be even')])
def test_an_impossible_model_is_refused_with_the_numbers(wrong, message):
    with pytest.raises(ValueError, match=message):
        GPT(GPTConfig(**{**dict(block_size=8, vocab_size=8, n_layer=1, n_head=2, n_embd=8), **wrong}))


def test_uninitialized_builds_in_the_dtype_and_leaves_torchs_default():
    net = gpt2.uninitialized(GPTConfig(12, 20, 1, 2, 16), torch.bfloat16)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16} and torch.get_default_dtype() == torch.float32
