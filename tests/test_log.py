"""lib/training/log.py: printed lines, log.jsonl and the progress bar; and what train.py prints and logs with them."""
import json
import os
import re
import struct
import subprocess
import sys

import pytest
import torch
from conftest import REPO, TINY
from kit import load

from configurator import resolve
from lib.training import log, trial

posix = pytest.mark.skipif(os.name == 'nt', reason='pseudo-terminals are not on Windows')
DRAW_A_BAR = '''
from lib.training import log
bar = log.progress_bar(100)
for i in range(3):
    log.update_bar(bar, (i + 1) / 4, 12.345678, 11.234567, 1234567.8, 7000.0)
    bar.refresh()
    log.say(f'iter {i}: loss 1.0')
log.warn('mind this')
bar.close()
'''


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Drawing loss.png takes longer than these runs; test_curves.py draws it."""
    monkeypatch.setitem(sys.modules, 'matplotlib', None)


SHARED = {}  # what one run made, for all tests of this file


@pytest.fixture
def finished(run, workdir):
    """The Outcome of one tiny run with a sample at each evaluation, and its log; trained once for all tests."""
    if not SHARED:
        SHARED['done'] = run('train.py', *TINY, '--sample_interval=1')
        SHARED['log'] = log.read_log('out/log.jsonl')
    return SHARED['done'], SHARED['log']


def evaluations(out_dir='out'):
    return [r for r in log.read_log(f'{out_dir}/log.jsonl') if 'step' in r]


def on_a_terminal(code, columns):
    """Run Python code on a pseudo-terminal with this many columns; returns the output that the terminal received."""
    import fcntl
    import pty
    import termios
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
    env = {**os.environ, 'PYTHONPATH': str(REPO), 'PYTHONIOENCODING': 'utf-8'}
    env.pop('COLUMNS', None)
    process = subprocess.Popen([sys.executable, '-c', code], stdout=theirs, stderr=theirs, stdin=theirs, env=env)
    os.close(theirs)
    received = b''
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # Linux raises it when the other end is closed
            break
        if not chunk:
            break
        received += chunk
    os.close(ours)
    assert process.wait() == 0, received
    return received.decode('utf-8')


@posix
@pytest.mark.parametrize('columns', [60, 200])
def test_the_bar_fits_the_terminal_with_all_its_text(columns):
    seen = on_a_terminal(DRAW_A_BAR, columns)
    drawn = [part for part in re.split(r'[\r\n]', seen) if '75%|' in part]
    assert drawn and all(len(part) <= columns and part.rstrip().endswith('4d20h left') and
                         'loss 12.346, best 11.235, 1.23M tok/s' in part for part in drawn), drawn


@posix
def test_the_bar_fills_a_wide_terminal():
    drawn = [part for part in re.split(r'[\r\n]', on_a_terminal(DRAW_A_BAR, 200)) if '75%|' in part]
    assert len(drawn[0]) > 190


@posix
def test_lines_and_warnings_are_not_broken_by_the_bar():
    lines = [line.split('\r')[-1] for line in on_a_terminal(DRAW_A_BAR, 80).split('\r\n')]
    assert [line for line in lines if line.startswith(('iter', 'warning'))] == [
        'iter 0: loss 1.0', 'iter 1: loss 1.0', 'iter 2: loss 1.0', 'warning: mind this']


def test_there_is_no_bar_in_a_pipe():
    done = subprocess.run([sys.executable, '-c', DRAW_A_BAR], capture_output=True, cwd=REPO, encoding='utf-8')
    assert done.stdout.splitlines() == [f'iter {i}: loss 1.0' for i in range(3)]
    assert done.stderr == 'warning: mind this\n'


@posix
def test_a_counting_bar_shows_its_total_on_a_terminal():
    seen = on_a_terminal('from lib.training import log\nfor _ in log.progress(range(3), 3, "windows"): pass', 80)
    assert 'windows:   0%|' in seen and '0/3 [' in seen


@pytest.mark.parametrize('number, text', [
    (0, '0'), (0.006, '0.006'), (7, '7'), (949.6, '950'), (999.4, '999'), (999.6, '1k'), (1000, '1k'), (9949, '9.95k'),
    (123_456, '123k'), (999_600, '1M'), (2.5e6, '2.5M'), (2.5e7, '25M'), (2e9, '2B')])
def test_human_numbers_have_three_digits_and_a_unit(number, text):
    assert log.human_number(number) == text


@pytest.mark.parametrize('minutes, text', [(0.01, '1s'), (0.75, '45s'), (12.5, '12m30s'), (302, '5h02m'),
                                           (4560, '3d04h'), (59.999, '1h00m')])
def test_durations_have_their_two_largest_units(minutes, text):
    assert log.duration(minutes) == text


def test_an_unknown_mfu_is_left_out_of_the_line():
    record = {'iter': 3, 'loss': 1.0, 'tok_s': 5e3, 'mfu': None}
    assert log.iter_line(record, 0.01, 2.0) == 'iter 3: loss 1.0000, time 10.00ms, tok/s 5,000, eta 2m00s'


def test_the_recipe_is_the_config_files_in_their_order():
    argv = ['config/train_shakespeare_char.py', '--seed=1', 'config/gpt2_classic.py']
    scope = {'__file__': str(REPO / 'train.py')}
    exec((REPO / 'train.py').read_text(encoding='utf-8').split('def lr_factor')[0], scope)
    defaults = {k: v for k, v in scope.items() if type(v) in (int, float, bool, str) and not k.startswith('_')}
    settings = resolve(defaults, argv, early={'device': lambda: 'cpu'})
    assert log.recipe(settings, argv) == 'config/train_shakespeare_char.py, config/gpt2_classic.py'


def test_a_run_without_a_config_prints_defaults_as_its_recipe(finished):
    assert "recipe: defaults; GPT-2's architecture\n" in finished[0].out


def test_the_banner_shows_device_dtype_and_epochs(finished):
    assert 'device: cpu, float32 (as asked), compile off\n' in finished[0].out
    assert 'tokens per iteration: 32 (62 iterations per epoch; 6 iterations are 0.10 epochs)\n' in finished[0].out


def test_the_banner_of_a_run_with_a_time_limit_has_no_number_of_epochs():
    assert log.tokens_line(32, 2000, 0) == 'tokens per iteration: 32 (62 iterations per epoch)'


def test_a_run_of_hours_is_warned_of_once_and_a_short_one_is_named(run, workdir, monkeypatch):
    monkeypatch.setattr(trial, 'probe', lambda *_: (3600.0, 0))  # as if a micro-batch took an hour
    done = run('train.py', *TINY)
    assert done.err.count('--max_minutes=3') == 1 and 'config/train_shakespeare_char.py' in done.err


def test_a_short_cpu_run_prints_no_warning(finished):
    assert finished[0].err == ''


def test_a_run_with_a_time_limit_is_not_called_long(run, workdir, monkeypatch):
    monkeypatch.setattr(trial, 'probe', lambda *_: (3600.0, 0))
    assert run('train.py', *TINY, '--max_minutes=500').err == ''


def test_samples_change_no_weight_and_no_loss(run, workdir):
    flags = [*TINY, '--dropout=0.2', '--eval_interval=2']
    run('train.py', *flags, '--out_dir=without')
    run('train.py', *flags, '--out_dir=with', '--sample_interval=1')
    without, with_ = load('without/last.pt')['model'], load('with/last.pt')['model']
    assert all(torch.equal(without[name], with_[name]) for name in without)
    assert [r['val_loss'] for r in evaluations('without')] == [r['val_loss'] for r in evaluations('with')]


def test_samples_are_written_at_every_nth_evaluation_and_at_the_end(run, workdir):
    run('train.py', *TINY, '--eval_interval=1', '--sample_interval=2')
    assert [r['step'] for r in evaluations() if 'sample' in r] == [1, 3, 5, 6]


def test_a_printed_sample_is_indented_so_that_it_cannot_look_like_a_line_of_the_log(finished):
    sample = finished[1][-1]['sample']
    assert len(sample) == 200 and f'    | {sample}' in finished[0].out


def test_updates_and_evaluations_log_the_tokens_seen(finished):
    assert [r['tokens'] for r in finished[1] if 'iter' in r] == [32, 64, 96, 128, 160, 192]
    assert [r['tokens'] for r in finished[1] if 'step' in r] == [0, 128, 192]


def test_evaluations_log_which_validation_data_they_read(finished, workdir):
    meta = json.loads((workdir / 'data/tiny/meta.json').read_text(encoding='utf-8'))
    assert {r['val_data'] for r in finished[1] if 'step' in r} == {meta['splits']['val']['sha256'][:12]}


def test_numbers_that_json_lacks_become_null(tmp_path):
    log.append_log(tmp_path / 'log.jsonl', {'iter': 0, 'loss': float('nan')})
    assert json.loads((tmp_path / 'log.jsonl').read_text(encoding='utf-8')) == {'iter': 0, 'loss': None}


def test_a_resumed_run_keeps_updates_before_it_and_evaluations_up_to_the_last_one(tmp_path):
    records = [{'iter': 3}, {'step': 4}, {'iter': 4}, {'step': 5}]
    for record in records:
        log.append_log(tmp_path / 'log.jsonl', record)
    log.trim_log(tmp_path / 'log.jsonl', iter_num=4, evaluated=4)
    assert log.read_log(tmp_path / 'log.jsonl') == records[:2]


# Faults

def test_incomplete_lines_of_a_log_are_skipped(tmp_path):
    (tmp_path / 'log.jsonl').write_text('{"iter": 0}\n{"iter": 1}\n{"it', encoding='utf-8')
    assert log.read_log(tmp_path / 'log.jsonl') == [{'iter': 0}, {'iter': 1}]


def test_a_log_that_cannot_be_written_is_one_warning(tmp_path, capsys):
    for i in range(2):
        log.append_log(tmp_path, {'iter': i})  # a folder
    assert capsys.readouterr().err.count('warning: could not write') == 1


def test_a_clock_that_is_set_back_does_not_stop_the_bar(monkeypatch):
    import io
    import time

    from lib.training import log
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(log.sys, 'stderr', screen)
    bar = log.progress_bar(100)
    now = time.time
    monkeypatch.setattr(time, 'time', lambda: now() - 3600)
    assert 0 <= bar.format_dict['elapsed'] < 60
    bar.close()


def test_a_disk_that_is_full_in_the_middle_of_a_line_leaves_whole_lines(tmp_path, monkeypatch):
    import resource
    import signal

    from lib.training import log
    from lib.training.log import append_log, read_log
    monkeypatch.setattr(log, 'warn_once', lambda line: None)  # the limit would hold for captured lines, too
    path, before = tmp_path / 'log.jsonl', resource.getrlimit(resource.RLIMIT_FSIZE)
    append_log(path, {'iter': 0})
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
    try:
        append_log(path, {'iter': 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    append_log(path, {'iter': 2})
    assert [record['iter'] for record in read_log(path)] == [0, 2]
    assert path.read_text(encoding='utf-8').count('\n') == 2


def test_a_line_that_somebody_wrote_into_the_log_stays(tmp_path):
    path = tmp_path / 'log.jsonl'
    path.write_text('{"iter": 0, "loss": 2.0}\n# a good run\n{"iter": 1, "loss": 1.0}\n{"ite', encoding='utf-8')
    log.trim_log(path, 1, 0)
    assert path.read_text(encoding='utf-8') == '{"iter": 0, "loss": 2.0}\n# a good run\n'
