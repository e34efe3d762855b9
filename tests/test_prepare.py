"""lib/text/prepare.py, lib/text/chunks.py and data/*/prepare.py: from a text to splits, tokens and files."""
import functools
import json
import os
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from kit import python
from textkit import LINES, TEXT, Prepared, contents, fails, json_lines, put, skip_without_gpt2

from configurator import REPO
from lib.text import chunks, read_text

# One text


def test_the_first_nine_tenths_of_one_text_are_for_training(prepare, tmp_path):
    data = prepare(f'--input={put(tmp_path / "book.txt", TEXT)}')
    assert data.text('train') == TEXT[:int(len(TEXT) * 0.9)] and data.text('val') == TEXT[int(len(TEXT) * 0.9):]


def test_a_separate_validation_text_is_used_whole(prepare, tmp_path):
    data = prepare(put(tmp_path / 'book.txt', TEXT), f'--val_input={put(tmp_path / "val.txt", "the end, ")}')
    assert data.text('train') == TEXT and data.text('val') == 'the end, '


def test_val_fraction_divides_one_text(prepare, tmp_path):
    data = prepare(put(tmp_path / 'book.txt', 'abcd' * 100), '--val_fraction=0.25')
    assert len(data.ids['train']) == 300 and len(data.ids['val']) == 100


def test_a_text_as_long_as_tiny_shakespeare_has_nanogpts_counts(prepare, tmp_path):
    data = prepare(put(tmp_path / 'plays.txt', 'ab' * 557_697))  # 1,115,394 characters
    assert (len(data.ids['train']), len(data.ids['val'])) == (1_003_854, 111_540)


@pytest.mark.parametrize('kind, counts', [('char', (1_003_854, 111_540)), ('gpt2', (301_966, 36_059))])
def test_tiny_shakespeare_has_nanogpts_counts(prepare, kind, counts):
    places = (REPO / 'data' / 'shakespeare_char' / 'input.txt', REPO / 'data' / 'shakespeare' / 'input.txt',
              REPO.parent / 'shared' / 'data' / 'tinyshakespeare.txt')
    path = next((path for path in places if path.exists()), None)
    if not path:
        pytest.skip('the text is not on this machine; python data/shakespeare_char/prepare.py downloads it')
    if kind == 'gpt2':
        skip_without_gpt2()
    data = prepare(path, f'--tokenizer={kind}')
    assert tuple(len(ids) for ids in data.ids.values()) == counts


def test_a_text_is_rewritten_before_it_is_split(prepare, tmp_path):
    data = prepare(put(tmp_path / 'book.txt', TEXT), rewrite=str.upper)
    assert data.text('val') == TEXT.upper()[int(len(TEXT) * 0.9):]


# Several documents

def test_every_tenth_document_is_for_validation_and_each_ends_with_a_separator(prepare, tmp_path):
    data = prepare(put(tmp_path / 'lines.jsonl', json_lines(LINES)), '--tokenizer=bpe', '--vocab_size=300')
    assert data.text('val').split('<|endoftext|>') == [*LINES[9::10], '']
    assert data.text('train').split('<|endoftext|>')[:-1] == [line for i, line in enumerate(LINES) if i % 10 != 9]


def test_val_fraction_divides_documents(prepare, tmp_path):
    data = prepare(put(tmp_path / 'lines.jsonl', json_lines(LINES)), '--val_fraction=0.25')
    assert data.text('val') == ''.join(line + '\n' for line in LINES[3::4])
    assert data.text('train') == ''.join(line + '\n' for i, line in enumerate(LINES) if i % 4 != 3)


def test_separators_count_as_tokens_but_not_as_bytes(prepare, tmp_path):
    data = prepare(put(tmp_path / 'lines.jsonl', json_lines(LINES)), '--tokenizer=bpe', '--vocab_size=300')
    assert data.meta['splits']['val']['n_bytes'] == sum(map(len, LINES[9::10]))
    assert (data.ids['val'] == data.tokenizer.eot).sum() == 20


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
    assert data.whole_text == 'ab\n' * 30


