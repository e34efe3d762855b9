"""Water Margin (shuihuzhuan): 928,000 characters, one id per character.

    python data/shuixu_char/prepare.py --input=shuihuzhuan.txt
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.text.prepare import prepare

WHERE = 'The text is in the public domain: https://zh.wikisource.org/wiki/水滸傳, also on Project Gutenberg'

if __name__ == '__main__':
    prepare(__file__, where=WHERE, tokenizer='char')
