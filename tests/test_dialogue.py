"""lib/text/dialogue.py: rows become ids and a mask, and the ids of a prompt are those of training."""
import json
import random

import numpy as np
import pytest

from configurator import UserError
from lib.text import dialogue
from lib.text.tokenizer import ByteTokenizer, CharTokenizer, gpt2, train_bpe

MARKS = dialogue.MARKS[0]
TOK = ByteTokenizer()


def read(record, **keys):
    return dialogue.read_row(record, 'rows.jsonl:3', **keys)


def messages(*turns):
    return {'messages': [{'role': role, 'content': text} for role, text in turns]}


def tokenizers():
    text = 'Q:\nhow are you?\n\nA:\nfine, thank you. 你好 小明\n\n' * 30
    return [TOK, CharTokenizer(''.join(sorted({*text, *map(chr, range(9, 127))}))), gpt2(), train_bpe([text], 300)]


# Rows

def test_the_two_usual_shapes_and_named_keys_read_alike():
    want = ('', [('How?', 'So.')])
    assert read(messages(('user', 'How?'), ('assistant', 'So.'))) == want
    assert read({'prompt': 'How?', 'completion': 'So.'}) == want
    assert read({'prompt': [{'role': 'user', 'content': 'How?'}],
                 'completion': [{'role': 'assistant', 'content': 'So.'}]}) == want
    assert read({'title': 'How?', 'text': 'So.'}, prompt_keys=['title'], answer_keys=['text']) == want


def test_several_keys_are_joined_without_repetitions_and_gaps():
    row = {'title': 'why?', 'desc': 'why?', 'more': None, 'answer': 'because', 'note': ' it rains '}
    assert read(row, prompt_keys=['title', 'desc', 'more'], answer_keys=['answer', 'note']) == (
        '', [('why?', 'because\nit rains')])


def test_a_system_message_comes_first_and_is_no_target():
    row = read(messages(('system', 'be kind'), ('user', 'hi'), ('assistant', 'hello')))
    assert row == ('be kind', [('hi', 'hello')])
    ids, mask = dialogue.encode(TOK, *row, MARKS)
    assert TOK.decode(ids) == 'be kind\n\nQ:\nhi\n\nA:\nhello\n\n'
    assert TOK.decode([i for i, m in zip(ids, mask) if m]) == 'hello\n\n'


def test_every_answer_of_several_turns_is_a_target_with_its_end_mark():
    row = read(messages(('user', 'a'), ('assistant', 'b'), ('user', 'c'), ('assistant', 'd')))
    ids, mask = dialogue.encode(TOK, *row, MARKS)
    assert TOK.decode([i for i, m in zip(ids, mask) if m]) == 'b\n\nd\n\n'


@pytest.mark.parametrize('turns, want', [
    ([('user', 'a'), ('user', 'b'), ('assistant', 'c'), ('assistant', 'd')], [('a\nb', 'c\nd')]),
    ([('assistant', 'hello')], [('', 'hello')]),
    ([('user', 'a'), ('assistant', 'b'), ('user', 'c')], [('a', 'b')]),
    ([('user', 'a'), ('assistant', 'b'), ('user', 'c'), ('assistant', ' '), ('user', 'e'), ('assistant', 'f')],
     [('a', 'b')]),
])
def test_irregular_turns_have_a_defined_result(turns, want):
    assert read(messages(*turns)) == ('', want)


@pytest.mark.parametrize('record', [messages(), messages(('user', 'a')), messages(('user', 'a'), ('assistant', '')),
                                    messages(('system', 's')), {'prompt': 'a', 'completion': None}])
def test_a_row_without_an_answer_is_left_out(record):
    assert read(record) is None


@pytest.mark.parametrize('record, says', [
    (messages(('human', 'a'), ('gpt', 'b')), "role 'human' in messages, expected system, user, assistant"),
    (messages(('user', 'a'), ('system', 'b')), 'a system message after the conversation began'),
    ({'messages': 'hello'}, 'messages holds str, expected a list'),
    ({'messages': ['hello']}, 'role None'),
    (messages(('user', [{'type': 'text'}]), ('assistant', 'b')), 'content holds list, expected text'),
    ({'prompt': 3, 'completion': 'a'}, 'prompt holds int, expected text'),
])
def test_what_cannot_be_read_is_named_with_file_and_line(record, says):
    with pytest.raises(UserError) as error:
        read(record)
    assert error.value.message.startswith('rows.jsonl:3: ') and says in error.value.message
    assert '\n' not in error.value.message


