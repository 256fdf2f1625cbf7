"""`python -m gradsafe`."""

import sys

from gradsafe._cli import main

if __name__ == "__main__":
    sys.exit(main())
