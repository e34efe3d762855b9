"""Faults 13 to 24 in one process: a resumed run is the run that was never stopped, or says why it cannot be."""
import json

import pytest
import torch
from conftest import TINY, write_dataset
from kit import differences, load, trained_part

from lib.text import dataset
from lib.weights import checkpoint
from model import GPT, GPTConfig

HARD = [*TINY, '--dropout=0.2', '--gradient_accumulation_steps=2', '--lr_decay_iters=6', '--eval_interval=2']


def halves(run, out_dir, at, *flags, spoil=lambda state: None):
    """Train 6 updates in two runs, the first of which ends after `at`; returns the final state."""
    assert run('train.py', *HARD, *flags, f'--out_dir={out_dir}', f'--max_iters={at}').status == 0
    state = load(f'{out_dir}/last.pt')
    spoil(state)
    torch.save(state, f'{out_dir}/last.pt')
    done = run('train.py', *HARD, *flags, f'--out_dir={out_dir}', '--init_from=resume')
    assert done.status == 0, done.err
    return load(f'{out_dir}/last.pt')


@pytest.mark.parametrize('flags', [[], ['--optimizer=muon'], ['--data_order=random'], ['--lr_schedule=wsd']])
def test_six_steps_equal_three_and_three_more_bit_for_bit(run, workdir, flags):  # fault 13
    run('train.py', *HARD, *flags, '--out_dir=whole')
    assert differences(trained_part(load('whole/last.pt')), trained_part(halves(run, 'halves', 3, *flags))) == []


def test_without_the_random_state_the_weights_differ(run, workdir):  # fault 13: the test above can fail
    run('train.py', *HARD, '--out_dir=whole')
    ended = halves(run, 'halves', 3, spoil=lambda state: state.pop('rng'))
    assert any(where.startswith('/model') for where in differences(trained_part(load('whole/last.pt')),
                                                                   trained_part(ended)))


def test_without_the_optimizer_moments_the_weights_differ(run, workdir):  # fault 13: the test above can fail
    run('train.py', *HARD, '--out_dir=whole')
    ended = halves(run, 'halves', 3, spoil=lambda state: state['optimizer']['state'][0]['exp_avg'].zero_())
    assert any(where.startswith('/model') for where in differences(trained_part(load('whole/last.pt')),
                                                                   trained_part(ended)))


def test_resuming_three_times_reads_the_windows_of_one_run_in_order(run, workdir, monkeypatch):  # fault 14
    read, real = [], dataset.Split.batch

    def batch(self, starts, block_size):
        if torch.is_grad_enabled():  # a training batch
            read.extend(starts.tolist())
        return real(self, starts, block_size)
    monkeypatch.setattr(dataset.Split, 'batch', batch)
    run('train.py', *TINY, '--out_dir=whole')
    once, read[:] = list(read), []
    for end in (2, 3, 6):
        run('train.py', *TINY, f'--max_iters={end}', '--init_from=auto')
    assert read == once and len(set(read)) == 24


@pytest.mark.parametrize('flag', ['--eval_interval=1', '--eval_iters=9', '--log_interval=3'])
def test_how_often_is_evaluated_or_logged_changes_no_weight(run, workdir, flag):  # fault 15
    run('train.py', *HARD, '--out_dir=a')
    run('train.py', *HARD, '--out_dir=b', flag)
    assert differences(trained_part(load('a/last.pt')), trained_part(load('b/last.pt'))) == []


def test_the_gradient_scaler_goes_on_where_it_was(run, workdir, monkeypatch):  # fault 16
    real = torch.amp.GradScaler  # preflight keeps float16 off the CPU; the scaler itself works there
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda device, enabled: real(device, growth_interval=2))
    run('train.py', *HARD, '--out_dir=whole')
    ended = halves(run, 'halves', 3)
    assert ended['scaler']['scale'] == 2.0**19
    assert differences(trained_part(load('whole/last.pt')), trained_part(ended)) == []


@pytest.fixture
def trained(run, workdir):
    assert run('train.py', *TINY, '--max_iters=4').status == 0
    return workdir


