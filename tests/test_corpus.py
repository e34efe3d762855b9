"""lib/text/prepare.py and data/*/prepare.py: what is read, how it is split, and what is written."""
import gzip
import hashlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configurator import REPO
from lib.text import chunks as chunks_room
from lib.text import prepare as prepare_room
from lib.text import read_text, tokenizer

if (shared := REPO.parent / 'shared' / 'tiktoken').is_dir():
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(shared))

LINES = [f'line {i}: the quick brown fox, number {i * i}, jumps over the lazy dog.\n' for i in range(200)]
TEXT = ''.join(LINES)


@pytest.fixture
def prepare(tmp_path, monkeypatch, capfd):
    """prepare(*flags, dataset='text', **fixed) runs a prepare script of a scratch repository; returns the Dataset."""
    monkeypatch.chdir(tmp_path)

    def prepare(*flags, dataset='text', **fixed):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', *map(str, flags)])
        prepare_room.prepare(tmp_path / 'data' / dataset / 'prepare.py', **fixed)
        prepare.out, prepare.err = capfd.readouterr()
        return Dataset(max((tmp_path / 'data').glob('*/meta.json'), key=lambda p: p.stat().st_mtime_ns).parent)
    return prepare


class Dataset:
    """What prepare wrote."""

    def __init__(self, folder):
        self.folder, self.meta = folder, json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        self.coder = tokenizer.from_spec(self.meta['tokenizer'])
        self.ids = {split: np.fromfile(folder / f'{split}.bin', self.meta['dtype']) for split in ('train', 'val')}

    def text(self, split):
        return self.coder.decode(self.ids[split])


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode('utf-8'))
    return path


def json_lines(texts, key='text'):
    return ''.join(json.dumps({key: text}, ensure_ascii=False) + '\n' for text in texts)


# One text

def test_the_first_nine_tenths_of_one_text_train(prepare, tmp_path):
    data = prepare(f'--input={put(tmp_path / "book.txt", TEXT)}')
    assert data.text('train') == TEXT[:int(len(TEXT) * 0.9)] and data.text('val') == TEXT[int(len(TEXT) * 0.9):]


def test_the_counts_are_printed_as_people_parse_them(prepare, tmp_path):
    prepare(put(tmp_path / 'book.txt', 'ab\n' * 1000))
    assert prepare.out.startswith('length of dataset in characters: 3,000\n'
                                  'all the unique characters: \nab\nvocab size: 3\n'
                                  'train has 2,700 tokens\nval has 300 tokens\n')


def test_a_tiny_text_is_warned_about_with_the_limit_of_block_size(prepare, tmp_path):
    prepare(put(tmp_path / 'book.txt', 'ab\n' * 500))
    assert 'warning: 1,500 characters are few' in prepare.err and 'below the 150 tokens of the val split' in prepare.err
    prepare(put(tmp_path / 'book.txt', 'ab\n' * 2000))
    assert 'warning' not in prepare.err


def test_the_preview_shows_lines_that_went_there_and_back(prepare, tmp_path):
    prepare(put(tmp_path / 'book.txt', '人之初\n性本善\n性相近\n习相远\n' * 9))
    assert '-> 人之初\n' in prepare.out and '-> 性相近\n' in prepare.out and '习相远' not in prepare.out


def test_the_command_to_type_next_fits_the_small_split(prepare, tmp_path):
    prepare(put(tmp_path / 'book.txt', 'ab\n' * 500))
    assert '--dataset=book --out_dir=out-book --block_size=128\n' in prepare.out


@pytest.mark.parametrize('name, config', [('shakespeare_char', 'train_shakespeare_char'), ('openwebtext', 'train_gpt2'),
                                          ('shakespeare', 'finetune_shakespeare')])
def test_of_several_configs_the_plain_one_is_named(prepare, tmp_path, name, config):
    prepare(put(tmp_path / 'book.txt', 'ab\n' * 2000), name=name)
    assert f'train with: python train.py config/{config}.py\n' in prepare.out


