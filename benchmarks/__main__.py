"""`python -m benchmarks`: see `benchmarks.suite`."""

import sys

from benchmarks.suite import app
from fastbert.check import InputError

if __name__ == "__main__":
    try:
        app()
    except (InputError, OSError) as error:
        said = str(error)
        if isinstance(error, OSError):
            if error.filename is None:  # no file that the user named
                raise
            said = f"{error.filename}: {error.strerror}"
        print(f"benchmarks: error: {said}", file=sys.stderr)
        sys.exit(2)