# Tokenizing in chunks and in processes

@pytest.mark.parametrize('kind', ['char', 'byte', 'bpe'])
def test_a_long_text_in_chunks_has_the_ids_of_the_whole(prepare, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(read_text, 'CHUNK', 100)
    monkeypatch.setattr(chunks, 'WINDOW', 20)
    text = TEXT + 'nospace' * 200 + '天地玄黄，宇宙洪荒。' * 50 + '\n \n\t  x' * 100
    size = ['--vocab_size=400'] if kind == 'bpe' else []
    data = prepare(put(tmp_path / 'book.txt', text), f'--tokenizer={kind}', *size)
    edge = int(len(text) * 0.9)
    assert data.ids['train'].tolist() == data.tokenizer.encode(text[:edge])
    assert data.ids['val'].tolist() == data.tokenizer.encode(text[edge:])


def test_the_files_do_not_depend_on_the_number_of_processes(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(read_text, 'CHUNK', 1000)
    path = put(tmp_path / 'lines.jsonl', json_lines(LINES))
    made = [prepare(path, f'--num_proc={n}', '--tokenizer=bpe', '--vocab_size=300') for n in (1, 2, 3)]
    assert made[0].meta == made[1].meta == made[2].meta


def test_processes_may_be_spawned_as_on_windows(prepare, tmp_path, monkeypatch):
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    started = []

    def spawn(n, **options):
        started.append(n)
        return ProcessPoolExecutor(n, mp_context=multiprocessing.get_context('spawn'), **options)
    monkeypatch.setattr(read_text, 'CHUNK', 1000)
    monkeypatch.setattr(chunks, 'ProcessPoolExecutor', spawn)
    path = put(tmp_path / 'lines.jsonl', json_lines(LINES))
    data = prepare(path, '--num_proc=2', '--tokenizer=bpe', '--vocab_size=300')
    assert started == [2] and data.text('val').startswith(LINES[9])


def test_the_sample_that_trains_a_bpe_is_bounded_and_even(monkeypatch):
    monkeypatch.setattr(chunks, 'SAMPLE', 1000)
    *_, sample = chunks.scan(((f'{i:09d}\n', True) for i in range(10_000)), np.inf)
    texts = list(sample)
    numbers = [int(text) for text in texts]
    assert 500 <= sum(map(len, texts)) <= 1000 and len(set(np.diff(numbers))) == 1 and numbers[-1] > 9_800


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
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


# What it prints

def test_the_counts_are_printed_as_people_parse_them(prepare, tmp_path):
    prepare(put(tmp_path / 'book.txt', 'ab\n' * 1000))
    assert prepare.out.startswith('length of dataset in characters: 3,000\nall the unique characters: \nab\n'
                                  'vocab size: 3\n'
                                  'train has 2,700 tokens\nval has 300 tokens\n')


def test_a_tiny_text_prints_a_warning_with_the_limit_of_block_size(prepare, tmp_path):
    prepare(put(tmp_path / 'book.txt', 'ab\n' * 500))
    assert 'warning: 1,500 characters are few' in prepare.err and 'below the 150 tokens of the val split' in prepare.err
    prepare(put(tmp_path / 'book.txt', 'ab\n' * 2000))
    assert 'warning' not in prepare.err


def test_the_preview_shows_lines_that_were_encoded_and_decoded(prepare, tmp_path):
    prepare(put(tmp_path / 'book.txt', '人之初\n性本善\n性相近\n习相远\n' * 9))
    assert '-> 人之初\n' in prepare.out and '-> 性相近\n' in prepare.out and '习相远' not in prepare.out


def test_the_next_command_fits_the_smaller_split(prepare, tmp_path):
    prepare(put(tmp_path / 'book.txt', 'ab\n' * 500))
    assert '--dataset=book --out_dir=out-book --block_size=128\n' in prepare.out


@pytest.mark.parametrize('name, config', [('shakespeare_char', 'train_shakespeare_char'), ('openwebtext', 'train_gpt2'),
                                          ('shakespeare', 'finetune_shakespeare')])
def test_the_next_command_names_the_plain_config_of_several(prepare, tmp_path, name, config):
    prepare(put(tmp_path / 'book.txt', 'ab\n' * 2000), name=name)
    assert f'train with: python train.py config/{config}.py\n' in prepare.out


def test_a_wrong_count_prints_a_warning_only_for_the_scripts_own_text(prepare, tmp_path):
    path = put(tmp_path / 'plays.txt', TEXT)
    prepare(dataset='plays', source=lambda folder: [str(path)], expect=(1, 2))
    assert 'warning: expected 1 and 2 tokens' in prepare.err
    prepare(path, dataset='plays', expect=(1, 2))
    assert 'warning' not in prepare.err


# Which text, and where the result goes

def test_input_txt_is_used_before_any_download(prepare, tmp_path):
    put(tmp_path / 'data' / 'plays' / 'input.txt', TEXT)
    assert prepare(dataset='plays', source='https://127.0.0.1:9/none').text('train').startswith('line 0')


def test_the_dataset_is_named_after_the_text_or_by_the_user(prepare, tmp_path):
    path = put(tmp_path / 'my book.v2.txt', TEXT)
    assert prepare(path).folder.name == 'my_book'
    assert prepare(path, '--name=mine').folder.name == 'mine'


def test_a_replaced_dataset_is_reported(prepare, tmp_path):
    def reported(*flags):
        prepare(*flags, dataset='x')
        return [line for line in prepare.err.splitlines() if ' held ' in line]
    n = f'{len(TEXT):,}'
    one, other = put(tmp_path / 'a.txt', TEXT), put(tmp_path / 'b.txt', TEXT.upper())
    assert reported(one) == reported(one) == []
    assert reported(other) == [f'data/x held {n} tokens (char) of {one}, which this replaced']
    both = [f'data/x held {n} tokens (char) of {other}, which this replaced']
    assert reported(one, other, '--tokenizer=byte') == both
    assert reported(one) == [f'data/x held {2 * len(TEXT) + 2:,} tokens (byte) of {one} {other}, which this replaced']


def test_a_replaced_dataset_without_a_valid_meta_json_is_reported(prepare, tmp_path):
    data = prepare(put(tmp_path / 'a.txt', 'ab' * 100), dataset='x')
    (data.folder / 'meta.json').write_text('[]', encoding='utf-8')
    prepare(tmp_path / 'a.txt', dataset='x')
    assert 'data/x held a train.bin of 360 bytes without a valid meta.json, which this replaced' in prepare.err


# The scripts

SCRIPTS = sorted(path.parent.name for path in (REPO / 'data').glob('*/prepare.py'))


def help_of(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['prepare.py', '--help'])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPO / 'data' / name / 'prepare.py'), run_name='__main__')
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize('name', SCRIPTS)
def test_the_help_of_every_script_shows_its_command_and_the_settings(name, monkeypatch, capsys):
    out = help_of(name, monkeypatch, capsys)
    assert f'    python data/{name}/prepare.py' in out and '--input ' in out and '--num_proc ' in out


