"""The command line with workers whose reader crashes on slides named so.

    python broken_reader.py extract --manifest=...

Ray calls `break_reader` in every worker before its work.
"""

import sys

import ray


def break_reader():
    """Make reading a tile of such a slide a segmentation fault, as a bad decoder does."""
    import signal
    from pathlib import Path

    from scellst_ray.slides import reader

    read = reader.Slide.read

    def reading(self, box, mpp):
        folder = Path(self.uri).parent
        if "crash" in folder.name:
            with (folder / "crashes").open("a") as crashes:
                crashes.write("x")
            signal.raise_signal(signal.SIGSEGV)  # in this thread, at once
        return read(self, box, mpp)

    reader.Slide.read = reading


def main():
    from scellst_ray.commands.cli import main as command_line

    ray.init(
        address="auto", runtime_env={"worker_process_setup_hook": break_reader}, logging_level=30
    )
    return command_line(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
