"""Water Margin (shuihuzhuan): 928,000 characters, one id per character.

    python data/shuixu_char/prepare.py [--input=shuihuzhuan.txt]
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.text.prepare import prepare
from lib.text.sources import SHUIXU

if __name__ == '__main__':
    prepare(__file__, source=SHUIXU.fetch, tokenizer='char')
