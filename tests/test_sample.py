"""sample.py: from a checkpoint to printed text, and the errors of wrong settings."""
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPO

import sample
from lib.text.prompt import encode_prompt
from lib.text.tokenizer import ByteTokenizer
from lib.weights import int8
from model import GPT, GPTConfig

CHARS = '\n abcdefgh人之初性本善'
HYPHENS = '-' * 15
SHORT = ['--device=cpu', '--dtype=float32', '--num_samples=2', '--max_new_tokens=12']


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A working directory that holds only out/ckpt.pt, a random model of CHARS; returns the checkpoint."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=8, vocab_size=len(CHARS), n_layer=2, n_head=2, n_embd=16)
    state = {'model': GPT(config).state_dict(), 'model_args': config.model_args(), 'iter_num': 4, 'best_val_loss': 1.0,
             'config': {'dataset': 'gone'}, 'tokenizer': {'kind': 'char', 'chars': CHARS}}
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out').mkdir()
    torch.save(state, 'out/ckpt.pt')
    return state


def test_defaults_are_nanogpts():
    names = 'init_from out_dir start num_samples max_new_tokens temperature top_k seed compile'.split()
    assert [getattr(sample, name) for name in names] == ['resume', 'out', '\n', 10, 500, 0.8, 200, 1337, False]


def test_each_sample_is_the_prompt_and_its_continuation_then_15_hyphens(run, trained):
    done = run('sample.py', *SHORT, '--start=abc')
    assert done.status == 0, done.err
    first, second, rest = done.out.split(f'\n{HYPHENS}\n')
    assert rest == '' and first != second
    assert all(text.startswith('abc') and len(text) == 15 for text in (first, second))


def test_the_checkpoint_alone_is_enough(run, trained, monkeypatch):
    for package in ('tiktoken', 'datasets', 'wandb', 'transformers', 'tokenizers'):
        monkeypatch.setitem(sys.modules, package, None)  # importing it now fails
    assert run('sample.py', *SHORT).status == 0


def test_the_same_seed_prints_the_same_text(run, trained):
    first, second, other = (run('sample.py', *SHORT, f'--seed={seed}').out for seed in (1, 1, 2))
    assert first == second != other


def test_temperature_zero_prints_the_same_text_for_any_seed(run, trained):
    first, second = (run('sample.py', *SHORT, '--temperature=0', f'--seed={seed}').out for seed in (1, 2))
    assert first == second


@pytest.mark.parametrize('num_samples', [1, 10])
def test_the_first_sample_does_not_depend_on_the_number_of_samples(run, trained, num_samples):
    first, other = (run('sample.py', *SHORT, f'--num_samples={n}').out for n in (2, num_samples))
    assert first.split(HYPHENS)[0] == other.split(HYPHENS)[0]


@pytest.mark.parametrize('flags, live', [([], False), (['--stream'], True), (['--stream=False'], False)])
def test_text_is_streamed_only_if_asked_for_when_the_output_is_a_file(run, trained, monkeypatch, flags, live):
    given = []
    monkeypatch.setattr('lib.generate.generate_text', lambda *args, **more: given.append(more['live']) or [])
    run('sample.py', *SHORT, *flags)
    assert given == [live]


def test_streaming_prints_the_same_text_as_waiting(run, trained):
    waiting, streaming = (run('sample.py', *SHORT, f'--stream={stream}').out for stream in (False, True))
    assert waiting == streaming


@pytest.mark.parametrize('start', ['', '\n', 'a', 'abc' * 10], ids=['empty', 'newline', 'one', 'long'])
def test_a_prompt_of_any_length_is_printed_completely(run, trained, start):
    done = run('sample.py', *SHORT, f'--start={start}')
    assert done.status == 0, done.err
    first = done.out.split(f'\n{HYPHENS}\n')[0]
    assert first.startswith(start) and len(first) == len(start) + 12


def test_int8_weights_print_samples(run, trained, monkeypatch):
    quantized, real = [], int8.Int8Linear
    monkeypatch.setattr(int8, 'Int8Linear', lambda layer: quantized.append(layer) or real(layer))
    done = run('sample.py', *SHORT, '--dtype=int8', '--start=abc')
    assert done.status == 0, done.err
    assert len(quantized) == 9 and done.out.count(HYPHENS) == 2


def test_the_stop_string_is_not_printed(run, trained):
    free = run('sample.py', *SHORT, '--num_samples=1', '--max_new_tokens=40').out.split('\n---')[0]
    stop = free[20:22]
    done = run('sample.py', *SHORT, '--num_samples=1', '--max_new_tokens=40', f'--stop={stop}')
    assert done.out.split('\n---')[0] == free[:free.index(stop, 1)]


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig'])
def test_the_prompt_may_come_from_a_file(run, trained, encoding):
    with open('prompt.txt', 'w', encoding=encoding) as file:
        file.write('人之初')
    assert run('sample.py', *SHORT, '--start=FILE:prompt.txt').out.startswith('人之初')


