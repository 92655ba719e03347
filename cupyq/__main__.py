"""`python -m cupyq`."""

import sys

from cupyq.cli import main

sys.exit(main())
