"""A call that says that it has begun and does not end."""

import time
from pathlib import Path


def sleep_long(mark):
    """Create the file `mark`, then sleep for ten minutes."""
    Path(mark).touch()
    time.sleep(600)
