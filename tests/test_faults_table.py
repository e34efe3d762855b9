"""docs/faults.md: every fault has a row, and every row a test that exists."""
import re

from kit import REPO


def rows():
    lines = (REPO / 'docs' / 'faults.md').read_text(encoding='utf-8').splitlines()
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if line.startswith('|')][2:]


def test_every_fault_has_a_row_in_order():
    numbers = [int(row[0]) for row in rows() if row[0]]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 87


def test_every_row_names_a_test_that_exists_and_slow_ones_say_so():
    for _, fault, name, test in rows():
        text = (REPO / 'tests' / f'test_{name}.py').read_text(encoding='utf-8')
        match = re.search(rf'((?:^@.*\n)*)^def {test.strip("`")}\(', text, re.M)
        assert match, (fault, name, test)
        slow = 'pytest.mark.slow' in match.group(1) or re.search(r'^pytestmark = \[?pytest.mark.slow', text, re.M)
        assert bool(slow) == ('(slow)' in fault), (fault, test)


def test_there_are_at_most_five_exceptions():
    text = (REPO / 'docs' / 'faults.md').read_text(encoding='utf-8').split('## Exceptions')[1]
    assert 1 <= len(re.findall('^- ', text, re.M)) <= 5
