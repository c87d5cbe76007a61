"""Train an encoder on crops of cells, as a Ray job.

ray job submit --working-dir . -- python jobs/pretrain.py --config jobs/pretrain.yaml
"""

import sys

from scellst_ray.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
