"""Process only what failed in a run, with the run's own settings, as a Ray job.

ray job submit --working-dir . -- python jobs/retry.py --run s3://BUCKET/runs/cohort --failed
"""

import sys

from scellst_ray.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["retry", *sys.argv[1:]]))
