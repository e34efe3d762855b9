"""Containers and encodings: prepare gives the original text, or names the format in one line."""
import bz2
import functools
import gzip
import io
import json
import lzma
import pickle
import re
import sqlite3
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from textkit import LINES, TEXT, fails, put

from configurator import UserError
from lib.text import containers, json_records, read_text

CHINESE = '人之初，性本善。性相近，习相远。\n' * 60


def tar(files, mode='w', kind=tarfile.GNU_FORMAT):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=kind) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zipped(files, method=zipfile.ZIP_DEFLATED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


A, B = TEXT[:7000].encode(), TEXT[7000:].encode()
TWO = {'in/a.txt': A, 'in/b.txt': B}
READ = {
    'gzip': gzip.compress(A + B), 'two gzip members': gzip.compress(A) + gzip.compress(B), 'bzip2': bz2.compress(A + B),
    'xz': lzma.compress(A + B), 'lzma': lzma.compress(A + B, lzma.FORMAT_ALONE), 'tar': tar(TWO),
    'ustar': tar(TWO, kind=tarfile.USTAR_FORMAT), 'pax': tar(TWO, kind=tarfile.PAX_FORMAT), 'tar.gz': tar(TWO, 'w:gz'),
    'tar.bz2': tar(TWO, 'w:bz2'), 'tar.xz': tar(TWO, 'w:xz'), 'zip': zipped(TWO), 'zip, stored': zipped(TWO, 0),
    'zip, bzip2': zipped(TWO, zipfile.ZIP_BZIP2), 'zip, lzma': zipped(TWO, zipfile.ZIP_LZMA),
    'gzip in gzip': gzip.compress(gzip.compress(A + B)), 'tar of gzip': tar({'a.gz': gzip.compress(A), 'b.txt': B}),
    'zip of xz': zipped({'a.xz': lzma.compress(A), 'b.txt': B}), 'tar in tar': tar({'a.tar': tar(TWO)}),
    'hidden files': tar({'in/._a.txt': b'\0\5\26\7', **TWO, '__MACOSX/x': b'x', '.DS_Store': b'\0'}),
    'a picture': zipped({**TWO, 'in/cover.png': b'\x89PNG\r\n\x1a\n'})}


@pytest.mark.parametrize('kind', READ)
def test_the_text_in_a_container_is_read_exactly(prepare, tmp_path, kind):
    found = prepare(put(tmp_path / 'a.bin', READ[kind]), '--name=x', '--tokenizer=byte')
    separators = found.whole_text.count('\n') - TEXT.count('\n')
    assert found.whole_text.replace('\n', '') == TEXT.replace('\n', '') and separators in (0, 2)


def test_what_is_left_out_of_an_archive_is_named_with_its_number(prepare, tmp_path):
    prepare(put(tmp_path / 'a.zip', zipped({**TWO, 'cover.png': b'\x89PNG\r\n\x1a\n', '.x': b'1'})), '--name=x')
    assert prepare.err.count('left out 2 files: cover.png (a picture), .x (hidden)') == 1


def database(path):
    with sqlite3.connect(path) as connection:
        connection.execute('create table t (a text)')
    connection.close()
    return path.read_bytes()


def npy(path):
    np.save(path, np.arange(50))
    return path.read_bytes()


def npz(path):
    np.savez(path, a=np.arange(50))
    return path.read_bytes()


def feather(path):
    from pyarrow import feather, table
    feather.write_feather(table({'text': LINES}), path, compression='uncompressed')
    return path.read_bytes()


def picture(path):
    from matplotlib import pyplot
    figure = pyplot.figure(figsize=(1, 1))
    figure.savefig(path)
    pyplot.close(figure)
    return path.read_bytes()


def torch_file(path):
    import torch
    torch.save({'a': torch.zeros(3)}, path)
    return path.read_bytes()


def tensors(path):
    import torch
    from safetensors.torch import save_file
    save_file({'a': torch.zeros(3)}, path)
    return path.read_bytes()


def dbm(module):
    def make(path):
        made = pytest.importorskip(module).open(str(path), 'c')
        made[b'a'] = b'1'
        made.close()
        return next(path.parent.glob(path.name + '*')).read_bytes()
    return make


REFUSED = [
    ('sqlite.db', database, 'an SQLite database'), ('gnu', dbm('dbm.gnu'), 'a gdbm database'),
    ('ndbm', dbm('dbm.ndbm'), 'database'), ('a.npy', npy, 'a NumPy array'),
    ('a.npz', npz, 'a file of NumPy arrays'), ('a.feather', feather, 'an Arrow'), ('a.png', picture, 'a picture'),
    ('a.pdf', picture, 'a PDF'), ('a.eps', picture, 'a PostScript file'), ('a.pt', torch_file, 'a PyTorch file'),
    ('a.safetensors', tensors, 'a safetensors file'),
    *[(f'{n}.pkl', lambda path, n=n: pickle.dumps(LINES, n), 'a Python pickle') for n in range(2, 6)],
    ('a.z', lambda path: zlib.compress(A), 'a zlib stream'),
    ('a.docx', lambda path: zipped({'word/document.xml': A}), 'a Word document'),
    ('a.epub', lambda path: zipped({'mimetype': b'', 'META-INF/container.xml': A}), 'an epub book'),
    ('a.7z', lambda path: b"7z\xbc\xaf'\x1c" + A, 'a 7z archive'), ('a.rar', lambda path: b'Rar!\x1a\7\0' + A, 'a rar'),
    ('a.zst', lambda path: b'\x28\xb5\x2f\xfd' + A, 'a zstd file'),
    ('a.lz4', lambda path: b'\x04\x22\x4d\x18' + A, 'an lz4 file'),
    ('a.Z', lambda path: b'\x1f\x9d\x90' + A, 'a compress'), ('a.gguf', lambda path: b'GGUF\3\0' + A, 'a model'),
    ('a.tar.gz', lambda path: gzip.compress(tar(TWO))[:-900], 'damaged'),
    ('a.tar', lambda path: tar(TWO)[:9000], 'a damaged tar'),
    ('a.xz', lambda path: lzma.compress(A)[:-9], 'a damaged xz'),
    ('a.bz2', lambda path: bz2.compress(A)[:-9], 'a damaged bzip2'), ('b.zip', lambda path: zipped(TWO)[:-30], 'zip'),
    ('c.zip', lambda path: gzip.compress(zipped(TWO)), 'a zip archive inside another'),
    ('nested', lambda path: functools.reduce(lambda data, _: gzip.compress(data), range(5), A), 'packed more'),
    ('nul.txt', lambda path: A[:500] + b'\0' + A[500:], 'holds NUL')]


@pytest.mark.parametrize('name, make, what', REFUSED, ids=[name for name, _, _ in REFUSED])
def test_what_is_not_text_is_refused_by_the_name_of_its_format(prepare, tmp_path, capfd, name, make, what):
    pytest.importorskip('pyarrow')
    path = put(tmp_path / 'in' / name, make(tmp_path / name))
    message = fails(capfd, lambda: prepare(path, '--name=x'))
    assert what in message and name in message


@pytest.mark.parametrize('codec', ['utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'utf-32-le', 'utf-32-be', 'utf-8-sig'])
@pytest.mark.parametrize('text', [TEXT, CHINESE])
def test_a_unicode_encoding_is_read_or_named(prepare, tmp_path, capfd, codec, text):
    path = put(tmp_path / 'a.txt', text.encode(codec))
    if codec == 'utf-8-sig':
        assert prepare(path).whole_text == text
        return
    message = fails(capfd, lambda: prepare(path))
    assert re.search(rf'--encoding={codec}(?![\w-])', message)
    assert prepare(path, f'--encoding={codec}').whole_text == text


@pytest.mark.parametrize('codec', ['utf-16', 'utf-16-le', 'utf-32-be', 'gb18030', 'big5'])
def test_utf8_is_not_read_as_another_encoding(prepare, tmp_path, capfd, codec):
    path = put(tmp_path / 'a.txt', CHINESE)
    assert 'is UTF-8, not' in fails(capfd, lambda: prepare(path, f'--encoding={codec}'))


# JSON

def lines(rows):
    return ''.join(json.dumps(row) + '\n' for row in rows)


ROWS = [{'text': line} for line in LINES]


@pytest.mark.parametrize('content, reason', [
    (lines([[row] for row in ROWS]), ':1: expected one JSON object per line, found list'),
    (lines(LINES), ':1: expected one JSON object per line, found str'),
    (lines(ROWS)[5:], ':1: not JSON, but the next lines are'), (json.dumps(ROWS)[:-9], 'is a JSON array with damage'),
    (json.dumps(LINES), 'expected'), (json.dumps(ROWS) + 'x', 'with more text after its end'),
    (json.dumps({'rows': ROWS}, indent=1), 'is JSON, but not one object per line'),
    (json.dumps([1, *ROWS], indent=1), 'is JSON, but not one object per line'),
    (lines(ROWS) + '[' * 100_000 + '\n', ':201: not JSON (it is nested too deeply)'),
    (lines(ROWS) + '{"text": ' + '9' * 5000 + '}\n', ':201: not JSON (Exceeds the limit (4300 digits)'),
    (lines(ROWS) + '{"text": null, "x": 1}\n' + '7\n', ':202: expected one JSON object per line, found int')])
def test_json_of_another_shape_is_refused_in_one_line(prepare, tmp_path, capfd, content, reason):
    assert reason in fails(capfd, lambda: prepare(put(tmp_path / 'chat.jsonl', content)))


@pytest.mark.parametrize('content', ['[Scene 1]\nROMEO: {no}\n' * 50, '[1]\na footnote\n' * 50, '{\nint a;\n}\n' * 50,
                                     '"Hello", she said.\n' * 50, '1\n2\n3\n' * 50, '[[x]]\n' * 50])
def test_text_that_begins_like_json_is_read_as_text(prepare, tmp_path, content):
    assert prepare(put(tmp_path / 'a.txt', content)).whole_text == content


@pytest.mark.parametrize('size', [1, 7, 100, 10**6])
@pytest.mark.parametrize('indent', [None, 2])
def test_an_array_of_objects_is_read_in_chunks_of_any_size(size, indent):
    content = json.dumps([{'a': '[]{},"\\', 'b': [1, {'c': None}]}, {}, {'d': -1.5e-7}], indent=indent)
    chunks = [content[i:i + size] for i in range(0, len(content), size)]
    found = json_records.read('a.json', content, iter(chunks))
    assert [record for _, record in found] == json.loads(content)


def test_an_empty_array_has_no_records(prepare, tmp_path, capfd):
    assert 'is empty' in fails(capfd, lambda: prepare(put(tmp_path / 'a.json', '[]')))


# Marks

@pytest.mark.parametrize('size', [1, 5, 13, 1000])
def test_documents_are_divided_at_a_mark_in_pieces_of_any_size(size):
    text = 'one<|endoftext|>two <|endof text|> three<|endoftext|><|endoftext|>four<|endoftext|>'
    pieces = [(text[i:i + size], i + size >= len(text)) for i in range(0, len(text), size)]
    found, document = [], ''
    for piece, is_last in read_text.divide_at('<|endoftext|>', [*pieces, ('next file', True)]):
        document += piece
        if is_last:
            found, document = [*found, document], ''
    assert [part for part in found if part] == ['one', 'two <|endof text|> three', 'four', 'next file'] and not document


def test_marks_in_a_text_are_the_end_of_documents_for_a_bpe(prepare, tmp_path):
    data = prepare(put(tmp_path / 'a.txt', '<|endoftext|>'.join(LINES)), '--tokenizer=bpe', '--vocab_size=300')
    assert list(data.ids['train']).count(data.tokenizer.eot) == 180 and not prepare.err.count('<|endoftext|>')


def test_marks_in_a_text_for_a_tokenizer_without_them_are_mentioned_once(prepare, tmp_path):
    text = '<|endoftext|>'.join(LINES)
    assert prepare(put(tmp_path / 'a.txt', text)).whole_text == text
    assert prepare.err.count('the text holds <|endoftext|>, which the char tokenizer reads as 13 characters') == 1


# Folders

def test_hidden_files_of_a_folder_are_named(prepare, tmp_path):
    for name in ('a.txt', '.secret', '.git/x', 'deeper/.hidden/y', 'deeper/b.txt'):
        put(tmp_path / 'in' / name, TEXT)
    assert len(prepare(tmp_path / 'in').whole_text) > 2 * len(TEXT) - 1
    assert 'left out 3 files or folders: ' in prepare.err and '.git (hidden)' in prepare.err


def test_a_folder_and_a_pattern_give_the_same_text(prepare, tmp_path):
    for name in ('a-b/x', 'a/y', 'a.txt', 'B/z'):
        put(tmp_path / 'in' / name, f'{name}\n' * 50)
    (tmp_path / 'elsewhere').mkdir()
    put(tmp_path / 'elsewhere' / 'w', 'linked\n' * 50)
    (tmp_path / 'in' / 'link').symlink_to(tmp_path / 'elsewhere')
    folder = prepare(tmp_path / 'in', '--name=x', '--tokenizer=byte').whole_text
    assert folder == prepare(tmp_path / 'in' / '**' / '*', '--name=x', '--tokenizer=byte').whole_text
    assert 'linked' in folder


def test_a_link_to_a_folder_above_is_followed_once(prepare, tmp_path):
    put(tmp_path / 'in' / 'a.txt', TEXT)
    (tmp_path / 'in' / 'again').symlink_to(tmp_path / 'in')
    assert prepare(tmp_path / 'in').whole_text == TEXT


@pytest.mark.parametrize('start, what', [(b'%PDF-1.4 plain ASCII', 'a PDF'), (b'Rar!\x1a\7', 'a rar archive'),
                                         (b'\x89PNG\r\n', 'picture'), (b'PK is short', ''), ('人之初'.encode(), ''),
                                         (b'', '')])
def test_files_that_are_not_text_are_known_by_their_first_bytes(tmp_path, start, what):
    path = tmp_path / 'x'
    path.write_bytes(start)
    assert what in containers.not_text(path) and bool(what) == bool(containers.not_text(path))


def test_files_of_a_folder_that_are_not_text_are_left_out_by_name(prepare, tmp_path):
    put(tmp_path / 'in' / 'a.txt', TEXT)
    put(tmp_path / 'in' / 'b.md', '')
    put(tmp_path / 'in' / 'c.pdf', b'%PDF-1.4')
    put(tmp_path / 'in' / 'd' / 'e.png', b'\x89PNG')
    assert prepare(tmp_path / 'in', '--name=x').whole_text == TEXT
    assert 'left out 2 files or folders: ' in prepare.err
    assert 'c.pdf (a PDF)' in prepare.err and 'e.png (a picture)' in prepare.err


def test_a_folder_without_text_is_refused(prepare, tmp_path, capfd):
    put(tmp_path / 'in' / 'c.pdf', b'%PDF-1.4')
    with pytest.raises(UserError, match='no text in it'):
        prepare(tmp_path / 'in', '--name=x')


# Two at once

def test_a_second_prepare_of_the_same_folder_is_refused_and_harms_nothing(prepare, tmp_path, capfd):
    from lib.machine import files
    book = put(tmp_path / 'book.txt', TEXT)
    prepare(book)
    with files.alone_in(tmp_path / 'data' / 'book'):
        assert 'another process is preparing' in fails(capfd, lambda: prepare(book, '--tokenizer=byte'))
    assert sorted(p.name for p in (tmp_path / 'data' / 'book').iterdir()) == ['meta.json', 'train.bin', 'val.bin']
    assert prepare(book).whole_text == TEXT


def test_what_a_killed_prepare_left_is_removed_and_nothing_else(prepare, tmp_path):
    for name in ('train.bin.tmp.123.0123abcd', 'thesis.tmp.docx', 'train.bin.tmp'):
        put(tmp_path / 'data' / 'book' / name, 'x')
    prepare(put(tmp_path / 'book.txt', TEXT), '--name=book')
    assert sorted(p.name for p in (tmp_path / 'data' / 'book').iterdir()) == [
        'meta.json', 'thesis.tmp.docx', 'train.bin', 'train.bin.tmp', 'val.bin']


def test_a_folder_of_the_program_that_cannot_be_written_is_replaced_by_one_here(prepare, tmp_path, monkeypatch):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    monkeypatch.setattr('os.access', lambda path, mode: False)
    with pytest.raises(ValueError, match='max'):  # the fixture looks for the result where it is not
        prepare(put(tmp_path / 'book.txt', TEXT))
    assert (tmp_path / 'here' / 'data' / 'book' / 'meta.json').exists()


def test_every_magic_number_is_refused_by_its_name(tmp_path):
    for magic, what in containers.OTHER_FILES.items():
        path = put(tmp_path / 'x', magic + b'\0' * 600)
        assert containers.not_text(path) == what
        with pytest.raises(UserError, match='not text'):
            list(containers.parts(path))


def test_words_that_are_also_magic_numbers_are_text(prepare, tmp_path):
    for word in ('ORC', 'RIFF', 'MSCF', 'xar!', 'AT&TFORM', 'ID3', 'OggS', 'fLaC', 'GIF8'):
        text = word + ' is a word.\n' + TEXT
        assert prepare(put(tmp_path / 'a.txt', text), '--name=x').whole_text == text
