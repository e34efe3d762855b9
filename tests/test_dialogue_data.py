"""data/dialogue: right answers, what is held out, and the score."""
import hashlib
import json
import random
import re
import runpy

import pytest
import torch

from configurator import REPO
from lib.text import dialogue
from lib.text.tokenizer import ByteTokenizer
from lib.weights import checkpoint
from model import GPT, GPTConfig

MAKE = runpy.run_path(str(REPO / 'data' / 'dialogue' / 'prepare.py'))
SCORE = runpy.run_path(str(REPO / 'data' / 'dialogue' / 'score.py'))
WORDS, N = MAKE['WORDS'], 400
NUMBERS = {language: {MAKE['number'](n, language): n for n in range(100)} for language in WORDS}


def pattern(template):
    return re.escape(template).replace(r'\{0\}', '(.+?)').replace(r'\{1\}', '(.+?)')


def one_of(templates, text):
    return next((found.groups() for t in templates if (found := re.fullmatch(pattern(t), text))), None)


@pytest.fixture(scope='module')
def rows():
    return {held: [MAKE['dialogue'](random.Random(f'{held} {n}'), held) for n in range(N)] for held in (False, True)}


def exchanges(row):
    """Yield (task, question, answer, question two turns ago) of a row."""
    texts = [m['content'] for m in row['messages']]
    for n, task in enumerate(row['tasks']):
        yield task, texts[2 * n], texts[2 * n + 1], texts[max(0, 2 * n - 4)]


def combinations(row):
    """Yield (task, the combinations in its question), read from the text."""
    w = WORDS[row['language']]
    for task, question, _, before in exchanges(row):
        if task == 'greet':
            yield task, [one_of(w['greet'], question)]
        elif task in ('where', 'who', 'colour'):
            fact = w['has_colour'] if task == 'colour' else w[f'{task}_fact']
            found = re.findall(pattern(fact), question.replace(' ', '') if not w['space'] else question)
            yield task, [pair[::-1] for pair in found] if task == 'who' else found  # a place, then who is there
        elif task == 'sum':
            numbers = one_of(w['sum'], question.rstrip('?？')) or one_of([t.rstrip('?？') for t in w['sum']],
                                                                       question.rstrip('?？'))
            yield task, [tuple(sorted(NUMBERS[row['language']][n.removesuffix('等于多少').removeprefix('what is ')]
                                      for n in numbers))]
        elif task == 'remember':
            yield task, [one_of(w['tell'], before)]
        elif task:
            yield task, [one_of(w[task], question)]


def clean(combination):
    """A fact after another begins with the space between them, and an English thing with its article."""
    return tuple(part.strip().removeprefix('the ') if isinstance(part, str) else part for part in combination)


def test_no_held_out_combination_is_said_in_training(rows):
    said = [clean(c) for row in rows[False] for _, found in combinations(row) for c in found]
    assert len(said) > 5 * N / 2 and not any(MAKE['held_out'](*c) for c in said)


def test_every_validation_question_is_about_one_held_out_combination(rows):
    for row in rows[True]:
        for task, found in combinations(row):
            assert sum(MAKE['held_out'](*clean(c)) for c in found) == 1, (task, found)


def test_a_tenth_of_the_combinations_is_held_out():
    for w in WORDS.values():
        for first, second in (('greetings', 'names'), ('names', 'places'), ('things', 'colours'), ('pets', 'called')):
            held = [MAKE['held_out'](a, b) for a in w[first] for b in w[second]]
            assert 0.05 < sum(held) / len(held) < 0.2


def test_every_answer_follows_from_its_question(rows):
    for row in rows[False] + rows[True]:
        w, language = WORDS[row['language']], row['language']
        found = dict(enumerate(combinations(row)))
        scored = [e for e in exchanges(row) if e[0]]
        for n, (task, question, answer, _) in enumerate(scored):
            facts = [clean(c) for c in found[n][1]]
            if task == 'greet':
                assert answer == w['greeted'].format(*facts[0])
            elif task == 'where':
                asked = max((f for f in facts), key=lambda f: question.rfind(f[0]))
                assert answer == w['at'].format(*asked)
            elif task == 'who':
                assert answer == max((f for f in facts), key=lambda f: question.rfind(f[1]))[0]
            elif task == 'colour':
                assert answer == max((f for f in facts), key=lambda f: question.rfind(f[0]))[1]
            elif task == 'sum':
                assert NUMBERS[language][answer] == sum(facts[0])
            elif task == 'reverse':
                assert answer == facts[0][0][::-1]
            elif task == 'count':
                assert NUMBERS[language][answer.removesuffix('个').replace('两', '二')] == len(facts[0][0])
            else:
                assert answer == facts[0][1]


