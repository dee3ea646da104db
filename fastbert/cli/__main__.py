"""`python -m fastbert.cli`: the command `fastbert` where it is not installed."""

from fastbert.cli import main

if __name__ == "__main__":
    main()
