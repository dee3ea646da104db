"""`python -m fastbert.cli` runs the command `fastbert` without installing it."""

from fastbert.cli import main

if __name__ == "__main__":
    main()
