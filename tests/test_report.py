"""What a run tells: banner, lines, the bar at several widths, samples, loss.png, TensorBoard and wandb."""
import json
import os
import re
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from conftest import REPO, TINY
from kit import load

from configurator import resolve
from lib.training import log

posix = pytest.mark.skipif(os.name == 'nt', reason='pseudo-terminals are not on Windows')
DRAW_A_BAR = '''
from lib.training import log
bar = log.progress_bar(100)
for i in range(3):
    log.advance(bar, (i + 1) / 4, 12.345678, 11.234567, 1234567.8, 7000.0)
    bar.refresh()
    log.say(f'iter {i}: loss 1.0')
log.warn('mind this')
bar.close()
'''


def evaluations(out_dir='out'):
    return [r for r in log.read_log(f'{out_dir}/log.jsonl') if 'step' in r]


def on_a_terminal(code, columns):
    """Run Python code on a pseudo-terminal of so many columns; returns what the terminal received."""
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
        except OSError:  # Linux says so when the other end is closed
            break
        if not chunk:
            break
        received += chunk
    os.close(ours)
    assert process.wait() == 0, received
    return received.decode('utf-8')


@posix
@pytest.mark.parametrize('columns', [60, 200])
def test_the_bar_fits_the_terminal_and_says_all_of_it(columns):
    seen = on_a_terminal(DRAW_A_BAR, columns)
    drawn = [part for part in re.split(r'[\r\n]', seen) if '75%|' in part]
    assert drawn and all(len(part) <= columns and part.rstrip().endswith('4d20h left') and
                         'loss 12.346, best 11.235, 1.2M tok/s' in part for part in drawn), drawn


@posix
def test_the_bar_fills_a_wide_terminal():
    drawn = [part for part in re.split(r'[\r\n]', on_a_terminal(DRAW_A_BAR, 200)) if '75%|' in part]
    assert len(drawn[0]) > 190


@posix
def test_lines_and_warnings_stand_whole_beside_the_bar():
    lines = [line.split('\r')[-1] for line in on_a_terminal(DRAW_A_BAR, 80).split('\r\n')]
    assert [line for line in lines if line.startswith(('iter', 'warning'))] == [
        'iter 0: loss 1.0', 'iter 1: loss 1.0', 'iter 2: loss 1.0', 'warning: mind this']


def test_there_is_no_bar_in_a_pipe():
    done = subprocess.run([sys.executable, '-c', DRAW_A_BAR], capture_output=True, cwd=REPO, encoding='utf-8')
    assert done.stdout.splitlines() == [f'iter {i}: loss 1.0' for i in range(3)]
    assert done.stderr == 'warning: mind this\n'


@posix
def test_counting_bars_tell_how_many_there_are_on_a_terminal():
    seen = on_a_terminal('from lib.training import log\nfor _ in log.watched(range(3), 3, "windows"): pass', 80)
    assert 'windows:   0%|' in seen and '0/3 [' in seen


@pytest.mark.parametrize('number, text', [(7, '7'), (949.6, '950'), (999.9, '1.0k'), (9949, '9.9k'), (9960, '10k'),
                                          (123_456, '123k'), (999_600, '1.0M'), (2.5e7, '25M')])
def test_speeds_are_short(number, text):
    assert log.short(number) == text


@pytest.mark.parametrize('minutes, text', [(0.01, '1s'), (0.75, '45s'), (12.5, '12m30s'), (302, '5h02m'),
                                           (4560, '3d04h'), (59.999, '1h00m')])
def test_durations_are_said_as_people_say_them(minutes, text):
    assert log.duration(minutes) == text


def test_an_unknown_mfu_is_left_out():
    record = {'iter': 3, 'loss': 1.0, 'tok_s': 5e3, 'mfu': None}
    assert log.iter_line(record, 0.01, 2.0) == 'iter 3: loss 1.0000, time 10.00ms, tok/s 5,000, eta 2m00s'


def test_the_recipe_is_the_config_files_in_their_order():
    argv = ['config/train_shakespeare_char.py', '--seed=1', 'config/gpt2_classic.py']
    scope = {'__file__': str(REPO / 'train.py')}
    exec((REPO / 'train.py').read_text(encoding='utf-8').split('def lr_factor')[0], scope)
    defaults = {k: v for k, v in scope.items() if type(v) in (int, float, bool, str) and not k.startswith('_')}
    settings = resolve(defaults, argv, early={'device': lambda: 'cpu'})
    assert log.recipe(settings, argv) == 'config/train_shakespeare_char.py, config/gpt2_classic.py'


def test_a_run_without_a_config_says_defaults(run, workdir):
    assert 'recipe: defaults\n' in run('train.py', *TINY).out


def test_the_banner_tells_machine_size_and_epochs(run, workdir):
    out = run('train.py', *TINY).out
    assert 'device: cpu, float32 (as asked), compile off\n' in out
    assert 'tokens per iteration: 32 (62 iterations an epoch; 6 make 0.10 epochs)\n' in out