@pytest.mark.parametrize('kind', ['char', 'byte', 'bpe', 'gpt2'])
def test_meta_tells_the_truth_about_the_files(prepare, tmp_path, kind):
    if kind == 'gpt2' and not (REPO.parent / 'shared' / 'tiktoken').is_dir():
        pytest.skip('GPT-2 BPE files are not on this machine')
    text = TEXT + '天地玄黄，宇宙洪荒。\n' * 50
    data = prepare(put(tmp_path / 'book.txt', text), f'--tokenizer={kind}', *['--vocab_size=300'] * (kind == 'bpe'))
    assert data.text('train') + data.text('val') == text
    assert data.meta['vocab_size'] == data.coder.vocab_size and data.meta['format'] == 1
    for split, facts in data.meta['splits'].items():
        raw = (data.folder / f'{split}.bin').read_bytes()
        assert facts == {'n_tokens': len(data.ids[split]), 'n_bytes': len(data.text(split).encode()),
                         'max_id': data.ids[split].max(), 'sha256': hashlib.sha256(raw).hexdigest()}


def test_ids_beyond_65535_are_written_as_uint32(prepare, tmp_path):
    text = ''.join(chr(code) for code in range(0x20, 0x12000) if not 0xD800 <= code < 0xE000)
    data = prepare(put(tmp_path / 'planes.txt', text))
    assert data.meta['dtype'] == 'uint32' and data.text('train') + data.text('val') == text


def test_65536_ids_still_fit_uint16():
    assert tokenizer.CharTokenizer(''.join(map(chr, [*range(0xD800), *range(0xE000, 0x10800)]))).dtype == '<u2'


def test_a_byte_order_mark_at_the_beginning_is_no_text(prepare, tmp_path):
    assert prepare(put(tmp_path / 'book.txt', '\ufeff' + TEXT)).text('train').startswith('line 0')


def test_line_ends_stay_as_they_are(prepare, tmp_path):
    data = prepare(put(tmp_path / 'book.txt', TEXT.replace('\n', '\r\n')))
    assert data.text('train') + data.text('val') == TEXT.replace('\n', '\r\n')


def test_another_encoding_is_read_by_name(prepare, tmp_path):
    data = prepare(put(tmp_path / 'book.txt', ('人之初性本善' * 100).encode('gb18030')), '--encoding=gb18030')
    assert data.text('val') == ('人之初性本善' * 100)[540:]