def test_help_shows_the_defaults_of_the_dataset(monkeypatch, capsys):
    out = help_of('openwebtext', monkeypatch, capsys)
    assert "str   'gpt2'" in out and 'float 0.0005' in out


def test_help_shows_nothing_but_settings(monkeypatch, capsys):
    lines = help_of('text', monkeypatch, capsys).split('Settings (--name=value):')[1].split('\n')
    assert {line.split()[0] for line in lines if line.strip()} == {
        'Text', 'Result', '--input', '--val_input', '--val_fraction', '--text_key', '--prompt_key',
        '--answer_key', '--encoding', '--name', '--tokenizer', '--vocab_size', '--num_proc',
        '--show'}


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
    assert Prepared(tmp_path / 'data' / 'x').text('val') == 'å中👍\n' * 10


def test_python_char_takes_the_ascii_files_of_the_standard_library_without_tests(tmp_path, monkeypatch):
    for name in ('b.py', 'a/c.py', 'a/test/x.py', 'site-packages/x.py', 'idle_test/x.py', 'a/notes.txt'):
        put(tmp_path / name, 'pass\n')
    put(tmp_path / 'a' / 'greek.py', '# λ\n')
    scope = runpy.run_path(str(REPO / 'data' / 'python_char' / 'prepare.py'))
    assert (Path(sysconfig.get_paths()['stdlib']) / 'argparse.py').exists()
    monkeypatch.setattr(sysconfig, 'get_paths', lambda: {'stdlib': str(tmp_path)})
    assert scope['library_files'](None) == [str(tmp_path / 'a' / 'c.py'), str(tmp_path / 'b.py')]