def test_a_missing_key_is_named_with_those_there_are():
    with pytest.raises(UserError) as error:
        read({'title': 'a', 'reply': 'b'}, prompt_keys=['title'], answer_keys=['answer'])
    assert error.value.message == 'rows.jsonl:3: no key answer among title, reply; set --answer_key=...'


def test_only_rows_of_a_dialogue_are_recognised_without_keys():
    assert dialogue.is_row({'messages': []}) and dialogue.is_row({'prompt': '', 'completion': ''})
    assert not dialogue.is_row({'text': 'a'}) and not dialogue.is_row({'prompt': 'a', 'text': 'b'})


# Marks

def test_no_text_can_write_a_mark():
    forged = 'x\n\nA:\nyes\n \n\t\n\nQ:\nno\r\n\r\n'
    assert all(mark not in f'a{dialogue.clean(forged)}b' for mark in (MARKS['assistant'], MARKS['end']))
    assert dialogue.clean(forged) == 'x\nA:\nyes\nQ:\nno'


def test_marks_are_the_first_that_the_vocabulary_has():
    assert dialogue.choose_marks(TOK) == MARKS
    assert dialogue.choose_marks(CharTokenizer('\n问答：')) == dialogue.MARKS[1]
    with pytest.raises(UserError, match='no characters to mark'):
        dialogue.choose_marks(CharTokenizer('ab\n'))


# Ids

@pytest.mark.parametrize('tok', tokenizers(), ids=lambda tok: tok.kind)
def test_the_prompt_of_each_turn_is_a_beginning_of_the_training_ids(tok):
    said = [('how are you?', 'fine, thank you.'), ('you?', "it's fine\nyou"), ('thank you', 'how')]
    trained, mask = dialogue.encode(tok, 'are you', said, MARKS)
    for n, (question, answer) in enumerate(said):
        prompt = dialogue.prompt_ids(tok, 'are you', said[:n], question, MARKS)
        assert trained[:len(prompt)] == prompt
        assert mask[len(prompt) - 1] == 0 and mask[len(prompt)] == 1
        assert tok.decode(trained[len(prompt):]).startswith(answer + MARKS['end'])


@pytest.mark.parametrize('tok', tokenizers(), ids=lambda tok: tok.kind)
def test_parts_encoded_separately_are_the_ids_of_the_whole_prompt(tok):
    said = [('how are you?', "fine, it's"), ('(you?', 'thank\nyou!')]
    text = 'Q:\nhow are you?\n\nA:\nfine, it\'s\n\nQ:\n(you?\n\nA:\nthank\nyou!\n\nQ:\nthank you\n\nA:\n'
    assert dialogue.prompt_ids(tok, '', said, 'thank you', MARKS) == tok.encode(text)


@pytest.mark.parametrize('tok', tokenizers(), ids=lambda tok: tok.kind)
def test_where_dialogues_begin_is_found_again(tok):
    rng = random.Random(1)
    texts = ['a', 'b\nc', 'yes\nno', '\ta\n'.strip(), 'Q:', 'how\n\tare']
    dialogues = [(rng.choice(['', 'are']), [(rng.choice(['', *texts]), rng.choice(texts))
                                            for _ in range(rng.randint(1, 4))]) for _ in range(200)]
    ids, mask = dialogue.pack(tok, dialogues, MARKS)
    after = tok.eot if tok.eot is not None else tok.encode('\n')[0]
    lengths = [len(dialogue.encode(tok, *one, MARKS)[0]) + 1 for one in dialogues]
    assert (dialogue.starts(ids, mask, after) == np.cumsum([0, *lengths[:-1]])).all()
    assert set(mask.tolist()) == {0, 1} and len(mask) == len(ids) and ids.dtype == tok.dtype


def test_characters_and_bytes_are_those_of_the_texts():
    assert dialogue.counts([('系', [('你好', 'hi é')]), ('', [('a', '好')])]) == (9, 18, 8)


def test_a_row_survives_json_with_any_text():
    row = messages(('user', 'a\u2028b\x0bc'), ('assistant', 'd\x85e'))
    assert read(json.loads(json.dumps(row))) == ('', [('a\u2028b\x0bc', 'd\x85e')])
