"""lib/chat.py: the history in the cache, what is forgotten when it is full, and the terminal."""
import io
import signal
import sys

import pytest
import torch

from configurator import UserError
from lib.chat import Conversation, open_conversation, print_answer, talk
from lib.text import dialogue
from lib.text.tokenizer import ByteTokenizer
from lib.weights import checkpoint
from model import GPT, GPTConfig

MARKS = dialogue.MARKS[0]
TOK = ByteTokenizer()
GREEDY = {'temperature': 0, 'max_new_tokens': 12}


def model(block_size=256, **options):
    torch.manual_seed(3)
    made = GPT(GPTConfig(block_size=block_size, vocab_size=256, n_layer=2, n_head=2, n_embd=16, **options)).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made


class Parrot(torch.nn.Module):
    """A stand-in for a model: answers with `reply`, and counts the tokens that it read."""

    def __init__(self, reply, block_size=256):
        super().__init__()
        self.reply, self.config = reply.encode() + b'\n\n', GPTConfig(block_size=block_size, vocab_size=256, n_layer=1,
                                                                      n_head=1, n_embd=2)
        self.lm_head, self.dtype, self.fed, self.at = torch.nn.Linear(1, 1), torch.float32, [], 0

    def forward(self, idx, cache=None):
        self.fed.append(idx[0].tolist())
        assert cache.pos + idx.size(1) <= self.config.block_size
        cache.pos += idx.size(1)
        self.at = 0 if idx.size(1) > 1 else self.at + 1
        logits = torch.zeros(1, 1, 256)
        logits[0, 0, self.reply[min(self.at, len(self.reply) - 1)]] = 9
        return logits, None


def conversation(made, **settings):
    return Conversation(made, TOK, MARKS, **{**GREEDY, **settings})


@pytest.mark.parametrize('options', [{}, {'pos': 'rope', 'norm': 'rmsnorm', 'smear': True}])
def test_an_answer_with_the_history_in_the_cache_is_that_of_reading_all_of_it_again(options):
    made = model(**options)
    kept, said = conversation(made), []
    for question in ('one', 'two, please', 'three?'):
        fresh = conversation(made)
        fresh.exchanges = list(said)
        assert ''.join(kept.answer(question)) == ''.join(fresh.answer(question))
        said = list(kept.exchanges)


def test_a_new_question_costs_its_own_tokens_only():
    parrot = Parrot('hello')
    kept = conversation(parrot)
    assert ''.join(kept.answer('hi')) == 'hello'
    parrot.fed.clear()
    assert ''.join(kept.answer('again')) == 'hello'
    # the last character of the first end mark was written, but not yet read
    assert TOK.decode(parrot.fed[0]) == '\nQ:\nagain\n\nA:\n'


def test_what_the_model_reads_is_what_training_holds_token_for_token():
    parrot = Parrot('hello')
    kept = conversation(parrot, system='be kind')
    for question in ('hi', 'again', 'and again'):
        list(kept.answer(question))
    read = [i for ids in parrot.fed for i in ids]
    trained, _ = dialogue.encode(TOK, 'be kind', kept.exchanges, MARKS)
    assert read == trained[:len(read)] and len(trained) - len(read) == 1


def test_an_end_mark_of_several_characters_ends_an_answer_and_is_not_printed():
    parrot = Parrot('two\nlines')
    assert ''.join(conversation(parrot).answer('hi')) == 'two\nlines'


def test_the_oldest_exchanges_are_forgotten_whole_when_the_context_is_full():
    kept = conversation(Parrot('hello', block_size=100))
    questions = [f'question number {n}' for n in range(5)]
    for question in questions:
        assert ''.join(kept.answer(question)) == 'hello'
    assert [q for q, _ in kept.exchanges] == questions[-2:] and kept.dropped == 1
    assert TOK.decode(kept.read).startswith('Q:\nquestion number 3\n\nA:\nhello\n\nQ:\nquestion number 4')


def test_a_system_text_stays_when_exchanges_are_forgotten():
    kept = conversation(Parrot('hello', block_size=100), system='be kind')
    for n in range(4):
        list(kept.answer(f'question {n}'))
    assert kept.dropped and TOK.decode(kept.read).startswith('be kind\n\nQ:\n')


def test_a_question_longer_than_the_context_is_refused_and_the_conversation_goes_on():
    kept = conversation(Parrot('hello', block_size=64))
    with pytest.raises(UserError, match='the question has 108 tokens with its marks; the context of 64'):
        list(kept.answer('x' * 100))
    assert ''.join(kept.answer('hi')) == 'hello'


