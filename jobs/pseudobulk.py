"""Sum up the slides of a finished run for response models, as a Ray job.

ray job submit --working-dir . -- python jobs/pseudobulk.py --help
"""

import sys

from scellst_ray.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["pseudobulk", *sys.argv[1:]]))
