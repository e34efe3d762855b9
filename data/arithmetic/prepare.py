"""Sums, differences, products and quotients of numbers up to 99, one a line, a tenth of them held out for validation.

    python data/arithmetic/prepare.py

A line is what a user types, up to the first =, the steps that lead to the answer, and the answer behind the last =:

    12+34=46
    12-34=-22
    47*38=0266+1520~6871=1786      7*38 and 40*38, then their sum from the last digit to the first
    47/12=0:47 1:35 2:23 3:11=3r11 how often 12 was taken away, and what is left each time; quotient and remainder
    97/4=0:9 1:5 2:1>0:17 1:13 2:9 3:5 4:1=24r1   long division: the tens (9), then what is left of them and 7

A problem and its mirror image (34+12) are held out together.
"""
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.text.prepare import prepare


def take_away(b, x):
    """Return how b is taken away from x until less than b is left, which is so within nine times."""
    return ' '.join(f'{k}:{x - k * b}' for k in range(x // b + 1))


def line(a, op, b):
    """Return the problem with its steps and its answer."""
    if op in '+-':
        return f'{a}{op}{b}={a + b if op == "+" else a - b}'
    if op == '*':
        return f'{a}*{b}={a % 10 * b:04}+{a // 10 * 10 * b:04}~{f"{a * b:04}"[::-1]}={a * b}'
    left, steps = a, ''
    if a // 10 >= b:
        left = a // 10 % b * 10 + a % 10
        steps = f'{take_away(b, a // 10)}>'
    return f'{a}/{b}={steps}{take_away(b, left)}={a // b}' + (f'r{a % b}' if a % b else '')


def problems(seed=1337):
    """Return (training lines, held-out lines), shuffled; at least a tenth of each operation is held out."""
    rng, train, val = random.Random(seed), [], []
    for op in '+-*/':
        pairs = [(a, b) for a in range(100) for b in range(op == '/', 100)]
        families = sorted({tuple(sorted(pair)) if op in '+*' else pair for pair in pairs})
        rng.shuffle(families)
        held, wanted = set(), len(pairs) / 10
        for a, b in families:
            if len(held) < wanted:
                held |= {(a, b), (b, a)} if op in '+*' else {(a, b)}
        for a, b in pairs:
            (val if (a, b) in held else train).append(line(a, op, b))
    rng.shuffle(train)
    rng.shuffle(val)
    return train, val


def write_problems(folder):
    """Write both files and return [the training one]."""
    folder.mkdir(exist_ok=True)
    for name, lines in zip(('input-train', 'input-val'), problems(), strict=True):
        (folder / name).write_text('\n'.join(['', *lines, '']), encoding='utf-8', newline='')
    return [str(folder / 'input-train')]


if __name__ == '__main__':
    prepare(__file__, source=write_problems, val_source=str(Path(__file__).resolve().with_name('input-val')),
            tokenizer='char')
