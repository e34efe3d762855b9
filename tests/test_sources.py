"""lib/text/sources.py: the tutorials' texts are fetched, checked, and otherwise described. No address is real here."""
import json
import re

import pytest

from configurator import REPO, UserError
from lib.text import download as downloads
from lib.text import sources
from lib.text.sources import BOLUOJING, SANZIJING, SHUIXU, SHUIXU_FULL, gutenberg, three_character_lines

CLASSIC = '\n'.join(['人之初', '性本善'] * 190)  # as long as the tutorial's: 380 lines, 1,519 characters


@pytest.fixture
def internet(monkeypatch):
    """A dict from address to bytes in the place of the internet; each download is noted in `.asked`."""
    class Internet(dict):
        asked = []
    net = Internet()
    net.asked = []

    def download(url, path, tries=3):
        net.asked.append(url)
        if url not in net:
            raise UserError(f'download failed: 404 Not Found from {url}; and so on')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(net[url])
        return path
    monkeypatch.setattr(sources, 'download', download)
    return net


def test_the_tutorials_repository_is_asked_first_in_both_branches(internet, tmp_path):
    address = sources.TUTORIAL[1].replace('NAME', 'sanzijing_char')
    internet[address] = CLASSIC.encode()
    assert [open(path, encoding='utf-8').read() for path in SANZIJING.fetch(tmp_path)] == [CLASSIC]
    assert internet.asked == ['https://raw.githubusercontent.com/drriguz/nanoGPT/master/data/sanzijing_char/input.txt',
                              'https://raw.githubusercontent.com/drriguz/nanoGPT/main/data/sanzijing_char/input.txt']


def test_a_text_that_was_fetched_is_not_fetched_again(internet, tmp_path):
    internet[sources.TUTORIAL[0].replace('NAME', 'sanzijing_char')] = CLASSIC.encode()
    assert SANZIJING.fetch(tmp_path) == SANZIJING.fetch(tmp_path) and len(internet.asked) == 1


@pytest.mark.parametrize('content, reason', [
    (b'\xff\xfe', "can't decode"), ('人之初'.encode(), '3 characters, expected 1,000 to 2,500'),
    (('天地玄' * 500).encode(), 'it does not contain 人之初'),
])
def test_a_download_that_is_not_the_text_is_not_kept(internet, tmp_path, content, reason):
    internet[sources.TUTORIAL[1].replace('NAME', 'sanzijing_char')] = content
    internet.pop(SANZIJING.other, None)
    with pytest.raises(UserError) as told:
        SANZIJING._download(sources.TUTORIAL[1].replace('NAME', 'sanzijing_char'), tmp_path / 'input.tutorial.txt')
    assert reason in told.value.message and list(tmp_path.iterdir()) == []


def test_another_edition_is_used_last_and_announced(internet, tmp_path, capsys):
    rows = ['人之初，性本善，性相近，习相远。'] * 100
    internet[SANZIJING.other] = json.dumps({'paragraphs': rows}).encode()
    path, = SANZIJING.fetch(tmp_path)
    assert open(path, encoding='utf-8').read().splitlines() == ['人之初', '性本善', '性相近', '习相远'] * 100
    assert 'differ from the tutorial' in capsys.readouterr().err and len(internet.asked) == 3


def test_a_copy_of_another_length_is_used_with_a_warning(internet, tmp_path, capsys):
    internet[sources.TUTORIAL[0].replace('NAME', 'sanzijing_char')] = CLASSIC[4:].encode()
    SANZIJING.fetch(tmp_path)
    assert '1,515 characters' in capsys.readouterr().err


@pytest.mark.parametrize('text', [SANZIJING, SHUIXU, BOLUOJING, SHUIXU_FULL])
def test_without_a_network_one_line_has_a_page_and_two_ways_to_provide_the_text(internet, tmp_path, text):
    with pytest.raises(UserError) as told:
        text.fetch(tmp_path / text.name)
    assert text.page in told.value.message and 'input.txt' in told.value.message
    assert f'data/{text.name}/prepare.py --input=PATH' in told.value.message and '\n' not in told.value.message


def test_each_text_belongs_to_a_prepare_script_that_uses_it():
    for text, constant in ((SANZIJING, 'SANZIJING'), (SHUIXU, 'SHUIXU'), (BOLUOJING, 'BOLUOJING'),
                           (SHUIXU_FULL, 'SHUIXU_FULL')):
        script = (REPO / 'data' / text.name / 'prepare.py').read_text(encoding='utf-8')
        assert f'source={constant}.fetch' in script


def test_project_gutenbergs_frame_is_cut_off():
    begin, end = ('*** START OF THE PROJECT GUTENBERG EBOOK 水滸傳 ***', '*** END OF THE PROJECT GUTENBERG EBOOK ***')
    assert gutenberg(f'License\n{begin}\n\n宋江\n\n{end}\nMore') == '宋江\n'
    with pytest.raises(ValueError):
        gutenberg('宋江')


def test_the_classic_is_cut_into_lines_of_three_characters():
    rows = '{"paragraphs": ["子不学，非所宜，幼不学，老何为？"]}'
    assert three_character_lines(rows) == '子不学\n非所宜\n幼不学\n老何为'


def test_download_tries_as_often_as_it_is_told(monkeypatch, tmp_path):
    asked = []

    def refuse(request, timeout):
        asked.append(request.full_url)
        raise OSError('unreachable')
    monkeypatch.setattr(downloads.urllib.request, 'urlopen', refuse)
    monkeypatch.setattr(downloads, 'WAIT', 0)
    for tries in (1, 3):
        asked.clear()
        with pytest.raises(UserError, match=re.escape('unreachable')):
            downloads.download('http://nowhere', tmp_path / 'x', tries=tries)
        assert len(asked) == tries


def test_a_failed_download_is_explained_in_the_systems_words(monkeypatch, tmp_path):
    def refuse(request, timeout):
        raise downloads.urllib.error.URLError(OSError(-2, 'Name or service not known'))
    monkeypatch.setattr(downloads.urllib.request, 'urlopen', refuse)
    with pytest.raises(UserError, match='^error: download failed: Name or service not known from http://nowhere; put'):
        downloads.download('http://nowhere', tmp_path / 'x', tries=1)
