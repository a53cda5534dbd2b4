"""`python -m lossless` is `lossless`."""

import sys

from .cli import main

sys.exit(main())
