"""What the tests of fetch share: a server of pictures, and no waiting between attempts."""

import pytest
from picture_server import PictureServer

from unigen.commands.fetch import client


@pytest.fixture
def server():
    server = PictureServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(client, "BACK_OFF", 0.01)
