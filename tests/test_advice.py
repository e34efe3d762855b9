"""lib/text/advice.py: what prepare tells a reader about a text and its tokens."""
from types import SimpleNamespace

import pytest

import train
from configurator import literals, resolve
from lib.text import advice, tokenizer
from lib.training import preflight

CHARS = tokenizer.CharTokenizer


def test_a_small_vocabulary_is_printed_as_nanogpt_prints_it():
    shakespeare = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert advice.unique_characters(shakespeare) == f'all the unique characters: {shakespeare}'
    assert advice.unique_characters(shakespeare).splitlines()[1].startswith(" !$&',-.3:;?ABC")


def test_a_large_vocabulary_is_not_printed():
    assert advice.unique_characters(''.join(map(chr, range(0x4e00, 0x4e00 + 200)))) == ''


def test_characters_that_move_the_cursor_are_printed_as_escapes():
    assert advice.unique_characters('\n\r\x1bab') == 'all the unique characters: \n\\r\\x1bab'


def bpe(n):
    return tokenizer.bpe([chr(i) for i in range(256)] + ['a' * i for i in range(2, n - 255)])


def test_a_bpe_with_fewer_ids_than_asked_for_is_explained():
    assert bpe(300).vocab_size == 300
    assert 'vocab size is 300 instead of 4,096' in advice.notes(bpe(300), 4096, 100, 50)[0]
    assert advice.notes(bpe(300), 300, 100, 50) == []


def test_more_tokens_than_characters_are_remarked_on():
    note, = advice.notes(bpe(300), 300, 1000, 1149)
    assert note.startswith('1,149 tokens for 1,000 characters') and '--tokenizer=char' in note and 'vocab_size' in note
    assert advice.notes(bpe(300), 300, 1000, 1000) == []


def test_gpt2s_vocabulary_on_a_small_text_is_remarked_on_and_fine_tuning_recommended():
    gpt2 = tokenizer.gpt2()
    assert 'too few to learn the 50,257' in advice.notes(gpt2, 4096, 48_000, 15_327)[0]
    assert advice.notes(gpt2, 4096, 30_000_000, 9_000_000) == []
    counts = {'train': 13_000, 'val': 1_500}
    assert advice.train_command('novel', [], gpt2, counts) == (
        'python train.py config/finetune_shakespeare.py --dataset=novel --out_dir=out-novel')


def test_carriage_returns_are_remarked_on():
    note, = advice.notes(CHARS('\n\rab'), 4096, 10, 10)
    assert 'Windows line ends' in note and note.endswith('then prepare NEW')


def test_the_command_against_carriage_returns_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'FILE').write_bytes('人之初\r\nb'.encode())
    note, = advice.notes(CHARS('\n\rab'), 4096, 10, 10)
    exec(note.split('"')[1])
    assert (tmp_path / 'NEW').read_bytes() == '人之初\nb'.encode()


def test_a_text_without_carriage_returns_gets_no_remark():
    assert advice.notes(CHARS('\nab'), 4096, 10, 10) == []


def test_the_command_to_type_next_is_the_datasets_config_or_one_that_fits_the_smaller_split():
    counts = {'train': 900, 'val': 100}
    assert advice.train_command('x', ['train_x.py', 'finetune_x.py'], CHARS('ab'), counts) == (
        'python train.py config/train_x.py')
    gpt2, both = SimpleNamespace(kind='gpt2'), ['train_x.py', 'finetune_x.py']
    assert advice.train_command('x', both, gpt2, counts).endswith('config/finetune_x.py')  # of few tokens
    assert advice.train_command('x', both, gpt2, {'train': 2_000_000, 'val': 100}).endswith('config/train_x.py')
    assert advice.train_command('x', [], CHARS('ab'), counts).endswith('--out_dir=out-x --block_size=64')
    assert '--block_size' not in advice.train_command('x', [], CHARS('ab'), {'train': 900, 'val': 257})


@pytest.mark.parametrize('n', range(2, 21))
def test_the_command_for_a_short_text_passes_the_checks_of_training(n):
    command = advice.train_command('x', [], CHARS('ab'), {'train': 9 * n, 'val': n})
    s = resolve(literals(vars(train)), command.split()[2:], {'device': lambda: 'cpu'})
    assert s.errors + preflight.check_values(s) == [] and s['block_size'] < n


def test_one_token_is_shown_as_one():
    assert advice.show_tokens('a', CHARS('ab'))[0] == 'char: 1 character, 1 byte, 1 token'


def test_tokens_are_shown_with_their_ids_and_parts_of_characters_as_bytes():
    lines = advice.show_tokens('你好 Hello World!', tokenizer.gpt2())
    assert lines[0] == 'gpt2: 15 characters, 19 bytes, 7 tokens'
    assert "   18435  ' Hello'" in lines
    assert any('part of a character, bytes ' in line for line in lines)
    assert lines[-1] == 'decoded again: 你好 Hello World!' and len(lines) == 9
