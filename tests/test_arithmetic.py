"""data/arithmetic: the problems, what is held out, and the answers a score is given for."""
import runpy
from collections import Counter

import pytest
import torch

from configurator import REPO
from lib.text.tokenizer import CharTokenizer
from model import GPT, GPTConfig

MAKE = runpy.run_path(str(REPO / 'data' / 'arithmetic' / 'prepare.py'))
SCORE = runpy.run_path(str(REPO / 'data' / 'arithmetic' / 'score.py'))


@pytest.fixture(scope='module')
def lines():
    return MAKE['problems']()


def operands(line):
    op = next(op for op in '+-*/' if op in line.split('=')[0])
    return op, *map(int, line.split('=')[0].split(op))


def test_every_line_ends_in_the_right_answer(lines):
    for line in lines[0] + lines[1]:
        assert line.split('=')[-1] == SCORE['truth'](line[:line.index('=') + 1])


def test_every_problem_occurs_once_and_division_by_zero_never(lines):
    asked = [operands(line) for line in lines[0] + lines[1]]
    assert len(asked) == len(set(asked)) == 39_900 and not any(op == '/' and b == 0 for op, a, b in asked)


def test_at_least_a_tenth_of_each_operation_is_held_out(lines):
    train, val = (Counter(operands(line)[0] for line in part) for part in lines)
    assert all(val[op] >= (train[op] + val[op]) / 10 for op in '+-*/')


def test_no_held_out_sum_or_product_is_trained_on_as_its_mirror_image(lines):
    trained = {operands(line) for line in lines[0]}
    assert not any((op, b, a) in trained for op, a, b in map(operands, lines[1]) if op in '+*')


def test_a_line_fits_the_context_of_its_config(lines):
    scope = {'device': 'cpu'}
    exec((REPO / 'config' / 'train_arithmetic.py').read_text(encoding='utf-8'), scope)
    assert max(map(len, lines[0] + lines[1])) < scope['block_size']


@pytest.mark.parametrize('problem, line', [
    ((12, '+', 34), '12+34=46'), ((12, '-', 34), '12-34=-22'), ((47, '*', 38), '47*38=0266+1520~6871=1786'),
    ((48, '/', 12), '48/12=0:48 1:36 2:24 3:12 4:0=4'), ((0, '/', 7), '0/7=0:0=0'), ((5, '/', 99), '5/99=0:5=0r5'),
    ((97, '/', 4), '97/4=0:9 1:5 2:1>0:17 1:13 2:9 3:5 4:1=24r1'),
])
def test_steps_are_written_as_the_docstring_shows(problem, line):
    assert MAKE['line'](*problem) == line


def test_answers_in_a_batch_are_those_of_one_prompt_at_a_time():
    torch.manual_seed(0)
    tok = CharTokenizer('\n=+0123456789')
    model = GPT(GPTConfig(block_size=32, vocab_size=13, n_layer=1, n_head=2, n_embd=16)).eval()
    prompts = ['\n12+34=', '\n99+99=', '\n50+05=']
    together = SCORE['answers'](model, tok, prompts, 'cpu')
    assert together == [SCORE['answers'](model, tok, [prompt], 'cpu')[0] for prompt in prompts]
