"""Train an expression head on cells and spots, as a Ray job.

ray job submit --working-dir . -- python jobs/train.py --config jobs/train.yaml
"""

import sys

from scellst_ray.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
