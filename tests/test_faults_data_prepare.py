"""Faults while preparing data: each ends in one line that names file, cause and fix, and leaves what was there."""
import functools
import gzip
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from configurator import REPO
from lib.text import chunks as chunks_room
from lib.text import data_folder, read_text, tokenizer
from lib.text import prepare as prepare_room

TEXT = 'some text to prepare, line after line\n' * 100


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(read_text, 'WAIT', 0.01)
    (tmp_path / 'data' / 'x').mkdir(parents=True)
    return tmp_path / 'data' / 'x' / 'prepare.py'


@pytest.fixture
def prepare(script, monkeypatch):
    def prepare(*flags, **fixed):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', *map(str, flags)])
        prepare_room.prepare(script, **fixed)
    return prepare


def fails(capfd, call, status=1):
    """Run `call`, check that it ends as a user's mistake does, and return its last line on stderr."""
    with pytest.raises(SystemExit) as end:
        call()
    message = end.value.code if isinstance(end.value.code, str) else capfd.readouterr().err.strip()
    assert isinstance(end.value.code, str) or end.value.code in (1, 2)
    assert '\n' not in message
    return message


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode('utf-8'))
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# 29, 33: killed half-way, also between its renames

KILL = """
import os, sys
sys.path.insert(0, {repo!r})
from lib.text import prepare
calls = []
def kill(function, at):
    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            os._exit(9)
        return function(*args, **kwargs)
    return wrapped
os.{name} = kill(os.{name}, {at})
prepare.prepare({script!r})
"""


def run_killed(script, path, name, at):
    code = KILL.format(repo=str(REPO), script=str(script), name=name, at=at)
    assert subprocess.run([sys.executable, '-c', code, path], capture_output=True).returncode == 9


@pytest.mark.parametrize('name, at', [('fsync', 1), ('fsync', 3), ('replace', 1)])
def test_killed_before_its_renames_prepare_leaves_the_old_dataset(script, prepare, tmp_path, name, at):
    prepare(put(tmp_path / 'a.txt', TEXT))
    before = contents(script.parent)
    run_killed(script, put(tmp_path / 'b.txt', TEXT.upper()), name, at)
    after = contents(script.parent)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize('at', [1, 2, 3])
def test_killed_between_its_renames_prepare_leaves_the_folder_marked(script, prepare, tmp_path, at):
    prepare(put(tmp_path / 'a.txt', TEXT))
    run_killed(script, put(tmp_path / 'b.txt', TEXT.upper()), 'replace', at)
    assert 'UNFINISHED' in contents(script.parent)


def test_running_again_after_a_kill_cleans_up(script, prepare, tmp_path):
    run_killed(script, put(tmp_path / 'a.txt', TEXT), 'replace', 2)
    prepare(tmp_path / 'a.txt')
    assert sorted(contents(script.parent)) == ['meta.json', 'train.bin', 'val.bin']


def test_meta_json_is_renamed_last(script, prepare, tmp_path, monkeypatch):
    order, replace = [], os.replace
    monkeypatch.setattr(os, 'replace', lambda a, b: (order.append(b.name), replace(a, b)))
    prepare(put(tmp_path / 'a.txt', TEXT))
    assert order == ['train.bin', 'val.bin', 'meta.json']


def test_a_failed_rename_leaves_no_temporary_file_and_a_line(script, prepare, tmp_path, monkeypatch, capfd):
    def refuse(source, target):
        raise PermissionError(13, 'Permission denied', str(target))
    monkeypatch.setattr(os, 'replace', refuse)
    assert 'train.bin: Permission denied' in fails(capfd, lambda: prepare(put(tmp_path / 'a.txt', TEXT)))
    assert list(contents(script.parent)) == ['UNFINISHED']


