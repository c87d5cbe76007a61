"""Score the cells of a finished run for cell types, as a Ray job.

ray job submit --working-dir . -- python jobs/annotate.py --help
"""

import sys

from scellst_ray.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["annotate", *sys.argv[1:]]))
