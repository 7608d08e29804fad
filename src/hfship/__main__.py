# SPDX-License-Identifier: Apache-2.0
"""`python -m hfship`."""

import sys

from hfship.commands.run import main

if __name__ == "__main__":
    sys.exit(main())