def test_a_run_by_the_clock_promises_no_epochs():
    assert log.tokens_line(32, 2000, 0) == 'tokens per iteration: 32 (62 iterations an epoch)'


def test_a_cpu_run_of_hours_is_told_of_a_short_one_once(run, workdir):
    done = run('train.py', *TINY, '--peak_tflops=1e-9')  # as if the machine were that slow
    assert done.err.count('--max_minutes=3') == 1 and 'config/train_shakespeare_char.py' in done.err


@pytest.mark.parametrize('minutes, long', [(30, False), (30.1, True)])
def test_a_run_is_long_from_half_an_hour_on(minutes, long, capsys):
    assert log.warn_if_long(minutes) == long == bool(capsys.readouterr().err)


def test_a_short_cpu_run_is_not_warned_of(run, workdir):
    assert run('train.py', *TINY).err == ''


def test_a_run_with_a_time_limit_is_not_warned_of(run, workdir):
    assert run('train.py', *TINY, '--peak_tflops=1e-9', '--max_minutes=5').err == ''


def test_samples_change_no_weight_and_no_loss(run, workdir):
    flags = [*TINY, '--dropout=0.2', '--eval_interval=2']
    run('train.py', *flags, '--out_dir=without')
    run('train.py', *flags, '--out_dir=with', '--sample_interval=1')
    without, with_ = load('without/last.pt')['model'], load('with/last.pt')['model']
    assert all(torch.equal(without[name], with_[name]) for name in without)
    assert [r['val_loss'] for r in evaluations('without')] == [r['val_loss'] for r in evaluations('with')]


def test_a_sample_comes_every_so_many_evaluations_and_at_the_end(run, workdir):
    run('train.py', *TINY, '--eval_interval=1', '--sample_interval=2')
    assert [r['step'] for r in evaluations() if 'sample' in r] == [1, 3, 5, 6]


def test_a_printed_sample_cannot_be_taken_for_a_line_of_the_log(run, workdir):
    done = run('train.py', *TINY, '--sample_interval=1')
    sample = evaluations()[-1]['sample']
    assert len(sample) == 200 and f'    | {sample}' in done.out


def test_updates_and_evaluations_log_the_tokens_seen(run, workdir):
    run('train.py', *TINY)
    records = log.read_log('out/log.jsonl')
    assert [r['tokens'] for r in records if 'iter' in r] == [32, 64, 96, 128, 160, 192]
    assert [r['tokens'] for r in records if 'step' in r] == [0, 128, 192]


def test_a_finished_run_leaves_its_curves(run, workdir):
    pytest.importorskip('matplotlib')
    done = run('train.py', *TINY)
    assert 'loss curves are in out/loss.png' in done.out and (workdir / 'out/loss.png').stat().st_size > 1000


