"""lib/weights/lora.py: only adapters are trained, the base weights stay unchanged, merging changes no logits."""
import copy
import json
import string

import pytest
import torch
from conftest import TINY

import export
from lib.text import tokenizer
from lib.weights import gpt2, lora
from model import GPT, GPTConfig

CONFIG = dict(block_size=8, vocab_size=16, n_layer=2, n_head=2, n_embd=16)
FACTORS = {'lora_a', 'lora_b'}


def load(path):
    return torch.load(path, weights_only=True)


def adapted(rank=3, seed=0, trained=True):
    """Return (GPT with adapters, the same GPT without); trained: whether the adapters change its output."""
    torch.manual_seed(seed)
    base = GPT(GPTConfig(**CONFIG))
    model = copy.deepcopy(base)
    lora.adapt(model, rank)
    if trained:
        for name, p in model.named_parameters():
            if name.endswith('lora_b'):
                torch.nn.init.normal_(p, std=0.1)
    return model, base


def logits(model):
    idx = torch.randint(16, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(idx, idx, return_logits=True)[0]


def test_an_untrained_adapter_does_not_change_the_logits():
    model, base = adapted(trained=False)
    assert torch.equal(logits(model), logits(base))


def test_the_merged_model_has_the_logits_of_the_adapted_one():
    model, base = adapted()
    merged = GPT(GPTConfig(**CONFIG))
    merged.load_state_dict(lora.merged(model.state_dict()))
    assert (logits(model) - logits(base)).abs().max() > 0.01
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)


def test_adapters_compute_in_the_dtype_of_the_model():
    model, _ = adapted()
    exact = logits(model)
    model.set_compute_dtype(torch.bfloat16)
    assert 0 < (logits(model) - exact).abs().max() < 0.05
    layer = model.transformer.h[0].mlp.c_fc
    assert layer(torch.ones(1, 16)).dtype == torch.bfloat16 and layer.lora_a.dtype == torch.float32


def test_frozen_weights_are_cast_once_and_saved_as_they_are():
    model, base = adapted()
    before, layer = copy.deepcopy(model.state_dict()), model.transformer.h[0].mlp.c_fc
    model.set_compute_dtype(torch.bfloat16)
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    low = layer.lora_b.bfloat16() @ (layer.lora_a.bfloat16() @ x.bfloat16().mT * layer.scale)
    expected = torch.nn.functional.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()) + low.mT
    assert torch.equal(layer(x), expected)
    assert layer.frozen.dtype == torch.bfloat16 and layer.weight.dtype == torch.float32
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    model.set_compute_dtype(torch.float32)
    assert layer.frozen is None


def test_every_matrix_of_the_blocks_and_nothing_else_gets_an_adapter():
    model, base = adapted(rank=3)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in base.named_parameters() if name.startswith('transformer.h.') and p.dim() == 2]
    assert {name.rpartition('.')[2] for name in trained} == {'lora_a', 'lora_b'}
    assert sum(p.numel() for p in trained.values()) == sum(3 * sum(p.shape) for p in matrices)


def test_adapting_does_not_copy_the_weights():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**CONFIG))
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    lora.adapt(model, 2)
    after = {name: p.data_ptr() for name, p in model.named_parameters() if name in before}
    assert after == before


@pytest.fixture
def folder(workdir):
    """A folder in GPT-2's layout with random weights and the tokenizer of the dataset `tiny`."""
    folder, (_, base) = workdir / 'base', adapted()
    tok = tokenizer.CharTokenizer(string.ascii_letters[:16])
    folder.mkdir()
    pytest.importorskip('safetensors.torch').save_file(export.hf_tensors(base), folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps(export.hf_config(base.config, tok)), encoding='utf-8')
    (folder / 'tokenizer_spec.json').write_text(json.dumps(tok.spec), encoding='utf-8')
    return 'base'


def lora_flags(folder):
    shape = [flag for flag in TINY if not flag.startswith(('--n_', '--block_size'))]
    return [*shape, f'--init_from={folder}', '--lora_rank=2', '--learning_rate=3e-3']


def test_training_lowers_the_loss_and_leaves_the_base_weights_unchanged(run, folder):
    done = run('train.py', *lora_flags(folder))
    assert done.status == 0, done.err
    last, base = load('out/last.pt'), gpt2.find(folder).load().state_dict()
    assert all(torch.equal(last['model'][name], tensor) for name, tensor in base.items())
    assert last['history'][-1][2] < last['history'][0][2]


def test_the_optimizer_keeps_state_of_adapters_only(run, folder):
    run('train.py', *lora_flags(folder))
    last = load('out/last.pt')
    adapters = [name for name in last['model'] if name.rpartition('.')[2] in FACTORS]
    assert len(last['optimizer']['state']) == len(adapters) == 2 * 4 * 2  # layers, matrices, two factors


def test_the_checkpoint_to_use_is_an_ordinary_model(run, folder):
    run('train.py', *lora_flags(folder), '--always_save_checkpoint')
    last, ckpt = load('out/last.pt'), load('out/ckpt.pt')
    assert not any(name.rpartition('.')[2] in FACTORS for name in ckpt['model'])
    merged = lora.merged(last['model'])
    assert ckpt['iter_num'] == last['iter_num'] == 6
    assert all(torch.equal(ckpt['model'][name], merged[name]) for name in merged)
    done = run('sample.py', '--device=cpu', '--num_samples=1', '--max_new_tokens=5', '--start=a')
    assert done.status == 0, done.err


def test_resuming_adapters_is_exact(run, folder):
    flags = [*lora_flags(folder), '--dropout=0.2', '--decay_lr=False']
    run('train.py', *flags, '--out_dir=whole')
    run('train.py', *flags, '--out_dir=halves', '--max_iters=3')
    flags.remove('--lora_rank=2')  # the checkpoint knows
    resumed = run('train.py', *flags, '--out_dir=halves', '--init_from=resume')
    assert 'resuming from iter 3' in resumed.out, resumed.err
    whole, halves = load('whole/last.pt')['model'], load('halves/last.pt')['model']
    assert whole.keys() == halves.keys() and all(torch.equal(whole[name], halves[name]) for name in whole)


def test_a_rank_that_contradicts_the_checkpoint_is_refused(run, folder):
    run('train.py', *lora_flags(folder), '--max_iters=1')
    done = run('train.py', *lora_flags(folder), '--init_from=resume', '--lora_rank=4')
    assert done.status == 2 and 'lora_rank=4 but the checkpoint out/last.pt has rank 2' in done.last_error


def test_adapters_on_an_untrained_model_are_refused(run, workdir):
    done = run('train.py', *TINY, '--lora_rank=2')
    assert done.status == 2 and 'lora_rank adapts a trained model' in done.last_error


def test_activation_checkpointing_does_not_change_the_gradients():
    found = []
    for on in (False, True):
        model, _ = adapted()
        model.train().checkpoint_activations = on
        idx = torch.arange(8)[None]
        model(idx, idx)[1].backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(*found))