def test_a_full_disk_leaves_the_old_dataset_and_no_temporary_file(script, prepare, tmp_path):
    prepare(put(tmp_path / 'a.txt', TEXT))
    before = contents(script.parent)
    code = (f'import resource, sys; sys.path.insert(0, {str(REPO)!r}); from lib.text.prepare import prepare\n'
            f'resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); prepare({str(script)!r})')
    done = subprocess.run([sys.executable, '-c', code, tmp_path / 'a.txt'], capture_output=True, text=True)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'File too large; fix that and try again' in done.stderr
    assert contents(script.parent) == before


def test_ctrl_c_ends_plainly_and_leaves_no_temporary_file(script, prepare, tmp_path, monkeypatch, capfd):
    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(chunks_room, '_tokenize_chunk', interrupt)
    with pytest.raises(SystemExit) as end:
        prepare(put(tmp_path / 'a.txt', TEXT))
    assert end.value.code == 130 and not contents(script.parent)


# 32: ids that do not fit

def test_an_id_beyond_the_vocabulary_is_never_written(script, tmp_path):
    import numpy as np
    coder = tokenizer.from_spec({'kind': 'byte'})
    with pytest.raises(AssertionError, match='70000'):
        jobs = [('train', np.array([70000], '<u4'), 1, 1), ('val', np.array([1]), 1, 1)]
        data_folder.write(script.parent, coder, jobs)
    assert not contents(script.parent)


# 34: downloads

