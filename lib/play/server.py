"""The HTTP server behind play.py: one thread per connection, one worker thread that computes.

Only POST requests to /api/ do anything. Their Host and Origin headers are checked, so that a foreign web page whose
name points to this machine (DNS rebinding) is refused. If other machines can reach the server, requests also need the
token of the printed address. The size of a request and the number and duration of connections are limited.
"""
import base64
import hashlib
import hmac
import ipaddress
import json
import os
import queue
import re
import select
import socket
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lib.play.answers import BadRequest, answer
from lib.play.models import Models
from lib.play.worker import Busy, Worker
from lib.text.schema import parse_json

MOST_BYTES = 2**20  # of a request
MOST_CONNECTIONS = 64
LOOPBACK = ('localhost', '127.0.0.1', '::1')
PAGE = Path(__file__).with_name('page.html')


def host_of(header):
    """Return the host in a Host header in lower case and without its port; '' if it is malformed."""
    found = re.fullmatch(r'(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]/@\s]+))(?::\d{1,5})?', header or '')
    return (found[1] or found[2]).lower() if found else ''


def is_address(host):
    """True if `host` is an IP address; unlike a name it does not depend on DNS."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host):
    """True if a server bound to `host` can be reached only from this machine."""
    return host == 'localhost' or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def content_policy(page, framed):
    """Return the Content-Security-Policy: only the page's own script runs, and it connects only to this server."""
    scripts = re.findall(r'<script>(.*?)</script>', page, re.S)
    hashes = ' '.join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    policy = (f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
              "base-uri 'none'; form-action 'none'")
    return policy if framed else f"{policy}; frame-ancestors 'none'"


class Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds without a byte after which a connection is closed
    server_version, sys_version = 'minuteGPT', ''
    unread = False  # True while the body of a POST request has not been read

    def log_message(self, *args):
        pass

    def send_error(self, code, message=None, explain=None):
        self.refuse(code, message or 'bad request')

    def refuse(self, status, message):
        length = self.headers.get('Content-Length', '') if getattr(self, 'headers', None) else ''
        if self.unread and re.fullmatch(r'\d{1,9}', length):  # closing with unread data would lose the answer
            for _ in range(min(int(length), 8 * MOST_BYTES) // 65536):
                self.rfile.read(65536)
            self.rfile.read(min(int(length), 8 * MOST_BYTES) % 65536)
        self.reply(status, 'application/json', json.dumps({'error': message}).encode())

    def reply(self, status, kind, body, **headers):
        self.send_response(status)
        self.start_headers(kind)
        self.send_header('Content-Length', str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def start_headers(self, kind):
        self.send_header('Content-Type', f'{kind}; charset=utf-8')
        self.send_header('Cache-Control', 'no-store')
        self.send_header('X-Content-Type-Options', 'nosniff')
        self.send_header('Referrer-Policy', 'no-referrer')
        self.send_header('Cross-Origin-Resource-Policy', 'same-origin')

    def stranger(self, token):
        """Return (status, message) if the request must be refused, else None. token: the one it carries."""
        site = self.server.site
        if not site.proxied:
            host, origin = self.headers.get('Host', ''), self.headers.get('Origin')
            name = host_of(host)
            if not (name in LOOPBACK or name in site.hosts or (site.token and is_address(name))):
                return 403, f'Host {host[:100]!r} is not this server'
            if origin is not None and origin not in (f'http://{host}', f'https://{host}'):
                return 403, f'Origin {origin[:100]!r} is not this page'
        if site.token and not hmac.compare_digest(site.token.encode(), (token or '').encode('utf-8', 'replace')):
            return 401, 'the token in the address is missing or out of date; open the address that play.py printed'
        return None

    def do_GET(self):
        path, _, query = self.path.partition('?')
        token = next((part[6:] for part in query.split('&') if part.startswith('token=')), '')
        if refused := self.stranger(token):
            return self.refuse(*refused)
        if path != '/':
            return self.refuse(404, 'there is nothing here; the page is at /')
        self.reply(200, 'text/html', self.server.page, Content_Security_Policy=self.server.policy)

    do_HEAD = do_GET

    def do_POST(self):
        self.unread = True
        if refused := self.stranger(self.headers.get('X-Token')):
            return self.refuse(*refused)
        if not self.headers.get('Content-Type', '').startswith('application/json'):
            return self.refuse(415, 'expected application/json')
        length = self.headers.get('Content-Length', '')
        if not re.fullmatch(r'\d{1,9}', length):
            return self.refuse(411, 'Content-Length is missing')
        if int(length) > MOST_BYTES:
            return self.refuse(413, f'a request may have {MOST_BYTES:,} bytes, this one has {int(length):,}')
        self.unread = False
        try:
            body = parse_json(self.rfile.read(int(length)).decode('utf-8'))
            work, queued = answer(self.server.site, self.path, body)
        except ValueError:
            return self.refuse(400, 'expected a JSON object in UTF-8')
        except BadRequest as error:
            return self.refuse(error.status, error.message)
        try:
            self.stream(work, queued)
        except (ConnectionError, TimeoutError):
            pass  # the client has disconnected

    def stream(self, work, queued):
        """Send the results of `work()`, one line of JSON each. queued: let the worker compute them."""
        if not queued:
            return self.lines(('item', item) for item in work())
        try:
            job = self.server.site.worker.submit(work)
        except Busy:
            return self.refuse(503, 'too many requests are waiting; try again soon')
        try:
            self.lines(self.results(job))
        finally:
            job.cancel()

    def results(self, job):
        """Yield the results of a job; ConnectionAbortedError if the client disconnects, checked every 0.2 seconds."""
        kind = ''
        while kind not in ('end', 'error'):
            try:
                kind, value = job.results.get(timeout=0.2)
            except queue.Empty:
                readable, _, _ = select.select([self.connection], [], [], 0)
                if readable and not self.connection.recv(1, socket.MSG_PEEK):
                    raise ConnectionAbortedError from None
                continue
            yield kind, value

    def lines(self, results):
        started = False
        for kind, value in results:
            if kind == 'error' and not started:
                return self.refuse(400, value)
            if not started:
                started = True
                self.send_response(200)
                self.start_headers('application/x-ndjson')
                self.end_headers()
            if kind != 'end':
                self.wfile.write(json.dumps(value if kind == 'item' else {'error': value}).encode() + b'\n')


@dataclass
class Site:
    """What is served and to whom. token: '' if none is needed. proxied: a notebook's proxy rewrites the headers."""
    models: Models
    host: str = '127.0.0.1'
    token: str = ''
    framed: bool = False  # other pages may embed this one
    proxied: bool = False
    worker: Worker = field(default_factory=Worker)

    def __post_init__(self):
        name = socket.gethostname().lower()
        self.hosts = {self.host.lower(), name, f'{name}.local'} if self.token else {self.host.lower()}


class Server(ThreadingHTTPServer):
    """Serves one Site."""
    daemon_threads = True
    allow_reuse_address = os.name != 'nt'  # Windows would let two servers share a port
    request_queue_size = 32

    def __init__(self, site, port):
        self.address_family = socket.AF_INET6 if ':' in site.host else socket.AF_INET
        self.site, self.slots = site, threading.BoundedSemaphore(MOST_CONNECTIONS)
        page = PAGE.read_text(encoding='utf-8')
        self.page, self.policy = page.encode('utf-8'), content_policy(page, site.framed)
        super().__init__((site.host, port), Handler)

    def process_request(self, request, client_address):
        if not self.slots.acquire(blocking=False):
            return self.shutdown_request(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)
