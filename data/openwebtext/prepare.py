"""OpenWebText, an open copy of GPT-2's training text: 8 million documents in GPT-2's BPE.

    python data/openwebtext/prepare.py                  streamed from the hub
    python data/openwebtext/prepare.py --input=FOLDER   from its parquet files

The training split has about 9.04 billion tokens, the validation split 4.4 million. Only the result is stored
on disk: at most 18 GB, or 36 GB while it replaces an older one.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.text.prepare import prepare

if __name__ == '__main__':
    prepare(__file__, source='hub:Skylion007/openwebtext', tokenizer='gpt2', val_fraction=0.0005)
