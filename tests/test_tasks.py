"""lib/tasks.py: what each task asks of a model, and how its answers are scored, on small examples."""
import json
import math

import pytest

from lib import tasks


class Letters:
    """A tokenizer of the letters a to o; every other character is 15."""
    start_ids = [0]

    @staticmethod
    def encode(text):
        return [ord(c) - ord('a') if 'a' <= c <= 'o' else 15 for c in text]


ITEMS = [{'ctx': 'ab', 'endings': ['c', 'dd', 'eee', 'f'], 'label': 2},
         {'ctx': 'ab', 'endings': ['g', 'g', 'g', 'g'], 'label': '0'},
         {'ctx': '', 'endings': ['a', 'b', 'c', 'd'], 'label': 3},
         {'ctx': 'b', 'endings': ['a', 'b', 'c', 'd'], 'label': 1}]


def test_hellaswag_asks_for_four_endings_after_a_space():
    requests = tasks.requests('hellaswag', ITEMS, Letters)
    assert len(requests) == 16 and requests[2] == ([0, 1], [15, 4, 4, 4]) and requests[8] == ([0], [15, 0])


def test_hellaswag_accuracy_of_known_losses():
    """The right ending is best per token in items 0 and 1 (a tie), and in sum in item 1 alone."""
    scored = [[(3, 2), (4, 3), (4.4, 4), (5, 2)], [(2, 2)] * 4, [(1, 2), (9, 2), (9, 2), (9, 2)]]
    found = tasks.scores('hellaswag', ITEMS[:3], [(*pair, False) for item in scored for pair in item])
    assert found == {'acc_norm': 2 / 3, 'acc': 1 / 3}


def test_lambada_asks_for_the_last_word_with_its_space():
    items = [{'text': 'ab cd efg\n'}, {'text': 'abc'}]
    assert tasks.requests('lambada', items, Letters) == [([0, 1, 15, 2, 3], [15, 4, 5, 6]), ([0], [0, 1, 2])]


def test_lambada_accuracy_and_perplexity_of_known_losses():
    scored = [(math.log(2), 1, True), (math.log(8), 3, False), (0, 1, True), (0, 2, True)]
    found = tasks.scores('lambada', [{}] * 4, scored)
    assert found == {'acc': 0.75, 'perplexity': pytest.approx(2.0)}


def test_words_and_punctuation_are_joined_as_usual():
    split = "`` do n't you know , '' he said , `` that it 's ( quite ) late ? ''"
    assert tasks.detokenize(split) == "\"don't you know,\" he said, \"that it's (quite) late?\""
    assert tasks.detokenize('"It\'s fine," she said. Then ...') == '"It\'s fine," she said. Then ...'


def test_lambadas_last_word_may_be_on_a_new_line():
    assert tasks.requests('lambada', [{'text': 'ab cd\nefg'}], Letters) == [([0, 1, 15, 2, 3], [15, 4, 5, 6])]


def test_lambadas_texts_are_detokenized():
    split, joined = ([{'text': text}] for text in ("a , b do n't end", "a, b don't end"))
    assert tasks.requests('lambada', split, Letters) == tasks.requests('lambada', joined, Letters)


@pytest.mark.parametrize('limit, n', [(0, 3), (1, 1), (2, 2), (9, 3)])
def test_limit_takes_items_from_the_beginning(tmp_path, limit, n):
    texts = [{'text': name} for name in 'abc']
    lines = '\n' + '\n'.join(map(json.dumps, texts))  # the empty line is no item
    (tmp_path / 'items.jsonl').write_text(lines, encoding='utf-8')
    assert tasks.read('lambada', tmp_path / 'items.jsonl', limit) == texts[:n]


# Faults

@pytest.mark.parametrize('line, said', [('{"ctx": "a"}', 'expected an object with ctx, endings, label'),
                                        ('not json', 'not JSON'), ('[1]', 'expected an object')])
def test_a_line_that_is_not_an_item_is_named(tmp_path, line, said):
    path = tmp_path / 'items.jsonl'
    path.write_text(json.dumps(ITEMS[0]) + '\n' + line + '\n', encoding='utf-8')
    with pytest.raises(SystemExit) as caught:
        tasks.read('hellaswag', path)
    assert f'{path}:2: {said}' in caught.value.message


def test_without_a_connection_the_error_says_where_to_put_the_file(monkeypatch, tmp_path):
    def fail(url, path):
        raise tasks.UserError(f'download failed: no route from {url}; put it elsewhere')
    monkeypatch.setattr(tasks, 'download', fail)
    monkeypatch.setattr(tasks, 'REPO', tmp_path)
    with pytest.raises(SystemExit) as caught:
        tasks.read('lambada', None)
    assert caught.value.message.startswith(f'download failed: no route from {tasks.URL["lambada"]}; ')
    assert f"put it at {tmp_path / 'data' / 'lambada' / 'input.jsonl'}, or name a copy" in caught.value.message