def resume(run, *flags):
    return run('train.py', *TINY, '--init_from=resume', *flags)


@pytest.mark.parametrize('flag', ['--block_size=16', '--block_size=4', '--n_layer=3', '--bias=True', '--mlp=swiglu'])
def test_a_flag_that_contradicts_the_checkpoint_is_refused(run, trained, flag):  # faults 17 and 18
    before = (trained / 'out' / 'last.pt').read_bytes()
    done = resume(run, flag)
    name, value = flag[2:].split('=')
    assert done.status == 2 and f'error: {name}={value} but the checkpoint out/last.pt has ' in done.last_error
    assert (trained / 'out' / 'last.pt').read_bytes() == before


def test_a_config_file_gives_way_to_the_checkpoint_and_a_line_says_so(run, trained):  # fault 17
    (trained / 'wide.py').write_text('n_embd = 64\n', encoding='utf-8')
    flags = [flag for flag in TINY if not flag.startswith('--n_embd')]
    done = run('train.py', *flags, 'wide.py', '--init_from=resume')
    assert done.status == 0 and 'n_embd: 16, as in the checkpoint' in done.out


def test_a_changed_weight_decay_is_applied_and_printed(run, trained):  # fault 19
    done = resume(run, '--weight_decay=0', '--beta2=0.9')
    assert 'weight_decay: checkpoint 0.1, now 0.0' in done.out and 'beta2: checkpoint 0.95, now 0.9' in done.out
    groups = load('out/last.pt')['optimizer']['param_groups']
    assert [(g['weight_decay'], g['betas']) for g in groups] == [(0.0, (0.9, 0.9))] * 2


def test_another_optimizer_is_refused_in_a_line(run, trained):
    done = resume(run, '--optimizer=muon')
    assert done.status == 1 and 'was the setting optimizer changed?' in done.last_error


def test_a_dataset_with_more_characters_is_refused(run, trained):  # fault 20
    write_dataset(trained / 'data' / 'wide', list(range(20)) * 20, chars='abcdefghijklmnopqrst')
    done = resume(run, '--dataset=wide')
    assert done.status == 2 and "vocab_size 16, dataset 'wide' has 20" in done.last_error


def test_a_dataset_with_other_characters_is_refused(run, trained):  # fault 20
    write_dataset(trained / 'data' / 'other', list(range(16)) * 20, chars='0123456789abcdef')
    done = resume(run, '--dataset=other')
    assert done.status == 2 and 'was trained with another tokenizer than dataset' in done.last_error


def test_more_text_in_the_same_characters_is_said_not_refused(run, trained):  # fault 20
    write_dataset(trained / 'data' / 'tiny', list(range(16)) * 40)
    done = resume(run)
    assert done.status == 0 and 'is not the data of the checkpoint: tiny of 2,000 tokens, now 640' in done.out


def test_resume_without_a_checkpoint_names_the_way_out(run, workdir):  # fault 21
    done = resume(run)
    assert done.status == 2 and 'no checkpoint in out/ to resume; use --init_from=auto' in done.last_error


def test_auto_without_a_checkpoint_starts_fresh_and_says_so(run, workdir):  # fault 21
    done = run('train.py', *TINY, '--init_from=auto')
    assert done.status == 0 and 'no checkpoint in out/: starting from scratch' in done.out
    assert 'resuming from iter 6' in run('train.py', *TINY, '--init_from=auto', '--max_iters=7').out


def nanogpt_checkpoint(path, prefix=''):
    """Write what nanoGPT's train.py writes, by its documented keys, with optimizer moments of one step."""
    args = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, bias=False, vocab_size=16, dropout=0.0)
    torch.manual_seed(5)
    model = GPT(GPTConfig(**args))
    shapes = [[p for p in model.parameters() if p.dim() >= 2], [p for p in model.parameters() if p.dim() < 2]]
    opt = torch.optim.AdamW([{'params': shapes[0], 'weight_decay': 0.1}, {'params': shapes[1], 'weight_decay': 0.0}],
                            lr=6e-4, betas=(0.9, 0.95))
    model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long))[1].backward()
    opt.step()
    path.parent.mkdir()
    torch.save({'model': {prefix + name: p for name, p in model.state_dict().items()}, 'optimizer': opt.state_dict(),
                'model_args': args, 'iter_num': 20, 'best_val_loss': torch.tensor(2.5),
                'config': {'dataset': 'tiny', 'learning_rate': 6e-4, 'block_size': 8, 'device': 'cuda'}}, path)
    return model


