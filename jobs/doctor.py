"""Check what this cluster offers and lacks, as a Ray job.

ray job submit --working-dir . -- python jobs/doctor.py
"""

import sys

from scellst_ray.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["doctor", *sys.argv[1:]]))
