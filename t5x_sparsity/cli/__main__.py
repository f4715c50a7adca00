"""`python -m t5x_sparsity.cli`, the command where it isn't on the path."""

import sys

from t5x_sparsity.cli import main

sys.exit(main())
