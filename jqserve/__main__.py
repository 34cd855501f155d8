"""`python -m jqserve`: the command line where its scripts are not on the path."""

import sys

from jqserve.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
