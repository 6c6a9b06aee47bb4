"""``torchrun --nproc-per-node=4 -m launch.torchrun ask ...``: the command line over torchrun's processes."""

import sys

from launch.torchrun.start import main

if __name__ == "__main__":
    sys.exit(main())
