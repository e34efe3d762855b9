"""Faults 56 and 59: data is never code; config files are, and README says so. Checkpoints: test_checkpoint.py."""
import json
import os
import pickle

import pytest
from conftest import TINY
from kit import REPO

from configurator import UserError
from lib.text import dataset


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def harm(tmp_path):
    return tmp_path / 'harmed'


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


def test_readme_says_that_config_files_are_code():  # fault 59
    text = ' '.join((REPO / 'README.md').read_text(encoding='utf-8').lower().split())
    assert 'config files are python and are executed' in text
