"""`python -m dbb` is the command `dbb`; `torchrun ... -m dbb train ...` starts it in several processes."""

import sys

from dbb.cli import main

sys.exit(main())