def nanogpt_dataset(folder):
    """Turn a dataset into nanoGPT's: the .bin files and a meta.pkl."""
    import pickle
    chars = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))['tokenizer']['chars']
    (folder / 'meta.json').unlink()
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 16, 'itos': dict(enumerate(chars)),
                                                    'stoi': {c: i for i, c in enumerate(chars)}}))


@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module.', 'module._orig_mod.'])
def test_a_nanogpt_checkpoint_and_data_folder_go_on_training(run, workdir, prefix):  # fault 22
    nanogpt_checkpoint(workdir / 'out' / 'ckpt.pt', prefix)
    nanogpt_dataset(workdir / 'data' / 'tiny')
    done = resume(run, '--max_iters=24')
    assert done.status == 0, done.err
    assert 'resuming from iter 20 (out/ckpt.pt)' in done.out and 'resuming is not exact' in done.err
    assert load('out/last.pt')['iter_num'] == 24


def test_a_nanogpt_checkpoint_is_evaluated_and_sampled(run, workdir):
    nanogpt_checkpoint(workdir / 'out' / 'ckpt.pt')
    nanogpt_dataset(workdir / 'data' / 'tiny')
    evaluated = resume(run, '--eval_only=True')
    assert evaluated.status == 0 and 'step 20: train loss' in evaluated.out
    sampled = run('sample.py', '--device=cpu', '--start=ab', '--num_samples=1', '--max_new_tokens=5')
    assert sampled.status == 0 and sampled.out.startswith('ab') and '-' * 15 in sampled.out, sampled.err


def test_what_ours_writes_has_the_keys_names_and_shapes_of_nanogpt(run, trained):
    state = load('out/ckpt.pt')
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= state.keys()
    assert state['model_args'] == dict(n_layer=2, n_head=2, n_embd=16, block_size=8, bias=False, vocab_size=16,
                                       dropout=0.0)
    layer = {'ln_1.weight': (16,), 'attn.c_attn.weight': (48, 16), 'attn.c_proj.weight': (16, 16),
             'ln_2.weight': (16,), 'mlp.c_fc.weight': (64, 16), 'mlp.c_proj.weight': (16, 64)}
    assert {name: tuple(p.shape) for name, p in state['model'].items()} == {
        'transformer.wte.weight': (16, 16), 'transformer.wpe.weight': (8, 16),
        **{f'transformer.h.{i}.{name}': shape for i in range(2) for name, shape in layer.items()},
        'transformer.ln_f.weight': (16,), 'lm_head.weight': (16, 16)}


@pytest.mark.parametrize('spoil, told', [
    (lambda s: s['model'].pop('transformer.h.1.ln_1.weight'), '1 tensors missing, e.g. transformer.h.1.ln_1.weight'),
    (lambda s: s['model'].update(extra=torch.zeros(1)), '1 tensors unexpected, e.g. extra'),
    (lambda s: s['model'].update({'lm_head.weight': torch.zeros(3, 3)}), '1 tensors of another shape, e.g. lm_head'),
    (lambda s: s['model'].update({'lm_head.weight': 3}), 'lm_head.weight'),
    (lambda s: s['model_args'].update(n_kv_head=1), 'n_kv_head'),
    (lambda s: s['model_args'].update(n_layer='two'), 'n_layer'),
    (lambda s: s['model_args'].pop('n_layer'), 'n_layer'),
    (lambda s: s.pop('optimizer'), 'optimizer'),
    (lambda s: s.pop('iter_num'), 'iter_num'),
    (lambda s: s.pop('best_val_loss'), 'best_val_loss'),
])
def test_a_checkpoint_with_a_key_amiss_names_it(run, trained, spoil, told):  # fault 23
    state = load('out/last.pt')
    spoil(state)
    for name in ('last.pt', 'last.prev.pt', 'ckpt.pt'):
        torch.save(state, f'out/{name}')
    done = resume(run)
    assert done.status in (1, 2) and 'out/' in done.last_error and told in done.last_error
    assert 'Traceback' not in done.err


