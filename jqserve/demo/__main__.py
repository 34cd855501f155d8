import sys

from jqserve.demo.demo import main

if __name__ == "__main__":
    sys.exit(main())