def test_an_answer_ends_where_the_context_ends():
    kept = conversation(Parrot('x' * 99, block_size=64), max_new_tokens=500)
    assert 16 <= len(''.join(kept.answer('hi'))) == 64 - len('Q:\nhi\n\nA:\n') + 1


def test_reset_forgets():
    parrot = Parrot('hello')
    kept = conversation(parrot)
    list(kept.answer('hi'))
    kept.reset()
    parrot.fed.clear()
    list(kept.answer('hi'))
    assert TOK.decode(parrot.fed[0]) == 'Q:\nhi\n\nA:\n'


def test_the_same_seed_gives_the_same_conversation():
    made = model()
    talks = [[''.join(kept.answer(question)) for question in ('a', 'b')]
             for kept in (conversation(made, temperature=1.0, seed=seed) for seed in (1, 1, 2))]
    assert talks[0] == talks[1] != talks[2]


def test_no_sequence_of_tokens_occurs_twice_in_an_answer():
    assert ''.join(conversation(Parrot('ababab')).answer('hi')) == 'ababab'
    said = conversation(Parrot('ababab'), no_repeat_ngram=2)
    assert not ''.join(said.answer('hi')).startswith('abab')


def test_every_setting_of_sample_py_reaches_the_rules(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out').mkdir()
    made = model()
    checkpoint.save('out/ckpt.pt', {'model': made.state_dict(), 'model_args': made.config.model_args(),
                                    'tokenizer': {'kind': 'byte'}, 'chat': MARKS})
    done = run('sample.py', '--chat', '--start=a', '--device=cpu', '--max_new_tokens=4', '--top_p=0.9', '--min_p=0.1',
               '--repetition_penalty=1.2', '--no_repeat_ngram=3')
    assert done.status == 0, done.err


def test_nan_is_a_plain_error():
    made = model()
    with torch.no_grad():
        made.transformer.wte.weight.fill_(float('nan'))
    with pytest.raises(UserError, match='computes NaN'):
        list(conversation(made).answer('hi'))


def test_a_model_without_marks_cannot_chat():
    with pytest.raises(UserError, match='trained on questions and answers'):
        open_conversation(model(), TOK, {'chat': None})


# The terminal

@pytest.fixture
def typing(monkeypatch):
    def typing(text):
        monkeypatch.setattr(sys, 'stdin', io.StringIO(text))
    return typing


def test_lines_are_answered_until_quit(typing, capsys):
    typing('hi\n\n/quit\nnever read\n')
    talk(conversation(Parrot('hello')), live=False)
    assert capsys.readouterr().out == 'hello\n'


def test_the_end_of_the_input_ends_it(typing, capsys):
    typing('hi\nho\n')
    talk(conversation(Parrot('hello')), live=True)
    assert capsys.readouterr().out == 'hello\nhello\n\n'


def test_slash_reset_forgets_and_other_commands_explain(typing, capsys):
    typing('hi\n/reset\n/help\n')
    kept = conversation(Parrot('hello'))
    talk(kept, live=False)
    assert kept.exchanges == [] and '/reset forgets' in capsys.readouterr().out


def test_a_character_that_the_model_lacks_is_said_and_the_conversation_goes_on(typing, capsys):
    from lib.text.tokenizer import CharTokenizer
    typing('é\nhi\n')
    parrot = Parrot('')
    parrot.reply = bytes([3, 0, 0])
    kept = Conversation(parrot, CharTokenizer('\n:AhiQ'), MARKS, **GREEDY)
    talk(kept, live=False)
    said = capsys.readouterr()
    assert "character 'é'" in said.err and said.out == 'h\n\n'


def test_forgetting_is_said(typing, capsys):
    typing(''.join(f'question number {n}\n' for n in range(5)))
    talk(conversation(Parrot('hello', block_size=100)), live=False)
    assert 'the context of 100 tokens was full: forgot the oldest exchange)' in capsys.readouterr().err


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(capsys):
    class Interrupted(Parrot):
        def forward(self, idx, cache=None):
            if len(self.fed) == 3:
                signal.raise_signal(signal.SIGINT)
            return super().forward(idx, cache)
    kept = conversation(Interrupted('hello'))
    print_answer(kept, 'hi', live=True)
    assert capsys.readouterr().out == 'hel\n' and kept.exchanges == [('hi', 'hel')]
