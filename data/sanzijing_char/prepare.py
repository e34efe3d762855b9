"""The Three Character Classic (sanzijing): 1,519 characters, one id per character. A small model memorises it.

    python data/sanzijing_char/prepare.py [--input=sanzijing.txt]
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.text.prepare import prepare
from lib.text.sources import SANZIJING

if __name__ == '__main__':
    prepare(__file__, source=SANZIJING.fetch, tokenizer='char')
