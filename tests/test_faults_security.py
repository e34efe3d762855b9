"""Faults 54 to 59: data and checkpoints are never code."""
import json
import os
import pickle
import re

import pytest
import torch
from conftest import TINY
from kit import REPO

from configurator import UserError
from lib.text import dataset
from lib.weights import checkpoint


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def harm(tmp_path):
    return tmp_path / 'harmed'


READERS = {
    'train.py resume': ['train.py', *TINY, '--init_from=resume'],
    'train.py auto': ['train.py', *TINY, '--init_from=auto'],
    'train.py eval_only': ['train.py', *TINY, '--init_from=resume', '--eval_only=True'],
    'sample.py': ['sample.py', '--device=cpu', '--num_samples=1', '--max_new_tokens=1'],
}


@pytest.mark.parametrize('trust', ['0', '1'])
@pytest.mark.parametrize('reader', READERS)
def test_a_checkpoint_with_a_payload_is_refused_by_every_reader(run, workdir, harm, monkeypatch, reader, trust):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', trust)  # faults 54 and 55
    (workdir / 'out').mkdir()
    torch.save({'model': {}, 'model_args': {}, 'config': Payload(harm)}, workdir / 'out' / 'ckpt.pt')
    done = run(*READERS[reader])
    assert done.status and not harm.exists()
    assert 'out/ckpt.pt holds Python objects other than tensors and plain values; refusing' in done.last_error


def test_the_payload_works_so_that_the_tests_here_mean_something(harm):
    pickle.loads(pickle.dumps(Payload(harm)))
    assert harm.exists()


@pytest.mark.parametrize('protocol', range(6))
def test_a_meta_pkl_with_a_payload_is_refused(run, workdir, harm, protocol):  # fault 56
    folder = workdir / 'data' / 'tiny'
    (folder / 'meta.json').unlink()
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'itos': Payload(harm)}, protocol=protocol))
    done = run('train.py', *TINY)
    assert done.status and not harm.exists()
    assert 'meta.pkl refers to posix.mkdir; refusing' in done.last_error


@pytest.mark.parametrize('n_bytes', range(0, 60, 7))
def test_a_damaged_meta_pkl_is_a_line_not_a_traceback(workdir, n_bytes):  # fault 56
    folder = workdir / 'data' / 'tiny'
    (folder / 'meta.json').unlink()
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'itos': dict(enumerate('abcdefghijklmnop'))})[:n_bytes])
    with pytest.raises(UserError, match='meta.pkl'):
        dataset.open_dataset('tiny', 8)


def test_meta_json_names_a_tokenizer_and_nothing_that_runs(run, workdir, harm):
    path = workdir / 'data' / 'tiny' / 'meta.json'
    meta = json.loads(path.read_text(encoding='utf-8'))
    meta['tokenizer'] = {'kind': f"__import__('os').mkdir('{harm}')"}
    path.write_text(json.dumps(meta), encoding='utf-8')
    assert run('train.py', *TINY).status and not harm.exists()


def test_a_torch_that_cannot_load_safely_is_refused(tmp_path, monkeypatch):  # fault 58
    path = tmp_path / 'ckpt.pt'
    checkpoint.save(path, {'model': {}, 'model_args': {}})
    monkeypatch.setattr(torch, '__version__', '2.5.1')
    with pytest.raises(UserError, match='torch 2.5.1 cannot load checkpoints safely .*; upgrade to >= 2.10'):
        checkpoint.load(path)


def test_no_file_of_the_project_loads_what_could_run(run):  # faults 54 to 57
    unsafe = re.compile(r'pickle\.loads?\(|weights_only\s*=\s*False|(?<!\w)eval\(|allow_pickle\s*=\s*True|'
                        r'distributed\.checkpoint\b(?!\.state_dict)')
    found = [f'{path.name}: {line.strip()}' for path in (*REPO.glob('*.py'), *REPO.glob('lib/**/*.py'),
                                                       *REPO.glob('data/*/*.py'))
             for line in path.read_text(encoding='utf-8').splitlines() if unsafe.search(line)]
    assert not [line for line in found if '.eval()' not in line]


def test_every_torch_load_is_safe_by_its_own_argument():  # fault 55
    for path in (*REPO.glob('*.py'), *REPO.glob('lib/**/*.py')):
        for call in re.findall(r'torch\.load\([^\n]*', path.read_text(encoding='utf-8')):
            assert 'weights_only=True' in call, (path, call)


def test_readme_says_that_config_files_are_code():  # fault 59
    text = ' '.join((REPO / 'README.md').read_text(encoding='utf-8').lower().split())
    assert 'config files are python and are executed' in text
