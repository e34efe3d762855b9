"""Water Margin (shuihuzhuan): 928,000 characters, one id each.

    python data/shuixu_char/prepare.py --input=shuihuzhuan.txt
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.text.prepare import prepare

WHERE = 'The text is in the public domain: wikisource (水滸傳) and Project Gutenberg have it'

if __name__ == '__main__':
    prepare(__file__, where=WHERE, tokenizer='char')
