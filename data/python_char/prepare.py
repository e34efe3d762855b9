"""The source of the Python standard library on this machine: about 11 MB of text, without a download.

    python data/python_char/prepare.py
"""
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.text.prepare import prepare

LEFT_OUT = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__'}


def library_files(_folder):
    """Return the ASCII source files of the standard library, in the same order on every system."""
    root = Path(sysconfig.get_paths()['stdlib'])
    paths = (path for path in root.rglob('*.py') if not LEFT_OUT & set(path.relative_to(root).parts))
    return [str(path) for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix())
            if path.read_bytes().isascii()]


if __name__ == '__main__':
    prepare(__file__, source=library_files, tokenizer='char')
