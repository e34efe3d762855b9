"""Faults 60 to 69, and the rows of users.md on settings: every mistake is one line, told before work begins."""
import pytest
from conftest import TINY


def errors(run, *flags):
    """Run train.py; return its error lines, having checked that it ended before the model was built."""
    done = run('train.py', *TINY, *flags)
    assert done.status == 2 and 'number of parameters' not in done.out and 'Traceback' not in done.err
    return [line for line in done.err.splitlines() if line.startswith('error: ')]


@pytest.mark.parametrize('flags, told', [
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
    (['--block_size=0'], 'block_size must be at least 1, got 0'),
    (['--learning_rate=nan'], 'learning_rate must be at least 0, got nan'),
    (['--dropout=1'], 'dropout must be at least 0 and below 1, got 1.0'),
    (['--beta2=1'], 'beta2 must be at least 0 and below 1, got 1.0'),
    (['--warmup_iters=6', '--lr_decay_iters=6'], 'warmup_iters must be below lr_decay_iters'),  # 66
    (['--context_warmup=2'], 'context_warmup must be at least 0 and at most 1, got 2.0'),
    (['--context_warmup=0.5', '--block_size=6'], 'context_warmup needs a block_size divisible by 4'),
    (['--n_embd=8', '--n_head=3'], 'n_embd=8 is not divisible by n_head=3'),  # 67
    (['--device=cuda'], 'no CUDA here; use --device=cpu'),  # 68
    (['--device=gpu'], "device='gpu': expected cpu, mps, cuda or cuda:N"),
    (['--dtype=float16'], 'dtype=float16 needs the gradient scaling that only CUDA has here'),
    (['--optimizer=adam'], "optimizer must be one of adamw, muon; got 'adam'"),
    (['--eval_only=True'], 'eval_only needs a model'),
    (['nowhere.py'], 'config file nowhere.py not found'),
])
def test_a_mistake_is_named_with_the_way_out(run, workdir, monkeypatch, flags, told):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    assert any(told in line for line in errors(run, *flags))


def test_a_typo_in_a_config_file_names_file_line_and_nearest(run, workdir):  # fault 60
    (workdir / 'my.py').write_text('batch_size = 2\nlearning_rat = 123.0\n', encoding='utf-8')
    assert errors(run, 'my.py')[-1] == 'error: my.py:2: unknown setting learning_rat; did you mean learning_rate?'


def test_helpers_in_a_config_file_are_left_alone(run, workdir):  # users.md 16
    (workdir / 'my.py').write_text('import time\n_x = 2\ndef f(n):\n    return n * _x\nmax_iters = f(1)\n',
                                   encoding='utf-8')
    flags = [flag for flag in TINY if not flag.startswith('--max_iters')]
    assert 'step 2:' in run('train.py', *flags, 'my.py').out


@pytest.mark.parametrize('flags', [['--learning_rate=1', '--dropout=0', '--grad_clip=1'], ['--seed', '3'], ['--bias'],
                                   ['--bias=true', '--compile=no'], ['--eval-interval=2'],
                                   ['--wandb_run_name=a=b=c'], ['--wandb_run_name=42']])
def test_the_spellings_people_use_are_understood(run, workdir, flags):  # fault 62, users.md 8, 15, 38
    assert run('train.py', *TINY, '--max_iters=1', *flags).status == 0


def test_all_mistakes_are_told_at_once(run, workdir):  # fault 69
    (workdir / 'my.py').write_text('epochs = 3\n', encoding='utf-8')
    (workdir / 'out').touch()
    told = errors(run, '--n_head=3', '--dtype=bf16', 'my.py', '--typo=1', '--dataset=nope')
    wanted = ('--typo', 'my.py:1', 'dtype', 'n_head=3', 'data/nope', 'out_dir')
    assert all(any(want in line for line in told) for want in wanted), told


@pytest.mark.parametrize('flags', [['--warmup_iters=0'], ['--warmup_iters=50'], ['--warmup_iters=6'],
                                   ['--lr_decay_iters=0'], ['--decay_lr=False'], ['--min_lr=0', '--learning_rate=0'],
                                   ['--lr_schedule=wsd', '--cooldown_frac=1'], ['--grad_clip=0'], ['--max_iters=0'],
                                   ['--context_warmup=1'], ['--context_warmup=0.1', '--warmup_iters=0']])
def test_zero_and_odd_lengths_of_the_schedule_train(run, workdir, flags):  # fault 66, users.md 35
    done = run('train.py', *TINY, *flags)
    assert done.status == 0, done.err