def test_flags_override_a_config_file(run, trained):
    with open('mine.py', 'w', encoding='utf-8') as file:
        file.write("num_samples = 3\nstart = 'ab'\n")
    done = run('sample.py', 'mine.py', '--start=ba', '--max_new_tokens=2', '--device=cpu')
    assert done.out.count(HYPHENS) == 3 and done.out.startswith('ba')


def test_help_explains_every_setting(run):
    text = run('sample.py', '--help').out
    for name in ('start', 'top_p', 'repetition_penalty', 'stop', 'stream', 'seed', 'dtype'):
        line = next(line for line in text.splitlines() if f'--{name} ' in line)
        assert len(line.split()) > 5, line


# Mistakes

def test_all_wrong_values_are_reported_at_once(run, trained):
    done = run('sample.py', '--temperature=-1', '--top_k=-1', '--top_p=0', '--num_samples=0', '--max_new_tokens=-1',
               '--repetition_penalty=0', '--dtype=bf16', '--device=toaster', '--start=FILE:none.txt', '--sead=1')
    assert done.status == 2 and len(done.err.splitlines()) == 10
    for message in ('top_k must be 0 (off) or more, got -1', 'top_p must be above 0', 'did you mean seed?', 'none.txt'):
        assert message in done.err


def test_an_unknown_character_is_named(run, trained):
    done = run('sample.py', *SHORT, '--start=Z')
    assert done.status == 1
    assert done.last_error == (f"error: character 'Z' (U+005A) is not in this model's {len(CHARS)}-character "
                               'vocabulary; leave it out, or train on a text prepared with --tokenizer=bpe')


def test_a_prompt_file_that_is_not_utf8_says_where(run, trained):
    with open('prompt.txt', 'wb') as file:
        file.write('ab人'.encode('gbk'))
    assert 'not UTF-8 at byte 2' in run('sample.py', *SHORT, '--start=FILE:prompt.txt').last_error


def test_a_missing_checkpoint_is_named(run, trained):
    done = run('sample.py', *SHORT, '--out_dir=nowhere')
    assert done.status == 1 and 'nowhere' in done.last_error and 'ckpt.pt' in done.last_error


def test_nan_weights_are_reported_with_their_iteration(run, trained):
    trained['model']['transformer.ln_f.weight'][2] = torch.nan
    torch.save(trained, 'out/ckpt.pt')
    done = run('sample.py', *SHORT)
    assert done.status == 1 and 'checkpoint contains NaN (iter 4)' in done.last_error


def test_a_tokenizer_of_another_model_is_refused(run, trained):
    trained['tokenizer']['chars'] += 'xyz'
    torch.save(trained, 'out/ckpt.pt')
    done = run('sample.py', *SHORT)
    assert done.status == 1 and f'the model has {len(CHARS)} tokens' in done.last_error


# Parts

def test_samples_are_printed_in_order_while_the_first_unfinished_one_grows(capsys, monkeypatch):
    monkeypatch.setattr(sample, 'num_samples', 3)
    shown = []

    def pieces():
        for piece in ((0, 'a', False), (1, 'x', False), (2, 'p', True), (0, 'b', True), (1, 'y', False), (1, '', True)):
            yield piece
            shown.append(capsys.readouterr().out)
    sample.show(pieces(), '>', live=True)
    assert shown == ['>a', '', '', f'b\n{HYPHENS}\n>x', 'y', f'\n{HYPHENS}\n>p\n{HYPHENS}\n']


def test_without_streaming_a_sample_is_printed_when_it_is_complete(capsys, monkeypatch):
    monkeypatch.setattr(sample, 'num_samples', 1)
    shown = []

    def pieces():
        for piece in ((0, 'a', False), (0, 'b', True)):
            yield piece
            shown.append(capsys.readouterr().out)
    sample.show(pieces(), '>', live=False)
    assert shown == ['', f'>ab\n{HYPHENS}\n']


def test_an_end_of_text_mark_in_the_prompt_becomes_that_token():
    tok = ByteTokenizer()
    tok.eot, tok.separator = 7, '<|endoftext|>'
    assert encode_prompt('<|endoftext|>a<|endoftext|>', tok) == [7, 97, 7]


def test_an_ascii_locale_garbles_neither_the_prompt_nor_the_output(trained):
    env = {**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    env.pop('PYTHONIOENCODING', None)
    done = subprocess.run([sys.executable, REPO / 'sample.py', *SHORT, '--start=人之初', '--stop=本'], env=env,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode('utf-8')
    assert text.startswith('人之初') and '本' not in text


def test_a_reader_that_ends_early_is_not_an_error(trained):
    command = f'{sys.executable} {REPO / "sample.py"} --device=cpu --num_samples=2 --max_new_tokens=5 | true'
    assert subprocess.run(command, shell=True, capture_output=True, text=True).stderr == ''
