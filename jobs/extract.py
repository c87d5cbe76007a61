"""Find and embed the cells of slides, as a Ray job.

ray job submit --working-dir . -- python jobs/extract.py --config jobs/extract.yaml
"""

import sys

from scellst_ray.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["extract", *sys.argv[1:]]))
