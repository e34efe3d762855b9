"""lib/text/read_text.py: files, folders, globs, URLs and hub datasets become a stream of text."""
import gzip
import http.server
import json
import threading

import pytest
from textkit import LINES, TEXT, contents, fails, json_lines, put

from lib.text import download, read_text


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(download, 'WAIT', 0.01)


def every_tenth(lines):
    return ''.join(line + '\n' for line in lines[9::10])


# Text files

def test_a_byte_order_mark_at_the_beginning_is_dropped(prepare, tmp_path):
    assert prepare(put(tmp_path / 'book.txt', '\ufeff' + TEXT)).text('train').startswith('line 0')


def test_line_ends_are_unchanged(prepare, tmp_path):
    data = prepare(put(tmp_path / 'book.txt', TEXT.replace('\n', '\r\n')))
    assert data.whole_text == TEXT.replace('\n', '\r\n')


def test_another_encoding_is_read_by_its_name(prepare, tmp_path):
    data = prepare(put(tmp_path / 'book.txt', ('人之初性本善' * 100).encode('gb18030')), '--encoding=gb18030')
    assert data.text('val') == ('人之初性本善' * 100)[540:]


def test_a_character_split_between_two_chunks_is_read_correctly(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(read_text, 'CHUNK', 7)
    text = '人之初，性本善👩‍👩‍👧‍👦' * 40
    assert prepare(put(tmp_path / 'book.txt', text)).whole_text == text


def test_a_delimiter_divides_a_text_file_into_documents(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(read_text, 'CHUNK', 50)
    story = put(tmp_path / 'stories.txt', '<|endoftext|>\n'.join(LINES))
    data = prepare(story, '--tokenizer=bpe', '--vocab_size=300', delimiter='<|endoftext|>')
    assert data.text('val').split('<|endoftext|>')[:-1] == [line.strip() for line in LINES[9::10]]


# Records

@pytest.mark.parametrize('name, compress', [('wiki_00', bytes), ('news.json', bytes), ('x.txt.gz', gzip.compress)])
def test_json_lines_are_recognised_by_their_content(prepare, tmp_path, name, compress):
    data = prepare(put(tmp_path / name, compress(json_lines(LINES).encode())), '--name=x')
    assert data.text('val') == every_tenth(LINES)


def test_keys_are_joined_with_newlines_and_may_be_absent(prepare, tmp_path):
    records = [{'title': 't', 'desc': '', 'content': 'c'}, {'title': 't'}] * 20
    path = put(tmp_path / 'news', ''.join(json.dumps(record) + '\n' for record in records))
    assert prepare(path, '--text_key=title,desc,content').text('train').startswith('t\nc\nt\nt\nc\nt\n')


def test_parquet_is_read(prepare, tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({'id': range(200), 'text': LINES}), tmp_path / 'part')
    assert prepare(tmp_path / 'part').text('val') == every_tenth(LINES)


def test_a_hub_dataset_is_streamed_from_a_local_folder_with_its_layout(prepare, tmp_path):
    pytest.importorskip('datasets')
    import pyarrow
    from pyarrow import parquet
    (tmp_path / 'hub' / 'data').mkdir(parents=True)
    put(tmp_path / 'hub' / 'README.md', '# a dataset card')
    for split, texts in (('train-00000-of-00002', LINES[:100]), ('train-00001-of-00002', LINES[100:]),
                         ('validation-00000-of-00001', ['val'])):
        parquet.write_table(pyarrow.table({'text': texts}), tmp_path / 'hub' / 'data' / f'{split}.parquet')
    hub = f'hub:{tmp_path}/hub'
    data = prepare(dataset='stories', source=hub, val_source=hub + '#validation', tokenizer='byte')
    assert data.text('train') == ''.join(line + '\n' for line in LINES) and data.text('val') == 'val\n'


def test_a_hub_dataset_that_is_a_script_is_read_from_its_parquet_copy(prepare, monkeypatch):
    datasets = pytest.importorskip('datasets')

    def load(name, split, streaming, revision=None):
        if revision is None:
            raise RuntimeError('Dataset scripts are no longer supported, but found openwebtext.py')
        assert revision == 'refs/convert/parquet' and streaming
        return datasets.IterableDataset.from_generator(lambda: ({'text': TEXT[:100]} for _ in range(40)))
    monkeypatch.setattr(datasets, 'load_dataset', load)
    assert prepare(dataset='x', source='hub:a/script', tokenizer='byte').text('val') == (TEXT[:100] + '\n') * 4


# Folders, globs, paths

def test_a_folder_is_read_in_order_with_its_subfolders_but_without_hidden_files(prepare, tmp_path):
    for name, text in (('b/2.txt', 'two'), ('a/1', 'one'), ('c.md', 'three'), ('.git/x', 'no'), ('.DS_Store', 'no')):
        put(tmp_path / 'books' / name, text * 10)
    data = prepare(tmp_path / 'books', '--tokenizer=byte')
    assert data.whole_text == f"{'one' * 10}\n{'two' * 10}\n{'three' * 10}\n"


def test_globs_and_repeated_flags_name_several_files(prepare, tmp_path):
    for name in 'cab':
        put(tmp_path / f'{name}.txt', name * 30)
    data = prepare(f'--input={tmp_path}/[ab].txt', '--input', tmp_path / 'c.txt', '--tokenizer=byte', '--name=x')
    assert data.whole_text == f"{'a' * 30}\n{'b' * 30}\n{'c' * 30}\n"


def test_a_pattern_skips_folders(prepare, tmp_path):
    put(tmp_path / 'in' / 'a.txt', TEXT)
    put(tmp_path / 'in' / 'deeper' / 'b.txt', 'other')
    assert prepare(tmp_path / 'in' / '*', dataset='x').whole_text == TEXT
    assert 'left out 1 files or folders: ' in prepare.err and 'deeper (a folder; ** reads those, too)' in prepare.err


def test_a_path_is_looked_up_in_the_working_directory_then_in_the_repository(prepare, tmp_path, monkeypatch):
    import configurator
    put(tmp_path / 'repo' / 'there.txt', TEXT)
    monkeypatch.setattr(configurator, 'REPO', tmp_path / 'repo')
    assert prepare('--input=there.txt').folder.name == 'there'


# Downloads

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


@pytest.fixture
def folder(tmp_path):
    """The folder that prepare(dataset='x') writes to."""
    (tmp_path / 'data' / 'x').mkdir(parents=True)
    return tmp_path / 'data' / 'x'


def test_a_download_is_kept_and_used_again_for_the_text_of_the_script(prepare, server, folder):
    prepare(dataset='x', source=server.url + '/text')
    assert download.own_file(folder, server.url + '/text').read_text(encoding='utf-8') == TEXT
    assert prepare(dataset='x', source=server.url + '/text').whole_text == TEXT and server.hits == 1


def test_a_busy_server_is_asked_three_times(prepare, server, folder):
    prepare(dataset='x', source=server.url + '/busy')
    assert server.hits == 3 and (folder / 'train.bin').exists()


@pytest.mark.parametrize('path, attempts', [('/missing', 1), ('/drop', 3)])
def test_an_interrupted_download_is_tried_three_times_and_a_missing_page_once(prepare, server, capfd, path, attempts):
    fails(capfd, lambda: prepare(dataset='x', source=server.url + path))
    assert server.hits == attempts


# Faults

@pytest.mark.parametrize('path, reason', [('/missing', '404 Not Found'), ('/page', 'a web page instead of the text'),
                                          ('/drop', f'400 of {len(TEXT):,} bytes')])
def test_a_failed_download_is_reported_and_leaves_no_file(prepare, server, folder, capfd, path, reason):  # fault 34
    message = fails(capfd, lambda: prepare(dataset='x', source=server.url + path))
    assert reason in message and server.url + path in message
    assert 'input.txt' in message and '--input=PATH' in message and 'python_char' in message
    assert not contents(folder)


def test_an_unreachable_server_is_reported(prepare, capfd):  # fault 34
    assert 'Connection refused' in fails(capfd, lambda: prepare(dataset='x', source='http://127.0.0.1:9/x'))


def test_an_unreachable_hub_is_reported_in_one_line(prepare, capfd, monkeypatch):
    datasets = pytest.importorskip('datasets')

    def refuse(*_, **__):
        raise ConnectionError('no route to host\nand more')
    monkeypatch.setattr(datasets, 'load_dataset', refuse)
    message = fails(capfd, lambda: prepare(dataset='x', source='hub:nobody/nothing'))
    assert 'cannot read hub:nobody/nothing: ConnectionError: no route to host' in message and '--input=PATH' in message
    assert 'HF_ENDPOINT' in message and 'https://hf-mirror.com' in message


@pytest.mark.parametrize('before', ['', '人' * 400_000])
def test_text_that_is_not_utf8_is_refused_with_file_and_byte(prepare, tmp_path, capfd, before):  # fault 37
    path = put(tmp_path / 'a.txt', before.encode() + '人'.encode('gb18030') + b'.')
    at, advice = f'{len(before.encode()):,}', 'this byte is damaged' if before else 'try --encoding=gb18030 (Chinese)'
    message = fails(capfd, lambda: prepare(path))
    assert f'{path} is not UTF-8 at byte {at} (0xc8); ' in message and advice in message


@pytest.mark.parametrize('text, codec', [('人之初', 'gb18030'), ('un café à la crème', 'cp1252'), ('plain', 'utf-16'),
                                         ('plain', 'utf-32')])
def test_the_suggested_encoding_reads_the_text(prepare, tmp_path, capfd, text, codec):
    path = put(tmp_path / 'a.txt', ((text + '\n') * 100).encode(codec))
    assert f'--encoding={codec}' in fails(capfd, lambda: prepare(path))
    assert prepare(path, f'--encoding={codec}').whole_text == (text + '\n') * 100


@pytest.mark.parametrize('first, second', [('gb18030', 'utf-8'), ('utf-8', 'gb18030')])
def test_of_files_in_two_encodings_the_message_says_which_to_save_anew(prepare, tmp_path, capfd, first, second):
    for name, codec in (('a', first), ('b', second)):
        put(tmp_path / f'texts/{name}.txt', ('人之初，性本善。\n' * 100).encode(codec))
    assert 'or save it as UTF-8' in fails(capfd, lambda: prepare(tmp_path / 'texts'))
    message = fails(capfd, lambda: prepare(tmp_path / 'texts', '--encoding=gb18030'))
    assert 'is UTF-8, not GB18030' in message and 'if other files are GB18030, save those as UTF-8' in message


def test_a_picture_is_refused_by_name(prepare, tmp_path, capfd):
    message = fails(capfd, lambda: prepare(put(tmp_path / 'a.png', b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR')))
    assert 'a.png is a picture, not text' in message


@pytest.mark.parametrize('data', [bytes(range(1, 256))])
def test_a_file_that_is_not_text_is_refused_without_suggesting_an_encoding(prepare, tmp_path, capfd, data):
    message = fails(capfd, lambda: prepare(put(tmp_path / 'a.png', data)))
    assert 'a.png is not UTF-8 at byte' in message and 'does not look like text' in message
    assert '--encoding' not in message


def test_a_text_that_ends_within_a_character_is_refused(prepare, tmp_path, capfd):
    path = put(tmp_path / 'a.txt', '人之初'.encode()[:-1])
    assert 'is not UTF-8 at byte 6 (0xe5), where it ends within a character' in fails(capfd, lambda: prepare(path))


def test_a_lone_surrogate_in_json_is_reported_with_its_line(prepare, tmp_path, capfd):
    path = put(tmp_path / 'a', '{"text": "fine"}\n' * 30 + '{"text": "bad \\ud800"}\n')
    assert f'{path}:31: lone surrogate U+D800 at character 4' in fails(capfd, lambda: prepare(path))


@pytest.mark.parametrize('line, reason', [
    ('{"text": ', ':2: not JSON'), ('{"title": "t"}', ':2: no key text among title'),
    ('{"text": 5}', ':2: text holds int'), ('[1]', ':2: expected one JSON object')])
def test_an_invalid_line_of_json_is_reported_with_its_number(prepare, tmp_path, capfd, line, reason):
    path = put(tmp_path / 'a', '{"text": "fine"}\n' + line + '\n')
    assert f'{path}{reason}' in fails(capfd, lambda: prepare(path))


@pytest.mark.parametrize('indent', [None, 1])
def test_a_json_file_that_is_one_list_of_objects_is_read(prepare, tmp_path, monkeypatch, indent):
    monkeypatch.setattr(read_text, 'CHUNK', 100)
    path = put(tmp_path / 'poems.json', json.dumps([{'text': line} for line in LINES], indent=indent))
    assert prepare(path).text('val') == every_tenth(LINES)


def test_a_json_file_of_another_shape_is_refused(prepare, tmp_path, capfd):
    path = put(tmp_path / 'poems.json', json.dumps({'text': 'a', 'more': 'b'}, indent=1))
    assert 'is JSON, but not one object per line' in fails(capfd, lambda: prepare(path))


def test_parquet_without_the_key_lists_the_columns(prepare, tmp_path, capfd):
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({'body': ['x']}), tmp_path / 'a.parquet')
    assert 'no key text among body; use --text_key=' in fails(capfd, lambda: prepare(tmp_path / 'a.parquet'))


@pytest.mark.parametrize('damage', [lambda raw: raw[:-9], lambda raw: raw[:-4] + b'xxxx', lambda raw: raw[:10] + b'x'])
def test_a_damaged_gzip_file_is_refused(prepare, tmp_path, capfd, damage):
    path = put(tmp_path / 'a.gz', damage(gzip.compress(TEXT.encode(), mtime=0) * 9))
    assert f'{path} is a damaged gzip file' in fails(capfd, lambda: prepare(path))


def test_a_damaged_parquet_file_is_refused(prepare, tmp_path, capfd):
    pytest.importorskip('pyarrow')
    path = put(tmp_path / 'a.parquet', b'PAR1' + TEXT.encode())
    assert f'{path} is a damaged parquet file' in fails(capfd, lambda: prepare(path))


def test_a_missing_file_is_reported(prepare, capfd):
    assert '--input=nope.txt: no such file' in fails(capfd, lambda: prepare('nope.txt'))


@pytest.mark.parametrize('flags', [[], ['--name=x']])
def test_a_pattern_that_matches_no_file_is_reported(prepare, capfd, flags):
    assert '--input=*.text: the pattern matches no file' in fails(capfd, lambda: prepare('--input=*.text', *flags))


def test_an_unknown_encoding_is_reported(prepare, capfd):
    assert 'encoding=klingon is unknown' in fails(capfd, lambda: prepare('--encoding=klingon'))
