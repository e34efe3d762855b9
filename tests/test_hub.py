"""GPT-2's weights without a network: a refusal within seconds that says first what to do."""
import socket
import time

import pytest

from configurator import UserError
from lib.weights import gpt2


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(name, raising=False)


def test_an_open_port_counts_as_a_connection_and_a_closed_one_does_not(no_proxy):
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
        gpt2.check_connection(f'http://127.0.0.1:{port}')
    with pytest.raises(OSError):
        gpt2.check_connection(f'http://127.0.0.1:{port}')


def test_behind_a_proxy_the_host_need_not_be_reachable(no_proxy, monkeypatch):
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:1')
    gpt2.check_connection('https://host.invalid')


def test_without_a_connection_the_error_comes_at_once_with_the_ways_out_first(no_proxy, monkeypatch, tmp_path):
    constants = pytest.importorskip('huggingface_hub.constants')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(constants, 'ENDPOINT', 'https://127.0.0.1:1')
    began = time.monotonic()
    with pytest.raises(UserError) as told:
        gpt2.find('gpt2-medium').files()
    assert time.monotonic() - began < 3
    message = told.value.message
    ways = [message.index(way) for way in ('HF_ENDPOINT', 'https://hf-mirror.com', '--init_from=FOLDER',
                                           'modelscope download --model AI-ModelScope/gpt2-medium', 'Reason: ')]
    assert ways == sorted(ways) and '\n' not in message and 'Connection refused' in message
