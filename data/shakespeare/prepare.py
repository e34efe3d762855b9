"""Tiny Shakespeare (1.1 MB of plays) in GPT-2's BPE, for fine-tuning GPT-2.

    python data/shakespeare/prepare.py [--input=PATH]
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.text.prepare import prepare

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'

if __name__ == '__main__':
    prepare(__file__, source=URL, expect=(301_966, 36_059), tokenizer='gpt2')
