"""``most doctor`` from a checkout: the first thing to run there, before anything is installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_most.commands.doctor import main  # noqa: E402

if __name__ == "__main__":
    main()
