"""lib/training/preflight.py: mistakes are reported before work begins, and what stays in force on resume."""
import json
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPO, TINY, write_dataset
from kit import differences, load, trained_part

from lib.training import preflight
from lib.weights import checkpoint


def without(*names):
    """Return the flags of TINY but those of `names`."""
    return [flag for flag in TINY if flag[2:].split('=')[0] not in names]


# Mistakes

def errors(run, *flags):
    """Run train.py; return its error lines, having checked that it ended before the model was built."""
    done = run('train.py', *TINY, *flags)
    assert done.status == 2 and 'number of parameters' not in done.out and 'Traceback' not in done.err
    return [line for line in done.err.splitlines() if line.startswith('error: ')]


@pytest.mark.parametrize('flags, message', [
    (['--learning_rat=1'], 'unknown setting --learning_rat; did you mean learning_rate?'),  # 61
    (['--bias=maybe'], '--bias=maybe: expected True or False'),  # 62
    (['--max_iters=many'], '--max_iters=many: expected a whole number'),
    (['--dropout=much'], '--dropout=much: expected a number'),
    (['--init_from=resumee'], "init_from='resumee': expected scratch, resume, auto, gpt2"),  # 63
    (['--dtype=bf16'], "dtype must be one of auto, float32, bfloat16, float16; got 'bf16'"),  # 64
    (['--eval_interval=0'], 'eval_interval must be at least 1, got 0'),  # 65
    (['--log_interval=0'], 'log_interval must be at least 1, got 0'),
    (['--batch_size=0'], 'batch_size must be at least 1, got 0'),
    (['--gradient_accumulation_steps=0'], 'gradient_accumulation_steps must be at least 1, got 0'),
    (['--eval_iters=-1'], 'eval_iters must be at least 1, got -1'),
    (['--eval_iters=0'], 'eval_iters must be at least 1, got 0'),  # 41
    (['--block_size=0'], 'block_size must be at least 1, got 0'),
    (['--patience=-1'], 'patience must be at least 0, got -1'),
    (['--learning_rate=nan'], 'learning_rate must be at least 0, got nan'),
    (['--learning_rate=inf'], 'learning_rate must be a finite number, got inf'),
    (['--dropout=1'], 'dropout must be at least 0 and below 1, got 1.0'),
    (['--beta2=1'], 'beta2 must be at least 0 and below 1, got 1.0'),
    (['--muon_momentum=1'], 'muon_momentum must be at least 0 and below 1, got 1.0'),
    (['--cooldown_frac=0'], 'cooldown_frac must be above 0 and at most 1, got 0.0'),
    (['--seed=9223372036854775808'], 'seed must be below 2**63, got 9223372036854775808'),
    (['--warmup_iters=6', '--lr_decay_iters=6'], 'warmup_iters=6 must be below lr_decay_iters=6'),  # 66
    (['--context_warmup=2'], 'context_warmup must be at least 0 and at most 1, got 2.0'),
    (['--context_warmup=0.5', '--block_size=6'], 'context_warmup needs a block_size divisible by 4'),
    (['--n_embd=8', '--n_head=3'], 'n_embd=8 is not divisible by n_head=3'),  # 67
    (['--device=cuda'], 'no CUDA here; use --device=cpu'),  # 68
    (['--device=gpu'], 'device=gpu: expected cpu, mps, cuda or cuda:N'),
    (['--dtype=float16'], 'dtype=float16 needs gradient scaling, which is available on CUDA only'),
    (['--optimizer=adam'], "optimizer must be one of adamw, muon; got 'adam'"),
    (['--eval_only=True'], 'eval_only needs a model'),
    (['--lora_rank=2'], 'lora_rank adapts a trained model'),
    (['nowhere.py'], 'config file nowhere.py not found'),
])
def test_a_mistake_is_reported_with_its_remedy(run, workdir, monkeypatch, flags, message):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    assert any(message in line for line in errors(run, *flags))


def test_a_typo_in_a_config_file_names_file_line_and_nearest_setting(run, workdir):  # fault 60
    (workdir / 'my.py').write_text('batch_size = 2\nlearning_rat = 123.0\n', encoding='utf-8')
    assert errors(run, 'my.py')[-1] == 'error: my.py:2: unknown setting learning_rat; did you mean learning_rate?'