def test_a_character_split_between_two_chunks_is_whole(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(read_text, 'CHUNK', 7)
    text = '人之初，性本善👩‍👩‍👧‍👦' * 40
    data = prepare(put(tmp_path / 'book.txt', text))
    assert data.text('train') + data.text('val') == text


def test_validation_text_of_its_own_is_taken_whole(prepare, tmp_path):
    data = prepare(put(tmp_path / 'book.txt', TEXT), f'--val_input={put(tmp_path / "val.txt", "the end, ")}')
    assert data.text('train') == TEXT and data.text('val') == 'the end, '


# Many documents

def test_every_tenth_document_validates_and_each_ends_with_a_mark(prepare, tmp_path):
    data = prepare(put(tmp_path / 'lines.jsonl', json_lines(LINES)), '--tokenizer=bpe', '--vocab_size=300')
    assert data.text('val').split('<|endoftext|>') == [*LINES[9::10], '']
    assert data.text('train').split('<|endoftext|>')[:-1] == [line for i, line in enumerate(LINES) if i % 10 != 9]


def test_marks_count_as_tokens_but_not_as_bytes(prepare, tmp_path):
    data = prepare(put(tmp_path / 'lines.jsonl', json_lines(LINES)), '--tokenizer=bpe', '--vocab_size=300')
    assert data.meta['splits']['val']['n_bytes'] == sum(map(len, LINES[9::10]))


def test_characters_have_a_newline_between_documents(prepare, tmp_path):
    data = prepare(put(tmp_path / 'lines.jsonl', json_lines(['ab', 'cd'] * 20)))
    assert data.text('val') == 'cd\n' * 4


def test_few_documents_are_split_by_position(prepare, tmp_path):
    for i in range(5):
        put(tmp_path / 'books' / f'{i}.txt', f'{i}' * 100)
    data = prepare(tmp_path / 'books', '--tokenizer=byte')
    assert data.text('val') == '4' * 50 + '\n'


def test_empty_documents_leave_no_trace(prepare, tmp_path):
    data = prepare(put(tmp_path / 'lines.jsonl', json_lines(['', 'ab', ''] * 30) + '\n{"text": null}\n'))
    assert data.text('train') + data.text('val') == 'ab\n' * 30


def test_a_delimiter_divides_a_text_file_into_documents(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(read_text, 'CHUNK', 50)
    story = put(tmp_path / 'stories.txt', '<|endoftext|>\n'.join(LINES))
    data = prepare(story, '--tokenizer=bpe', '--vocab_size=300', delimiter='<|endoftext|>')
    assert data.text('val').split('<|endoftext|>')[:-1] == [line.strip() for line in LINES[9::10]]


# What is read

def expected_val(lines=LINES):
    return ''.join(line + '\n' for line in lines[9::10])


@pytest.mark.parametrize('name, pack', [('wiki_00', bytes), ('news.json', bytes), ('x.txt.gz', gzip.compress)])
def test_json_lines_are_known_by_their_content(prepare, tmp_path, name, pack):
    data = prepare(put(tmp_path / name, pack(json_lines(LINES).encode())), '--name=x')
    assert data.text('val') == expected_val()


def test_keys_are_joined_with_newlines_and_may_be_absent(prepare, tmp_path):
    records = [{'title': 't', 'desc': '', 'content': 'c'}, {'title': 't'}] * 20
    path = put(tmp_path / 'news', ''.join(json.dumps(record) + '\n' for record in records))
    assert prepare(path, '--text_key=title,desc,content').text('train').startswith('t\nc\nt\nt\nc\nt\n')


def test_parquet_is_read(prepare, tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({'id': range(200), 'text': LINES}), tmp_path / 'part')
    assert prepare(tmp_path / 'part').text('val') == expected_val()


def test_a_folder_is_read_in_order_with_what_lies_deeper_but_not_what_is_hidden(prepare, tmp_path):
    for name, text in (('b/2.txt', 'two'), ('a/1', 'one'), ('c.md', 'three'), ('.git/x', 'no'), ('.DS_Store', 'no')):
        put(tmp_path / 'books' / name, text * 10)
    data = prepare(tmp_path / 'books', '--tokenizer=byte')
    assert data.text('train') + data.text('val') == f"{'one' * 10}\n{'two' * 10}\n{'three' * 10}\n"


def test_globs_and_repeated_flags_name_many_files(prepare, tmp_path):
    for name in 'cab':
        put(tmp_path / f'{name}.txt', name * 30)
    data = prepare(f'--input={tmp_path}/[ab].txt', '--input', tmp_path / 'c.txt', '--tokenizer=byte', '--name=x')
    assert data.text('train') + data.text('val') == f"{'a' * 30}\n{'b' * 30}\n{'c' * 30}\n"


def test_a_hub_dataset_is_streamed_from_a_folder_laid_out_like_one(prepare, tmp_path):
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


def test_a_file_put_there_by_hand_comes_before_any_download(prepare, tmp_path):
    put(tmp_path / 'data' / 'plays' / 'input.txt', TEXT)
    assert prepare(dataset='plays', source='https://127.0.0.1:9/none').text('train').startswith('line 0')


def test_a_path_is_looked_up_in_the_working_directory_then_in_the_repository(prepare, tmp_path, monkeypatch):
    import configurator
    put(tmp_path / 'repo' / 'there.txt', TEXT)
    monkeypatch.setattr(configurator, 'REPO', tmp_path / 'repo')
    assert prepare('--input=there.txt').folder.name == 'there'


def test_a_wrong_count_warns_only_about_the_scripts_own_text(prepare, tmp_path):
    path = put(tmp_path / 'plays.txt', TEXT)
    prepare(dataset='plays', source=lambda folder: [str(path)], expect=(1, 2))
    assert 'warning: expected 1 and 2 tokens' in prepare.err
    prepare(path, dataset='plays', expect=(1, 2))
    assert 'warning' not in prepare.err


def test_a_text_is_rewritten_before_it_is_split(prepare, tmp_path):
    data = prepare(put(tmp_path / 'book.txt', TEXT), rewrite=str.upper)
    assert data.text('val') == TEXT.upper()[int(len(TEXT) * 0.9):]


def test_the_dataset_is_named_after_the_text_or_by_the_user(prepare, tmp_path):
    path = put(tmp_path / 'my book.v2.txt', TEXT)
    assert prepare(path).folder.name == 'my_book'
    assert prepare(path, '--name=mine').folder.name == 'mine'


# Tokenizing in pieces and in processes

@pytest.mark.parametrize('kind', ['char', 'byte', 'bpe'])
def test_a_long_text_in_pieces_has_the_ids_of_the_whole(prepare, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(read_text, 'CHUNK', 100)
    monkeypatch.setattr(chunks_room, 'WINDOW', 20)
    text = TEXT + 'nospace' * 200 + '天地玄黄，宇宙洪荒。' * 50 + '\n \n\t  x' * 100
    data = prepare(put(tmp_path / 'book.txt', text), f'--tokenizer={kind}', *['--vocab_size=400'] * (kind == 'bpe'))
    edge = int(len(text) * 0.9)
    assert data.ids['train'].tolist() == data.coder.encode(text[:edge])
    assert data.ids['val'].tolist() == data.coder.encode(text[edge:])


def test_the_bytes_do_not_depend_on_the_number_of_processes(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(read_text, 'CHUNK', 1000)
    path = put(tmp_path / 'lines.jsonl', json_lines(LINES))
    made = [prepare(path, f'--num_proc={n}', '--tokenizer=bpe', '--vocab_size=300') for n in (1, 2, 3)]
    assert made[0].meta == made[1].meta == made[2].meta


def test_processes_may_be_spawned_as_on_windows(prepare, tmp_path, monkeypatch):
    import multiprocessing
    started = []
    monkeypatch.setattr(read_text, 'CHUNK', 1000)
    monkeypatch.setattr(chunks_room, 'ProcessPoolExecutor', lambda n, **more: started.append(n) or Pool(
        n, mp_context=multiprocessing.get_context('spawn'), **more))
    from concurrent.futures import ProcessPoolExecutor as Pool
    path = put(tmp_path / 'lines.jsonl', json_lines(LINES))
    data = prepare(path, '--num_proc=2', '--tokenizer=bpe', '--vocab_size=300')
    assert started == [2] and data.text('val').startswith(LINES[9])


def test_the_sample_a_bpe_learns_from_is_bounded_and_even(monkeypatch):
    monkeypatch.setattr(chunks_room, 'SAMPLE', 1000)
    *_, sample = chunks_room.scan(((f'{i:09d}\n', True) for i in range(10_000)), np.inf)
    numbers = [int(text) for text in sample]
    assert 500 <= sum(map(len, sample)) <= 1000 and len(set(np.diff(numbers))) == 1 and numbers[-1] > 9_800


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    script = ('import resource, sys; sys.path.insert(0, {repo!r}); from lib.text.prepare import prepare\n'
              'prepare({script!r}, tokenizer="byte")\n'
              'print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)')
    peaks = []
    for copies in (50, 500):
        path = tmp_path / f'{copies}.txt'
        with open(path, 'wb') as file:
            for _ in range(copies):
                file.write((TEXT * 80).encode()[:1_000_000])
        code = script.format(repo=str(REPO), script=str(tmp_path / 'data' / 'text' / 'prepare.py'))
        done = subprocess.run([sys.executable, '-c', code, path], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.2 * peaks[0]


# The scripts

SCRIPTS = sorted(path.parent.name for path in (REPO / 'data').glob('*/prepare.py'))


@pytest.mark.parametrize('name', SCRIPTS)
def test_every_script_explains_itself(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['prepare.py', '--help'])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPO / 'data' / name / 'prepare.py'), run_name='__main__')
    out = capsys.readouterr().out
    assert not end.value.code and f'python data/{name}/prepare.py' in out and '--input ' in out


def test_help_shows_the_datasets_own_defaults(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['prepare.py', '--help'])
    with pytest.raises(SystemExit):
        runpy.run_path(str(REPO / 'data' / 'shakespeare' / 'prepare.py'), run_name='__main__')
    assert "str   'gpt2'" in capsys.readouterr().out


def test_a_prepare_script_needs_neither_torch_nor_tiktoken_nor_datasets(tmp_path):
    put(tmp_path / 'book.txt', TEXT)
    code = (f'import sys; sys.path.insert(0, {str(REPO)!r})\n'
            'absent = "torch", "tiktoken", "datasets", "tokenizers", "tqdm", "pyarrow", "requests"\n'
            'sys.modules.update(dict.fromkeys(absent))\n'
            'from lib.text.prepare import prepare; prepare("data/text/prepare.py")')
    subprocess.run([sys.executable, '-c', code, 'book.txt'], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / 'data' / 'book' / 'train.bin').exists()


def test_a_c_locale_breaks_nothing(tmp_path):
    put(tmp_path / 'å中👍.txt', 'å中👍\n' * 100)
    code = (f'import sys; sys.path.insert(0, {str(REPO)!r})\n'
            'from lib.text.prepare import prepare; prepare("data/text/prepare.py")')
    env = {**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    done = subprocess.run([sys.executable, '-c', code, '--input=å中👍.txt', '--name=x'], cwd=tmp_path, env=env,
                          capture_output=True, check=True)
    assert '-> å中👍' in done.stdout.decode('utf-8')
    assert Dataset(tmp_path / 'data' / 'x').text('val') == 'å中👍\n' * 10


def test_python_char_takes_the_librarys_ascii_files_without_tests():
    scope = runpy.run_path(str(REPO / 'data' / 'python_char' / 'prepare.py'))
    files = [Path(path) for path in scope['library_files'](None)]
    assert len(files) > 300 and 'argparse.py' in {path.name for path in files}
    assert not {'site-packages', 'test', 'tests'} & {part for path in files for part in path.parts[-3:]}
    assert all(path.read_bytes().isascii() for path in files[:50])


def test_shuffling_lines_is_the_same_every_time():
    shuffle = runpy.run_path(str(REPO / 'data' / 'shuixu_full' / 'prepare.py'))['shuffle_lines']
    assert shuffle(TEXT) == shuffle(TEXT) != TEXT and sorted(shuffle(TEXT).splitlines()) == sorted(TEXT.splitlines())


@pytest.mark.parametrize('kind, counts', [('char', (1_003_854, 111_540)), ('gpt2', (301_966, 36_059))])
def test_tiny_shakespeare_has_nanogpts_counts(prepare, kind, counts):
    path = REPO.parent / 'shared' / 'data' / 'tinyshakespeare.txt'
    if not path.exists():
        pytest.skip('the text is not on this machine')
    data = prepare(path, f'--tokenizer={kind}')
    assert tuple(len(ids) for ids in data.ids.values()) == counts
