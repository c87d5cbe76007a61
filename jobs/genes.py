"""Write chosen genes of a finished run as Parquet columns, as a Ray job.

ray job submit --working-dir . -- python jobs/genes.py --help
"""

import sys

from scellst_ray.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["genes", *sys.argv[1:]]))
