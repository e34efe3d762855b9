"""Every file format at its boundary: any value in any field is read, or refused in one line, in bounded memory."""
import bz2
import copy
import encodings.aliases
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import pickle
import random
import sys
import tarfile
import traceback
import zipfile
from pathlib import Path

import pytest
import torch
from test_hostile import make_state

from configurator import UserError
from lib import tasks
from lib.play import answers, curves
from lib.play.models import Opened
from lib.text import chunks, data_folder, dataset, json_records, read_text, schema, tokenizer
from lib.text import encodings as text_encodings
from lib.training import curves as training_curves
from lib.training import log, sweep, sweep_results
from lib.weights import gpt2
from lib.weights.load_model import load_model

WRONG = [None, True, -1, 0, 0.5, 2**70, -2**70, 10**400, math.nan, math.inf, '', 'text', '\ud800',
         '\x1b[31m', '1' * 5000, [], [[]], {}, {'a': 1}, [1], ['a', 1, 2], {'kind': []}]
ROOM = 2**30  # bytes of memory that a reader may use beyond those of the process that begins to read
MISSING = object()


def bounded(work, room=ROOM):
    """Run `work` in a child process with bounded memory and time; AssertionError with its traceback if it fails."""
    if not hasattr(os, 'fork') or sys.platform != 'linux':
        return work()
    import resource
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.fsync = lambda fd: None  # nothing here is about power failures
            used = int(Path('/proc/self/statm').read_text(encoding='ascii').split()[0]) * os.sysconf('SC_PAGE_SIZE')
            resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
            resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
            work()
            status = 0
        except BaseException:
            os.write(writer, traceback.format_exc()[-4000:].encode('utf-8', 'replace'))
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, encoding='utf-8') as pipe:
        report = pipe.read()
    ended = os.waitpid(child, 0)[1]
    assert ended == 0, f'ended with {ended}\n{report}'


