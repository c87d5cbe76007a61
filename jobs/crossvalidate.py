"""Train heads on some slides and score them on others, over a grid, as a Ray job.

ray job submit --working-dir . -- python jobs/crossvalidate.py --config jobs/crossvalidate.yaml
"""

import sys

from scellst_ray.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["crossvalidate", *sys.argv[1:]]))
