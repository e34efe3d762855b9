"""TinyStories (https://arxiv.org/abs/2305.07759): short stories in the words of a small child, in GPT-2's BPE.

    python data/tinystories/prepare.py                  streamed from the hub (1 GB), about 1 GB of .bin files
    python data/tinystories/prepare.py --input=TinyStoriesV2-GPT4-train.txt --val_input=TinyStoriesV2-GPT4-valid.txt
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.text.prepare import prepare

HUB = 'hub:roneneldan/TinyStories'

if __name__ == '__main__':
    prepare(__file__, source=HUB, val_source=f'{HUB}#validation', delimiter='<|endoftext|>', tokenizer='gpt2')
