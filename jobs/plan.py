"""Estimate time and cost of a run of extract or predict, as a Ray job.

ray job submit --working-dir . -- python jobs/plan.py --config jobs/predict.yaml --gpus 8
"""

import sys

from scellst_ray.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
