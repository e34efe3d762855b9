"""Fault 75: an optional service that fails is dropped with one warning; the run and its weights are as without it."""
import sys
import types

import pytest
import torch
from conftest import TINY
from kit import load


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
def test_a_wandb_that_fails_warns_once_and_changes_no_weight(run, workdir, monkeypatch, wandb):
    module = None
    if wandb:
        module = types.ModuleType('wandb')
        module.__getattr__ = lambda name: getattr(wandb, name)
    monkeypatch.setitem(sys.modules, 'wandb', module)
    run('train.py', *TINY, '--out_dir=plain')
    done = run('train.py', *TINY, '--out_dir=tracked', '--wandb_log=True')
    assert done.status == 0 and done.err.count('warning') == 1 and 'wandb' in done.err
    plain, tracked = load('plain/last.pt')['model'], load('tracked/last.pt')['model']
    assert all(torch.equal(plain[name], tracked[name]) for name in plain)


def test_without_wandb_log_the_package_is_never_imported(run, workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    assert run('train.py', *TINY).err == ''