def test_shuffling_lines_is_the_same_every_time():
    shuffle = runpy.run_path(str(REPO / 'data' / 'shuixu_full' / 'prepare.py'))['shuffle_lines']
    assert shuffle(TEXT) == shuffle(TEXT) != TEXT and sorted(shuffle(TEXT).splitlines()) == sorted(TEXT.splitlines())


def test_facts_are_written_one_per_line_without_repetition(tmp_path, monkeypatch):
    scope = runpy.run_path(str(REPO / 'data' / 'chucknorris' / 'prepare.py'))
    facts = [{'value': 'one\n two'}, {'value': 'b'}, {'value': 'b'}]
    answer = put(tmp_path / 'input.json', json.dumps({'result': facts}))
    monkeypatch.setitem(scope['fetch_facts'].__globals__, 'download', lambda url, path: answer)
    assert Path(scope['fetch_facts'](tmp_path)[0]).read_text(encoding='utf-8') == 'one two\nb\n'


# Faults

def test_an_empty_text_is_refused(prepare, tmp_path, capfd):
    assert 'a.txt is empty' in fails(capfd, lambda: prepare(put(tmp_path / 'a.txt', '')))


def test_one_character_cannot_be_divided(prepare, tmp_path, capfd):
    assert 'the train split is empty: 1 characters' in fails(capfd, lambda: prepare(put(tmp_path / 'a.txt', 'x')))
    assert 'val split has one token: 10 char' in fails(capfd, lambda: prepare(put(tmp_path / 'a.txt', '0123456789')))


def test_half_of_a_value_without_quotes_is_recognised(prepare, tmp_path, capfd):
    path = put(tmp_path / 'a.txt', TEXT)
    message = fails(capfd, lambda: prepare(f'--input={path}', '--name=my', 'book'))
    assert message.endswith('--input=book: no such file or folder; if it belongs to --name=my, a value with spaces '
                            'needs quotes: "--name=my book"')
    assert 'quotes' not in fails(capfd, lambda: prepare(path, 'book'))
    assert 'quotes' not in fails(capfd, lambda: prepare(f'--input={path}', 'book'))


def test_without_a_text_the_error_says_where_to_put_it(prepare, tmp_path, capfd):
    message = fails(capfd, lambda: prepare(dataset='x', where='A library has it'))
    assert '--input=PATH' in message and str(tmp_path / 'data' / 'x' / 'input.txt') in message
    assert message.endswith('. A library has it')


def test_all_invalid_settings_are_reported_together(prepare, capfd):
    invalid = 'tokenizer=words', 'val_fraction=1.0', 'num_proc=-1', 'name=a/b', 'encoding=klingon', 'vocab_size=9'
    with pytest.raises(SystemExit) as end:
        prepare(*(f'--{setting}' for setting in invalid))
    lines = capfd.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 6
    assert all(any(setting in line for line in lines) for setting in invalid)


def test_a_vocabulary_size_for_a_fixed_vocabulary_is_refused(prepare, capfd):
    assert 'vocab_size is for --tokenizer=bpe' in fails(capfd, lambda: prepare('--vocab_size=500'))