@pytest.mark.parametrize('ranks, flags, told', [  # fault 24
    (2, ['--gradient_accumulation_steps=5'], 'gradient_accumulation_steps=5 is not divisible by 2 ranks; use 4 or 6'),
    (3, ['--gradient_accumulation_steps=1'], 'gradient_accumulation_steps=1 is not divisible by 3 ranks; use 3'),
    (2, ['--total_batch_tokens=100'], 'total_batch_tokens=100 is not divisible by batch_size x block_size x ranks'),
])
def test_accumulation_that_ranks_cannot_share_names_the_nearest(run, workdir, monkeypatch, ranks, flags, told):
    monkeypatch.setenv('WORLD_SIZE', str(ranks))
    done = run('train.py', *TINY, *flags)
    assert done.status == 2 and told in done.last_error


def test_eval_only_evaluates_ends_and_writes_nothing(run, trained):
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (trained / 'out').iterdir()}
    done = resume(run, '--eval_only=True')
    assert done.status == 0 and done.out.count('step ') == 1 and 'iter ' not in done.out.replace('per iter', '')
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (trained / 'out').iterdir()} == before


def test_the_best_model_stays_best_when_later_ones_are_worse(run, workdir):
    flags = [*TINY, '--eval_interval=1', '--max_iters=8', '--learning_rate=0.5', '--decay_lr=False', '--grad_clip=0']
    run('train.py', *flags)
    history = load('out/last.pt')['history']
    best = min(history, key=lambda h: h[2])
    assert best[0] < 8, 'this run should get worse'
    assert (load('out/ckpt.pt')['iter_num'], load('out/last.pt')['best_val_loss']) == (best[0], best[2])
    run('train.py', *flags, '--init_from=resume', '--max_iters=9')
    assert load('out/ckpt.pt')['iter_num'] == best[0]


def test_the_log_goes_on_without_gap_or_repeat(run, workdir):
    run('train.py', *TINY, '--max_iters=3')
    (workdir / 'out' / 'log.jsonl').open('a', encoding='utf-8').write('{"iter": 3, "loss": 1.0}\n{"iter": 4, "lo')
    resume(run)
    records = [json.loads(line) for line in (workdir / 'out' / 'log.jsonl').read_text(encoding='utf-8').splitlines()]
    assert [r['iter'] for r in records if 'iter' in r] == [0, 1, 2, 3, 4, 5]
    assert [r['step'] for r in records if 'step' in r] == [0, 3, 4, 6]


def test_resuming_prefers_the_newest_state_to_the_best(run, trained):
    state = load('out/ckpt.pt')
    state['iter_num'] = 1
    checkpoint.save('out/ckpt.pt', state)
    assert 'resuming from iter 4 (out/last.pt)' in resume(run).out


def test_a_signal_leaves_the_best_model_in_ckpt_where_step_0_was_good(run, workdir, monkeypatch):
    """Fine-tuning begins with a good model; what a signal saves later may be worse and was not evaluated."""
    from lib.machine import signals
    run('train.py', *TINY)
    good = {**torch.load('out/last.pt', weights_only=True), 'best_val_loss': 0.0}
    good['history'] = good['history'][:1]
    torch.save(good, 'out/last.pt')
    torch.save(good, 'out/ckpt.pt')
    before = (workdir / 'out' / 'ckpt.pt').read_bytes()
    monkeypatch.setattr(signals.Signals, '__enter__', lambda self: setattr(self, 'level', 1) or self)
    assert 'SIGUSR1: saved' in run('train.py', *TINY, '--init_from=resume', '--max_iters=7').out
    assert (workdir / 'out' / 'ckpt.pt').read_bytes() == before
