"""lib/training/trackers.py: TensorBoard and wandb, read back from the files that their own packages write."""
import json
import os
import shutil
import struct
import sys
import types

import pytest
import torch
from conftest import TINY
from kit import load

from lib.training import log, trackers


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)


SHARED = {}  # what one run made, for all tests of this file


@pytest.fixture
def plain_weights(run, workdir):
    """The weights of a tiny run without a tracker, trained once for all tests."""
    if not SHARED:
        run('train.py', *TINY, '--out_dir=plain')
        SHARED.update(load('plain/last.pt')['model'])
    return SHARED


def evaluations(out_dir='out'):
    return [r for r in log.read_log(f'{out_dir}/log.jsonl') if 'step' in r]


# TensorBoard's own reader

def tensorboard_events(folder):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    events = accumulator.EventAccumulator(str(folder), size_guidance={accumulator.TENSORS: 0})
    return events.Reload()


@pytest.mark.pictures
def test_tensorboard_shows_the_numbers_of_the_log(run, workdir):
    pytest.importorskip('tensorboard')
    run('train.py', *TINY, '--tensorboard_log=True', '--sample_interval=1', '--peak_tflops=1')
    events = tensorboard_events('out/tensorboard')
    values = {e.step: e.value for e in events.Scalars('eval/val_loss')}
    assert values == pytest.approx({r['step']: r['val_loss'] for r in evaluations()})
    assert {'train/loss', 'train/lr', 'train/grad_norm', 'train/tok_s', 'train/mfu', 'eval/val_bpb'} <= set(
        events.Tags()['scalars'])
    assert events.Tags()['tensors'] == ['eval/sample/text_summary'] and events.Tags()['images'] == ['curves']


def test_tensorboard_shows_each_step_once_after_a_kill_and_a_resume(run, workdir, without_pictures):
    pytest.importorskip('tensorboard')
    flags = [*TINY, '--tensorboard_log=True', '--init_from=auto']
    run('train.py', *flags, '--max_iters=4')
    shutil.copy('out/last.pt', 'iter4.pt')
    run('train.py', *flags)
    for name in ('ckpt.pt', 'last.prev.pt'):
        os.remove(f'out/{name}')
    os.replace('iter4.pt', 'out/last.pt')  # as if killed after iter 5, before it was saved
    assert 'resuming from iter 4' in run('train.py', *flags).out
    assert [e.step for e in tensorboard_events('out/tensorboard').Scalars('train/loss')] == [0, 1, 2, 3, 4, 5]


def test_a_new_run_in_an_old_folder_has_its_own_tensorboard_curves(run, workdir, without_pictures):
    pytest.importorskip('tensorboard')
    run('train.py', *TINY, '--tensorboard_log=True')
    run('train.py', *TINY, '--tensorboard_log=True', '--max_iters=2')
    assert [len(tensorboard_events(f'out/{old}tensorboard').Scalars('train/loss')) for old in ('', 'old-1/')] == [2, 6]


# wandb: the real package, without a network

def wandb_records(path):
    """Yield the records of a .wandb file: wandb's own protobuf in LevelDB's log format, blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record
    raw = path.read_bytes()
    place, whole = 7, b''  # after the file's header
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


@pytest.mark.pictures
def test_wandb_has_the_numbers_of_the_log_and_a_resumed_run_is_the_same_run(run, wandb_alone, monkeypatch):
    pytest.importorskip('matplotlib')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    flags = [*TINY, '--wandb_log=True', '--sample_interval=1', '--peak_tflops=1']
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


def test_wandb_without_a_key_is_one_warning_at_once(run, wandb_alone, monkeypatch, without_pictures):
    monkeypatch.setenv('WANDB_MODE', 'online')
    done = run('train.py', *TINY, '--wandb_log=True')
    assert done.status == 0 and done.err.count('warning: wandb is off') == 1 and 'wandb login' in done.err


@pytest.mark.slow
def test_wandb_without_a_network_is_one_warning_after_its_timeout(run, wandb_alone, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'online')
    monkeypatch.setenv('WANDB_API_KEY', '0' * 40)
    monkeypatch.setenv('WANDB_BASE_URL', 'http://127.0.0.1:9')  # the port of nothing
    done = run('train.py', *TINY, '--wandb_log=True')
    assert done.status == 0 and done.err.count('warning: wandb is off') == 1


# Faults

class Broken:
    """A wandb whose init or log raises."""

    def __init__(self, init=None, log=None, finish=None):
        self.errors = {'init': init, 'log': log, 'finish': finish}
        self.id = self.name = self.url = 'x'

    def _maybe(self, call):
        if self.errors[call]:
            raise self.errors[call]

    def init(self, *args, **kwargs):
        self._maybe('init')
        return self

    def log(self, *args, **kwargs):
        self._maybe('log')

    def finish(self, *args, **kwargs):
        self._maybe('finish')

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.mark.parametrize('wandb', [
    None, Broken(init=RuntimeError('api_key not configured (no-tty)')), Broken(init=SystemExit(1)),
    Broken(init=KeyError('x')), Broken(log=ConnectionError('broken pipe')), Broken(finish=OSError('no route to host'))],
    ids=['missing', 'no key', 'exit', 'bug', 'log', 'finish'])
def test_a_wandb_that_fails_warns_once_and_changes_no_weight(run, workdir, monkeypatch, plain_weights, without_pictures,
                                                            wandb):
    module = None
    if wandb:
        module = types.ModuleType('wandb')
        module.__getattr__ = lambda name: getattr(wandb, name)
    monkeypatch.setitem(sys.modules, 'wandb', module)
    done = run('train.py', *TINY, '--wandb_log=True')
    assert done.status == 0 and done.err.count('warning') == 1 and 'wandb' in done.err
    tracked = load('out/last.pt')['model']
    assert all(torch.equal(plain_weights[name], tracked[name]) for name in tracked)


def test_without_wandb_log_the_package_is_never_imported(run, workdir, monkeypatch, without_pictures):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    assert run('train.py', *TINY).err == ''


@pytest.mark.parametrize('name, modules', [('wandb', ['wandb']),
                                           ('tensorboard', ['tensorboard', 'torch.utils.tensorboard'])])
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path, capsys, name, modules):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    flags = {'wandb_log': False, 'wandb_project': 'x', 'wandb_run_name': 'x', 'tensorboard_log': False}
    trackers.open_trackers({**flags, f'{name}_log': True}, tmp_path)
    assert f'; pip install {name}' in capsys.readouterr().err


@pytest.mark.parametrize('enabled', [True, False])
def test_only_an_enabled_rank_opens_a_service(monkeypatch, tmp_path, enabled):
    opened = []
    monkeypatch.setattr(trackers, 'open_tensorboard', lambda *args: opened.append(args) or (print, print, ''))
    trackers.open_trackers({'wandb_log': False, 'tensorboard_log': True}, tmp_path, enabled=enabled)
    assert len(opened) == enabled