class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.hits += 1
        if self.path == '/missing':
            return self.send_error(404)
        if self.path == '/busy' and self.server.hits < 3:
            return self.send_error(503)
        self.send_response(200)
        if self.path == '/page':
            self.end_headers()
            return self.wfile.write(b'\n<!DOCTYPE html><html>log in to this network</html>')
        self.send_header('Content-Length', str(len(TEXT)))
        self.end_headers()
        self.wfile.write(TEXT.encode()[:400 if self.path == '/drop' else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server) as server:
        server.hits = 0
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.url = f'http://127.0.0.1:{server.server_port}'
        yield server
        server.shutdown()


@pytest.mark.parametrize('path, reason', [('/missing', '404 Not Found'), ('/page', 'a web page instead of the text'),
                                          ('/drop', '400 of 3,800 bytes')])
def test_a_failed_download_says_so_and_leaves_nothing(script, prepare, server, capfd, path, reason):
    message = fails(capfd, lambda: prepare(source=server.url + path))
    assert reason in message and server.url + path in message
    assert 'input.txt' in message and '--input=PATH' in message and 'python_char' in message
    assert not contents(script.parent)


def test_a_server_out_of_reach_says_so(script, prepare, capfd):
    assert 'Connection refused' in fails(capfd, lambda: prepare(source='http://127.0.0.1:9/x'))


def test_a_busy_server_is_asked_three_times_and_a_missing_page_once(script, prepare, server, capfd):
    prepare(source=server.url + '/busy')
    assert server.hits == 3 and (script.parent / 'train.bin').exists()
    (script.parent / 'input.txt').unlink()
    fails(capfd, lambda: prepare(source=server.url + '/missing'))
    assert server.hits == 4
    fails(capfd, lambda: prepare(source=server.url + '/drop'))
    assert server.hits == 7


def test_a_download_is_kept_as_input_txt(script, prepare, server):
    prepare(source=server.url + '/text')
    assert (script.parent / 'input.txt').read_text(encoding='utf-8') == TEXT


def test_the_hub_out_of_reach_is_one_line(prepare, capfd, monkeypatch):
    datasets = pytest.importorskip('datasets')

    def refuse(*_, **__):
        raise ConnectionError('no route to host\nand more')
    monkeypatch.setattr(datasets, 'load_dataset', refuse)
    message = fails(capfd, lambda: prepare(source='hub:nobody/nothing'))
    assert 'cannot read hub:nobody/nothing: ConnectionError: no route to host' in message and '--input=PATH' in message


def test_a_hub_dataset_that_is_still_a_script_is_read_from_its_parquet_copy(prepare, monkeypatch, script):
    datasets = pytest.importorskip('datasets')

    def load(name, split, streaming, revision=None):
        if revision is None:
            raise RuntimeError('Dataset scripts are no longer supported, but found openwebtext.py')
        assert revision == 'refs/convert/parquet' and streaming
        return datasets.IterableDataset.from_generator(lambda: ({'text': TEXT} for _ in range(40)))
    monkeypatch.setattr(datasets, 'load_dataset', load)
    prepare(source='hub:a/script', tokenizer='byte')
    assert (script.parent / 'meta.json').exists()


# 37: bad text

def test_an_empty_text_is_refused(prepare, tmp_path, capfd):
    assert 'a.txt is empty' in fails(capfd, lambda: prepare(put(tmp_path / 'a.txt', '')))


def test_one_character_cannot_be_divided(prepare, tmp_path, capfd):
    assert 'the train split is empty: 1 characters' in fails(capfd, lambda: prepare(put(tmp_path / 'a.txt', 'x')))


@pytest.mark.parametrize('before', ['', '人' * 400_000])
def test_text_that_is_not_utf8_is_refused_with_file_and_byte(prepare, tmp_path, capfd, before):
    path = put(tmp_path / 'a.txt', before.encode() + '人'.encode('gb18030') + b'.')
    at, advice = f'{len(before.encode()):,}', 'this byte is damaged' if before else 'try --encoding=gb18030 (Chinese)'
    message = fails(capfd, lambda: prepare(path))
    assert f'{path} is not UTF-8 at byte {at} (0xc8); ' in message and advice in message


@pytest.mark.parametrize('text, codec', [('人之初', 'gb18030'), ('un café à la crème', 'cp1252'), ('plain', 'utf-16'),
                                         ('plain', 'utf-32')])
def test_an_encoding_is_proposed_that_reads_the_text(prepare, tmp_path, capfd, text, codec):
    path = put(tmp_path / 'a.txt', ((text + '\n') * 100).encode(codec))
    assert f'--encoding={codec}' in fails(capfd, lambda: prepare(path))
    prepare(path, f'--encoding={codec}')


@pytest.mark.parametrize('data, wanted', [
    (b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR', 'a.png is a picture, not text'),
    (b'%PDF-1.4 only ASCII', 'a.png is a PDF, not text'),
    (bytes(range(1, 256)), 'a.png is not UTF-8 at byte 127 (0x80) and does not look like text')])
def test_what_is_no_text_is_told_so_and_no_encoding_proposed(prepare, tmp_path, capfd, data, wanted):
    message = fails(capfd, lambda: prepare(put(tmp_path / 'a.png', data)))
    assert wanted in message and '--encoding' not in message


def test_one_pdf_in_a_folder_is_named_with_a_pattern_that_reads_the_rest(prepare, tmp_path, capfd):
    put(tmp_path / 'books/a.pdf', b'%PDF-1.4'), put(tmp_path / 'books/b.txt', TEXT)
    message = fails(capfd, lambda: prepare(f'--input={tmp_path / "books"}', '--name=books'))
    assert 'a.pdf is a PDF' in message
    prepare(f'--input={tmp_path / "books"}/**/*.txt', '--name=books')


def test_a_text_that_ends_within_a_character_is_refused(prepare, tmp_path, capfd):
    path = put(tmp_path / 'a.txt', '人之初'.encode()[:-1])
    assert 'is not UTF-8 at byte 6 (0xe5), where it ends within a character' in fails(capfd, lambda: prepare(path))


def test_a_lone_surrogate_in_json_is_named_with_its_line(prepare, tmp_path, capfd):
    path = put(tmp_path / 'a', '{"text": "fine"}\n' * 30 + '{"text": "bad \\ud800"}\n')
    assert f'{path}:31: lone surrogate U+D800 at character 4' in fails(capfd, lambda: prepare(path))


@pytest.mark.parametrize('line, reason', [
    ('{"text": ', ':2: not JSON'), ('{"title": "t"}', ':2: no key text among title'),
    ('{"text": 5}', ':2: text holds int'), ('[1]', ':2: expected one JSON object')])
def test_a_bad_line_of_json_is_named(prepare, tmp_path, capfd, line, reason):
    path = put(tmp_path / 'a', '{"text": "fine"}\n' + line + '\n')
    assert f'{path}{reason}' in fails(capfd, lambda: prepare(path))


def test_json_that_is_one_list_is_not_taken_for_text(prepare, tmp_path, capfd):
    path = put(tmp_path / 'poems.json', json.dumps([{'text': 'a'}, {'text': 'b'}], indent=1))
    assert 'is JSON, but not one object per line' in fails(capfd, lambda: prepare(path))


def test_parquet_without_the_key_names_the_columns(prepare, tmp_path, capfd):
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({'body': ['x']}), tmp_path / 'a.parquet')
    assert 'no key text among body; use --text_key=' in fails(capfd, lambda: prepare(tmp_path / 'a.parquet'))


@pytest.mark.parametrize('damage', [lambda raw: raw[:-9], lambda raw: raw[:-4] + b'xxxx', lambda raw: raw[:10] + b'x'])
def test_a_damaged_gzip_file_is_named(prepare, tmp_path, capfd, damage):
    path = put(tmp_path / 'a.gz', damage(gzip.compress(TEXT.encode(), mtime=0) * 9))
    assert f'{path} is a damaged gzip file' in fails(capfd, lambda: prepare(path))


def test_a_damaged_parquet_file_is_named(prepare, tmp_path, capfd):
    pytest.importorskip('pyarrow')
    path = put(tmp_path / 'a.parquet', b'PAR1' + TEXT.encode())
    assert f'{path} is a damaged parquet file' in fails(capfd, lambda: prepare(path))


def test_a_file_that_is_not_there_is_named(prepare, capfd):
    assert '--input=nope.txt: no such file' in fails(capfd, lambda: prepare('nope.txt'))


@pytest.mark.parametrize('flags', [[], ['--name=x']])
def test_a_pattern_that_matches_no_file_says_so(script, tmp_path, monkeypatch, capfd, flags):
    monkeypatch.setattr(sys, 'argv', ['prepare.py', '--input=*.text', *flags])
    message = fails(capfd, lambda: prepare_room.prepare(tmp_path / 'data' / 'text' / 'prepare.py'))
    assert '--input=*.text: the pattern matches no file' in message


def test_a_pattern_gives_the_dataset_no_name(script, tmp_path, monkeypatch, capfd):
    put(tmp_path / 'a.txt', TEXT)
    monkeypatch.setattr(sys, 'argv', ['prepare.py', '--input=*.txt'])
    message = fails(capfd, lambda: prepare_room.prepare(tmp_path / 'data' / 'text' / 'prepare.py'))
    assert '--input=*.txt gives the dataset no name; choose one with --name=' in message


def test_a_pattern_passes_over_folders(prepare, script, tmp_path):
    put(tmp_path / 'in' / 'a.txt', TEXT)
    put(tmp_path / 'in' / 'deeper' / 'b.txt', TEXT)
    prepare(tmp_path / 'in' / '*')
    assert json.loads((script.parent / 'meta.json').read_text(encoding='utf-8'))['splits']['val']['n_tokens'] == 380


def test_no_text_at_all_says_where_to_put_it(prepare, script, capfd):
    message = fails(capfd, lambda: prepare(where='A library has it'))
    assert '--input=PATH' in message and str(script.parent / 'input.txt') in message and 'A library has it' in message


def test_wrong_settings_are_told_together(prepare, capfd):
    wrong = 'tokenizer=words', 'val_fraction=1.0', 'num_proc=-1', 'name=a/b', 'encoding=klingon', 'vocab_size=9'
    with pytest.raises(SystemExit) as end:
        prepare(*(f'--{setting}' for setting in wrong))
    told = capfd.readouterr().err
    assert end.value.code == 2 and len(told.splitlines()) == 6 and all(setting in told for setting in wrong)


def test_a_vocabulary_size_for_a_fixed_vocabulary_is_refused(prepare, capfd):
    assert 'vocab_size is for --tokenizer=bpe' in fails(capfd, lambda: prepare('--vocab_size=500'))


@pytest.mark.parametrize('flags', [[], ['--name=plays']])
def test_a_dataset_with_a_script_of_its_own_is_never_overwritten(tmp_path, monkeypatch, capfd, flags):
    monkeypatch.setattr(sys, 'argv', ['prepare.py', str(put(tmp_path / 'plays.txt', TEXT)), *flags])
    put(tmp_path / 'data' / 'plays' / 'prepare.py', '')
    message = fails(capfd, lambda: prepare_room.prepare(tmp_path / 'data' / 'text' / 'prepare.py'))
    assert 'data/plays has its own prepare.py; choose another name with --name=' in message
    assert list(contents(tmp_path / 'data' / 'plays')) == ['prepare.py']


def test_a_derived_name_never_replaces_another_text(tmp_path, monkeypatch, capfd):
    def prepare(path, *flags):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', str(path), *flags])
        prepare_room.prepare(tmp_path / 'data' / 'text' / 'prepare.py')
    one, other = put(tmp_path / '1' / 'book.txt', TEXT), put(tmp_path / '2' / 'book.txt', TEXT.upper())
    prepare(one)
    prepare(one, '--tokenizer=byte')
    before = contents(tmp_path / 'data' / 'book')
    message = fails(capfd, lambda: prepare(other))
    assert f'data/book holds 3,800 tokens (byte) of {one}; choose another name' in message
    assert contents(tmp_path / 'data' / 'book') == before
    prepare(other, '--name=book')
    assert contents(tmp_path / 'data' / 'book') != before


def test_what_a_dataset_held_is_told_when_it_is_replaced(prepare, script, tmp_path, capfd):
    def told(*flags):
        capfd.readouterr()
        prepare(*flags)
        return [line for line in capfd.readouterr().err.splitlines() if ' held ' in line]
    one, other = put(tmp_path / 'a.txt', TEXT), put(tmp_path / 'b.txt', TEXT.upper())
    assert told(one) == told(one) == []
    assert told(other) == [f'data/x held 3,800 tokens (char) of {one}, which this replaced']
    assert told(one, other, '--tokenizer=byte') == [f'data/x held 3,800 tokens (char) of {other}, which this replaced']
    assert told(one) == [f'data/x held 7,602 tokens (byte) of {one} {other}, which this replaced']
    (script.parent / 'meta.json').write_text('[]', encoding='utf-8')
    assert told(one) == ['data/x held a train.bin of 6,840 bytes without a valid meta.json, which this replaced']


def test_a_worker_that_dies_ends_prepare_with_a_line(prepare, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(read_text, 'CHUNK', 500)
    monkeypatch.setattr(chunks_room, 'WINDOW', 50)
    monkeypatch.setattr(chunks_room, '_tokenize_chunk', functools.partial(die, os.getpid()))
    message = fails(capfd, lambda: prepare(put(tmp_path / 'a.txt', TEXT), '--tokenizer=bpe', '--num_proc=2'))
    assert 'a worker process died' in message and '--num_proc=1' in message


def die(parent, *_):
    assert os.getpid() != parent
    os._exit(1)


# 77: tiktoken

def test_tiktoken_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    with pytest.raises(SystemExit, match='pip install tiktoken'):
        tokenizer.gpt2().encode('x')


def test_tokenizers_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(SystemExit, match='pip install tokenizers'):
        tokenizer.train_bpe(['x'], 300)


def test_gpt2_files_out_of_reach_name_the_cache_folder(monkeypatch):
    load = pytest.importorskip('tiktoken.load')

    def refuse(*_):
        raise ConnectionError('Name or service not known')
    monkeypatch.setattr(load, 'read_file_cached', refuse)
    with pytest.raises(SystemExit, match='TIKTOKEN_CACHE_DIR'):
        tokenizer.gpt2().encode('x')


def test_gpt2_data_can_be_trained_on_without_tiktoken(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    coder = tokenizer.from_spec({'kind': 'gpt2'})
    assert (coder.vocab_size, coder.eot) == (50257, 50256)