def places(value, place=()):
    """Yield the places of all entries of nested dictionaries and lists, as tuples of keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*place, key)
        yield from places(inner, (*place, key))


def mutations(value):
    """Yield (what, another value): each entry replaced by each wrong value, left out, or beside one more."""
    yield from (('whole', wrong) for wrong in WRONG)
    for place in places(value):
        for wrong in (*WRONG, MISSING):
            changed = copy.deepcopy(value)
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            if wrong is MISSING:
                del inner[place[-1]]
            else:
                inner[place[-1]] = wrong
            yield (place, str(wrong)[:20]), changed
    for place in ((), *places(value)):
        changed = copy.deepcopy(value)
        inner = changed
        for key in place:
            inner = inner[key]
        if isinstance(inner, dict):
            inner['another \x1b[31m'] = ['x']
            yield (place, 'one more'), changed


def refuses_or_reads(read, cases, least_refused):
    """Check that `read(case)` returns, or raises a UserError of one line, for all (what, case)."""
    def work():
        refused = 0
        for what, case in cases:
            try:
                read(case)
            except UserError as error:
                assert '\n' not in error.message and len(error.message) < 3000, (what, error.message)
                refused += 1
            except BaseException as error:
                raise AssertionError(f'{what}: {type(error).__name__}: {error}') from error
        assert refused >= least_refused, refused
    bounded(work)


# meta.json and meta.pkl

def meta_of(folder, chat):
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    if chat:
        mask = bytes([0, 1, 1, 0] * 500)
        for split, facts in meta['splits'].items():
            part = mask[:facts['n_tokens']]
            (folder / f'{split}.mask').write_bytes(part)
            facts.update(mask_sha256=hashlib.sha256(part).hexdigest(), answer_bytes=sum(part))
        meta['chat'] = {'user': 'a', 'assistant': 'b', 'end': 'c'}
    return meta


@pytest.mark.parametrize('chat', [False, True])
def test_every_field_of_meta_json(workdir, chat):
    folder = workdir / 'data' / 'tiny'
    meta = meta_of(folder, chat)

    def read(value):
        (folder / 'meta.json').write_text(json.dumps(value), encoding='utf-8')
        data = dataset.open_dataset('tiny', 8)
        dataset.train_starts(1, len(data.train), 8, 0, 4, data.train.dialogues)
        data.val.bits_per_byte(2.5)
        data_folder.describe_existing(folder)
    refuses_or_reads(read, mutations(meta), 200)


def random_value(rng, depth=3):
    """Return any plain value that pickle and JSON can hold."""
    kind = rng.randrange(9 if depth else 6)
    if kind > 6:
        keys = rng.choices([1, 'a', 'itos', 0, 'kind', '0'], k=rng.randrange(4))
        return {key: random_value(rng, depth - 1) for key in keys}
    if kind == 6:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return rng.choice(WRONG[:15])


def test_any_plain_value_as_meta_pkl():
    def work():
        rng = random.Random(1)
        for _ in range(500):
            value = random_value(rng)
            if rng.random() < 0.7:
                value = {'itos': value, 'stoi': {}}
            try:
                assert schema.nanogpt_chars(pickle.dumps(value, rng.randrange(6)))
            except ValueError as error:
                assert '\n' not in str(error)
    bounded(work)


# Hugging Face folders

CONFIG = {'model_type': 'gpt2', 'vocab_size': 50257, 'n_positions': 8, 'n_embd': 4, 'n_layer': 1, 'n_head': 2,
          'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': True, 'n_inner': None}
VOCABULARY = {'\u0120the': 262, '\u0120gazed': 50255}
FOLDER = {
    'config.json': CONFIG, 'vocab.json': VOCABULARY,
    'tokenizer.json': {'model': {'vocab': VOCABULARY}, 'added_tokens': [{'content': '<|endoftext|>', 'id': 50256}]},
    'added_tokens.json': {'<|endoftext|>': 50256},
    'tokenizer_config.json': {'added_tokens_decoder': {'50256': {'content': '<|endoftext|>'}}},
    'model.safetensors.index.json': {'weight_map': {'wte.weight': 'model-00001-of-00001.safetensors'}},
    'tokenizer_spec.json': {'kind': 'char', 'chars': 'abc'}, 'chat.json': {'user': 'a', 'assistant': 'b', 'end': 'c'}}


@pytest.mark.parametrize('name', FOLDER)
def test_every_field_of_a_hugging_face_folder(tmp_path, name):
    for other in ('config.json', name):
        (tmp_path / other).write_text(json.dumps(FOLDER[other]), encoding='utf-8')
    source = gpt2.Source('folder', tmp_path)

    def read(value):
        (tmp_path / name).write_text(json.dumps(value), encoding='utf-8')
        for part in (source.config, source.tokenizer_spec, source.files, source.load):
            try:
                part()
            except UserError as error:
                assert '\n' not in error.message
    refuses_or_reads(read, mutations(FOLDER[name]), 0)


# log.jsonl, results of sweeps

UPDATE = {'iter': 0, 'loss': 2.5, 'lr': 1e-3, 'tok_s': 1e4, 'mfu': None, 'grad_norm': 1.0, 'tokens': 32, 'minutes': 0.1}
EVALUATION = {'step': 0, 'train_loss': 2.5, 'val_loss': 2.6, 'val_bpb': 3.0, 'train_bpb': 3.0, 'tokens': 32,
              'minutes': 0.1, 'val_data': 'abc', 'whole_val_loss': 2.6, 'sample': 'text'}


def test_every_field_of_the_log(tmp_path):
    import plot
    path = tmp_path / 'log.jsonl'

    def read(record):
        path.write_text(''.join(json.dumps(line) + '\n' for line in (UPDATE, EVALUATION, record)), encoding='utf-8')
        run = training_curves.read_run(tmp_path)
        plot.summary(run)
        training_curves.comparison_note([run, run])
        assert not training_curves.use_bits([run, run])
        for x, y in (('iter', 'loss'), ('step', 'val_loss'), ('minutes', 'train_loss')):
            training_curves.y_limit(*training_curves.series(run.updates + run.evals, x, y))
        json.dumps(curves.appended(path, None), allow_nan=False)
        log.trim_log(path, 1, 1)
    refuses_or_reads(read, [*mutations(UPDATE), *mutations(EVALUATION)], 0)


ROW = {'n_params': 10, 'tokens': 32, 'seconds': 0.5, 'val_loss': 2.5, 'val_bpb': '', 'error': ''}


def test_every_field_of_a_stored_result_of_a_sweep(tmp_path):
    stored = {'hash': 'abc', 'row': ROW}

    def read(value):
        (tmp_path / 'sweep.json').write_text(json.dumps(value), encoding='utf-8')
        run = sweep.Run({'n_embd': '8'}, [], {}, tmp_path, 'abc')
        if sweep.load_result(run):
            rows = [{**run.varied, **run.row}, {'n_embd': '16', **ROW}]
            sweep_results.table(rows)
            sweep_results.verdict(rows)
            sweep_results.write_tsv(tmp_path / 'results.tsv', rows)
            sweep_results.read_tsv(tmp_path / 'results.tsv')
    refuses_or_reads(read, mutations(stored), 0)


def test_every_cell_of_results_tsv(tmp_path):
    path, head = tmp_path / 'results.tsv', ['n_embd', *ROW]
    cells = [head, ['8', *map(str, ROW.values())], ['16', *map(str, ROW.values())]]
    cases = []
    for i, line in enumerate(cells):
        for j in range(len(line)):
            for wrong in ('', 'x', 'nan', 'inf', '1e999', '-1', '\x1b[31m', '"', '9' * 5000, 'a\tb', '\0', '\ufeff'):
                changed = copy.deepcopy(cells)
                changed[i][j] = wrong
                cases.append(((i, j, wrong[:9]), '\n'.join('\t'.join(line) for line in changed)))
        cases.append(((i, 'short'), '\n'.join('\t'.join(line[:3 if k == i else 9]) for k, line in enumerate(cells))))
    cases += [('long', 'x' * 200_000), ('empty', ''), ('head', '\t'.join(head))]

    def read(text):
        path.write_text(text, encoding='utf-8', newline='')
        rows = sweep_results.read_tsv(path)
        sweep_results.table(rows)
        sweep_results.verdict(rows)
    refuses_or_reads(read, cases, 100)


# Task files

@pytest.mark.parametrize('task, item', [
    ('hellaswag', {'ctx': 'a b', 'endings': ['c', 'd'], 'label': '1'}), ('lambada', {'text': 'one two three'})])
def test_every_field_of_a_task_file(tmp_path, task, item):
    path = tmp_path / 'rows.jsonl'

    def read(value):
        path.write_text(json.dumps(value) + '\n', encoding='utf-8')
        items = tasks.read(task, path)
        asked = tasks.requests(task, items, tokenizer.ByteTokenizer())
        tasks.scores(task, items, [(1.0, len(ids), True) for _, ids in asked])
    refuses_or_reads(read, mutations(item), 40)


# Requests to play.py

BODIES = {
    'next': {'prompt': 'ab', 'after': [1], 'temperature': 0.8, 'top_k': 3, 'top_p': 0.9, 'repetition_penalty': 1.1},
    'write': {'prompt': 'ab', 'after': [1], 'max_new_tokens': 2, 'seed': 1},
    'read': {'text': 'abcdefghijk', 'drop': False},
    'look': {'text': 'abc', 'layer': 0, 'head': 0, 'drop': True}, 'passage': {'place': 0.5, 'tokens': 5},
    'chat': {'turns': [['user', 'ab']], 'max_new_tokens': 2, 'seed': 1}, 'curves': {'cursors': {'out': ['1', 0]}},
    'models': {}, 'nothing': {}}


class Models:
    """Stands for the opened models of a server: one, whatever its name."""

    def __init__(self, opened, folder):
        self.opened, self.folder = opened, folder

    def get(self, name):
        return self.opened

    def logs(self):
        return {'out': self.folder / 'log.jsonl'}

    def wanted(self):
        return []

    describe = wanted


@pytest.mark.parametrize('kind', BODIES)
def test_every_field_of_a_request(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out').mkdir()
    torch.save({**make_state(), 'chat': {'user': 'a', 'assistant': 'b', 'end': 'c'}}, tmp_path / 'out' / 'ckpt.pt')
    model, tok, state = load_model('resume', 'out')
    (tmp_path / 'log.jsonl').write_text(json.dumps(UPDATE) + '\n', encoding='utf-8')
    site = type('Site', (), {'models': Models(Opened(model, tok, state, 1), tmp_path), 'worker': None})

    def read(body):
        try:
            work, _ = answers.answer(site, f'/api/{kind}', schema.parse_json(json.dumps(body)))
            for line in work():
                json.dumps(line, allow_nan=False)
        except answers.BadRequest as error:
            raise UserError(error.message) from None
    refuses_or_reads(read, mutations(BODIES[kind]), 8)


# Encodings and containers

TEXTS = {
    'English': 'The quick brown fox jumps over the lazy dog.\n' * 40,
    'German': 'Füchse jagen zwölf Boxkämpfer quer.\n' * 40,
    'French': "Les élèves naïfs mangèrent à Noël près du château où l'été s'achève.\n" * 40,
    'Russian': 'Съешь же ещё этих мягких французских булок, да выпей чаю.\n' * 40,
    'Greek': 'Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.\n' * 40,
    'Chinese': '人之初，性本善。性相近，习相远。\n' * 60,
    'Japanese': 'いろはにほへと ちりぬるを 色は匂へど散りぬるを\n' * 40,
    'Korean': '키스의 고유조건은 입술끼리 만나야 하고\n' * 40,
    'several': 'Ça va 😀 日本 Привет\n' * 40,
    'Hebrew': 'דג סקרן שט בים מאוכזב\n' * 40,
    'Thai': 'เป็นมนุษย์สุดประเสริฐ\n' * 40}
# no encodings of texts: names of hosts; and Hebrew in one of IBM's, all of whose letters are ASCII's
NOT_MEANT = {'idna', 'punycode', 'cp424'}
CODECS = sorted({*encodings.aliases.aliases.values(), 'utf_8_sig', 'unicode_escape', 'raw_unicode_escape', 'cp874',
                 'cp720', 'cp737', 'cp875', 'cp1006', 'koi8_t', 'koi8_u'} - NOT_MEANT)


def read_whole(path, codec='utf-8'):
    return ''.join(text for text, _ in read_text.read(path, codec, ['text']))


@pytest.mark.filterwarnings('ignore:invalid escape')
@pytest.mark.parametrize('language', TEXTS)
def test_a_text_in_any_encoding_of_python_is_read_exactly_or_refused(tmp_path, language):
    text, path, n = TEXTS[language], tmp_path / 'a.txt', 0
    for codec in CODECS:
        try:
            path.write_bytes(text.encode(codec))
        except (UnicodeError, LookupError):  # it lacks these letters, or is no encoding of text
            continue
        n += 1
        try:
            few = codec == 'unicode_escape' and language in ('English', 'German', 'French')  # programs have some
            assert read_whole(path) == text or few, codec
        except UserError as error:
            assert 'a.txt' in error.message and '\n' not in error.message
        try:
            assert read_whole(path, codec) == text, codec
        except UserError as error:
            assert 'is UTF-8, not' in error.message, codec
    assert n >= 6


def packed(data, rng, depth):
    """Return `data` inside `depth` random containers."""
    for _ in range(depth):
        kind = rng.choice(['gzip', 'bz2', 'xz', 'lzma', 'tar', 'zip'])
        if kind == 'tar':
            out = io.BytesIO()
            kind_of_tar = rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
            with tarfile.open(fileobj=out, mode='w', format=kind_of_tar) as archive:
                info = tarfile.TarInfo(rng.choice(['a', '水浒.txt', 'in/' + 'x' * 150, 'a b']))
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            data = out.getvalue()
        elif kind == 'zip':
            out = io.BytesIO()
            with zipfile.ZipFile(out, 'w', rng.choice([0, 8, 12, 14])) as archive:
                archive.writestr(rng.choice(['a', '水浒.txt', 'in/b']), data)
            data = out.getvalue()
        else:
            data = {'gzip': gzip.compress, 'bz2': bz2.compress, 'xz': lzma.compress,
                    'lzma': lambda data: lzma.compress(data, lzma.FORMAT_ALONE)}[kind](data)
    return data


def test_a_text_in_any_containers_is_read_exactly_or_refused(tmp_path):
    rng, path, exact = random.Random(3), tmp_path / 'a.bin', 0
    for case in range(120):
        text = TEXTS[rng.choice(list(TEXTS))][:rng.choice([1, 100, 3000])]
        path.write_bytes(packed(text.encode(), rng, rng.randrange(1, 6)))
        try:
            assert read_whole(path) == text, case
            exact += 1
        except UserError as error:
            assert 'packed more than' in error.message or 'a zip archive inside another' in error.message
    assert exact > 60


def test_damaged_containers_are_refused_in_one_line_or_read(tmp_path):
    def work():
        rng, path = random.Random(4), tmp_path / 'a.bin'
        for _ in range(300):
            data = bytearray(packed(TEXTS['Chinese'].encode(), rng, rng.randrange(1, 3)))
            at = rng.randrange(min(len(data), rng.choice([40, 600, 10**6])))
            data[at:at + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
            path.write_bytes(data[:rng.choice([len(data), rng.randrange(len(data)) + 1])])
            try:
                read_whole(path)
            except UserError as error:
                assert 'a.bin' in error.message and '\n' not in error.message
    bounded(work)


def test_a_header_that_claims_gigabytes_takes_no_memory(tmp_path):
    def header(kind, size):
        info = tarfile.TarInfo('x')
        info.type, info.size = kind, size
        return info.tobuf(tarfile.GNU_FORMAT)

    def work():
        path = tmp_path / 'a.tar.gz'
        for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE):
            with gzip.open(path, 'wb', 1) as file:
                file.write(header(kind, 2**31) + bytes(2**20))
            with pytest.raises(UserError, match='a header claims'):
                read_whole(path)
        path.write_bytes(b']\0\0\0\x80' + b'\xff' * 8 + bytes(100))  # an lzma file with a dictionary of 2 GB
        with pytest.raises(UserError, match='is a damaged lzma file'):
            read_whole(path)
    bounded(work)


def test_a_line_of_200_megabytes_takes_little_memory(tmp_path):
    path, n = tmp_path / 'a.txt', 200
    with open(path, 'wb') as file:
        for _ in range(n):
            file.write(b'ab cd ' * 174_763)  # a mebibyte

    def work():
        stream = (('train', *piece) for piece in read_text.read(path, 'utf-8', ['text']))
        sizes = [sum(len(text) for text, _ in pieces)
                 for _, pieces in chunks.gather(stream, tokenizer.ByteTokenizer().safe_split, False)]
        assert sum(sizes) == path.stat().st_size and max(sizes) < 3 * 2**20
    bounded(work, room=2**28)


# Other shapes of JSON

@pytest.mark.parametrize('content, reason', [
    (json.dumps({'cells': [{'source': ['a']}]}, indent=1), 'is JSON, but not one object per line'),  # a notebook
    ('{\n "text": "a"\n}\n{\n "text": "b"\n}\n' * 9, 'is JSON, but not one object per line'),
    ('{"text": "a"},\n{"text": "b"}\n', ':1: a comma after a JSON object'),
    ('{"text": "a"} {"text": "b"}', ':1: not JSON .Extra data.; expected one object per line')])
def test_json_is_known_by_its_content_and_not_by_its_name(tmp_path, content, reason):
    (tmp_path / 'a.txt').write_text(content, encoding='utf-8')
    with pytest.raises(UserError, match=reason):
        read_whole(tmp_path / 'a.txt')


def test_a_json_object_that_is_longer_than_the_beginning_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, 'ENOUGH', 1 << 20)  # characters; a chunk has as many
    text = 'word ' * 500_000
    (tmp_path / 'a.jsonl').write_text(json.dumps({'text': text}), encoding='utf-8')
    assert read_whole(tmp_path / 'a.jsonl') == text


def test_a_json_text_sequence_is_read(tmp_path):
    (tmp_path / 'a.txt').write_text('\x1e{"text": "a"}\n\x1e{"text": "b"}\n', encoding='utf-8')
    assert read_whole(tmp_path / 'a.txt') == 'ab'


@pytest.mark.parametrize('name', ['ascii', 'latin-1'])
def test_ascii_that_is_meant_as_it_stands_is_read_with_that_encoding(tmp_path, name):
    (tmp_path / 'a.txt').write_text('+AGEA6Q- ' * 50 + '~{VP~}', encoding='ascii')
    assert read_whole(tmp_path / 'a.txt', name) == '+AGEA6Q- ' * 50 + '~{VP~}'


def test_programs_and_logs_are_no_seven_bit_encodings(tmp_path):
    rng = random.Random(5)  # keys in base64, which would be characters from everywhere in Unicode
    by_accident = ''.join(chr(rng.randrange(0x2100, 0xd700)) for _ in range(90)).encode('utf-7').decode()
    for text in ('a = b + c\nx += d+e-f\n' * 50, 'print("\\x1b[31m\\u4eba")  # ~{x}~\n' + 'plain code = 1\n' * 50,
                 '\x1b[31mred\x1b[0m\x1b(B\n' * 50, by_accident):
        assert text_encodings._seven_bit(text.encode()) == ''
