"""evaluate.py and the rules of the tasks, against sums by hand."""
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
    """The summed loss of tokens 1, 2, ..., each given so many tokens before it, in a forward pass of its own."""
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
    assert evaluate.split_nats(model, RT, as_split(IDS), 8, 1) == pytest.approx(expected, rel=1e-5)


def test_windows_side_by_side_begin_anew_and_the_last_is_short():
    model = tiny_gpt()
    expected = brute_force(model, IDS, [i % 8 + 1 for i in range(29)])
    assert evaluate.split_nats(model, RT, as_split(IDS), 8, 8) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('n_tokens', [2, 8, 9, 10, 17, 30])
@pytest.mark.parametrize('stride', [1, 3, 8])
def test_every_token_but_the_first_counts_once(n_tokens, stride):
    counted = []
    for start, length, fresh in evaluate.windows(n_tokens, 8, stride):
        assert 0 < fresh <= length <= 8
        counted += range(start + length - fresh + 1, start + length + 1)
    assert counted == list(range(1, n_tokens))


def test_the_batch_size_changes_no_result(monkeypatch):
    model, found = tiny_gpt(), []
    for size in (1, 3, 100):
        monkeypatch.setattr(evaluate, 'batch_size', size)
        found.append(evaluate.split_nats(model, RT, as_split(IDS[:28]), 8, 3))  # the last window reads 6 tokens
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


def test_a_text_file_gives_what_the_same_tokens_in_a_dataset_do(run, workdir):
    save_run(workdir)
    val = np.fromfile('data/tiny/val.bin', dtype='<u2')
    chars = json.loads((workdir / 'data/tiny/meta.json').read_text(encoding='utf-8'))['tokenizer']['chars']
    (workdir / 'some.txt').write_text(''.join(chars[i] for i in val), encoding='utf-8')
    flags = ['--device=cpu', '--dtype=float32', '--stride=2']
    dataset, text = run('evaluate.py', *flags).out, run('evaluate.py', *flags, '--text=some.txt').out
    assert numbers(text.splitlines()[-1]) == numbers(dataset.splitlines()[-1]) and 'stride 2' in text


def test_a_text_that_is_not_utf8_is_refused_with_its_place_or_read_by_the_name_of_its_encoding(run, workdir):
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
    assert "its tokenizer is char, the model's is byte; prepare it as it was in training" in done.last_error


def test_a_stride_that_would_leave_out_tokens_is_refused(run, workdir):
    save_run(workdir)
    done = run('evaluate.py', '--device=cpu', '--stride=9')
    assert done.status == 1 and 'the model reads 8 at once' in done.last_error


def test_wrong_settings_are_told_together(run, workdir):
    done = run('evaluate.py', '--device=cpu', '--task=trivia', '--text=none.txt', '--stride=-1')
    assert done.status == 2 and len(done.err.splitlines()) == 4  # text and task exclude each other, too


# the tasks

class Letters:
    """A tokenizer of the letters a to p, the space included as p, for toy tasks."""
    start_ids = [0]

    @staticmethod
    def encode(text):
        return [15 if c == ' ' else ord(c) - ord('a') for c in text]


def test_continuations_are_scored_token_by_token_given_their_context():
    model = tiny_gpt()
    rows = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9, 10]), (list(range(12)), [3, 3])]  # the last is cut to 9 tokens
    found = evaluate.continuation_nats(model, RT, rows)
    for (context, end), (nats, n_tokens, _) in zip(rows, found):
        ids = (context + end)[-9:]
        first = len(ids) - len(end)
        with torch.no_grad():
            losses = [F.cross_entropy(model(torch.tensor([ids[:i]]))[0][0, -1], torch.tensor(ids[i]))
                      for i in range(first, len(ids))]
        assert n_tokens == len(end) and nats == pytest.approx(float(sum(losses)), rel=1e-5)


def test_a_continuation_is_exact_only_if_each_token_is_the_likeliest():
    model = tiny_gpt()
    with torch.no_grad():
        first = int(model(torch.tensor([[1, 2]]))[0].argmax())
        second = int(model(torch.tensor([[1, 2, first]]))[0].argmax())
    wrong = (second + 1) % 16
    found = evaluate.continuation_nats(model, RT, [([1, 2], [first, second]), ([1, 2], [first, wrong])])
    assert [exact for _, _, exact in found] == [True, False]


