"""Images behind URLs, served by this machine: fetched within bounds, refused by name."""

import contextlib
import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from ipadapter_jax import InputError
from ipadapter_jax.images import urls
from ipadapter_jax.images.preprocess import load_image
from ipadapter_jax.images.urls import fetch

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = png()
        if self.path == "/gone.png":
            return self.send_error(404)
        self.send_response(302 if self.path.startswith("/to/") else 200)
        if self.path.startswith("/to/"):
            self.send_header("Location", self.path.removeprefix("/to/"))
        if self.path == "/page.png":
            content = b"<!DOCTYPE html><html>"
        if self.path != "/unsaid.png":
            more = {"/cut.png": 10, "/huge.png": 10**9}.get(self.path, 0)
            self.send_header("Content-Length", str(len(content) + more))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as here:
        threading.Thread(target=here.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{here.server_port}"
        here.shutdown()


@pytest.fixture
def online(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("path", ["/a.png", "/unsaid.png", "/to//a.png"])
def test_an_image_is_fetched(server, online, path):
    np.testing.assert_array_equal(load_image(server + path), PIXELS)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/gone.png", "could not be fetched \\(HTTP 404 Not Found\\): check the URL"),
        ("/page.png", "is a web page"),
        ("/cut.png", "ended after|IncompleteRead"),
        ("/huge.png", "is larger than 100 MB"),
        ("/to/ftp://127.0.0.1/a.png", "without encryption or leads to one"),
        ("/to/file:///etc/hostname", "is not allowed"),
        ("/to/http://example.com/a.png", "without encryption or leads to one"),
    ],
)
def test_failed_downloads_are_named(server, online, path, words):
    with pytest.raises(InputError, match=words) as caught:
        load_image(server + path)
    assert server in str(caught.value) and "\n" not in str(caught.value)


def test_an_endless_answer_is_cut(server, online, monkeypatch):
    monkeypatch.setattr(urls, "MAX_BYTES", 50)
    with pytest.raises(InputError, match="is larger than"):
        fetch(server + "/unsaid.png")
    monkeypatch.setattr(urls, "_DEADLINE", -1)
    with pytest.raises(InputError, match="took more than -1 seconds"):
        fetch(server + "/unsaid.png")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://example.com/a.png", "without encryption .* give https://, or download it first"),
        ("https://", "names no host"),
        ("https://name:word@example.com/a.png", "a password"),
        ("https://[::1", "not a URL that can be read"),
        ("https://127.0.0.1:1/a.png", "could not be fetched"),
    ],
)
def test_urls_that_are_refused(online, url, words):
    with pytest.raises(InputError, match=words):
        load_image(url)


def test_a_redirect_to_this_machine_is_refused():
    with pytest.raises(InputError, match="leads to this machine itself"):
        urls._check("http://localhost/a.png", "'https://example.com'", local=False)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ({"HF_HUB_OFFLINE": "on", "TRANSFORMERS_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ({"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "True"}, "TRANSFORMERS_OFFLINE"),
        ({"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"}, None),
    ],
)
def test_nothing_is_fetched_when_the_network_is_off(server, online, variables, said, monkeypatch):
    """The same that turns huggingface_hub off."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    program = "from huggingface_hub.constants import is_offline_mode; print(is_offline_mode())"
    hub = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert hub.stdout == f"{said is not None}\n"
    if said is None:
        assert load_image(server + "/a.png").size
    else:
        with pytest.raises(InputError, match=f"the network is off .{said}.: download it first"):
            load_image(server + "/a.png")
