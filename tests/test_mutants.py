"""benchmarks/mutants.py: which mutants there are, which tests may notice them, and how they are put in place."""
import gc
import importlib
import json
import sys
from types import FunctionType

import pytest

from benchmarks import mutant_tests, mutants

SOURCE = '''"""A module."""
LIMIT = 3


def total(numbers, start=0):
    """Text that stays."""
    for n in numbers:
        if n < LIMIT and not n == start:
            start += n
    return start


class Box:
    size = 4

    def area(self, scale=2):
        return (self.size *
                scale)
'''


def test_every_line_has_its_mutants_and_texts_have_none(tmp_path):
    (tmp_path / 'toy.py').write_text(SOURCE, encoding='utf-8')
    found = [(m.line, m.kind, m.after.strip()) for m in mutants.mutants_of(tmp_path / 'toy.py')]
    assert found == [
        (2, 'constant', 'LIMIT = (4)'), (5, 'constant', 'def total(numbers, start=(1)):'),
        (8, 'comparison', 'if (n <= LIMIT) and not n == start:'),
        (8, 'comparison', 'if n < LIMIT and not (n != start):'),
        (8, 'boolean', 'if n < LIMIT and (n == start):'), (8, 'boolean', 'if (n < LIMIT or not n == start):'),
        (9, 'arithmetic', 'start -= n'), (9, 'removed statement', 'pass'), (10, 'return value', 'return None'),
        (14, 'constant', 'size = (5)'), (16, 'constant', 'def area(self, scale=(3)):')]


def test_a_line_belongs_to_its_statement_and_a_default_value_to_the_functions_body():
    spans = mutants.statements(SOURCE)
    assert spans[17] == spans[18] == {17, 18} and spans[8] == {8} and spans[16] == {17, 18}
    assert spans[5] == {6, 7, 8, 9, 10} and 2 not in spans and 14 not in spans


def test_the_tests_that_execute_a_line_run_with_the_modules_own_and_the_fastest_first(monkeypatch):
    other, own = 'tests/test_lora.py::', 'tests/test_train.py::'
    recorded = {f'{other}a': (3.0, [1, 2]), f'{other}b': (1.0, [2]), f'{own}c': (2.0, [5]), f'{own}d': (1.5, [2])}

    def chosen(lines):
        return ''.join(id[-1] for id in mutants.tests_of('train.py', lines, recorded))
    assert (chosen({2}), chosen({9}), chosen(None)) == ('dba', '', 'dcba')
    monkeypatch.setattr(mutants, 'budget', 5.0)
    assert chosen(None) == 'dcb'


def test_every_equivalent_mutant_is_one_that_there_is():
    for name, reasons in json.loads(mutants.EQUIVALENT.read_text(encoding='utf-8')).items():
        there = {m.key for m in mutants.candidates(mutants.REPO / name)}
        assert reasons.keys() <= there and all(reasons.values()), name


def test_modules_of_the_repository_are_imported_anew_for_the_tests():
    assert [name for name in ('model', 'lib.generate', 'configurator', 'kit', 'tests.kit', 'torch.nn', 'json')
            if mutants.ours(name)] == ['model', 'lib.generate', 'configurator', 'kit', 'tests.kit']


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A module toy and its apply(old text, new text), which puts a mutant in place and says if anything differs."""
    (tmp_path / 'toy.py').write_text(SOURCE, encoding='utf-8')
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module('toy')
    path = str(tmp_path / 'toy.py')
    functions = [f for f in gc.get_objects() if type(f) is FunctionType and f.__code__.co_filename == path]
    module.apply = lambda old, new: mutant_tests.apply(path, SOURCE.replace(old, new), functions)
    yield module
    del sys.modules['toy']


@pytest.mark.parametrize('old, new, total, area', [
    ('+= n', '-= n', -3, 8), ('start=0', 'start=1', 3, 8), ('scale=2', 'scale=3', 3, 12),
    ('size = 4', 'size = 5', 3, 10)])
def test_a_mutant_changes_functions_and_classes_that_were_imported_already(toy, old, new, total, area):
    total_of, box = toy.total, toy.Box()
    assert toy.apply(old, new) and (total_of([1, 2]), box.area()) == (total, area)


def test_a_change_without_effect_is_not_a_mutant(toy):
    assert not toy.apply('LIMIT = 3', 'LIMIT = (3)')


def test_a_mutated_constant_changes_where_it_was_imported_too(toy, monkeypatch):
    other = type(sys)('other')
    other.LIMIT = toy.LIMIT
    monkeypatch.setitem(sys.modules, 'other', other)
    assert toy.apply('LIMIT = 3', 'LIMIT = 9') and other.LIMIT == 9 and toy.total([5]) == 5
