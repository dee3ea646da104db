"""`python -m benchmarks`: see `benchmarks.suite`."""

import sys

from benchmarks.suite import app
from fastbert.check import InputError

if __name__ == "__main__":
    try:
        app()
    except InputError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        sys.exit(2)
