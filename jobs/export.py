"""Export a finished run to a file for other tools, as a Ray job.

ray job submit --working-dir . -- python jobs/export.py --help
"""

import sys

from scellst_ray.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
