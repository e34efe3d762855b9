"""evaluate.py: printed losses against sums written out, token by token."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, write_dataset

import evaluate
from lib import tasks
from lib.machine.runtime import Runtime
from lib.text.dataset import Split
from lib.weights import checkpoint
from model import GPT, GPTConfig

RT = Runtime(torch.device('cpu'), torch.float32, False, '')


def tiny_gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=16)).eval()


def save_run(workdir, chars='abcdefghijklmnop', scale=1.0):
    """Write out/ckpt.pt with the tiny model, as if trained on the dataset `tiny`; scale: of its weights."""
    model = tiny_gpt().state_dict()
    (workdir / 'out').mkdir(exist_ok=True)
    checkpoint.save('out/ckpt.pt', {
        'model': {name: tensor * scale for name, tensor in model.items()}, 'iter_num': 0,
        'model_args': tiny_gpt().config.model_args(), 'tokenizer': {'kind': 'char', 'chars': chars},
        'config': {'dataset': 'tiny'}})


def as_split(ids):
    return Split(None, np.array(ids, dtype=np.uint16), len(ids), '', 16)


def brute_force(model, ids, contexts):
    """The summed loss of tokens 1, 2, ...: a forward pass for each, over its number of context tokens in `contexts`."""
    total = 0.0
    for i, n in enumerate(contexts, 1):
        with torch.no_grad():
            logits = model(torch.tensor([ids[i - n:i]]))[0][0, -1]
        total += float(F.cross_entropy(logits, torch.tensor(ids[i])))
    return total


IDS = [int(i) for i in np.random.default_rng(0).integers(16, size=30)]


def test_stride_1_gives_every_token_the_longest_context():
    model = tiny_gpt()
    expected = brute_force(model, IDS, [min(i, 8) for i in range(1, 30)])
    assert evaluate.split_loss(model, RT, as_split(IDS), 8, 1) == pytest.approx(expected, rel=1e-5)


def test_windows_do_not_overlap_by_default_and_the_last_is_short():
    model = tiny_gpt()
    expected = brute_force(model, IDS, [i % 8 + 1 for i in range(29)])
    assert evaluate.split_loss(model, RT, as_split(IDS), 8, 8) == pytest.approx(expected, rel=1e-5)


def test_the_batch_size_changes_no_result(monkeypatch):
    model, found = tiny_gpt(), []
    for size in (1, 3, 100):
        monkeypatch.setattr(evaluate, 'batch_size', size)
        found.append(evaluate.split_loss(model, RT, as_split(IDS[:28]), 8, 3))  # the last window reads 6 tokens
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def numbers(line):
    """{'loss': 2.77, 'perplexity': 16.0, ...} of a printed line."""
    pairs = [part.split() for part in line.split(': ', 1)[1].split(' (')[0].split(', ')]
    return {name: float(value) for name, value in pairs}


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(run, workdir):
    save_run(workdir, scale=0.0)  # all logits 0: each of 16 characters is as likely
    done = run('evaluate.py', '--device=cpu')
    found = numbers(done.out.splitlines()[-1])
    assert found['loss'] == pytest.approx(math.log(16), abs=1e-4) and found['perplexity'] == pytest.approx(16, abs=1e-3)
    assert found['bpb'] == pytest.approx(4 * 399 / 400, abs=1e-4)  # 399 targets of 4 bits in 400 bytes


def test_the_whole_split_is_what_eval_only_prints(run, workdir):
    run('train.py', *TINY)
    printed = numbers(run('evaluate.py', '--device=cpu', '--dtype=float32').out.splitlines()[-1])['loss']
    assert f'val loss {printed:.4f}' in run('train.py', *TINY, '--eval_only', '--init_from=resume').out


def test_a_text_is_read_with_its_line_ends_and_without_its_byte_order_mark(run, workdir):
    save_run(workdir, chars='abcdefghijklmn\r\n', scale=0.0)  # 4 bits per character
    (workdir / 'a.txt').write_bytes(b'\xef\xbb\xbf' + b'ab\r\ncd\n' * 3)
    done = run('evaluate.py', '--device=cpu', '--text=a.txt')
    assert '(20 targets' in done.out, done.err
    assert numbers(done.out.splitlines()[-1])['bpb'] == pytest.approx(4 * 20 / 21, abs=1e-4)


def test_train_prints_the_bits_per_byte_of_a_known_distribution(run, workdir):
    save_run(workdir, scale=0.0)
    done = run('train.py', '--eval_only', '--init_from=resume', '--dataset=tiny', '--device=cpu', '--dtype=float32',
               '--batch_size=4')
    assert f'val loss {math.log(16):.4f}, val bpb {4 * 399 / 400:.4f}\n' in done.out, done.err


def test_a_text_file_gives_what_the_same_tokens_in_a_dataset_do(run, workdir):
    save_run(workdir)
    val = np.fromfile('data/tiny/val.bin', dtype='<u2')
    chars = json.loads((workdir / 'data/tiny/meta.json').read_text(encoding='utf-8'))['tokenizer']['chars']
    (workdir / 'some.txt').write_text(''.join(chars[i] for i in val), encoding='utf-8')
    flags = ['--device=cpu', '--dtype=float32', '--stride=2']
    dataset, text = run('evaluate.py', *flags).out, run('evaluate.py', *flags, '--text=some.txt').out
    assert numbers(text.splitlines()[-1]) == numbers(dataset.splitlines()[-1]) and 'stride 2' in text


# tasks (their rules are tested in test_tasks.py)

def test_continuations_are_scored_token_by_token_given_their_context():
    model = tiny_gpt()
    requests = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9, 10]), (list(range(12)), [3, 3])]  # the last is cut to 9 tokens
    found = evaluate.loglikelihoods(model, RT, requests)
    for (context, end), (nats, n_tokens, _) in zip(requests, found):
        ids = (context + end)[-9:]
        first = len(ids) - len(end)
        with torch.no_grad():
            losses = [F.cross_entropy(model(torch.tensor([ids[:i]]))[0][0, -1], torch.tensor(ids[i]))
                      for i in range(first, len(ids))]
        assert n_tokens == len(end) and nats == pytest.approx(float(sum(losses)), rel=1e-5)


def test_a_continuation_is_greedy_only_if_each_of_its_tokens_is_the_likeliest():
    model = tiny_gpt()
    with torch.no_grad():
        first = int(model(torch.tensor([[1, 2]]))[0].argmax())
        second = int(model(torch.tensor([[1, 2, first]]))[0].argmax())
    wrong = (second + 1) % 16
    found = evaluate.loglikelihoods(model, RT, [([1, 2], [first, second]), ([1, 2], [first, wrong])])
    assert [is_greedy for _, _, is_greedy in found] == [True, False]


ITEMS = [{'ctx': 'ab', 'endings': ['c', 'dd', 'eee', 'f'], 'label': 2},
         {'ctx': '', 'endings': ['a', 'b', 'c', 'd'], 'label': 3}]


@pytest.mark.parametrize('task, items', [('hellaswag', ITEMS), ('lambada', [{'text': 'ab cd ef'}, {'text': 'b c'}])])
def test_a_task_runs_from_local_json_lines(run, workdir, task, items):
    chars = 'abcdefghijklmno '
    save_run(workdir, chars)
    (workdir / 'items.jsonl').write_text('\n'.join(map(json.dumps, items)) + '\n', encoding='utf-8')
    done = run('evaluate.py', '--device=cpu', f'--task={task}', '--input=items.jsonl', '--limit=2')
    assert done.status == 0 and '(2 items; ' in done.out and tasks.RULE[task] in done.out, done.err


# Faults

def test_a_text_in_another_encoding_needs_its_name(run, workdir):
    save_run(workdir, chars='一二三四五六七八九十abcdef')
    (workdir / 'a.txt').write_text('一二三四五六七八九十' * 5, encoding='gb18030', newline='')
    done = run('evaluate.py', '--device=cpu', '--text=a.txt')
    assert done.status == 1 and 'a.txt is not UTF-8 at byte 2 (0xb6); try --encoding' in done.last_error
    assert '--encoding=gb18030' in done.last_error
    done = run('evaluate.py', '--device=cpu', '--text=a.txt', '--encoding=gb18030')
    assert done.status == 0 and '(49 targets' in done.out
    assert 'encoding=klingon is unknown' in run('evaluate.py', '--device=cpu', '--encoding=klingon').last_error


@pytest.mark.parametrize('chars, why', [
    ('abcdefghijklmnoP', "it has characters that the model was not trained on ('P'); leave --dataset out"),
    ('abcdefghijklQRST', "it has characters that the model was not trained on ('Q', 'R', 'S' and 1 more)"),
    ('abcdefgh', 'it has 8 different characters, the model 16, so their ids differ')])
def test_a_dataset_of_other_characters_is_refused(run, workdir, chars, why):
    save_run(workdir)
    write_dataset(workdir / 'data' / 'other', [0, 1, 2] * 10, chars=chars)
    done = run('evaluate.py', '--device=cpu', '--dataset=other')
    assert done.status == 1 and f'dataset other does not fit this model: {why}' in done.last_error
    assert '--text=FILE' in done.last_error


def test_a_dataset_of_another_kind_of_tokenizer_is_refused(run, workdir):
    save_run(workdir)
    state = checkpoint.load('out/ckpt.pt')
    checkpoint.save('out/ckpt.pt', {**state, 'tokenizer': {'kind': 'byte'}, 'model_args': {
        **state['model_args'], 'vocab_size': 256}, 'model': GPT(GPTConfig(
            block_size=8, vocab_size=256, n_layer=1, n_head=2, n_embd=16)).state_dict()})
    done = run('evaluate.py', '--device=cpu')
    assert "its tokenizer is char, the model's is byte; prepare it as for the training" in done.last_error


def test_a_stride_that_would_leave_out_tokens_is_refused(run, workdir):
    save_run(workdir)
    done = run('evaluate.py', '--device=cpu', '--stride=9')
    assert done.status == 1 and 'the context of the model is 8 tokens' in done.last_error


def test_all_wrong_settings_are_reported_together(run, workdir):
    done = run('evaluate.py', '--device=cpu', '--task=trivia', '--text=none.txt', '--stride=-1')
    assert done.status == 2 and len(done.err.splitlines()) == 4  # text and task exclude each other, too
