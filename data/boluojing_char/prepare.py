"""The Great Perfection of Wisdom sutra (Mahaprajnaparamita, boluojing): 5.7 million characters, one id per character.

    python data/boluojing_char/prepare.py [--input=FOLDER_OR_FILE]
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.text.prepare import prepare
from lib.text.sources import BOLUOJING

if __name__ == '__main__':
    prepare(__file__, source=BOLUOJING.fetch, tokenizer='char')
