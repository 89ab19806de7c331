"""python -m efficient_attn.cli"""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
