"""`python -m lossless` is `lossless`."""

import sys

from .cli.parser import main

sys.exit(main())