@pytest.mark.parametrize('n, english, chinese', [
    (0, 'zero', '零'), (7, 'seven', '七'), (10, 'ten', '十'), (12, 'twelve', '十二'), (20, 'twenty', '二十'),
    (99, 'ninety nine', '九十九')])
def test_numbers_in_words(n, english, chinese):
    assert (MAKE['number'](n, 'en'), MAKE['number'](n, 'zh')) == (english, chinese)


def test_a_dialogue_fits_the_context_of_its_config(rows):
    scope = {'device': 'cpu'}
    exec((REPO / 'config' / 'train_dialogue.py').read_text(encoding='utf-8'), scope)
    text = ''.join(m['content'] for row in rows[False] + rows[True] for m in row['messages'])
    assert len(set(text)) < 256
    for row in rows[False] + rows[True]:
        _, said = dialogue.from_messages(row['messages'], '')
        written = ''.join(part for part, _, _ in dialogue.parts('', said, dialogue.MARKS[0]))
        assert len(written) <= MAKE['LONGEST'] < scope['block_size']


def test_the_rows_are_the_same_everywhere(rows):
    text = json.dumps(rows[False][:50], ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == '84cf78ef7843cd5f'


# The score

def test_every_task_is_scored_with_the_right_answers_before_it(rows):
    row = next(row for row in rows[True] if 'remember' in row['tasks'])
    asked = list(SCORE['questions']([row]))
    assert len(asked) == sum(map(bool, row['tasks']))
    task, language, before, question, answer = next(a for a in asked if a[0] == 'remember')
    assert before[-2][1] == WORDS[language]['told'] and answer in before[-2][0]


def test_answers_in_a_batch_are_those_of_one_prompt_at_a_time():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=40, vocab_size=256, n_layer=1, n_head=2, n_embd=16)).eval()
    prompts = [list(b'Q:\na\n\nA:\n'), list(b'Q:\nb\n\nA:\n')]
    together = SCORE['answers'](model, ByteTokenizer(), prompts, '\n\n', 'cpu', 9)
    assert together == [SCORE['answers'](model, ByteTokenizer(), [prompt], '\n\n', 'cpu', 9)[0] for prompt in prompts]


def test_an_answer_is_cut_once_it_is_longer_than_the_right_one():
    model, calls = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=1, n_head=1, n_embd=4)), []
    model.register_forward_hook(lambda *args: calls.append(0))
    SCORE['answers'](model, ByteTokenizer(), [[65]], 'an end that it never writes', 'cpu', 9)
    assert len(calls) == 9


def test_the_score_counts_by_task_and_language(run, tmp_path, monkeypatch, rows):
    monkeypatch.chdir(tmp_path)
    config = GPTConfig(block_size=256, vocab_size=256, n_layer=1, n_head=1, n_embd=4)
    (tmp_path / 'out').mkdir()
    checkpoint.save('out/ckpt.pt', {'model': GPT(config).state_dict(), 'model_args': config.model_args(),
                                    'tokenizer': {'kind': 'byte'}, 'chat': dialogue.MARKS[0]})
    path = tmp_path / 'val.jsonl'
    path.write_text(''.join(json.dumps({'language': 'en', 'tasks': ['sum'], 'messages': [
        {'role': 'user', 'content': 'one plus two'}, {'role': 'assistant', 'content': 'three'}]}) + '\n'
        for _ in range(3)), encoding='utf-8')
    done = run('data/dialogue/score.py', '--out_dir=out', f'--rows={path}', '--device=cpu')
    assert done.status == 0, done.err
    assert done.out.startswith('asking 3 questions\nsum      en  0 of 3 (0.00%)\nall  0 of 3 (0.00%)\none plus two')
