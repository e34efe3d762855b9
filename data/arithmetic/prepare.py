"""Sums, differences, products and quotients of numbers up to 99, one per line; a tenth is held out for validation.

    python data/arithmetic/prepare.py

A line is the problem, up to the first =, then the steps of the calculation, and the answer after the last =:

    12+34=46
    12-34=-22
    47*38=0266+1520~6871=1786      7*38 and 40*38, then their sum with its digits reversed
    47/12=0:47 1:35 2:23 3:11=3r11 how often 12 was subtracted : what is left; then quotient and remainder
    97/4=0:9 1:5 2:1>0:17 1:13 2:9 3:5 4:1=24r1   long division: first the tens (9), then their remainder and the 7

A problem and its mirror image (34+12) are held out together.
"""
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.text.prepare import prepare


def subtract(b, x):
    """Return the steps of subtracting b from x until less than b is left; there are at most nine."""
    return ' '.join(f'{k}:{x - k * b}' for k in range(x // b + 1))


def line(a, op, b):
    """Return the line of one problem: the problem, its steps and its answer."""
    if op in '+-':
        return f'{a}{op}{b}={a + b if op == "+" else a - b}'
    if op == '*':
        return f'{a}*{b}={a % 10 * b:04}+{a // 10 * 10 * b:04}~{f"{a * b:04}"[::-1]}={a * b}'
    left, steps = a, ''
    if a // 10 >= b:
        left = a // 10 % b * 10 + a % 10
        steps = f'{subtract(b, a // 10)}>'
    return f'{a}/{b}={steps}{subtract(b, left)}={a // b}' + (f'r{a % b}' if a % b else '')


def problems(seed=1337):
    """Return (training lines, held-out lines), shuffled; at least a tenth of each operation is held out."""
    rng, train, val = random.Random(seed), [], []
    for op in '+-*/':
        pairs = [(a, b) for a in range(100) for b in range(op == '/', 100)]
        families = sorted({tuple(sorted(pair)) if op in '+*' else pair for pair in pairs})
        rng.shuffle(families)
        held_out, wanted = set(), len(pairs) / 10
        for a, b in families:
            if len(held_out) < wanted:
                held_out |= {(a, b), (b, a)} if op in '+*' else {(a, b)}
        for a, b in pairs:
            split = val if (a, b) in held_out else train
            split.append(line(a, op, b))
    rng.shuffle(train)
    rng.shuffle(val)
    return train, val


def write_problems(folder):
    """Write both files to `folder` and return [the path of the training file]."""
    folder.mkdir(exist_ok=True)
    for name, lines in zip(('input-train', 'input-val'), problems(), strict=True):
        (folder / name).write_text('\n'.join(['', *lines, '']), encoding='utf-8', newline='')
    return [str(folder / 'input-train')]


if __name__ == '__main__':
    prepare(__file__, source=write_problems, val_source=str(Path(__file__).resolve().with_name('input-val')),
            tokenizer='char')
