"""Pages of HTML as tests look at them."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """A page: its pictures, links and text; elements must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.source, self.images, self.links, self.texts, self.open = text, [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(found)
        if tag == "a":
            self.links.append(found["href"])

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def pictures(self):
        """Return the pictures by their alternative texts, RGB."""
        return {image["alt"]: decode(image["src"]) for image in self.images}


def decode(uri):
    """Return a picture of a data URI, RGB."""
    head, _, data = uri.partition(",")
    assert re.fullmatch(r"data:image/(png|jpeg);base64", head)
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return np.asarray(image.convert("RGB"))


def check_page(text):
    """Check what holds of every page; return it."""
    page = Page(text)
    without_pictures = re.sub(r"data:image/\w+;base64,[\w+/=]+", "", text)
    assert not re.search(r"https?:|//|@import|<iframe|<object", without_pictures)
    for image in page.images:
        pixels = decode(image["src"])
        assert pixels.shape[:2] == (int(image["height"]), int(image["width"]))
        assert pixels.std() > 0, image["alt"]
    return page
