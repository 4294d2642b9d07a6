"""python -m ipadapter_jax.cli"""

import sys

from ipadapter_jax.cli import main

sys.exit(main())