def test_helpers_in_a_config_file_are_not_settings(run, workdir):
    (workdir / 'my.py').write_text('import time\n_x = 2\ndef f(n):\n    return n * _x\nmax_iters = f(1)\n',
                                   encoding='utf-8')
    assert 'step 2:' in run('train.py', *without('max_iters'), 'my.py').out


@pytest.mark.parametrize('flags, setting, value', [
    (['--learning_rate=1'], 'learning_rate', 1.0), (['--seed', '3'], 'seed', 3), (['--bias'], 'bias', True),
    (['--compile=no'], 'compile', False), (['--eval-interval=2'], 'eval_interval', 2),
    (['--wandb_run_name=a=b=c'], 'wandb_run_name', 'a=b=c'), (['--wandb_run_name=42'], 'wandb_run_name', '42')])
def test_the_usual_spellings_of_flags_are_read(run, workdir, flags, setting, value):  # fault 62
    assert run('train.py', *TINY, '--max_iters=0', *flags).status == 0
    assert load('out/last.pt')['config'][setting] == value


def test_all_mistakes_are_reported_at_once(run, workdir):  # fault 69
    (workdir / 'my.py').write_text('epochs = 3\n', encoding='utf-8')
    (workdir / 'out').touch()
    lines = errors(run, '--n_head=3', '--dtype=bf16', 'my.py', '--typo=1', '--dataset=nope')
    expected = ('--typo', 'my.py:1', 'dtype', 'n_head=3', 'data/nope', 'out_dir')
    assert all(any(part in line for line in lines) for part in expected), lines


@pytest.mark.parametrize('flags', [['--warmup_iters=0'], ['--warmup_iters=50'], ['--warmup_iters=6'],
                                   ['--lr_decay_iters=0'], ['--decay_lr=False'], ['--min_lr=0', '--learning_rate=0'],
                                   ['--lr_schedule=wsd', '--cooldown_frac=1'], ['--grad_clip=0'], ['--max_iters=0'],
                                   ['--context_warmup=1'], ['--context_warmup=0.1', '--warmup_iters=0']])
def test_zero_and_unusual_lengths_of_the_schedule_train(run, workdir, flags):  # fault 66
    done = run('train.py', *TINY, *flags)
    n_updates = 0 if '--max_iters=0' in flags else 6
    assert done.status == 0 and load('out/last.pt')['iter_num'] == n_updates, done.err


