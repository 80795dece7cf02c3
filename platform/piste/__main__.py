"""`python -m piste`."""

import sys

from piste.cli import main

sys.exit(main())