ITEMS = [{'ctx': 'ab', 'endings': ['c', 'dd', 'eee', 'f'], 'label': 2},
         {'ctx': 'ab', 'endings': ['g', 'g', 'g', 'g'], 'label': '0'},
         {'ctx': '', 'endings': ['a', 'b', 'c', 'd'], 'label': 3},
         {'ctx': 'b', 'endings': ['a', 'b', 'c', 'd'], 'label': 1}]


def test_hellaswag_scores_four_endings_behind_a_space():
    rows = tasks.rows('hellaswag', ITEMS, Letters)
    assert len(rows) == 16 and rows[2] == ([0, 1], [15, 4, 4, 4]) and rows[8] == ([0], [15, 0])


def test_hellaswag_accuracy_by_hand():
    """The right ending is best per token in items 0, 1 (a tie) and 3, and in sum in items 1 and 3."""
    scored = [[(3, 2), (4, 3), (4.4, 4), (5, 2)], [(2, 2)] * 4, [(1, 2), (9, 2), (9, 2), (9, 2)],
              [(9, 2), (1, 2), (9, 2), (9, 2)]]
    found = tasks.scores('hellaswag', ITEMS, [(*pair, False) for item in scored for pair in item])
    assert found == {'acc_norm': 0.75, 'acc': 0.5}


def test_lambada_scores_the_last_word_with_its_space():
    items = [{'text': 'ab cd efg\n'}, {'text': 'abc'}]
    assert tasks.rows('lambada', items, Letters) == [([0, 1, 15, 2, 3], [15, 4, 5, 6]), ([0], [0, 1, 2])]


def test_lambada_accuracy_and_perplexity_by_hand():
    scored = [(math.log(2), 1, True), (math.log(8), 3, False), (0, 1, True), (0, 2, True)]
    found = tasks.scores('lambada', [{}] * 4, scored)
    assert found == {'acc': 0.75, 'perplexity': pytest.approx(2.0)}


def test_a_text_split_into_words_and_marks_is_put_together():
    split = "`` do n't you know , '' he said , `` that it 's ( quite ) late ? ''"
    assert tasks.detokenize(split) == "\"don't you know,\" he said, \"that it's (quite) late?\""
    assert tasks.detokenize('"It\'s fine," she said. Then ...') == '"It\'s fine," she said. Then ...'


@pytest.mark.parametrize('task, items', [('hellaswag', ITEMS), ('lambada', [{'text': 'ab cd ef'}, {'text': 'b c'}])])
def test_a_task_runs_from_local_json_lines(run, workdir, task, items):
    chars = 'abcdefghijklmno '
    save_run(workdir, chars)
    (workdir / 'items.jsonl').write_text('\n'.join(map(json.dumps, items)) + '\n', encoding='utf-8')
    done = run('evaluate.py', '--device=cpu', f'--task={task}', '--input=items.jsonl', '--limit=2')
    assert done.status == 0 and '(2 items; ' in done.out and tasks.RULE[task] in done.out, done.err


@pytest.mark.parametrize('line, said', [('{"ctx": "a"}', 'expected an object with ctx, endings, label'),
                                        ('not json', 'not JSON'), ('[1]', 'expected an object')])
def test_a_line_that_is_no_item_is_named(tmp_path, line, said):
    path = tmp_path / 'items.jsonl'
    path.write_text(json.dumps(ITEMS[0]) + '\n' + line + '\n', encoding='utf-8')
    with pytest.raises(SystemExit) as caught:
        tasks.read('hellaswag', path)
    assert f'{path}:2: {said}' in caught.value.message


def test_without_a_connection_the_task_says_where_its_file_goes(monkeypatch, tmp_path):
    def fail(url, path):
        raise tasks.UserError(f'download failed: no route from {url}; put it elsewhere')
    monkeypatch.setattr(tasks, 'download', fail)
    monkeypatch.setattr(tasks, 'REPO', tmp_path)
    with pytest.raises(SystemExit) as caught:
        tasks.read('lambada', None)
    assert f"put it at {tmp_path / 'data' / 'lambada' / 'input.jsonl'}, or name a copy" in caught.value.message