@pytest.mark.parametrize('ranks, flags, message', [  # fault 24
    (2, ['--gradient_accumulation_steps=5'], 'gradient_accumulation_steps=5 is not divisible by 2 ranks; use 4 or 6'),
    (3, ['--gradient_accumulation_steps=1'], 'gradient_accumulation_steps=1 is not divisible by 3 ranks; use 3'),
    (2, ['--total_batch_tokens=100'], 'total_batch_tokens=100 is not divisible by batch_size x block_size x ranks = 64;'
                                      ' the nearest is 128'),
])
def test_accumulation_that_ranks_cannot_share_names_the_nearest(run, workdir, monkeypatch, ranks, flags, message):
    for name, value in dict(WORLD_SIZE=ranks, RANK=0, LOCAL_RANK=0, MASTER_ADDR='127.0.0.1', MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    done = run('train.py', *TINY, *flags)
    assert done.status == 2 and message in done.last_error


# Resuming: the checkpoint

def resume(run, *flags):
    return run('train.py', *TINY, '--init_from=resume', '--max_iters=9', *flags)


@pytest.mark.parametrize('flag', ['--block_size=16', '--block_size=4', '--n_layer=3', '--bias=True', '--mlp=swiglu'])
def test_a_flag_that_contradicts_the_checkpoint_is_refused(run, trained, flag):  # faults 17 and 18
    before = (trained / 'last.pt').read_bytes()
    done = resume(run, flag)
    name, value = flag[2:].split('=')
    assert done.status == 2 and f'error: {name}={value} but the checkpoint out/last.pt has ' in done.last_error
    assert (trained / 'last.pt').read_bytes() == before


def test_the_checkpoints_architecture_overrides_a_config_file_and_a_line_says_so(run, trained, workdir):  # fault 17
    (workdir / 'wide.py').write_text('n_embd = 64\n', encoding='utf-8')
    done = run('train.py', *without('n_embd', 'max_iters'), 'wide.py', '--init_from=resume', '--max_iters=7')
    assert done.status == 0 and 'n_embd: 16, as in the checkpoint' in done.out
    assert load('out/last.pt')['model_args']['n_embd'] == 16


def test_another_optimizer_is_refused_in_one_line(run, trained):
    done = resume(run, '--optimizer=muon')
    assert done.status == 1 and 'was the setting optimizer changed?' in done.last_error


def test_resume_without_a_checkpoint_names_the_remedy(run, workdir):  # fault 21
    done = resume(run)
    assert done.status == 2 and 'no checkpoint in out/ to resume; use --init_from=auto' in done.last_error


def test_auto_without_a_checkpoint_starts_from_scratch_and_says_so(run, workdir):  # fault 21
    done = run('train.py', *TINY, '--init_from=auto')
    assert done.status == 0 and 'no checkpoint in out/: starting from scratch' in done.out
    assert 'resuming from iter 6' in run('train.py', *TINY, '--init_from=auto', '--max_iters=7').out


@pytest.mark.parametrize('spoil, message', [
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
def test_a_missing_extra_or_wrong_key_of_a_checkpoint_is_named(run, trained, spoil, message):  # fault 23
    state = load('out/last.pt')
    spoil(state)
    for name in ('last.pt', 'last.prev.pt', 'ckpt.pt'):
        torch.save(state, f'out/{name}')
    done = resume(run)
    assert done.status in (1, 2) and 'out/' in done.last_error and message in done.last_error
    assert 'Traceback' not in done.err


# Resuming: settings

def test_resume_alone_continues_the_run_exactly(run, workdir):
    flags = [*TINY, '--dropout=0.2', '--weight_decay=0.3', '--learning_rate=3e-3', '--lr_decay_iters=6', '--seed=5']
    run('train.py', *flags, '--out_dir=whole')
    run('train.py', *flags, '--max_iters=3')
    done = run('train.py', '--init_from=resume', '--device=cpu', '--max_iters=6')
    assert 'resuming from iter 3' in done.out, done.err
    assert differences(trained_part(load('whole/last.pt')), trained_part(load('out/last.pt'))) == []


def settings_of(path='out/last.pt'):
    return load(path)['config']


@pytest.fixture
def configured(run, workdir):
    """A run with grad_clip from a flag and weight_decay and beta2 from the config first.py; second.py differs."""
    (workdir / 'first.py').write_text('weight_decay = 0.3\nbeta2 = 0.9\ngrad_clip = 2.0\n', encoding='utf-8')
    (workdir / 'second.py').write_text('weight_decay = 0.2\ngrad_clip = 4.0\n', encoding='utf-8')
    assert run('train.py', *TINY, 'first.py', '--grad_clip=0.5').status == 0
    assert [settings_of()[name] for name in ('grad_clip', 'weight_decay', 'beta2')] == [0.5, 0.3, 0.9]

    def resume(*words):
        done = run('train.py', '--init_from=resume', '--device=cpu', '--max_iters=7', *words)
        assert done.status == 0 and settings_of()['init_from'] == 'resume', done.err  # it has saved
        return done
    return resume


def test_without_a_config_a_resumed_run_keeps_all_settings(configured):
    before, done = settings_of(), configured()
    changed = {name for name, value in settings_of().items() if value != before[name]}
    assert changed == {'init_from', 'max_iters', 'lr_decay_iters'}, done.err  # lr_decay_iters follows max_iters


def test_a_flag_of_the_original_command_overrides_a_config_on_resume(configured):
    done = configured('second.py')
    assert settings_of()['grad_clip'] == 0.5 and 'grad_clip' not in done.out


def test_other_settings_follow_the_config_and_the_defaults_given_on_resume(configured):
    done = configured('second.py')
    assert (settings_of()['weight_decay'], settings_of()['beta2']) == (0.2, 0.95)
    assert 'weight_decay: checkpoint 0.3, now 0.2' in done.out and 'beta2: checkpoint 0.9, now 0.95' in done.out


def test_a_flag_changes_a_flag_of_the_original_command(configured):
    done = configured('--grad_clip=0.25')
    assert settings_of()['grad_clip'] == 0.25 and 'grad_clip: checkpoint 0.5, now 0.25' in done.out


def test_a_flag_stays_in_force_over_two_resumes(configured):
    configured()
    configured('second.py', '--max_iters=8')
    assert settings_of()['grad_clip'] == 0.5


def test_every_changed_setting_is_printed(configured):
    before, done = settings_of(), configured('second.py', '--seed=3', '--eval_interval=5')
    printed = {line.split(':')[0] for line in done.out.splitlines() if ': checkpoint ' in line}
    changed = {name for name, value in settings_of().items() if value != before[name]}
    assert printed == changed - preflight.OF_THIS_PROCESS
    assert printed == {'max_iters', 'lr_decay_iters', 'weight_decay', 'beta2', 'seed', 'eval_interval'}


def test_a_changed_weight_decay_or_beta_reaches_the_optimizer(run, trained):  # fault 19
    done = resume(run, '--weight_decay=0', '--beta2=0.9')
    assert 'weight_decay: checkpoint 0.1, now 0.0' in done.out and 'beta2: checkpoint 0.95, now 0.9' in done.out
    groups = load('out/last.pt')['optimizer']['param_groups']
    assert [(g['weight_decay'], g['betas']) for g in groups] == [(0.0, (0.9, 0.9))] * 2


@pytest.fixture
def timed(run, workdir, monkeypatch):
    """timed(*words) trains with a config that sets max_minutes and context_warmup; returns the two settings used."""
    (workdir / 'timed.py').write_text('max_minutes = 5.0\ncontext_warmup = 0.6\n', encoding='utf-8')
    real, used = preflight.open_run, []

    def open_run(namespace):
        used.append(real(namespace))
        return used[-1]
    monkeypatch.setattr(preflight, 'open_run', open_run)

    def timed(*words):
        done = run('train.py', *words)
        assert done.status == 0, done.err
        return used[-1][0]['max_minutes'], used[-1][0]['context_warmup']
    return timed


def test_an_explicit_max_iters_switches_the_time_limit_of_a_config_off(timed):
    assert timed('timed.py', *TINY) == (0.0, 0.0)


@pytest.mark.parametrize('words', [[], ['timed.py'], ['--max_iters=8'], ['timed.py', '--max_iters=8']])
def test_an_explicit_max_iters_switches_it_off_on_resume_too(timed, words):
    timed('timed.py', *TINY)
    assert timed('--init_from=resume', '--device=cpu', *words) == (0.0, 0.0)


def test_explicit_limits_of_both_kinds_are_both_kept(timed):
    assert timed('timed.py', *TINY, '--max_minutes=9', '--context_warmup=0.5') == (9.0, 0.5)


# Resuming: data

def test_a_dataset_with_more_characters_is_refused(run, trained, workdir):  # fault 20
    write_dataset(workdir / 'data' / 'wide', list(range(20)) * 20, chars='abcdefghijklmnopqrst')
    done = resume(run, '--dataset=wide')
    assert done.status == 2 and "vocab_size 16, dataset 'wide' has 20" in done.last_error


def test_a_dataset_with_other_characters_is_refused(run, trained, workdir):  # fault 20
    write_dataset(workdir / 'data' / 'other', list(range(16)) * 20, chars='0123456789abcdef')
    done = resume(run, '--dataset=other')
    assert done.status == 2 and 'was trained with another tokenizer than dataset' in done.last_error


def test_more_text_in_the_same_characters_is_reported_and_trains(run, trained, workdir):  # fault 20
    write_dataset(workdir / 'data' / 'tiny', list(range(16)) * 40)
    done = resume(run)
    assert done.status == 0 and 'dataset tiny is not the data of the checkpoint (tiny): train.bin of 2,000' in done.out
    assert 'now 640 ' in done.out


@pytest.mark.parametrize('split', ['train', 'val'])
def test_other_text_of_the_same_size_is_reported_and_its_losses_are_not_compared(run, trained, workdir, split):
    state = load('out/last.pt')
    state['best_val_loss'] = 0.01  # of the old text; no model reaches it on the new one
    checkpoint.save('out/last.pt', state)
    path = workdir / 'data' / 'tiny' / f'{split}.bin'
    ids = {name: np.fromfile(workdir / 'data' / 'tiny' / f'{name}.bin', '<u2') for name in ('train', 'val')}
    ids[split] = ids[split][::-1]
    write_dataset(path.parent, ids['train'], ids['val'])
    done = resume(run)
    line = next(line for line in done.out.splitlines() if 'is not the data of the checkpoint' in line)
    assert f'{split}.bin of {len(ids[split]):,} tokens' in line and 'the best validation loss starts anew' in line
    assert line.count('.bin') == 1  # the other split is the same
    ended = load('out/last.pt')
    assert [step for step, *_ in ended['history']] == [8, 9] and ended['best_val_loss'] > 0.01
    assert load('out/ckpt.pt')['iter_num'] > 6  # the best on the new text


def test_the_same_data_under_resume_keeps_the_best_loss_and_the_history(run, trained):
    resume(run)
    assert [step for step, *_ in load('out/last.pt')['history']] == [0, 4, 6, 8, 9]


# A new option of the model is two lines: a field of GPTConfig and a setting of train.py

RUN_ALL = '''
import json, runpy, sys
sys.path.insert(0, '.')
statuses = []
for line in json.load(sys.stdin):
    sys.argv = line
    try:
        runpy.run_path(line[0], run_name='__main__')
        statuses.append(0)
    except SystemExit as end:
        print(end.code if isinstance(end.code, str) else '', file=sys.stderr, flush=True)
        statuses.append(end.code if isinstance(end.code, int) else 1 if end.code else 0)
print('statuses', statuses)
'''


@pytest.fixture(scope='module')
def with_reach(tmp_path_factory):
    """A copy of the program with an option `reach`; returns a function that runs commands there in one process."""
    copy = tmp_path_factory.mktemp('copy')
    for path in [*REPO.glob('*.py'), REPO / 'lib']:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, copy / path.name)
    for name, next_line, line in (('model.py', '    dropout: float', '    reach: int = 0  # positions seen\n'),
                                  ('train.py', 'dropout = ', 'reach = 0  # positions seen\n')):
        text = (copy / name).read_text(encoding='utf-8')
        assert text.count(f'\n{next_line}') == 1
        (copy / name).write_text(text.replace(f'\n{next_line}', f'\n{line}{next_line}'), encoding='utf-8')
    ids = np.cumsum(np.random.default_rng(0).integers(1, 4, 600)) % 16
    write_dataset(copy / 'data' / 'tiny', ids)

    def commands(*lines):
        done = subprocess.run([sys.executable, '-c', RUN_ALL], input=json.dumps([shlex.split(line) for line in lines]),
                              cwd=copy, capture_output=True, text=True)
        return done, copy
    return commands


def test_a_new_model_option_trains_resumes_samples_and_is_refused_where_it_contradicts(with_reach):
    tiny = ' '.join(TINY)
    done, copy = with_reach(f'train.py {tiny} --reach=6 --max_iters=2',
                            f'train.py {tiny} --init_from=resume --reach=4 --max_iters=3',  # refused
                            'train.py --init_from=resume --device=cpu --max_iters=3',
                            'sample.py --device=cpu --num_samples=1 --max_new_tokens=3 --start=a',
                            'evaluate.py --device=cpu', 'export.py --to=exported')  # GPT-2 has no such option
    assert done.stdout.splitlines()[-1] == 'statuses [0, 2, 0, 0, 0, 1]', done.stderr
    assert 'reach=4 but the checkpoint out/last.pt has 6; drop the flag' in done.stderr
    assert 'reach' in done.stderr.splitlines()[-1] and not (copy / 'exported' / 'config.json').exists()
    state = load(copy / 'out' / 'last.pt')
    assert state['model_args']['reach'] == 6 and state['iter_num'] == 3
