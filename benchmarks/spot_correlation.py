"""Compare predicted with measured expression on held-out spots, and with a colour-only model.

    python benchmarks/spot_correlation.py --run runs/pred --manifest held_out.csv \
        --train-manifest train.csv --slides C4 [--json results/spot_correlation.json]

It is `scellst-ray evaluate expression` under its former name.
"""

import argparse
import sys

from scellst_ray.commands.evaluate_expression import run_evaluate_expression
from scellst_ray.evaluation.expression.config import EvaluateExpressionConfig


def main() -> int:
    """Print the comparison for each held-out slide, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", required=True)
    parser.add_argument("--manifest", required=True)
    parser.add_argument("--train-manifest", required=True)
    parser.add_argument("--slides", nargs="+", required=True)
    parser.add_argument("--json", default="benchmarks/results/spots.json")
    options = parser.parse_args()
    config = EvaluateExpressionConfig(
        run=options.run,
        manifest=options.manifest,
        train_manifest=options.train_manifest,
        slides=options.slides,
        out=options.json,
    )
    return run_evaluate_expression(config)


if __name__ == "__main__":
    sys.exit(main())
