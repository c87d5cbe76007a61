"""Predict the expression of every cell of slides, as a Ray job.

ray job submit --working-dir . -- python jobs/predict.py --config jobs/predict.yaml
"""

import sys

from scellst_ray.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
