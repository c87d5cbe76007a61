"""Write a finished run as HTML pages, as a Ray job.

ray job submit --working-dir . -- python jobs/report.py --help
"""

import sys

from scellst_ray.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
