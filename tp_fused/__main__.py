"""`python -m tp_fused doctor`, also installed as `tp-fused`."""

import argparse
import sys

from . import doctor


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="tp-fused", description="Fused collective kernels for tensor-parallel inference."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    examined = commands.add_parser("doctor", help="whether this machine can run which backend, and what to do if not")
    examined.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args()
    sys.exit(doctor.report(doctor.examine(), arguments.json))


if __name__ == "__main__":
    main()