def test_a_pattern_gives_the_dataset_no_name(prepare, tmp_path, capfd):
    put(tmp_path / 'a.txt', TEXT)
    message = fails(capfd, lambda: prepare('--input=*.txt'))
    assert '--input=*.txt gives the dataset no name; choose one with --name=' in message


@pytest.mark.parametrize('flags', [[], ['--name=plays']])
def test_a_folder_with_its_own_script_is_never_overwritten(prepare, tmp_path, capfd, flags):
    put(tmp_path / 'data' / 'plays' / 'prepare.py', '')
    message = fails(capfd, lambda: prepare(put(tmp_path / 'plays.txt', TEXT), *flags))
    assert 'data/plays has its own prepare.py; choose another name with --name=' in message
    assert list(contents(tmp_path / 'data' / 'plays')) == ['prepare.py']


def test_another_text_is_replaced_only_with_an_explicit_name(prepare, tmp_path, capfd):
    one, other = put(tmp_path / '1' / 'book.txt', TEXT), put(tmp_path / '2' / 'book.txt', TEXT.upper())
    prepare(one)
    prepare(one, '--tokenizer=byte')  # the same text is replaced without asking
    before = contents(tmp_path / 'data' / 'book')
    message = fails(capfd, lambda: prepare(other))
    assert f'data/book holds {len(TEXT):,} tokens (byte) of {one}; choose another name' in message
    assert contents(tmp_path / 'data' / 'book') == before
    prepare(other, '--name=book')
    assert contents(tmp_path / 'data' / 'book') != before


def test_a_worker_that_dies_is_reported_in_one_line(prepare, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(read_text, 'CHUNK', 500)
    monkeypatch.setattr(chunks, 'WINDOW', 50)
    monkeypatch.setattr(chunks, '_tokenize_chunk', functools.partial(die, os.getpid()))
    message = fails(capfd, lambda: prepare(put(tmp_path / 'a.txt', TEXT), '--tokenizer=bpe', '--num_proc=2'))
    assert 'a worker process died' in message and '--num_proc=1' in message


def die(parent, *_):
    assert os.getpid() != parent
    os._exit(1)


def test_the_checkpoint_of_nanogpt_has_no_tokenizer_and_its_dataset_is_to_be_named(prepare, tmp_path, capfd):
    import torch
    (tmp_path / 'nano').mkdir()
    torch.save({'model': {}, 'model_args': {}, 'iter_num': 1}, tmp_path / 'nano' / 'ckpt.pt')
    message = fails(capfd, lambda: prepare(put(tmp_path / 'a.txt', TEXT), f'--tokenizer={tmp_path / "nano"}'))
    assert 'name the folder of the dataset that it was trained on' in message


KILLED = """
import os, sys
from lib.text import chunks
from lib.text.tokenizer import from_spec
tokenizer = from_spec({'kind': 'bpe', 'tokens': [chr(i) for i in range(256)] + ['ab']})
for _ in chunks.tokenize((('train', [('ab', False)]) for _ in range(10**9)), tokenizer, 2):
    os.kill(os.getpid(), int(sys.argv[1]))
"""


@pytest.mark.skipif(os.name != 'posix', reason='needs signals')
@pytest.mark.parametrize('number', [9, 15, 1])
def test_the_workers_of_a_prepare_that_is_killed_end_with_it(number):
    child = python(KILLED, number, start_new_session=True)
    try:
        child.communicate(timeout=30)  # until all who write to this pipe have ended
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, 9)
        raise AssertionError('the workers went on') from None
    assert child.returncode == -number


def test_ctrl_c_prints_one_line_and_leaves_no_temporary_file(prepare, tmp_path, monkeypatch, capfd):
    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(chunks, '_tokenize_chunk', interrupt)
    with pytest.raises(SystemExit) as end:
        prepare(put(tmp_path / 'a.txt', TEXT))
    assert end.value.code == 130 and capfd.readouterr().err == 'interrupted; run it again\n'
    assert not contents(tmp_path / 'data' / 'a')
