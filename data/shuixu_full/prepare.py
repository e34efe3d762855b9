"""Water Margin and its sequels (15.3 MB) in GPT-2's BPE. The lines are shuffled, in the same order every time.

    python data/shuixu_full/prepare.py [--input=FOLDER_WITH_THE_BOOKS]

Shuffling gives the validation split the same mix of books and authors as the training split.
"""
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.text.prepare import prepare
from lib.text.sources import SHUIXU_FULL


def shuffle_lines(text):
    """Return the lines of `text` in a random order that depends only on their number."""
    lines = text.splitlines()
    random.Random(1337).shuffle(lines)
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    prepare(__file__, source=SHUIXU_FULL.fetch, rewrite=shuffle_lines, tokenizer='gpt2')
