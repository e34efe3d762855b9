"""Chinese text of your own in GPT-2's BPE: put it at data/chinese/input.txt, or name it.

    python data/chinese/prepare.py [--input=PATH ...] [--encoding=gb18030]

GPT-2's tokens spend two or three ids on a Chinese character; --tokenizer=bpe learns ones that fit.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.text.prepare import prepare

WHERE = 'data/README.md lists Chinese corpora'

if __name__ == '__main__':
    prepare(__file__, where=WHERE, tokenizer='gpt2')
