"""The command line with kernels that start at once, for the tests of several processes."""

import json
import os
import sys

from process_fixtures import warmed

from lpft_nb.command_line import main
from lpft_nb.lab import launch

if __name__ == "__main__":
    launch.own_kernel = warmed(launch.own_kernel, json.loads(os.environ["WARM_KERNEL"]))
    sys.exit(main(sys.argv[1:]))