def test_without_matplotlib_a_run_ends_as_ever(run, workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    done = run('train.py', *TINY)
    assert done.status == 0 and done.err == '' and not (workdir / 'out/loss.png').exists()


def test_a_drawing_that_fails_is_one_warning(run, workdir, monkeypatch):
    import plot

    def fail(*_):
        raise ValueError('no such font')
    monkeypatch.setattr(plot, 'draw', fail)
    done = run('train.py', *TINY)
    assert done.status == 0 and done.err == 'warning: no loss.png (ValueError: no such font)\n'


def test_reading_a_log_passes_over_what_a_kill_broke(tmp_path):
    (tmp_path / 'log.jsonl').write_text('{"iter": 0}\n{"iter": 1}\n{"it', encoding='utf-8')
    assert log.read_log(tmp_path / 'log.jsonl') == [{'iter': 0}, {'iter': 1}]


def test_numbers_that_are_none_become_null(tmp_path):
    log.append_log(tmp_path / 'log.jsonl', {'iter': 0, 'loss': float('nan')})
    assert json.loads((tmp_path / 'log.jsonl').read_text(encoding='utf-8')) == {'iter': 0, 'loss': None}


# TensorBoard's own reader

def tensorboard_events(folder):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    events = accumulator.EventAccumulator(str(folder), size_guidance={accumulator.TENSORS: 0})
    return events.Reload()


def test_tensorboard_reads_back_what_the_log_has(run, workdir):
    pytest.importorskip('tensorboard')
    run('train.py', *TINY, '--tensorboard_log=True', '--sample_interval=1')
    events = tensorboard_events('out/tensorboard')
    values = {e.step: e.value for e in events.Scalars('eval/val_loss')}
    assert values == pytest.approx({r['step']: r['val_loss'] for r in evaluations()})
    assert {'train/loss', 'train/lr', 'train/grad_norm', 'train/tok_s', 'train/mfu', 'eval/val_bpb'} <= set(
        events.Tags()['scalars'])
    assert events.Tags()['tensors'] == ['eval/sample/text_summary'] and events.Tags()['images'] == ['curves']


def test_tensorboard_shows_each_step_once_after_a_kill_and_resuming(run, workdir):
    pytest.importorskip('tensorboard')
    flags = [*TINY, '--tensorboard_log=True', '--init_from=auto']
    run('train.py', *flags, '--max_iters=4')
    shutil.copy('out/last.pt', 'iter4.pt')
    run('train.py', *flags)
    for name in ('ckpt.pt', 'last.prev.pt'):
        os.remove(f'out/{name}')
    os.replace('iter4.pt', 'out/last.pt')  # as if killed behind iter 5, before it was saved
    assert 'resuming from iter 4' in run('train.py', *flags).out
    assert [e.step for e in tensorboard_events('out/tensorboard').Scalars('train/loss')] == [0, 1, 2, 3, 4, 5]


def test_a_new_run_in_an_old_folder_begins_its_own_curves(run, workdir):
    pytest.importorskip('tensorboard')
    run('train.py', *TINY, '--tensorboard_log=True')
    run('train.py', *TINY, '--tensorboard_log=True', '--max_iters=2')
    assert [len(tensorboard_events(f'out/{old}tensorboard').Scalars('train/loss')) for old in ('', 'old-1/')] == [2, 6]


# wandb: the real package, without a network

def wandb_records(path):
    """Yield the records of a .wandb file: wandb's own protobuf in LevelDB's log format, blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record
    raw = path.read_bytes()
    place, whole = 7, b''  # behind the file's header
    while place + 7 <= len(raw):
        rest = 32768 - place % 32768
        if rest < 7:  # too short for a chunk's head
            place += rest
            continue
        _, length, kind = struct.unpack_from('<IHB', raw, place)
        whole += raw[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, or the last of several
            yield Record.FromString(whole)
            whole = b''


def wandb_history(path):
    """Return a .wandb file's history as {step: {name: value}}."""
    steps = {}
    for record in wandb_records(path):
        if record.WhichOneof('record_type') == 'history':
            items = {item.key or '/'.join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            steps.setdefault(items.get('_step', record.history.step.num), {}).update(items)
    return steps


@pytest.fixture
def wandb_alone(workdir, monkeypatch):
    """wandb in an empty home, with no key, reading its environment afresh; returns the working directory."""
    wandb = pytest.importorskip('wandb')
    for name in [name for name in os.environ if name.startswith('WANDB_')]:
        monkeypatch.delenv(name)
    for name in ('HOME', 'USERPROFILE', 'XDG_CONFIG_HOME', 'XDG_CACHE_HOME'):
        monkeypatch.setenv(name, str(workdir))
    monkeypatch.setenv('WANDB_CONSOLE', 'off')  # pytest has the streams
    yield workdir
    wandb.teardown()


def wandb_files(workdir):
    return sorted(workdir.glob('out/wandb/*run-*/*.wandb'), key=lambda path: path.stat().st_mtime)


def test_wandb_offline_reads_back_what_the_log_has_and_a_resumed_run_is_the_same_run(run, wandb_alone, monkeypatch):
    pytest.importorskip('matplotlib')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    flags = [*TINY, '--wandb_log=True', '--sample_interval=1']
    first = run('train.py', *flags, '--max_iters=4')
    second = run('train.py', *flags, '--init_from=resume')
    assert 'is off' not in first.err + second.err
    files = wandb_files(wandb_alone)
    assert len(files) == 2 and len({path.stem for path in files}) == 1  # run-ID.wandb
    history = {}
    for path in files:
        for step, items in wandb_history(path).items():
            history.setdefault(step, {}).update(items)
    records = log.read_log('out/log.jsonl')
    assert [history[r['iter']]['train/loss'] for r in records if 'iter' in r] == pytest.approx(
        [r['loss'] for r in records if 'iter' in r])
    assert [history[s]['eval/val_loss'] for s in (0, 4, 6)] == pytest.approx([r['val_loss'] for r in records
                                                                              if 'step' in r])
    assert {'train/lr', 'train/grad_norm', 'train/tok_s', 'train/mfu'} <= set(history[1])
    assert history[4]['eval/val_bpb'] > 0
    assert history[6]['eval/sample/_type'] == 'html-file' and history[6]['curves/_type'] == 'image-file'


def test_wandb_without_a_key_is_one_warning_at_once(run, wandb_alone, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'online')
    done = run('train.py', *TINY, '--wandb_log=True')
    assert done.status == 0 and done.err.count('warning: wandb is off') == 1 and 'wandb login' in done.err


@pytest.mark.slow
def test_wandb_without_a_network_is_one_warning_within_its_patience(run, wandb_alone, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'online')
    monkeypatch.setenv('WANDB_API_KEY', '0' * 40)
    monkeypatch.setenv('WANDB_BASE_URL', 'http://127.0.0.1:9')  # the port of nothing
    done = run('train.py', *TINY, '--wandb_log=True')
    assert done.status == 0 and done.err.count('warning: wandb is off') == 1
