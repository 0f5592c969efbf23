"""`python -m ajpq` is the same command as `ajpq`."""

import sys

from ajpq.cli import main

sys.exit(main())
