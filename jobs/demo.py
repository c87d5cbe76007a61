"""Run all steps on synthetic slides with known truth, as a Ray job.

ray job submit --working-dir . -- python jobs/demo.py --out demo
"""

import sys

from scellst_ray.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
