"""`python -m tsgdn` is the command `tsgdn`."""

import sys

from tsgdn.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
