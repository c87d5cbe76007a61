"""Commands that only note the settings they were called with."""

from scellst_ray.commands.table import Command


def capture_settings(monkeypatch):
    """Return a list that receives the settings of each command that is called; no work is done."""
    seen = []

    def work(settings):
        seen.append(settings)
        return 0

    monkeypatch.setattr(Command, "load_work", lambda _: work)
    return seen
