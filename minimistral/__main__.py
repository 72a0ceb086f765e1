"""`python -m minimistral` is the command `minimistral`."""

import sys

from minimistral.cli import main

sys.exit(main())
