"""Chuck Norris facts, one per line, in GPT-2's BPE: a small text to fine-tune GPT-2 on.

    python data/chucknorris/prepare.py [--input=facts.txt]
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import UserError
from lib.text.download import download
from lib.text.prepare import prepare

URL = 'https://api.chucknorris.io/jokes/search?query=chuck'  # returns all facts that contain the word


def fetch_facts(folder):
    """Download the facts and return [the path of a file with one fact per line]."""
    answer = download(URL, folder / 'input.json')
    try:
        facts = [' '.join(fact['value'].split()) for fact in json.loads(answer.read_text(encoding='utf-8'))['result']]
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{URL} did not return a list of facts; give a file of facts: --input=PATH') from None
    path = folder / 'input.facts'
    path.write_text('\n'.join(dict.fromkeys(facts)) + '\n', encoding='utf-8', newline='')
    return [str(path)]


if __name__ == '__main__':
    prepare(__file__, source=fetch_facts, tokenizer='gpt2')
