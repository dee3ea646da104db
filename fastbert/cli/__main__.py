"""`python -m fastbert.cli`, as `fastbert` where no command is installed."""

from fastbert.cli import main

if __name__ == "__main__":
    main()
