"""Your own text: files, folders, globs, JSON lines, parquet, gzip, or a dataset on the Hugging Face hub.

    python data/text/prepare.py --input=book.txt --name=mybook --tokenizer=char
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.text.prepare import prepare

if __name__ == '__main__':
    prepare(__file__)
