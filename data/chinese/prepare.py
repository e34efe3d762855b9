"""Your own Chinese text in GPT-2's BPE: put it at data/chinese/input.txt, or pass --input.

    python data/chinese/prepare.py [--input=PATH ...] [--encoding=gb18030]

GPT-2's BPE needs two or three ids per Chinese character. --tokenizer=bpe trains a better one on the text.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.text.prepare import prepare

WHERE = 'data/README.md lists Chinese corpora'

if __name__ == '__main__':
    prepare(__file__, where=WHERE, tokenizer='gpt2')
